r"""Pace: orthogonalised momentum whose step size follows a law and is then corrected by what the run shows.

The direction of a matrix is Nesterov's momentum, orthogonalised, with root mean square 1. What is learned is how far to
go: numbers of a law (shape, horizon), of a schedule over the run, and of a feedback. Momentum points to where recent
gradients agreed. If a new gradient still agrees with it, steps are too short; if it turns against it, they overshoot:

.. math:: a_t = \operatorname{mean} \langle g_t, m_{t-1} \rangle / \langle m_{t-1}, m_{t-1} \rangle
    \qquad \log \mathrm{pace} \mathrel{+}= \mathrm{gain} \cdot (\bar a_t - \mathrm{target})

The mean is over matrices, and :math:`\bar a` an average over some steps. Feedback is active in the first part of the
run, and fades. Vectors, scalars and the tensors of groups marked ``rule="adamw"`` take Adam's step at the same pace.
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
    "log_vector_step",
    "width_exponent",
    "horizon_exponent",
    "momentum",
    "target",
    "log_gain",
    "log_memory",
    "fade",
    "power",
)
"""What theta holds, in the order of its only array ``numbers``: see :meth:`PaceRule.from_arrays`."""

WIDTH, HORIZON = 256.0, 1000.0
"""Long side of a matrix, and steps of a run, at which the law is 1."""

NARROWEST = 16
"""Long sides from which on the law of the width is followed; narrower networks were not meta-trained on."""

FEEDBACK, SHORTEST = 134.0, 60
"""Steps of a run in which the gain is as theta has it, those of meta-training in the mean, and of its shortest run."""

LONGEST = 100_000
"""Steps up to which the law of the horizon is followed."""

LARGEST_LOG_PACE = math.log(32)

LARGEST_NUMBER = 20
"""Of theta: most are logarithms."""

_MOMENTUM = ("momentum_0",)


@dataclass(frozen=True, eq=False)
class PaceRule(Rule):
    """The rule of Pace.

    Attributes:
        numbers: ``(10,)``, those of :data:`NUMBERS`.
        orthogonalise: Precision of the products that orthogonalise.
    """

    numbers: Tensor
    orthogonalise: Precision = "float32"

    kind: ClassVar[str] = "Pace"
    finishes: ClassVar[bool] = True
    norm_eps: ClassVar[float] = 1e-9

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor], *, orthogonalise: Precision = "float32") -> PaceRule:
        """Build the rule from theta.

        Args:
            arrays: ``numbers``, ``(10,)``: logarithms of the root mean square of a step of a matrix, and of Adam's
                rate; exponents of the law in width and horizon; logit of the momentum's decay; what agreement is
                brought to; logarithms of the feedback's gain per step and of the steps that it averages over;
                logarithm of the part of the run in which it is active; logarithm of the schedule's exponent.
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
        """``"adamw"`` as well."""
        return "learned", "adamw"

    def rule_for(self, layout: TensorLayout, group: Mapping[str, Any]) -> Rule:
        """This rule for matrices; Adam at its pace for others, class tokens of shape (1, 1, n) among them."""
        is_matrix = len(layout.shape) > 1 and max(layout.shape[axis] for axis in layout.order[-2:]) > 1
        return self if is_matrix and group["rule"] != "adamw" else self.adam

    @cached_property
    def adam(self) -> PacedAdamRule:
        """Who steps what is no matrix."""
        return PacedAdamRule((0.9, 0.95), clips=True, numbers=self.numbers)

    def schedule(self, iteration: int, num_steps: int | None) -> float:
        """What is left of the run, to a learned power."""
        return schedule_of(self.numbers, iteration, num_steps)

    @property
    def workspace(self) -> int:
        """Gradient, momentum and products of them."""
        return 8

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """One momentum."""
        return dict.fromkeys(_MOMENTUM)

    def initial_memory(self) -> dict[str, Tensor]:
        """No feedback yet."""
        return {name: torch.zeros((), dtype=torch.float32, device="cpu") for name in ("log_pace", "agreement")}

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The numbers, each 0-d by its name, and the weight of a new gradient in the momentum, ``(1,)``."""
        numbers = by_name(self.numbers.to(device, dtype))
        return numbers | {"momentum_weight": torch.sigmoid(-numbers["momentum"]).unsqueeze(-1)}

    @property
    def kernel_spec(self) -> KernelSpec:
        """Momentum, which :meth:`directions` finishes."""
        return KernelSpec(NesterovSpec(), CLIP, ("products",), ("products",), directions=self.directions, has_cuda=True)

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """Products of gradient and momentum, and of the momentum with itself."""
        grad, momentum = read_clipped_gradient(block, ctx), block.load(_MOMENTUM)
        products = torch.cat([grad * momentum, momentum.square()], dim=1)
        return {"products": PartialSum.of(products, range(len(block.box.shape)), block.box.shape)}

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Agreement of all matrices, and the pace that follows from it."""
        c = ctx.constants
        ratios = torch.cat([total["products"].flatten(2).sum(2).to(c["momentum"].device) for total in sums])
        # Without a gradient there is nothing to agree with, and the momentum of one that was takes long to vanish.
        known = (ratios[:, 1] > 0) & (ratios[:, 0] != 0)
        filled = 1 - torch.sigmoid(c["momentum"]) ** ctx.iteration  # what of the momentum's weights has met a gradient
        agreement = torch.where(known, filled * ratios[:, 0] / ratios[:, 1].clamp_min(1e-38), 0).clamp(-2, 2)
        seen = known.sum()
        mean = agreement.sum() / seen.clamp_min(1)
        before = {name: ctx.memory.get(name, value) for name, value in self.initial_memory().items()}
        average = before["agreement"].to(mean)
        # An average of as many steps as there were, until there were enough.
        weight = 1 / torch.minimum(c["log_memory"].exp(), torch.full_like(mean, max(1.0, float(ctx.iteration))))
        weight = weight.clamp_max(1)
        average = torch.where(seen > 0, average + weight * (mean - average), average)
        change = c["log_gain"].exp() * (average - c["target"]) * _activity(ctx)
        pace = before["log_pace"].to(mean) + torch.where(seen > 0, change, 0)
        pace = pace.clamp(-LARGEST_LOG_PACE, LARGEST_LOG_PACE)
        ctx.memory.update(log_pace=pace.float(), agreement=average.float())
        return [{}] * len(buckets)

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update the momentum."""
        weight = ctx.constants["momentum_weight"]
        block.store_(_MOMENTUM, ema_(block.load(_MOMENTUM), read_clipped_gradient(block, ctx), weight))
        return {}

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """Nesterov's momentum."""
        return ema_(block.load(_MOMENTUM), read_clipped_gradient(block, ctx), ctx.constants["momentum_weight"])

    def finish(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> Tensor:
        """Orthogonalise, and go as far as law, schedule and feedback say."""
        directions, scale = self.directions(steps, layout, ctx)
        return directions * scale

    def directions(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Two factors of the finished steps of whole tensors; see :class:`~pylo_integrations.rules.celo2.Celo2Rule`."""
        axes = [axis + 2 for axis in layout.order[-2:]]
        long = max(NARROWEST, *(steps.shape[axis] for axis in axes))
        width = torch.exp(ctx.constants["width_exponent"] * math.log(long / WIDTH))
        size = torch.exp(ctx.constants["log_step"]) * width * pace_of(ctx)
        directions = orthogonalise(steps.movedim(axes, (-2, -1)), self.orthogonalise).movedim((-2, -1), axes)
        scale = inverse_rms(directions, axes, self.norm_eps)
        return directions, scale * size.reshape(-1, *(1,) * (scale.dim() - 1)).to(scale)

    def telemetry(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The feedback's factor on steps, and the agreement that it follows."""
        told = {name: memory[name] for name in ("log_pace", "agreement") if name in memory}
        return {"pace": told["log_pace"].exp(), "agreement": told["agreement"]} if told else {}


@dataclass(frozen=True, eq=False)
class PacedAdamRule(AdamWRule):
    """Adam's step at the pace of a :class:`PaceRule`.

    Attributes:
        numbers: As there.
    """

    kind: ClassVar[str] = "PacedAdam"
    numbers: Tensor = torch.empty(0)

    @property
    def kernel_spec(self) -> KernelSpec:
        """Adam's step, scaled by the pace."""
        return replace(super().kernel_spec, factor=_vector_step)

    def schedule(self, iteration: int, num_steps: int | None) -> float:
        """As that of the rule for matrices."""
        return schedule_of(self.numbers, iteration, num_steps)

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of both."""
        return super().constants(device, dtype) | by_name(self.numbers.to(device, dtype))

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """The momentum over the root of the second moment, as far as schedule and feedback say."""
        step = super().propose(block, prepared, sums, control, ctx)
        return step * _vector_step(ctx).reshape(-1, *(1,) * (step.dim() - 1))


def by_name(numbers: Tensor) -> dict[str, Tensor]:
    """Those of :data:`NUMBERS`, 0-d."""
    return dict(zip(NUMBERS, numbers.unbind(-1), strict=True))


def _vector_step(ctx: StepContext) -> Tensor:
    return torch.exp(ctx.constants["log_vector_step"]) * pace_of(ctx)


def _activity(ctx: StepContext) -> float | Tensor:
    """How much of the feedback's gain there is: less and less until a part of the run, and then nothing.

    It is of the run, not of its steps: over a long one, a bias as small as that of noise would add up.
    """
    if ctx.num_steps is None:
        return FEEDBACK / (HORIZON + ctx.iteration)
    part = ctx.constants["fade"].exp()
    left = (1 - ctx.iteration / ctx.num_steps / part).clamp_min(0)
    return left * FEEDBACK / max(ctx.num_steps, SHORTEST)


def pace_of(ctx: StepContext) -> Tensor:
    """Factor on the steps of all tensors: of the feedback, the horizon and the schedule."""
    c = ctx.constants
    pace = torch.exp(ctx.memory["log_pace"].to(c["power"])) if "log_pace" in ctx.memory else torch.ones_like(c["power"])
    if ctx.num_steps is None:
        return pace
    horizon = torch.exp(c["horizon_exponent"] * math.log(min(ctx.num_steps, LONGEST) / HORIZON))
    left = 1 - ctx.iteration / ctx.num_steps
    return pace * horizon * (torch.exp(c["power"].exp() * math.log(left)) if left > 0 else 0)


def schedule_of(numbers: Tensor, iteration: int, num_steps: int | None) -> float:
    """The schedule alone, as :func:`pace_of` has it: a power of what is left of the run."""
    if num_steps is None:
        return 1.0
    return float(max(0.0, 1 - iteration / num_steps) ** math.exp(numbers[NUMBERS.index("power")]))
