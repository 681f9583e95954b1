r"""Pace: orthogonalised momentum whose step size follows laws, and is then corrected by what the run shows.

The direction of a matrix is Nesterov's momentum :math:`u`, orthogonalised to :math:`d` with root mean square 1. What is
learned is how far to go, by role (matrix, table of embeddings, vector), shape, horizon and part of the run, and by

.. math:: \nu = \langle u, d \rangle / (|u|\,|d|),

the *flatness* of the momentum's spectrum: 1 if all singular values are equal, and the less the fewer of them matter.
Two numbers of the whole model correct the step as the run goes. Momentum points to where recent gradients agreed. If a
new gradient still agrees with it, steps are too short; if it turns against it, they overshoot:

.. math:: a_t = \operatorname{mean} \langle g_t, m_{t-1} \rangle / \langle m_{t-1}, m_{t-1} \rangle
    \qquad \log \mathrm{pace} \mathrel{+}= \mathrm{gain} \cdot (\bar a_t - \mathrm{target})

And where gradients have become small, as on examples that are known by heart, steps become smaller too:

.. math:: \mathrm{quiet} \cdot (\bar s_t - \max_{k \le t} \bar s_k), \qquad
    s_t = \operatorname{mean} \log |m_{t-1}|

The means are over matrices, and bars averages over some steps. Vectors, scalars and the tensors of groups marked
``rule="adamw"`` take Adam's step at the same pace.
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
    "log_warmup",
    "log_power",
    "flatness",
    "quiet",
    "target",
    "log_gain",
    "log_memory",
    "log_fade",
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

LEAST_FLATNESS = 0.05
"""From which on its law is followed: that of a matrix whose singular values are all 0 but one in 400."""

UNSEEN = -100.0
"""Logarithm of the size of gradients before there were any."""

LARGEST_NUMBER = 20
"""Of theta: most are logarithms."""

_MOMENTUM = ("momentum_0",)


@dataclass(frozen=True, eq=False)
class PaceRule(Rule):
    """The rule of Pace.

    Attributes:
        numbers: ``(17,)``, those of :data:`NUMBERS`.
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
            arrays: ``numbers``, ``(17,)``. Logarithms of the root mean square of a step of a matrix and of Adam's rates
                for tables and vectors; exponents of the laws in a matrix's long side and aspect (outputs over inputs),
                and in the horizon, for matrices and for others; logit of the momentum's decay, and its slope in the
                logarithm of the horizon; logarithms of the part of the run that warms up and of the exponent of what
                is left; exponents of flatness and of the size of gradients; what agreement is brought to; logarithms
                of the feedback's gain per step, of the steps that averages are over, and of the part of the run in
                which the gain falls to zero.
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
        if len(layout.shape) < 2 or max(layout.shape[axis] for axis in layout.order[-2:]) < 2:
            return self.vectors
        return self.tables if group["rule"] == "adamw" else self

    @cached_property
    def tables(self) -> PacedAdamRule:
        """Who steps embeddings, and other matrices that are not to be orthogonalised."""
        return PacedAdamRule((0.9, 0.95), clips=True, numbers=self.numbers, step="log_table_step")

    @cached_property
    def vectors(self) -> PacedAdamRule:
        """Who steps biases, gains and scalars."""
        return PacedAdamRule((0.9, 0.95), clips=True, numbers=self.numbers, step="log_vector_step")

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
        """Nothing has been seen."""
        start = {"log_pace": 0.0, "agreement": 0.0, "size": 0.0, "largest": UNSEEN}
        return {name: torch.tensor(value, dtype=torch.float32, device="cpu") for name, value in start.items()}

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The numbers, each 0-d by its name."""
        return by_name(self.numbers.to(device, dtype))

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
        weight = momentum_weight(ctx)
        products = torch.cat([total["products"].flatten(2).sum(2).to(weight.device) for total in sums])
        # Without a gradient there is nothing to agree with, and the momentum of one that was takes long to vanish.
        known = (products[:, 1] > 0) & (products[:, 0] != 0)
        squares = products[:, 1].clamp_min(1e-38)
        filled = 1 - (1 - weight) ** ctx.iteration  # what of the momentum's weights has met a gradient
        agreement = (filled * products[:, 0] / squares).clamp(-2, 2)
        size = squares.log() / 2 - filled.clamp_min(1e-6).log()
        seen = known.any()
        before = {name: ctx.memory.get(name, value).to(weight) for name, value in self.initial_memory().items()}
        # An average of as many steps as there were, until there were enough; the first is what it is.
        share = 1 / c["log_memory"].exp().clamp(1, max(1, ctx.iteration))
        share = torch.where(before["largest"] > UNSEEN, share, 1)

        def averaged(name: str, values: Tensor) -> Tensor:
            mean = torch.where(known, values, 0).sum() / known.sum().clamp_min(1)
            return before[name] + torch.where(seen, share * (mean - before[name]), 0)

        after = {"agreement": averaged("agreement", agreement), "size": averaged("size", size)}
        after["largest"] = torch.where(seen, torch.maximum(before["largest"], after["size"]), before["largest"])
        change = c["log_gain"].exp() * (after["agreement"] - c["target"]) * _activity(ctx)
        after["log_pace"] = before["log_pace"] + torch.where(seen, change, 0)
        after["log_pace"] = after["log_pace"].clamp(-LARGEST_LOG_PACE, LARGEST_LOG_PACE)
        ctx.memory.update({name: value.float() for name, value in after.items()})
        return [{}] * len(buckets)

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update the momentum."""
        weight = momentum_weight(ctx).unsqueeze(-1)
        block.store_(_MOMENTUM, ema_(block.load(_MOMENTUM), read_clipped_gradient(block, ctx), weight))
        return {}

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """Nesterov's momentum."""
        return ema_(block.load(_MOMENTUM), read_clipped_gradient(block, ctx), momentum_weight(ctx).unsqueeze(-1))

    def finish(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> Tensor:
        """Orthogonalise, and go as far as law, schedule and feedback say."""
        directions, scale = self.directions(steps, layout, ctx)
        return directions * scale

    def directions(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Two factors of the finished steps of whole tensors; see :class:`~pylo_integrations.rules.celo2.Celo2Rule`."""
        c = ctx.constants
        axes = [axis + 2 for axis in layout.order[-2:]]
        inputs, outputs = (steps.shape[axis] for axis in axes)
        law = c["width_exponent"] * math.log(max(NARROWEST, inputs, outputs) / WIDTH)
        law = torch.exp(c["log_step"] + law + c["aspect_exponent"] * math.log(outputs / inputs)) * pace_of(ctx)
        momentum = steps.movedim(axes, (-2, -1))
        directions = orthogonalise(momentum, self.orthogonalise)
        products = (momentum * directions).sum((-2, -1), keepdim=True, dtype=torch.float32)
        norms = [torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.float32) for x in (momentum, directions)]
        flatness = (products / (norms[0] * norms[1]).clamp_min(1e-30)).clamp(LEAST_FLATNESS, 1)
        flatness, directions = (x.movedim((-2, -1), axes) for x in (flatness, directions))
        scale = inverse_rms(directions, axes, self.norm_eps)
        law, exponent = (x.reshape(-1, *(1,) * (scale.dim() - 1)).to(scale) for x in (law, c["flatness"]))
        return directions, scale * law * flatness.to(scale) ** exponent

    def telemetry(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The feedback's factor on steps, the agreement that it follows, and how much smaller gradients became."""
        if "log_pace" not in memory:
            return {}
        pace = torch.exp(memory["log_pace"] + self.numbers[NUMBERS.index("quiet")] * _quiet(memory))
        return {"pace": pace, "agreement": memory["agreement"], "quiet": _quiet(memory)}


@dataclass(frozen=True, eq=False)
class PacedAdamRule(AdamWRule):
    """Adam's step at the pace of a :class:`PaceRule`.

    Attributes:
        numbers: As there.
        step: Which of them is the logarithm of the rate.
    """

    kind: ClassVar[str] = "PacedAdam"
    numbers: Tensor = torch.empty(0)
    step: str = "log_vector_step"

    @property
    def kernel_spec(self) -> KernelSpec:
        """Adam's step, scaled by the pace."""
        return replace(super().kernel_spec, factor=self._size)

    def schedule(self, iteration: int, num_steps: int | None) -> float:
        """As that of the rule for matrices."""
        return schedule_of(self.numbers, iteration, num_steps)

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Those of both."""
        return super().constants(device, dtype) | by_name(self.numbers.to(device, dtype))

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """The momentum over the root of the second moment, as far as schedule and feedback say."""
        step = super().propose(block, prepared, sums, control, ctx)
        return step * self._size(ctx).reshape(-1, *(1,) * (step.dim() - 1))

    def _size(self, ctx: StepContext) -> Tensor:
        return torch.exp(ctx.constants[self.step]) * pace_of(ctx, "vector_horizon_exponent")


def by_name(numbers: Tensor) -> dict[str, Tensor]:
    """Those of :data:`NUMBERS`, 0-d."""
    return dict(zip(NUMBERS, numbers.unbind(-1), strict=True))


def momentum_weight(ctx: StepContext) -> Tensor:
    """The weight of a new gradient in the momentum, 0-d; where the horizon is not known, that of 1000 steps."""
    slope = math.log(_known_horizon(ctx) / HORIZON)
    return torch.sigmoid(-ctx.constants["momentum"] - slope * ctx.constants["momentum_horizon"])


def _known_horizon(ctx: StepContext) -> float:
    return HORIZON if ctx.num_steps is None else float(min(ctx.num_steps, LONGEST))


def _activity(ctx: StepContext) -> float | Tensor:
    """How much of the feedback's gain there is: less and less until a part of the run, and then nothing.

    It is of the run, not of its steps: over a long one, a bias as small as that of noise would add up.
    """
    if ctx.num_steps is None:
        return FEEDBACK / (HORIZON + ctx.iteration)
    part = ctx.constants["log_fade"].exp()
    left = (1 - ctx.iteration / ctx.num_steps / part).clamp_min(0)
    return left * FEEDBACK / max(ctx.num_steps, SHORTEST)


def _quiet(memory: Mapping[str, Tensor]) -> Tensor:
    """Logarithm of the size of gradients, of the largest that it was; at most 0."""
    return torch.where(memory["largest"] > UNSEEN, memory["size"] - memory["largest"], 0)


def pace_of(ctx: StepContext, horizon_exponent: str = "horizon_exponent") -> Tensor:
    """Factor on the steps of all tensors: of the feedback, the horizon and the schedule."""
    c, log_pace = ctx.constants, torch.zeros_like(ctx.constants["log_power"])
    if "log_pace" in ctx.memory:
        log_pace = ctx.memory["log_pace"].to(log_pace) + c["quiet"] * _quiet(ctx.memory).to(log_pace)
    log_pace = log_pace + c[horizon_exponent] * math.log(_known_horizon(ctx) / HORIZON)
    if ctx.num_steps is None:
        return log_pace.exp()
    left = 1 - ctx.iteration / ctx.num_steps
    if left <= 0:
        return torch.zeros_like(log_pace)
    warm = ((ctx.iteration + 1) / (c["log_warmup"].exp() * ctx.num_steps)).clamp_max(1)
    return warm * torch.exp(log_pace + c["log_power"].exp() * math.log(left))


def schedule_of(numbers: Tensor, iteration: int, num_steps: int | None) -> float:
    """The schedule alone, as :func:`pace_of` has it: a warm-up, and a power of what is left of the run."""
    if num_steps is None:
        return 1.0
    warmup, power = (math.exp(numbers[NUMBERS.index(name)]) for name in ("log_warmup", "log_power"))
    left = max(0.0, 1 - iteration / num_steps)
    return float(min(1.0, (iteration + 1) / (warmup * num_steps)) * left**power)
