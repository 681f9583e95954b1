"""Learning rates over a run, as factors: functions of the part of the run that is over, from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

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


SHAPES: Mapping[Shape, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine}
"""By name."""
