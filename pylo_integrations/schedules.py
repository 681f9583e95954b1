"""Learning rates over a run, as factors: functions of the part of the run that is over, from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

WARM_UP = 0.05
"""Part of the run in which :func:`warmed_up` rises."""

Shape: TypeAlias = Literal["constant", "linear", "cosine"]
"""How a learning rate falls: not at all, or to zero as a line or half a cosine does."""


def constant(done: float) -> float:
    """1."""
    return 1.0


def linear(done: float) -> float:
    """From 1 to 0 along a line."""
    return 1 - done


def cosine(done: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * done)) / 2


def warmed_up(done: float) -> float:
    """From 0 to 1 along a line in the first twentieth, then to 0 along half a cosine."""
    return done / WARM_UP if done < WARM_UP else cosine((done - WARM_UP) / (1 - WARM_UP))


SHAPES: Mapping[Shape, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
"""By name."""
