"""What state dicts look like: the keys that are ours, and whether one was written by an optimizer like this one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from pylo_integrations.options import OPTIONS, check_group
from pylo_integrations.progress import FLOATS, INTEGERS, Progress, fault_of
from pylo_integrations.sharding.pieces import local_part

PROGRESS = "progress"
"""Key, in the first parameter group, of what is global to the run."""

SMALL = "tensor_state"
"""Key, in the first parameter group, of statistics of FSDP1's slices that are not shaped like them."""


class CheckpointError(ValueError):
    """A checkpoint is not for this optimizer or model, or would lose state; nothing was changed or written."""


@dataclass(frozen=True)
class Checkpoint:
    """What a state dict holds for an optimizer.

    Attributes:
        states: By number of the parameter; copies, in the form that this rank keeps.
        progress: None if there was none.
        theta: Which weights it was written with, if that is known.
    """

    states: dict[int, dict[str, Any]]
    progress: Progress | None
    theta: str | None


def check_form(state_dict: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless this is a state dict that an optimizer with our options wrote."""
    groups, state = state_dict.get("param_groups"), state_dict.get("state")
    if not isinstance(groups, (list, tuple)) or not isinstance(state, Mapping):
        raise CheckpointError("it is no state dict of an optimizer, which has a dict 'state' and a list 'param_groups'")
    for group in groups:
        indices = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(indices, (list, tuple)) or not all(isinstance(index, (int, str)) for index in indices):
            raise CheckpointError("its 'param_groups' are not dicts with a list of numbers or names, 'params'")
    indices = [index for index in state if isinstance(index, (int, str))]
    if wrong := [index for index in indices if not isinstance(state[index], Mapping | None)]:
        raise CheckpointError(f"the states of parameters {wrong[:10]} are not dicts")
    if lacking := [option for option in OPTIONS if any(option not in group for group in groups)]:
        names = sorted({str(name) for own in state.values() if isinstance(own, Mapping) for name in own})
        raise CheckpointError(
            f"its groups have no {lacking}, and its states are {names[:10]}: another kind of optimizer wrote it. "
            "Create the optimizer that wrote it, or start this one without its state"
        )


def check_groups(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], choices: Collection[str]
) -> None:
    """Raise CheckpointError unless the groups of a state dict are those of an optimizer, with options it can have.

    Args:
        saved: Groups of the state dict, see :func:`check_form`.
        groups: Of the optimizer.
        choices: As for :func:`~pylo_integrations.options.check_group`.
    """
    sizes, own_sizes = ([len(group["params"]) for group in some] for some in (saved, groups))
    if sizes != own_sizes:
        raise CheckpointError(
            f"it has parameter groups of {sizes} parameters, this optimizer of {own_sizes}: group the parameters as in "
            "the run that wrote it, or move the run by parameter names with pylo_integrations.state.to_canonical() and "
            "from_canonical()"
        )
    for theirs, group in zip(saved, groups, strict=True):
        for option in ("lr", "weight_decay", "base_lr"):
            value = theirs.get(option, 0.0)
            if not isinstance(value, (Real, Tensor)) or isinstance(value, bool):
                raise CheckpointError(f"{option}={value!r:.50} is not a number")
            if isinstance(value, Tensor) and (fault := fault_of_number(value)):
                raise CheckpointError(f"{option} {fault}")
        if not isinstance(theirs["maximize"], bool):
            raise CheckpointError(f"maximize={theirs['maximize']!r:.50} is neither True nor False")
        try:
            if not (math.isfinite(base_lr := float(theirs.get("base_lr", 0.0))) and base_lr >= 0):
                raise ValueError(f"base_lr={base_lr} must be a finite number >= 0")
            check_group({**theirs, "params": group["params"]}, choices)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(str(error)) from error


def has_states(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict holds the state of any parameter."""
    states = [own for own in state_dict["state"].values() if isinstance(own, Mapping)]
    return any(states) or blob_of(state_dict["param_groups"], SMALL) is not None


def blob_of(groups: Sequence[Mapping[str, Any]], key: str) -> Any:
    """What groups have under a key of ours, but for an empty string, which only keeps its place."""
    values = [group[key] for group in groups if key in group]
    return next((value for value in values if not (value is None or (type(value) is bytes and not value))), None)


def fault_of_number(value: Tensor) -> str | None:
    """What keeps a tensor from holding one number that can be read, as the end of a sentence, or None."""
    if fault := fault_of(local_part(value), (*INTEGERS, *FLOATS)):
        return fault
    return None if value.numel() == 1 else f"has shape {tuple(value.shape)}, not one element"
