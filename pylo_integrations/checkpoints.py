"""State dicts: the forms that state takes in checkpoints, and whether a state dict fits an optimizer.

The form is torch's, with what is global to the run as a string of bytes in the first parameter group: that is what
every checkpoint path of torch, FSDP and the frameworks hands back unchanged. Reading checks everything before anything
is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import safetensors.torch
import torch
from torch import Tensor

from pylo_integrations.options import OPTIONS, check_group
from pylo_integrations.progress import Progress
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import Held, local_part
from pylo_integrations.sharding.wholes import gather_whole

PROGRESS = "progress"
"""Key, in the first parameter group, of what is global to the run."""

SMALL = "tensor_state"
"""Key, in the first parameter group, of statistics of FSDP1's slices that are not shaped like them."""

States = Mapping[int, Mapping[str, Tensor]]
"""States by the number of their parameter."""


class CheckpointError(ValueError):
    """A checkpoint is not for this optimizer or model, or would lose state; nothing was changed or written."""


@dataclass(frozen=True)
class Member:
    """A parameter of an optimizer, as checkpoints see it.

    Attributes:
        param: The parameter.
        name: In the model that FSDP1 wraps, or as the optimizer was given it; None if it was not.
        shape: Of the whole parameter.
        held: What is here of it.
        shapes: Of its whole states, by name; None for "shaped, and sharded, like the parameter".
        dtype: Of its states.
        is_slice: Whether it is a 1-D slice made by FSDP1.
    """

    param: Tensor
    name: str | None
    shape: tuple[int, ...]
    held: Held
    shapes: Mapping[str, tuple[int, ...] | None]
    dtype: torch.dtype
    is_slice: bool


@dataclass(frozen=True)
class Checkpoint:
    """What a state dict holds for an optimizer.

    Attributes:
        states: By number of the parameter; copies, in the form that this rank keeps.
        progress: None if there was none.
        theta: Which weights it was written with, if that is known.
    """

    states: dict[int, dict[str, Tensor]]
    progress: Progress | None
    theta: str | None


class _Shares(dict[int, Any]):
    """States of which this rank has its share only; a copy of it on disk would pass for all of them."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise CheckpointError(
            "with shard_step=True a rank's state_dict() has its share of the state only, and a file of it would lose "
            "the shares of the others: call optimizer.consolidate_state_dict() on every rank first, which makes the "
            "state_dict() of rank 0 whole, or save with torch.distributed.checkpoint or "
            "pylo_integrations.state.to_canonical()"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shares:
        return _Shares({key: copy.deepcopy(value, memo) for key, value in self.items()})


# -- writing -----------------------------------------------------------------------------------------------------------


def pack_states(states: States, members: Sequence[Member]) -> tuple[dict[int, Any], bytes | None]:
    """States in the form that checkpoint paths carry, and, of FSDP1's slices, what has to travel apart.

    FSDP takes every tensor in the state of a slice to be shaped like it, so row and column statistics are serialised.
    """
    packed: dict[int, Any] = dict(states)
    slices = {index: member for index, member in enumerate(members) if member.is_slice and index in states}
    small: dict[str, Tensor] = {}
    # FSDP takes all slices to have the same states, too: those that one lacks are zeros.
    like_param = {key: None for member in slices.values() for key, shape in member.shapes.items() if shape is None}
    for index, member in slices.items():
        own, param = states[index], member.param
        small |= {f"{member.name}/{key}": own[key].cpu() for key, shape in member.shapes.items() if shape is not None}
        packed[index] = {
            key: own[key] if key in own else torch.zeros(param.shape, dtype=member.dtype, device=param.device)
            for key in like_param
        }
    if any(members[index].held.share is not None for index in states if index in range(len(members))):
        packed = _Shares(packed)
    return packed, safetensors.torch.save(small) if slices else None


def whole_states(
    states: States,
    members: Sequence[Member],
    holdings: Holdings,
    to: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """States as one device would have them, copied. All ranks have to run through it together.

    Args:
        states: Of this rank.
        members: Of the optimizer.
        holdings: Who takes part.
        to: The rank that gets them; by default all do.
        device: Where to put them; by default where they are.

    Yields:
        Number of a parameter and its states; nothing for a rank that gets none.
    """
    known = [(index, members[index]) for index in sorted(states)]
    names = {index: [name for name, shape in member.shapes.items() if shape is None] for index, member in known}
    divided = [
        (member.shape, member.held, [states[index][name] for name in names[index]])
        for index, member in known
        if member.held.parts > 1 and names[index]
    ]
    gathered = gather_whole(divided, holdings.ranks, to)
    for index, member in known:
        whole = dict(states[index])
        if member.held.parts > 1 and names[index]:
            whole |= dict(zip(names[index], next(gathered), strict=False))
        if to in (None, holdings.ranks.rank):
            yield index, {name: local_part(value.detach()).to(device, copy=True) for name, value in whole.items()}


# -- reading -----------------------------------------------------------------------------------------------------------


def check_groups(
    saved: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]], choices: Collection[str]
) -> None:
    """Raise CheckpointError unless the groups of a state dict are those of an optimizer, with options it can have.

    Args:
        saved: Groups of the state dict.
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
        if lacking := [option for option in OPTIONS if option not in theirs]:
            raise CheckpointError(f"its groups have no {lacking}: another kind of optimizer wrote it")
        try:
            check_group({**theirs, "params": group["params"]}, choices)
        except ValueError as error:
            raise CheckpointError(str(error)) from error


def has_states(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict holds the state of any parameter."""
    return bool(state_dict["state"]) or any(SMALL in group for group in state_dict["param_groups"])


def read_state_dict(
    state_dict: Mapping[str, Any], members: Sequence[Member], holdings: Holdings, rule: str
) -> Checkpoint:
    """What a state dict holds for the optimizer of ``members``, checked, copied and cut to what this rank keeps.

    Args:
        state_dict: In torch's form, with as many parameters.
        members: Of the optimizer; may be left empty if there is no state.
        holdings: What is here of their parameters.
        rule: Class of the optimizer's rule.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    groups = state_dict["param_groups"]
    progress, theta = None, None
    if blob := next((group[PROGRESS] for group in groups if group.get(PROGRESS)), None):
        progress, theta = _read_progress(blob, rule)
    small = _read_small(next((group[SMALL] for group in groups if SMALL in group), None), members)
    is_of_slices = any(SMALL in group for group in groups)
    states = {}
    indices = [index for group in groups for index in group["params"]] if members else []
    for number, (index, member) in enumerate(zip(indices, members, strict=True)):
        tensors = {**state_dict["state"].get(index, {}), **small.get(number, {})}
        if is_of_slices:
            tensors = {name: value for name, value in tensors.items() if name in member.shapes}
        if tensors and not member.held.numel:  # FSDP1 drops the state of what is not here
            absent = {name: member.param.new_zeros(0) for name, shape in member.shapes.items() if shape is None}
            tensors = (absent if member.is_slice else {}) | tensors
        if tensors:
            states[number] = _fit(tensors, index, member, holdings)
    return Checkpoint(states, progress, theta)


def _read_progress(blob: bytes, rule: str) -> tuple[Progress, str | None]:
    try:
        progress, origin = Progress.from_bytes(blob)
    except ValueError as error:
        raise CheckpointError(f"{error}: the checkpoint is damaged or was not written by this package") from error
    written = origin.get("rule")  # not in the first checkpoints
    if written not in (None, rule):
        raise CheckpointError(
            f"it was written by an optimizer with the rule {written}, and this one has {rule}: create the optimizer "
            "that wrote it, or start this one without its state"
        )
    return progress, origin.get("theta")


def _read_small(blob: bytes | None, members: Sequence[Member]) -> dict[int, dict[str, Tensor]]:
    """Row and column statistics that were saved apart, see :func:`pack_states`."""
    if blob is None:
        return {}
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load(blob).items():
        owner, _, name = key.rpartition("/")
        by_name.setdefault(owner, {})[name] = tensor
    names = [member.name for member in members]
    if missing := by_name.keys() - set(names):
        raise CheckpointError(
            f"it was written under FSDP1 and names parameters {sorted(missing)}, which this optimizer does not know: "
            "create it from named parameters, or with FSDP1 call bind_model(model) first"
        )
    return {number: by_name[name] for number, name in enumerate(names) if name in by_name}


def _fit(tensors: Mapping[str, Any], index: Any, member: Member, holdings: Holdings) -> dict[str, Tensor]:
    """Saved states of a parameter as this rank keeps them, copied."""
    param, held = member.param, member.held
    admitted = {n: [tuple(param.shape), member.shape] if own is None else [own] for n, own in member.shapes.items()}
    found = {name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
    if found.keys() != member.shapes.keys() or any(found[name] not in admitted[name] for name in found):
        expected = {name: choices[-1] for name, choices in admitted.items()}
        named = f"parameter {index}" + (f" ({member.name})" if member.name else "")
        raise CheckpointError(
            f"{named} of shape {member.shape} has state {found}, expected {expected}. Was it written by another "
            "optimizer, or for a model with other shapes or parameter order?"
        )
    fitted = {}
    for name, shape in member.shapes.items():
        if shape is None:
            fitted[name] = holdings.zero_state(param, held, member.dtype)
        else:
            fitted[name] = torch.zeros(shape, dtype=member.dtype, device=param.device)
        with torch.no_grad():
            _copy_(fitted[name], tensors[name], held, f"state {name} of parameter {index}")
    return fitted


def _copy_(state: Tensor, value: Tensor, held: Held, what: str) -> None:
    """Fill what is here of a state from a tensor that is sharded like it, or whole."""
    if hasattr(value, "placements"):
        local, theirs = local_part(state), local_part(value)
        same = getattr(state, "placements", None) == value.placements and local.shape == theirs.shape
        if not same:
            raise CheckpointError(
                f"{what} is a DTensor placed {value.placements}, and is kept in another form here: load "
                "through torch.distributed.checkpoint, which reshards, or move the run with "
                "pylo_integrations.state.to_canonical() and from_canonical()"
            )
        local.copy_(theirs)
    elif value.shape == local_part(state).shape:
        local_part(state).copy_(value)
    else:
        whole = value if value.dim() else value.reshape(1)
        for piece in held.pieces:
            piece.view(local_part(state)).copy_(whole[piece.box.slices((0,) * whole.dim())])
