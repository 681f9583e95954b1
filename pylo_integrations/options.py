"""Options of parameter groups: which there are, and what their values may be."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from operator import is_
from typing import Any, get_args

import numpy as np
from torch import Tensor

from pylo_integrations.decay import check_decay_policy
from pylo_integrations.sharding.layout import AxisOrder

OPTIONS = ("lr", "weight_decay", "weight_decay_policy", "maximize", "axes", "rule")
"""What every parameter group has."""

MOMENTUM = "momentum"
"""A default that nothing reads, and that groups have only once something writes it. It stands there because schedulers
that cycle the momentum (``OneCycleLR`` and ``CyclicLR`` do, unless told not to) refuse an optimizer without one; in
groups from the start, distributed checkpoints of optimizers without it would lack a key."""

_LARGEST = 3.4e38
"""About the largest float32, in which lr and decay meet parameters."""

_COMPARED = (*OPTIONS, "base_lr")


def check_group(group: Mapping[str, Any], choices: Collection[str], index: int | None = None) -> None:
    """Raise unless a parameter group can be stepped.

    Args:
        group: With its parameters.
        choices: Values of ``rule`` that the optimizer understands.
        index: Of the group among others, for messages.

    Raises:
        ValueError: An option is missing or out of range; the message names it.
        TypeError: A parameter to be trained is complex or not floating point.
    """
    check_options(group, choices, index)
    for position, param in enumerate(group["params"]):
        if param.requires_grad and not param.is_floating_point():
            names = group.get("param_names")
            raise TypeError(
                f"parameter {names[position] if names else position} is {param.dtype}; learned optimizers step real "
                "floating-point parameters only (view a complex one with torch.view_as_real)"
            )


def check_options(group: Mapping[str, Any], choices: Collection[str], index: int | None = None) -> None:
    """As :func:`check_group`, but for the parameters."""
    try:
        if missing := [option for option in OPTIONS if option not in group]:
            raise ValueError(f"the options {missing} are missing; set them as add_param_group() did")
        for option in ("lr", "weight_decay", "base_lr"):
            if option in group:
                _check_number(option, group[option])
        check_decay_policy(group["weight_decay_policy"])
        if not isinstance(group["maximize"], (int, np.bool_)):
            raise ValueError(f"maximize={group['maximize']!r} must be True or False")
        if group["axes"] not in get_args(AxisOrder):
            raise ValueError(f"axes={group['axes']!r} is unknown; choose one of {list(get_args(AxisOrder))}")
        if group["rule"] not in choices:
            raise ValueError(f"rule={group['rule']!r} is not a choice of this optimizer; it has {list(choices)}")
    except ValueError as error:
        raise error if index is None else ValueError(f"parameter group {index}: {error}") from None


def _check_number(option: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            kind = f"not of shape {tuple(value.shape)} and {value.dtype}"
            raise ValueError(f"Tensor {option} must be 1-element and real, {kind}")
        if value.device.type == "meta":
            return
        number = value.item()
    else:
        number = value
    # Infinity and nan fail the comparison.
    if not (isinstance(number, Real) and 0 <= number <= _LARGEST):
        raise ValueError(f"{option}={value!r} must be a finite number >= 0")


class OptionCheck:
    """Checks the options of all groups at every step; what it found good costs it little to see again.

    Args:
        choices: Values of ``rule`` that the optimizer understands.
    """

    def __init__(self, choices: Collection[str]) -> None:
        self._choices = choices
        self._good: list[tuple[Any, ...]] = []

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if the options of a group are not in range.

        An option that is a tensor on the CPU is read every time. One on another device is read when it is put
        into a group: later reads would have to wait for the device.
        """
        good = self._good
        if len(good) != len(groups):
            good[:] = [()] * len(groups)
        for index, group in enumerate(groups):
            values: tuple[Any, ...] = tuple(map(group.get, _COMPARED))
            known = len(good[index]) and all(map(is_, values, good[index]))
            if not known or any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
                good[index] = ()
                check_options(group, self._choices, index)
                good[index] = values
