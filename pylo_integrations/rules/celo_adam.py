r"""Celo-Adam: Adam under Celo's learned schedule (docs/mathematics.md).

Moudgil et al., "Celo: Training Versatile Learned Optimizers on a Compute Diet", 2025.

.. math:: p \leftarrow p - \mathrm{lr\_mult} \cdot \mathrm{step\_mult} \cdot
    \hat m / (10^{-8} + \sqrt{\hat r + 10^{-10}})

with bias-corrected moments of the gradient, clipped element by element, and nothing learned but the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import Decays, ema_, rounded_to_float32
from pylo_integrations.rules.arrays import check_arrays, check_mults, extent
from pylo_integrations.rules.base import CLIP, Control, Rule, StepContext, l2_penalty, read_clipped_gradient
from pylo_integrations.rules.control import (
    SCHEDULE_FEATURES,
    global_lr_mult,
    global_lstm_step_,
    initial_global_memory,
    loss_telemetry,
    lstm_shapes,
    objective,
    param_squares,
)
from pylo_integrations.rules.kernel_spec import AdamSpec, KernelSpec
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums
from pylo_integrations.sharding.layout import TensorLayout

DECAYS = Decays(rounded_to_float32((0.9,)), rounded_to_float32((0.999,)), ())


@dataclass(frozen=True, eq=False)
class CeloAdamRule(Rule):
    """The rule of Celo-Adam.

    Attributes:
        controller: Weights of the LSTM, by the reference's names.
        step_mult: Adam's learning rate before the learned factor.
        eps: Added to the root of the second moment.
        eps_root: Added to the second moment under the root.
    """

    controller: Mapping[str, Tensor]
    step_mult: float = 1e-3

    needs_loss: ClassVar[bool] = True
    needs_horizon: ClassVar[bool] = True
    eps: ClassVar[float] = 1e-8
    eps_root: ClassVar[float] = 1e-10

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor], *, step_mult: float = 1e-3) -> CeloAdamRule:
        """Build the rule from theta.

        Args:
            arrays: ``lstm_init_state/*`` and ``rnn_params/*`` with 18 inputs; all weights (inputs, outputs).
            step_mult: Adam's learning rate before the learned factor.

        Raises:
            ValueError: A name is missing or unknown, a shape does not fit, or the scale is not finite; the message says
                which.
        """
        check_mults(step_mult=step_mult)
        hidden = extent("celo_adam", arrays, "lstm_init_state/hidden", -1)
        check_arrays("celo_adam", arrays, lstm_shapes(SCHEDULE_FEATURES, hidden))
        return cls(dict(arrays), step_mult)

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """One momentum and one second moment."""
        return {"momentum_0": None, "rms": None}

    def initial_memory(self) -> dict[str, Tensor]:
        """No loss seen, and the LSTM's learned initial state."""
        return initial_global_memory(self.controller)

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """EMA weights, and the controller's weights by the reference's names."""
        return DECAYS.weights(device, dtype) | {n: value.to(device, dtype) for n, value in self.controller.items()}

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """The sum of squared parameters, where an L2 penalty needs it."""
        return {"param_squares": param_squares(block)} if l2_penalty(block.bucket.group) else {}

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Run the LSTM's one row; moves its state, which is in ``ctx.memory``, on."""
        start = ctx.constants["lstm_init_state/hidden"]
        hidden = global_lstm_step_(objective(buckets, sums, ctx, start), ctx)
        return [{"lr_mult": global_lr_mult(hidden, ctx.constants)}] * len(buckets)

    def corrections(self, iteration: int) -> tuple[float, float]:
        """Divisors of both averages after ``iteration`` earlier steps."""
        (beta,), (rms_beta,) = DECAYS.momentum, DECAYS.rms
        return 1 - beta ** (iteration + 1), 1 - rms_beta ** (iteration + 1)

    @property
    def kernel_spec(self) -> KernelSpec:
        """Adam's step, scaled by what the LSTM decides."""
        step = AdamSpec(self.eps, self.eps_root, self.corrections)
        return KernelSpec(step, CLIP, sums_with_l2=("param_squares",), step_mult=self.step_mult, has_cuda=True)

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update the moments."""
        grad = read_clipped_gradient(block, ctx)
        for names, value, weight in ((("momentum_0",), grad, "momentum"), (("rms",), grad.square(), "rms")):
            block.store_(names, ema_(block.load(names), value, ctx.constants[f"{weight}_weight"]))
        return {}

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """Adam's step at the learned rate."""
        correction, rms_correction = self.corrections(ctx.iteration)
        momentum = block.load(("momentum_0",)).div_(correction)
        root = block.load(("rms",)).div_(rms_correction).add_(self.eps_root).sqrt_()
        rate = (control["lr_mult"] * self.step_mult).view(-1, *(1,) * (momentum.dim() - 1))
        return momentum.mul_(rate).div_(root.add_(self.eps))

    def telemetry(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The loss features."""
        return loss_telemetry(memory)
