"""Celo: VeLO's MLPs under one learned schedule for the whole model (docs/mathematics.md).

Moudgil et al., "Celo: Training Versatile Learned Optimizers on a Compute Diet", 2025.

The LSTM reads only the course of the loss and what is left of the run, so all tensors share its one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.arrays import check_mults
from pylo_integrations.rules.base import Control, StepContext
from pylo_integrations.rules.control import (
    SCHEDULE_FEATURES,
    global_lr_mult,
    global_lstm_step_,
    initial_global_memory,
    linear,
    objective,
)
from pylo_integrations.rules.mixture import MixtureRule, param_scales
from pylo_integrations.sharding.blocks import Bucket, Sums


@dataclass(frozen=True, eq=False)
class CeloRule(MixtureRule):
    """The rule of Celo.

    Attributes:
        phase: 2 for the whole optimizer; 1 for the MLP without the learned schedule, the state of meta-training before
            the schedule is trained.
    """

    phase: int = 2

    architecture: ClassVar[str] = "celo"
    controller_inputs: ClassVar[int] = SCHEDULE_FEATURES
    gain: ClassVar[float] = 1.0

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Tensor], *, exp_mult: float = 1e-3, step_mult: float = 1e-3, phase: int = 2
    ) -> CeloRule:
        """Build the rule from theta.

        Args:
            arrays: ``lstm_init_state/*``, ``rnn_params/*`` with 18 inputs, and ``ff_mod_stack/~/*``, a bank of MLPs
                with 30 inputs in 14 arrays ``w0__0``... and 3 outputs; all weights (inputs, outputs).
            exp_mult: Scale of the magnitude output inside the exponential.
            step_mult: Scale of the whole step.
            phase: 1 or 2, see :class:`CeloRule`.

        Raises:
            ValueError: A name is missing or unknown, a shape does not fit, a scale is not finite, or there is no such
                phase.
        """
        if phase not in (1, 2):
            raise ValueError(f"phase={phase!r} must be 1 (without the learned schedule) or 2 (with it)")
        check_mults(exp_mult=exp_mult, step_mult=step_mult)
        return cls(**cls._fields(arrays), exp_mult=exp_mult, step_mult=step_mult, phase=phase)

    def initial_memory(self) -> dict[str, Tensor]:
        """No loss seen, and the LSTM's learned initial state."""
        return initial_global_memory(self.controller)

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Run the LSTM's one row and mix the one MLP; moves the LSTM's state, which is in ``ctx.memory``, on."""
        start = ctx.constants["lstm_init_state/hidden"]
        hidden = global_lstm_step_(objective(buckets, sums, ctx, start), ctx)
        decisions = self.mix(torch.softmax(linear(hidden, ctx.constants, "rnn_to_controls"), dim=1), ctx)
        lr_mult = global_lr_mult(hidden, ctx.constants)
        decisions["lr_mult"] = lr_mult if self.phase == 2 else torch.ones_like(lr_mult)
        return [decisions | {"param_scale": scale} for scale in param_scales(buckets, sums)]
