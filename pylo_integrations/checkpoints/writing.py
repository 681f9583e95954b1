"""States on their way into a state dict, or to one rank as a whole."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from pylo_integrations import sealed
from pylo_integrations.checkpoints.form import SMALL, CheckpointError
from pylo_integrations.checkpoints.run import run_tensors
from pylo_integrations.formats import FLOAT32, decoded
from pylo_integrations.ledger import Entry
from pylo_integrations.progress import Progress
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import local_part
from pylo_integrations.sharding.wholes import gather_whole

States = Mapping[int, Mapping[str, Any]]
"""States by the number of their parameter."""


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


def pack_states(
    states: Mapping[Any, Any], entries: Sequence[Entry], progress: Progress, *, is_whole: bool
) -> tuple[dict[Any, Any], bytes | None]:
    """States in the form that checkpoint paths carry, and, of FSDP1's slices, what has to travel apart.

    FSDP takes every tensor in the state of a slice to be shaped like it, so row and column statistics are serialised.

    Args:
        states: By the number of their parameter; what has other keys is left as it is.
        entries: Of the optimizer.
        progress: Of the run.
        is_whole: Whether states are whole where ranks share the steps.
    """
    run = run_tensors(progress)
    packed = {index: {**own, **run} if index in range(len(entries)) else own for index, own in states.items()}
    slices = {index: entry for index, entry in enumerate(entries) if entry.is_slice and index in packed}
    small: dict[str, Tensor] = {}
    # FSDP takes all slices to have the same states, too: those that one lacks are zeros.
    like_param = {key: None for entry in slices.values() for key, shape in entry.shapes.items() if shape is None}
    for index, entry in slices.items():
        own, param = states[index], entry.param
        small |= {f"{entry.name}/{key}": own[key] for key, shape in entry.shapes.items() if shape is not None}
        packed[index] = {
            key: own[key].to(entry.dtype)
            if key in own
            else torch.zeros(param.shape, dtype=entry.dtype, device=param.device)
            for key in like_param
        }
    if lost := foreign_names([states[index] for index in slices], [entries[index] for index in slices]):
        warnings.warn(
            f"FSDP1 cannot save what other code keeps among the states of a parameter: {lost} are left out",
            RuntimeWarning,
            stacklevel=2,
        )
    shared = (entries[index].held.share is not None for index in packed if index in range(len(entries)))
    if not is_whole and any(shared):
        packed = _Shares(packed)
    return packed, sealed.to_bytes(SMALL, {}, small) if slices else None


def foreign_names(states: Sequence[Mapping[str, Any]], entries: Sequence[Entry]) -> list[str]:
    """Names of entries that are not the rule's, but kept among its states by other code."""
    pairs = zip(states, entries, strict=True)
    return sorted({str(name) for own, entry in pairs for name in own if name not in entry.stored})


def whole_states(
    states: States,
    entries: Sequence[Entry],
    holdings: Holdings,
    to: int | None = None,
    device: torch.device | str | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """States as one device would have them, copied, in numbers. All ranks have to run through it together.

    What other code keeps among them is left out. Those of formats other than float32 are decoded: to read them into the
    same format gives back what was stored.

    Args:
        states: Of this rank.
        entries: Of the optimizer.
        holdings: Who takes part.
        to: The rank that gets them; by default all do.
        device: Where to put them; by default where they are.

    Yields:
        Number of a parameter and its states; nothing for a rank that gets none.
    """
    known = [(index, entries[index]) for index in sorted(states)]
    names = {index: [name for name, shape in entry.shapes.items() if shape is None] for index, entry in known}
    divided = [
        (entry.shape, entry.held, partial(_all_numbers, states[index], entry, names[index]))
        for index, entry in known
        if entry.held.parts > 1 and names[index]
    ]
    gathered = gather_whole(divided, holdings.ranks, to)
    for index, entry in known:
        divides = entry.held.parts > 1 and names[index]
        whole = {
            name: _numbers(states[index], entry, name)
            for name in entry.shapes
            if name not in names[index] or not divides
        }
        if divides:
            whole |= dict(zip(names[index], next(gathered), strict=False))
        if to in (None, holdings.ranks.rank):
            yield index, {name: local_part(value.detach()).to(device, copy=True) for name, value in whole.items()}


def _numbers(own: Mapping[str, Tensor], entry: Entry, name: str) -> Tensor:
    """A state as it is stored, or what it says, where that is something else; of what is here, then."""
    parts = [own[part] for part in entry.parts[name]]
    if entry.form is FLOAT32 or entry.shapes[name] is not None:
        return parts[0]
    return decoded(entry.form, [local_part(part.detach()) for part in parts])


def _all_numbers(own: Mapping[str, Tensor], entry: Entry, names: Sequence[str]) -> list[Tensor]:
    return [_numbers(own, entry, name) for name in names]
