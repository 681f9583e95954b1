"""Named per-parameter features (docs/mathematics.md, "Features").

A rule lists the names it feeds its network; feature 13 therefore means the same thing in every backend. Features of
rows or columns stay compact, with extent 1 along the axis they do not depend on, until the network needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TIME_SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)
"""Steps over which the time features of small_fc change."""


@dataclass(frozen=True)
class Moments:
    """A block's ingredients, each broadcastable to ``(tensors, channels, *box)``.

    Attributes:
        grad, param: 1 channel.
        momentum: 3 channels.
        rms: 1 channel, the second moment (not its root).
        row, col: 3 channels, factored second moments; the full-size one twice for vectors.
        grad_scale, momentum_scale: 3 channels, factored inverse root second moments.
        rms_eps: Added to ``rms`` before its inverse root.
    """

    grad: Tensor
    param: Tensor
    momentum: Tensor
    rms: Tensor
    row: Tensor
    col: Tensor
    grad_scale: Tensor
    momentum_scale: Tensor
    rms_eps: float = 1e-6

    @property
    def inverse_rms(self) -> Tensor:
        """1 channel: inverse root of the second moment."""
        return (self.rms + self.rms_eps).rsqrt()


_FORMULAS: dict[str, tuple[int, Callable[[Moments], Tensor]]] = {
    "grad": (1, lambda x: x.grad),
    "clipped_grad": (1, lambda x: x.grad.clamp(-0.1, 0.1)),
    "param": (1, lambda x: x.param),
    "momentum": (3, lambda x: x.momentum),
    "rms": (1, lambda x: x.rms),
    "momentum_over_rms": (3, lambda x: x.momentum * x.inverse_rms),
    "inverse_rms": (1, lambda x: x.inverse_rms),
    "factored_grad": (3, lambda x: x.grad * x.grad_scale),
    "grad_over_rms": (1, lambda x: x.grad * x.inverse_rms),
    "row": (3, lambda x: x.row),
    "col": (3, lambda x: x.col),
    "inverse_row": (3, lambda x: (x.row + 1e-8).rsqrt()),
    "inverse_col": (3, lambda x: (x.col + 1e-8).rsqrt()),
    "factored_momentum": (3, lambda x: x.momentum * x.momentum_scale),
}


MATRIX_FEATURES = (
    "grad",
    "clipped_grad",
    "param",
    "momentum",
    "rms",
    "momentum_over_rms",
    "inverse_rms",
    "factored_grad",
    "grad_over_rms",
    "row",
    "col",
    "inverse_row",
    "inverse_col",
    "factored_momentum",
)
"""What VeLO and its descendants read, in the order of theta's ``w0__0`` to ``w0__13``."""

MOMENTUM_FEATURES = ("momentum", "momentum_over_rms", "factored_momentum")
"""Features with a channel for each momentum."""

RMS_FEATURES = ("rms", "momentum_over_rms", "inverse_rms", "grad_over_rms")
"""Features that are made of the second moment."""


def channel_counts(names: Sequence[str]) -> list[int]:
    """Number of channels of each named feature."""
    return [_FORMULAS[name][0] for name in names]


def channel_count(names: Sequence[str]) -> int:
    """Number of channels of the named features together."""
    return sum(channel_counts(names))


def compact_features(names: Sequence[str], moments: Moments) -> list[Tensor]:
    """The named features in order, each ``(tensors, its channels, *axes)`` and broadcastable to the block."""
    return [_FORMULAS[name][1](moments) for name in names]


def time_rates(dtype: torch.dtype, device: torch.device) -> Tensor:
    """``1 / scale`` for every time scale, shape (11,)."""
    return torch.tensor(TIME_SCALES, dtype=dtype, device=device).reciprocal()


def time_features(iteration: int, rates: Tensor) -> Tensor:
    """``tanh(t / scale - 1)`` for every time scale, shape (11,); ``t`` counts from 0, ``1 / scale`` are ``rates``."""
    return torch.tanh(rates * iteration - 1)
