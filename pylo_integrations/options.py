"""Options of parameter groups: which there are, and what their values may be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, get_args

from torch import Tensor

from pylo_integrations.decay import check_decay_policy
from pylo_integrations.sharding.layout import AxisOrder

OPTIONS = ("lr", "weight_decay", "weight_decay_policy", "maximize", "axes", "rule")
"""What every parameter group has."""

MOMENTUM = "momentum"
"""A default that nothing reads, and that groups have only once something writes it. It stands there because schedulers
that cycle the momentum (``OneCycleLR`` and ``CyclicLR`` do, unless told not to) refuse an optimizer without one; in
groups from the start, distributed checkpoints of optimizers without it would lack a key."""


def check_group(group: Mapping[str, Any], choices: Collection[str]) -> None:
    """Raise unless a parameter group can be stepped.

    Args:
        group: With its parameters.
        choices: Values of ``rule`` that the optimizer understands.

    Raises:
        ValueError: An option is out of range; the message names it.
        TypeError: A parameter is complex or not floating point.
    """
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(group['lr'].shape)}")
    for option in ("lr", "weight_decay"):
        value = float(group[option])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{option}={group[option]!r} must be a finite number >= 0")
    check_decay_policy(group["weight_decay_policy"])
    if group["axes"] not in get_args(AxisOrder):
        raise ValueError(f"axes={group['axes']!r} is unknown; choose one of {list(get_args(AxisOrder))}")
    if group["rule"] not in choices:
        raise ValueError(f"rule={group['rule']!r} is not a choice of this optimizer; it has {list(choices)}")
    for position, param in enumerate(group["params"]):
        if not param.is_floating_point():
            names = group.get("param_names")
            raise TypeError(
                f"parameter {names[position] if names else position} is {param.dtype}; learned optimizers step real "
                "floating-point parameters only (view a complex one with torch.view_as_real)"
            )
