"""Options of parameter groups: which there are, and what their values may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from numbers import Real
from operator import is_
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pylo_integrations.decay import check_decay, check_decay_policy
from pylo_integrations.formats import StateDtype, wanted_format
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.components import check_split, components_of
from pylo_integrations.sharding.layout import AxisOrder

OPTIONS = ("lr", "weight_decay", "weight_decay_policy", "maximize", "axes", "rule")
"""What every parameter group has."""

USUAL = {"state_dtype": "float32", "split": 1, "stacked": False}
"""What groups have only where it is not this. It is of an optimizer and not of its run: checkpoints do not set it, and
those of optimizers that knew nothing of it are as those of today."""

MOMENTUM = "momentum"
"""A default that nothing reads, and that groups have only once something writes it. It stands there because schedulers
that cycle the momentum (``OneCycleLR`` and ``CyclicLR`` do, unless told not to) refuse an optimizer without one; in
groups from the start, distributed checkpoints of optimizers without it would lack a key."""

_LARGEST = {"lr": 1e12, "weight_decay": 3.4e38, "base_lr": 3.4e38}
"""How large the numbers of a group may be. They meet tensors in float32, and what such an ``lr`` makes of a parameter
can be squared and summed in it; for weight decay, :func:`~pylo_integrations.decay.check_decay` knows more."""

_ROUNDING = 1e-12
"""How far below zero counts as zero."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16, torch.int32, torch.int64)
"""Of tensors in a number's place: those that torch can compute with."""

_COMPARED = (*OPTIONS, *USUAL, "base_lr")
_ABSENT = (object(),) * len(_COMPARED)
"""In the place of options that a group has not: None is a value, and a wrong one."""


def check_group(group: Mapping[str, Any], choices: Collection[str], index: int | None = None) -> None:
    """Raise unless a parameter group can be stepped, as far as its options do not depend on each other.

    Args:
        group: With its parameters.
        choices: Values of ``rule`` that the optimizer understands.
        index: Of the group among others, for messages.

    Raises:
        ValueError: An option is missing or out of range; the message names it.
        TypeError: A parameter to be trained is complex or not floating point.
    """
    with _of_group(index):
        _read_options(group, choices, OPTIONS, read_number)
        for param in group["params"]:
            if not is_lazy(param) and not getattr(param, "_fsdp_flattened", False):
                components_of(param.shape, group)
    for position, param in enumerate(group["params"]):
        if param.requires_grad and not param.is_floating_point():
            names = group.get("param_names")
            raise TypeError(
                f"parameter {names[position] if names else position} is {param.dtype}; learned optimizers step real "
                "floating-point parameters only (view a complex one with torch.view_as_real)"
            )


@contextmanager
def _of_group(index: int | None) -> Iterator[None]:
    """Have errors name the group."""
    try:
        yield
    except ValueError as error:
        raise error if index is None else ValueError(f"parameter group {index}: {error}") from None


def _read_options(
    group: Mapping[str, Any], choices: Collection[str], wanted: Collection[str], read: Callable[[str, Any], float]
) -> dict[str, float]:
    """The numbers of a group, if all its options are in range."""
    if missing := [option for option in wanted if option not in group]:
        raise ValueError(f"the options {missing} are missing; set them as add_param_group() did")
    numbers = {option: read(option, group[option]) for option in _LARGEST if option in group}
    is_real = any(isinstance(param, Tensor) and not param.is_meta for param in group.get("params", ())[:1])
    if is_real and (lost := [option for option, number in numbers.items() if math.isnan(number)]):
        raise ValueError(f"{lost[0]}={group[lost[0]]!r} is on the meta device and has no value; a float will do")
    check_decay_policy(group["weight_decay_policy"])
    if not isinstance(group["maximize"], (int, np.bool_)):
        raise ValueError(f"maximize={group['maximize']!r} must be True or False")
    if group["axes"] not in get_args(AxisOrder):
        raise ValueError(f"axes={group['axes']!r} is unknown; choose one of {list(get_args(AxisOrder))}")
    if group["rule"] not in choices:
        raise ValueError(f"rule={group['rule']!r} is not a choice of this optimizer; it has {list(choices)}")
    check_state_dtype(group)
    check_split(group)
    return numbers


def check_state_dtype(group: Mapping[str, Any]) -> None:
    """Raise ValueError if a group names a format of state that does not exist."""
    if wanted_format(group) not in get_args(StateDtype):
        raise ValueError(f"state_dtype={group['state_dtype']!r} is unknown; choose one of {list(get_args(StateDtype))}")


def read_number(option: str, value: Any) -> float:
    """The value of ``lr``, ``weight_decay`` or ``base_lr``; nan for a tensor that has none, on the meta device.

    Raises:
        ValueError: It is no number, or out of range.
    """
    number = value
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.dtype not in _DTYPES or value.numel() != 1:
            raise ValueError(
                f"Tensor {option} must be 1-element and real, dense and of at least 16 bits, not of shape "
                f"{tuple(value.shape)}, {value.layout} and {value.dtype}; a float will do"
            )
        if value.device.type == "meta":
            return math.nan
        number = value.item()
    is_real = isinstance(number, Real)
    # Nan fails the comparison, too. Schedules to zero may end a rounding error below it.
    if not (is_real and -_ROUNDING <= number < math.inf):
        raise ValueError(f"{option}={value!r} must be a finite number >= 0")
    if number > _LARGEST[option]:
        raise ValueError(f"{option}={value!r} must be at most {_LARGEST[option]:g}")
    return float(number)


class OptionCheck:
    """Checks the options of all groups at every step; what it found good costs it little to see again.

    Args:
        rule: Of the optimizer.
        adamw_scale: See :func:`~pylo_integrations.decay.keep_and_scale`.
    """

    def __init__(self, rule: Rule, adamw_scale: float) -> None:
        self._choices = rule.choices
        self._factors = rule.largest_lr_mult, adamw_scale
        self._good: list[tuple[Any, ...]] = []
        self._on_devices: dict[tuple[int, str], tuple[Tensor, float]] = {}

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if options of a group are not in range, or are not together.

        An option that is a tensor on the CPU is read every time. One on another device is read when it is put
        into a group: later reads would have to wait for the device.
        """
        good = self._good
        if len(good) != len(groups):
            good[:] = [()] * len(groups)
        for index, group in enumerate(groups):
            values: tuple[Any, ...] = tuple(map(group.get, _COMPARED, _ABSENT))
            known = len(good[index]) and all(map(is_, values, good[index]))
            if not known or any(isinstance(value, Tensor) and value.device.type == "cpu" for value in values):
                good[index] = ()
                is_relative = str(group.get("weight_decay_policy")).endswith("_independent")
                with _of_group(index):
                    self._check(
                        group, (*OPTIONS, "base_lr") if is_relative else OPTIONS, partial(self._read_once, index)
                    )
                good[index] = values

    def check_new(self, group: Mapping[str, Any], index: int) -> None:
        """As :meth:`check`, of a group that is to have this index, and need not have a ``base_lr`` yet."""
        with _of_group(index):
            self._check(group, OPTIONS, read_number)

    def _check(self, group: Mapping[str, Any], wanted: Collection[str], read: Callable[[str, Any], float]) -> None:
        numbers = _read_options(group, self._choices, wanted, read)
        check_decay({**group, "base_lr": numbers["lr"], **numbers}, *self._factors)

    def _read_once(self, index: int, option: str, value: Any) -> float:
        """As :func:`read_number`, but for tensors that would have to be waited for again."""
        if not isinstance(value, Tensor) or value.device.type == "cpu":
            return read_number(option, value)
        seen, number = self._on_devices.get((index, option), (None, 0.0))
        if seen is not value:
            number = read_number(option, value)
            self._on_devices[index, option] = value, number
        return number
