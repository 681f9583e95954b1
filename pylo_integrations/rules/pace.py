r"""Pace: orthogonalised momentum whose step size follows learned laws.

The direction of a matrix is Nesterov's momentum :math:`u`, orthogonalised to :math:`d` with root mean square 1. What is
learned is how far to go, by role (matrix, table of embeddings, vector), shape, horizon and part of the run, and by

.. math:: \nu = \langle u, d \rangle / (|u|\,|d|),

the *flatness* of the momentum's spectrum: 1 if all singular values are equal, and the less the fewer of them matter.
Where few directions carry a gradient, the rest of an orthogonalised step is noise, so steps are shorter there. And
where the first loss is known, no step of a matrix *promises* more than a learned part of it, which is what the step
would take away if the loss were linear. In networks that train well few steps come to that; where one of the usual
size would wreck a network, it promises many times the whole loss. Where the promises of full steps of all matrices,
squared and added up, are more than the square of another part of it, everything goes less far for the rest of the run.
The matrices of groups marked ``rule="attention"``, which make queries, keys and values, go less far: where logits of
attention grow too fast, a transformer trains badly, and the more so the wider it is. Vectors, scalars and the tensors
of groups marked ``rule="adamw"`` take Adam's step at the same pace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import ema_
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.arrays import check_arrays
from pylo_integrations.rules.base import CLIP, Control, Rule, RuleChoice, StepContext, read_clipped_gradient
from pylo_integrations.rules.kernel_spec import KernelSpec, NesterovSpec
from pylo_integrations.rules.newton_schulz import Precision, check_precision, inverse_rms, orthogonalise
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums
from pylo_integrations.sharding.layout import TensorLayout

NUMBERS = (
    "log_step",
    "log_table_step",
    "log_vector_step",
    "width_exponent",
    "aspect_exponent",
    "horizon_exponent",
    "vector_horizon_exponent",
    "momentum",
    "momentum_horizon",
    "momentum_exponent",
    "log_warmup",
    "log_power",
    "power_horizon",
    "flatness",
    "log_promise",
    "log_total_promise",
    "log_attention",
)
"""What theta holds, in the order of its only array ``numbers``: see :meth:`PaceRule.from_arrays`."""

WIDTH, HORIZON = 256.0, 1000.0
"""Width of a matrix, the larger number of its channels, and steps of a run, at which the law is 1."""

WEIGHT = 0.1
"""Of a new gradient in the momentum, at which the law is 1: the longer a momentum, the farther do its steps add up."""

NARROWEST = 16
"""Widths from which on their law is followed; narrower networks were not meta-trained on."""

SHORTEST, LONGEST = 100, 100_000
"""Steps from which on and up to which the law of the horizon is followed; shorter runs were not meta-trained on."""

TABLE_DECAY = 0.999
"""Of the second moment of a table: that of a row that few batches read has to last until the next one does."""

LEAST_FLATNESS = 0.05
"""From which on its law is followed: that of a matrix whose singular values are all 0 but one in 400."""

GROWTH = 1.1
"""By which the largest promise of all matrices and a first loss grow in a step at most: one bad batch counts little."""

UNUSUAL = 2.0
"""How many times a first loss an early one has to be for the first to have been an easy batch's, and to grow."""

LEAST_PROMISE = 0.01
"""Where it begins, as a part of the first loss: a transformer's first gradients, its largest ones, do not count."""

LEAST_PART = 0.05
"""Of steps, for their promises: a first batch whose loss happens to be small must not stop a run."""

LEAST_LOSS = 1e-3
"""First losses below this are no measure: those of reinforcement learning begin near zero, whatever is ahead."""

LARGEST_LOGIT = 10.0
"""Of a gradient's weight in the momentum, either way."""

LARGEST_NUMBER = 20
"""Of theta: most are logarithms."""

_MOMENTUM = ("momentum_0",)
_FIRST_LOSS = "first_loss"
_SQUARES = "squared_promises"
_LARGEST_PROMISE = "largest_promise"


@dataclass(frozen=True, eq=False)
class PaceRule(Rule):
    """The rule of Pace.

    Attributes:
        numbers: ``(17,)``, those of :data:`NUMBERS`.
        orthogonalise: Precision of the products that orthogonalise.
        projects: Whether it steps what makes queries, keys and values, several of which may be one matrix: the width of
            one without places, as a convolution has, is that of its inputs.
    """

    numbers: Tensor
    orthogonalise: Precision = "float32"
    projects: bool = False

    kind: ClassVar[str] = "Pace"
    early_losses: ClassVar[int] = 100
    finishes: ClassVar[bool] = True
    counts: ClassVar[tuple[str, ...]] = (_SQUARES,)
    norm_eps: ClassVar[float] = 1e-9

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor], *, orthogonalise: Precision = "float32") -> PaceRule:
        """Build the rule from theta.

        Args:
            arrays: ``numbers``, ``(17,)``. Logarithms of the root mean square of a step of a matrix and of Adam's rates
                for tables and vectors; exponents of the laws in a matrix's width and aspect (outputs over inputs),
                and in the horizon, for matrices and for others; logit of the momentum's decay, its slope in the
                logarithm of the horizon, and the exponent of the law in a gradient's weight; logarithms of the part of
                the run that warms up and of the exponent of what is left, and the latter's slope; exponent of flatness;
                logarithms of the largest promise of a matrix, of that of all of them together, the root of the sum of
                squares, and of the factor on what makes queries, keys and values.
            orthogonalise: Precision of the products.

        Raises:
            ValueError: A name is missing or unknown, the shape does not fit, or the precision is unknown.
        """
        check_arrays("pace", arrays, {"numbers": (len(NUMBERS),)})
        check_precision(orthogonalise)
        return cls(arrays["numbers"], orthogonalise)

    def reduced(self) -> PaceRule:
        """This rule, which uses all of its numbers. They are checked here: now they are a file's, not meta-training's.

        Raises:
            ValueError: A number is so large that its exponential overflows within a run.
        """
        for name, number in zip(NUMBERS, self.numbers.tolist(), strict=True):
            if not abs(number) <= LARGEST_NUMBER:
                raise ValueError(
                    f"pace theta: {name}={number:g} must be between -{LARGEST_NUMBER} and {LARGEST_NUMBER}"
                )
        return self

    @property
    def choices(self) -> tuple[RuleChoice, ...]:
        """``"adamw"`` as well, and ``"attention"``, of matrices that make queries, keys and values."""
        return "learned", "attention", "adamw"

    def rule_for(self, layout: TensorLayout, group: Mapping[str, Any]) -> Rule:
        """This rule for matrices; Adam at its pace for others, class tokens of shape (1, 1, n) among them."""
        if len(layout.shape) < 2 or max(layout.shape[axis] for axis in layout.order[-2:]) < 2:
            return self.vectors
        return {"learned": self, "attention": self.projections, "adamw": self.tables}[group["rule"]]

    @cached_property
    def projections(self) -> PaceRule:
        """Who steps matrices that make queries, keys and values."""
        return replace(self, projects=True)

    @cached_property
    def tables(self) -> PacedAdamRule:
        """Who steps embeddings, and other matrices that are not to be orthogonalised."""
        return PacedAdamRule((0.9, TABLE_DECAY), clips=True, numbers=self.numbers, rate="log_table_step")

    @cached_property
    def vectors(self) -> PacedAdamRule:
        """Who steps biases, gains and scalars."""
        return PacedAdamRule((0.9, 0.95), clips=True, numbers=self.numbers, rate="log_vector_step")

    def schedule(self, iteration: int, num_steps: int | None) -> float:
        """What is left of the run, to a learned power."""
        return schedule_of(by_name(self.numbers), iteration, num_steps).item()

    @property
    def workspace(self) -> int:
        """Gradient, momentum, and what orthogonalising takes."""
        return 8

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """One momentum."""
        return dict.fromkeys(_MOMENTUM)

    def initial_memory(self) -> dict[str, Tensor]:
        """The first loss, and the largest promise of all matrices together; 0 while they are not known."""
        return {name: torch.zeros((), device="cpu") for name in (_FIRST_LOSS, _LARGEST_PROMISE)}

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Remember the first loss."""
        _remember_first_loss(ctx)
        return super().control(buckets, sums, ctx)

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The numbers, each 0-d by its name."""
        return by_name(self.numbers.to(device, dtype))

    def telemetry(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The first loss, and the largest promise of all matrices together; 0 if they are not known."""
        return dict(memory)

    def conclude(self, counted: Mapping[str, Tensor], ctx: StepContext) -> Mapping[str, Tensor]:
        """The first loss, which grows where early ones are unusual; the largest promise of all matrices together."""
        first_loss = ctx.memory.get(_FIRST_LOSS)
        if first_loss is None:
            return {}
        found = {}
        if ctx.loss is not None and self.reads_loss(ctx.iteration):
            early = ctx.loss.abs().to(first_loss.dtype) / UNUSUAL
            before = first_loss.to(early)
            found[_FIRST_LOSS] = before.maximum(early.minimum(GROWTH * before)).where(before >= LEAST_LOSS, before)
        if _SQUARES in counted:
            promise = counted[_SQUARES].sqrt()
            least = LEAST_PROMISE * first_loss.to(promise)
            before = ctx.memory.get(_LARGEST_PROMISE, torch.zeros_like(promise)).to(promise).maximum(least)
            found[_LARGEST_PROMISE] = before.maximum(promise.minimum(GROWTH * before))
        return found

    @property
    def kernel_spec(self) -> KernelSpec:
        """Momentum, which :meth:`directions` finishes."""
        return KernelSpec(NesterovSpec(self._weight), CLIP, directions=self.directions, has_cuda=True)

    def _weight(self, num_steps: int | None) -> float:
        return momentum_weight(by_name(self.numbers), num_steps).item()

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update the momentum."""
        weight = momentum_weight(ctx.constants, ctx.num_steps).unsqueeze(-1)
        block.store_(_MOMENTUM, ema_(block.load(_MOMENTUM), read_clipped_gradient(block, ctx), weight))
        return {}

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """Nesterov's momentum."""
        weight = momentum_weight(ctx.constants, ctx.num_steps).unsqueeze(-1)
        return ema_(block.load(_MOMENTUM), read_clipped_gradient(block, ctx), weight)

    def finish(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> Tensor:
        """Orthogonalise, and go as far as laws and schedule say."""
        directions, scale = self.directions(steps, layout, ctx)
        return directions * scale

    def directions(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Two factors of the finished steps of whole tensors; see :class:`~pylo_integrations.rules.celo2.Celo2Rule`."""
        c = ctx.constants
        rows = row_axis(layout)
        ordered = steps.movedim(rows + 2, -1)
        matrices = ordered.flatten(1, -2)
        channels = layout.shape[rows : rows + 2]
        aspect = math.log(layout.shape[rows] / matrices.shape[1]) * (1 if _has_outputs_first(layout) else -1)
        inputs = channels[1 if _has_outputs_first(layout) else 0]
        width = inputs if self.projects and math.prod(channels) == layout.numel else max(channels)
        law = c["width_exponent"] * math.log(max(NARROWEST, width) / WIDTH) + c["aspect_exponent"] * aspect
        law = torch.exp(c["log_step"] + c["log_attention"] * self.projects + law)
        law = law * horizon_law(c, ctx.num_steps, "horizon_exponent")
        law = law * (momentum_weight(c, ctx.num_steps) / WEIGHT) ** c["momentum_exponent"]
        directions = orthogonalise(matrices, self.orthogonalise)
        scale = inverse_rms(directions, (-2, -1), self.norm_eps).view(-1)
        wide = torch.promote_types(steps.dtype, torch.float32)
        products = (matrices * directions).mean((-2, -1), dtype=wide) * scale
        squares = matrices.square().mean((-2, -1), dtype=wide)
        flatness = (products * squares.clamp_min(1e-38).rsqrt()).clamp(LEAST_FLATNESS, 1)
        size = law.to(scale) * flatness.to(scale) ** c["flatness"].to(scale)
        promises = products * size * layout.numel
        ctx.count(_SQUARES, promises.square())
        part = (schedule_of(c, ctx.iteration, ctx.num_steps) * total_part(ctx)).to(scale)
        size = size * part * _part_allowed("log_promise", promises * part, ctx)
        directions = directions.view(-1, 1, *ordered.shape[2:]).movedim(-1, rows + 2)
        return directions, (scale * size).view(-1, *(1,) * (steps.dim() - 1))


def row_axis(layout: TensorLayout) -> int:
    """The axis of a tensor that is a matrix's rows; all others together are its columns.

    The rows of a convolution are its outputs, those of a transposed one its inputs. A table of shape ``(1, positions,
    channels)``, as timm has for position embeddings, has a row for each position.
    """
    is_table = len(layout.shape) == 3 and layout.shape[0] == 1 and _has_outputs_first(layout)
    return 1 if is_table else 0


def _has_outputs_first(layout: TensorLayout) -> bool:
    return layout.order[-1] == 0


def _remember_first_loss(ctx: StepContext) -> None:
    """As whoever steps first does: a matrix may have its first gradient later."""
    if ctx.iteration == 0 and ctx.loss is not None:
        ctx.memory[_FIRST_LOSS] = ctx.loss.abs().to(ctx.memory.get(_FIRST_LOSS, ctx.loss))


def total_part(ctx: StepContext) -> Tensor:
    """The part of all steps by which those of all matrices together promise no more than theta allows."""
    largest = ctx.memory.get(_LARGEST_PROMISE, torch.zeros_like(ctx.constants["log_total_promise"]))
    part = _part_allowed("log_total_promise", largest.to(ctx.constants["log_total_promise"]), ctx)
    return part.clamp_min(LEAST_PART)


def _part_allowed(number: str, promises: Tensor, ctx: StepContext) -> Tensor:
    """The part of a step that promises no more than theta allows, at most 1; all of it while no loss is known.

    Args:
        number: The logarithm of what is allowed, as a part of the first loss.
        promises: What would be taken off the loss if it were linear.
        ctx: Of the step.
    """
    first_loss = ctx.memory.get(_FIRST_LOSS, promises.new_zeros(())).to(promises)
    allowed = ctx.constants[number].exp().to(promises) * first_loss
    part = (allowed / promises.clamp_min(1e-30)).clamp_max(1)
    return part.where(first_loss >= LEAST_LOSS, 1)


@dataclass(frozen=True, eq=False)
class PacedAdamRule(AdamWRule):
    """Adam's step at the pace of a :class:`PaceRule`.

    Attributes:
        numbers: As there.
        rate: The name of the number that is the rate's logarithm.
    """

    kind: ClassVar[str] = "PacedAdam"
    numbers: Tensor = torch.empty(0)
    rate: str = "log_vector_step"

    @property
    def kernel_spec(self) -> KernelSpec:
        """Adam's step, scaled by the pace."""
        return replace(super().kernel_spec, factor=self._size)

    def schedule(self, iteration: int, num_steps: int | None) -> float:
        """As that of the rule for matrices."""
        return schedule_of(by_name(self.numbers), iteration, num_steps).item()

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Remember the first loss, which the rule for matrices reads."""
        _remember_first_loss(ctx)
        return super().control(buckets, sums, ctx)

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of both."""
        return super().constants(device, dtype) | by_name(self.numbers.to(device, dtype))

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """The momentum over the root of the second moment, as far as laws and schedule say."""
        step = super().propose(block, prepared, sums, control, ctx)
        return step * self._size(ctx).reshape(-1, *(1,) * (step.dim() - 1))

    def _size(self, ctx: StepContext) -> Tensor:
        c = ctx.constants
        rate = torch.exp(c[self.rate]) * horizon_law(c, ctx.num_steps, "vector_horizon_exponent")
        return rate * schedule_of(c, ctx.iteration, ctx.num_steps) * total_part(ctx)


def by_name(numbers: Tensor) -> dict[str, Tensor]:
    """Those of :data:`NUMBERS`, 0-d."""
    return dict(zip(NUMBERS, numbers.unbind(-1), strict=True))


def log_horizon(num_steps: int) -> float:
    """What the laws of the horizon read."""
    return math.log(min(max(num_steps, SHORTEST), LONGEST) / HORIZON)


def momentum_weight(numbers: Mapping[str, Tensor], num_steps: int | None) -> Tensor:
    """Weight of a new gradient in the momentum."""
    law = 0.0 if num_steps is None else numbers["momentum_horizon"] * log_horizon(num_steps)
    return torch.sigmoid((-numbers["momentum"] - law).clamp(-LARGEST_LOGIT, LARGEST_LOGIT))


def horizon_law(numbers: Mapping[str, Tensor], num_steps: int | None, exponent: str) -> Tensor:
    """Factor on all steps of a run; 1 where its length is not known."""
    number = numbers[exponent]
    return torch.ones_like(number) if num_steps is None else torch.exp(number * log_horizon(num_steps))


def schedule_of(numbers: Mapping[str, Tensor], iteration: int, num_steps: int | None) -> Tensor:
    """The schedule alone: a warm-up, and a power of what is left of the run."""
    power = numbers["log_power"]
    if num_steps is None:
        return torch.ones_like(power)
    left = 1 - iteration / num_steps
    if left <= 0:
        return torch.zeros_like(power)
    power = torch.exp(power + numbers["power_horizon"] * log_horizon(num_steps))
    return ((iteration + 1) / (numbers["log_warmup"].exp() * num_steps)).clamp_max(1) * left**power
