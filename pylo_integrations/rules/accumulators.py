"""Momentum, second-moment and factored accumulators shared by the learned rules (docs/mathematics.md).

All start at zero and are never bias-corrected. ``q`` below is the squared gradient plus ``1e-30``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pylo_integrations.sharding.layout import TensorLayout

MOMENTUM = ("momentum_0", "momentum_1", "momentum_2")
RMS = ("rms",)
DIAGONAL = ("diagonal_0", "diagonal_1", "diagonal_2")
"""Full-size stand-ins for row and column statistics of tensors below rank 2."""
SECOND_MOMENTS = (*RMS, *DIAGONAL, "row", "col")
"""States that are averages of squares, so never negative."""


@dataclass(frozen=True)
class Decays:
    """EMA coefficients: three for momentum, one for the second moment, three for the factored second moments.

    Learned ones are float64 tensors of that length, so that meta-training can look through them.
    """

    momentum: tuple[float, ...] | Tensor
    rms: tuple[float, ...] | Tensor
    factored: tuple[float, ...] | Tensor

    def weights(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weight ``1 - beta`` of the new value in each EMA, shape (n,).

        ``beta`` is rounded to ``dtype`` before the subtraction, as the reference does: for 0.999 in float32 that is
        1.3e-5 (relative) away from 1e-3. Learned momentum decays may be negative and are used as they are; the second
        moments clip theirs to [0, 1] to stay positive.
        """
        clipped = {"momentum": False, "rms": True, "factored": True}
        weights = {}
        for name, clip in clipped.items():
            decays = getattr(self, name)
            exact = decays if isinstance(decays, Tensor) else torch.tensor(decays, dtype=torch.float64, device="cpu")
            beta = exact.to(dtype)
            weights[f"{name}_weight"] = (1 - (beta.clamp(0, 1) if clip else beta)).to(device)
        return weights


def decays_from_offsets(initial: Sequence[float], offsets: Tensor) -> Tensor:
    """EMA coefficients that meta-training moved away from ``initial`` by ``offsets``, float64.

    ``1 - beta = (1 - initial) * exp(10 * offset)`` (docs/mathematics.md); ``initial`` is rounded to float32 as the
    reference's is.
    """
    starts = torch.tensor(rounded_to_float32(initial), dtype=torch.float64, device=offsets.device)
    return 1 - (1 - starts) * torch.exp(10 * offsets.double())


def rounded_to_float32(values: Sequence[float]) -> tuple[float, ...]:
    """The float32 numbers nearest to ``values``: what the reference has for 0.999 in any precision."""
    return tuple(torch.tensor(values, dtype=torch.float32, device="cpu").tolist())


def accumulator_shapes(layout: TensorLayout, decays: Decays) -> dict[str, tuple[int, ...] | None]:
    """State of the accumulators: parameter-shaped, but for ``row`` and ``col`` of shape ``(decays, *shape)``.

    ``row`` is the mean over the largest axis d0, ``col`` over the second largest d1; the axis keeps extent 1.
    """
    shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys((*MOMENTUM, *RMS))
    if layout.factored is None:
        return shapes | dict.fromkeys(DIAGONAL)
    d1, d0 = layout.factored
    count = len(decays.factored)
    return shapes | {"row": (count, *layout.without(d0)), "col": (count, *layout.without(d1))}


def along_channels(weight: Tensor, like: Tensor) -> Tensor:
    """View ``(channels,)`` or ``(tensors, channels)`` so that it broadcasts over ``(tensors, channels, *axes)``."""
    return weight.reshape(-1, weight.shape[-1], *(1,) * (like.dim() - 2))


def factored_scales(row: Tensor, col: Tensor, d1: int) -> tuple[Tensor, Tensor]:
    """Factors whose product estimates the inverse root second moment: ``(row_scale, col_scale)``.

    Args:
        row: Means of ``q`` over d0, ``(tensors, decays, *shape with 1 at d0)``.
        col: Means of ``q`` over d1, ``(tensors, decays, *shape with 1 at d1)``.
        d1: The tensor axis over which ``row`` is normalised.
    """
    row_mean = row.mean(d1 + 2, keepdim=True)
    row_scale = (row / (row_mean + 1e-9)).clamp_min(1e-9).rsqrt()
    return row_scale, col.clamp_min(1e-9).rsqrt()


def ema_(average: Tensor, value: Tensor, weight: Tensor) -> Tensor:
    """Move ``average``, ``(tensors, channels, *axes)``, towards ``value`` by a per-channel ``weight``, in place.

    The weight is ``(channels,)``, or ``(tensors, channels)`` where every tensor has its own theta.
    """
    return average.lerp_(value.expand_as(average), along_channels(weight, average).expand_as(average))
