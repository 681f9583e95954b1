"""VeLO: an LSTM per tensor controls the MLP that steps it (docs/mathematics.md).

Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022.

Each step the LSTM reads, for every tensor, how its momentum, second moment and parameters are scaled, its rank, the
course of the loss and what is left of the run; it answers with coefficients of the mixture (see
:mod:`~pylo_integrations.rules.mixture`) and a factor on the step. Tensors learn of each other through a maximum over
all that are stepped. A tensor without a gradient takes no part in a step: its LSTM state stays and it is not in that
maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import MOMENTUM, RMS
from pylo_integrations.rules.arrays import check_mults
from pylo_integrations.rules.base import Control, StepContext
from pylo_integrations.rules.control import (
    SCHEDULE_FEATURES,
    SHORTEST_HALF_LIFE,
    linear,
    lstm_step,
    objective,
    schedule_features_,
)
from pylo_integrations.rules.kernel_spec import KernelSpec
from pylo_integrations.rules.mixture import MixtureRule, param_scales
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums
from pylo_integrations.sharding.layout import TensorLayout

RANKS = 5
_LSTM = ("hidden", "cell")


@dataclass(frozen=True, eq=False)
class VeLORule(MixtureRule):
    """The rule of VeLO.

    Attributes:
        use_bugged_loss_features: Average the loss over 10 steps at most, whatever the horizon.
        use_bugged_next_lstm_state: Never move the LSTM's state on.
    """

    use_bugged_loss_features: bool = False
    use_bugged_next_lstm_state: bool = False

    architecture: ClassVar[str] = "velo"
    controller_inputs: ClassVar[int] = SCHEDULE_FEATURES + 1 + RANKS + 3 + 3
    gain: ClassVar[float] = 100.0

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Tensor],
        *,
        exp_mult: float = 1e-3,
        step_mult: float = 1e-3,
        use_bugged_loss_features: bool = False,
        use_bugged_next_lstm_state: bool = False,
    ) -> VeLORule:
        """Build the rule from theta.

        Args:
            arrays: ``lstm_init_state/*``, ``rnn_params/*`` with 30 inputs, and ``ff_mod_stack/~/*``, a bank of MLPs
                with 30 inputs in 14 arrays ``w0__0``... and 3 outputs; all weights (inputs, outputs).
            exp_mult: Scale of the magnitude output inside the exponential.
            step_mult: Scale of the whole step.
            use_bugged_loss_features: As the reference's flag of that name; the released weights were trained without.
            use_bugged_next_lstm_state: As the reference's flag of that name; the released weights were trained without.

        Raises:
            ValueError: A name is missing or unknown, a shape does not fit, or a scale is not finite; the message says
                which.
        """
        check_mults(exp_mult=exp_mult, step_mult=step_mult)
        return cls(
            **cls._fields(arrays),
            exp_mult=exp_mult,
            step_mult=step_mult,
            use_bugged_loss_features=use_bugged_loss_features,
            use_bugged_next_lstm_state=use_bugged_next_lstm_state,
        )

    @property
    def kernel_spec(self) -> KernelSpec:
        """As of any mixture; the LSTM reads how momenta and second moments are scaled too."""
        sums = ("param_squares", "moments", "moment_squares")
        return replace(super().kernel_spec, sums=sums, sums_with_l2=sums)

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """Accumulators, and the tensor's row of the LSTM."""
        hidden = self.controller["lstm_init_state/hidden"].shape[1]
        return super().state_shapes(layout) | {"lstm_hidden": (hidden,), "lstm_cell": (hidden,)}

    def initial_state(self) -> Mapping[str, Tensor]:
        """The learned initial state of the LSTM."""
        return {f"lstm_{part}": self.controller[f"lstm_init_state/{part}"][0] for part in _LSTM}

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """Also sums and sums of squares of the momenta and the second moment, as the last step left them.

        In float64, so that variances can be had from plain sums, which shards can add, without cancelling.
        """
        moments = block.load((*MOMENTUM, *RMS)).double()
        axes = range(len(block.box.shape))
        sums = {
            "moments": PartialSum.of(moments, axes, block.box.shape),
            "moment_squares": PartialSum.of(moments.square_(), axes, block.box.shape),
        }
        return super().collect(block, ctx) | sums

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Run the LSTM, all rows as one, and mix every tensor's MLP; moves the LSTM's states on."""
        start = ctx.constants["lstm_init_state/hidden"]
        longest = SHORTEST_HALF_LIFE if self.use_bugged_loss_features else None
        schedule = schedule_features_(objective(buckets, sums, ctx, start), ctx, longest)
        tensors = torch.cat([_tensor_features(*pair).to(start) for pair in zip(buckets, sums, strict=True)])
        inputs = torch.cat([schedule.expand(len(tensors), -1), tensors], dim=1)
        hidden, cell = (torch.cat([bucket.stack(f"lstm_{part}").to(start) for bucket in buckets]) for part in _LSTM)
        new = lstm_step(inputs, hidden, cell, ctx.constants)
        sizes = [len(bucket) for bucket in buckets]
        if not self.use_bugged_next_lstm_state:
            for part, rows in zip(_LSTM, new, strict=True):
                for bucket, mine in zip(buckets, rows.split_with_sizes(sizes), strict=True):
                    bucket.unstack_(f"lstm_{part}", mine)
        decisions = self.mix(linear(new[0], ctx.constants, "rnn_to_controls"), ctx)
        decisions["lr_mult"] = linear(new[0], ctx.constants, "step_size").squeeze(1)
        pieces = {name: rows.split_with_sizes(sizes) for name, rows in decisions.items()}
        return [
            {name: rows[i] for name, rows in pieces.items()} | {"param_scale": scale}
            for i, scale in enumerate(param_scales(buckets, sums))
        ]


def _tensor_features(bucket: Bucket, sums: Sums) -> Tensor:
    """The LSTM's inputs that differ between tensors, ``(tensors, 12)``: scales relative to the parameters, and rank."""
    numel, count = bucket.layout.numel, len(bucket)
    moments, squares, param_square = (
        sums[name].view(count, -1) / numel for name in ("moments", "moment_squares", "param_squares")
    )
    inverse = param_square.clamp_min(1e-9).rsqrt()
    variance = (squares - moments.square()).clamp_min(0) * inverse.square()
    momentum, rms = (moments * inverse).split_with_sizes([3, 1], dim=1)
    # Around the mean of the momentum, not its own: a quirk of the reference that the weights were trained with.
    rms_spread = variance[:, 3:] + (rms - momentum).square()
    rank = sum(extent > 1 for extent in bucket.layout.shape)
    one_hot = torch.zeros(count, RANKS, dtype=rms.dtype, device=rms.device)
    one_hot[:, rank : rank + 1] = 1  # ranks from 5 on have none
    return torch.cat([_log(rms), one_hot, _log(variance[:, :3]), _log(rms_spread)], dim=1)


def _log(x: Tensor) -> Tensor:
    return (1e-8 + (10 * x).abs()).log().clamp(-5, 5) / 2
