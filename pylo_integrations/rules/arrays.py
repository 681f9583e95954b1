"""Checks of theta's arrays, with messages that name the culprit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real

from torch import Tensor


def extent(architecture: str, arrays: Mapping[str, Tensor], name: str, axis: int) -> int:
    """Size of one axis of an array, from which a rule reads its geometry.

    Raises:
        ValueError: The array is missing or has no such axis.
    """
    if name not in arrays:
        raise ValueError(f"{architecture} theta lacks {[name]}")
    shape = arrays[name].shape
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{architecture} theta: {name} is {tuple(shape)}, which has too few axes")
    return shape[axis]


def check_arrays(architecture: str, arrays: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that ``arrays`` are those of ``shapes``, no more and no less.

    Raises:
        ValueError: A name is missing or unknown, or a shape does not fit.
    """
    if missing := sorted(set(shapes) - set(arrays)):
        raise ValueError(f"{architecture} theta lacks {missing}")
    if unknown := sorted(set(arrays) - set(shapes)):
        raise ValueError(f"{architecture} theta has unknown arrays {unknown}; remove them or rename them")
    wrong = {name: tuple(arrays[name].shape) for name, shape in shapes.items() if tuple(arrays[name].shape) != shape}
    if wrong:
        expected = {name: shapes[name] for name in wrong}
        raise ValueError(f"{architecture} theta has shapes {wrong}; expected {expected}: weights are (inputs, outputs)")


def check_mults(**mults: float) -> None:
    """Check factors of a rule's steps.

    Raises:
        ValueError: One is not a finite number, or a ``step_mult`` is negative; the message names it.
    """
    for name, value in mults.items():
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{name}={value!r} must be a finite number, or None for that of the weights")
        if name == "step_mult" and value < 0:
            raise ValueError(f"{name}={value!r} must not be negative; pass maximize=True to ascend")
