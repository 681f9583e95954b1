"""States as they come out of a state dict: checked, copied, converted, and cut to what this rank keeps."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylo_integrations import sealed
from pylo_integrations.checkpoints.form import SMALL, CheckpointError, blob_of
from pylo_integrations.checkpoints.run import has_run
from pylo_integrations.fitting import missing_memory
from pylo_integrations.formats import CODE, CODES, FORMATS, SCALE, Format, decoded, encoded, scale_shape
from pylo_integrations.ledger import Entry, Ledger
from pylo_integrations.progress import Progress, fault_of, flaw_of
from pylo_integrations.rules.accumulators import SECOND_MOMENTS
from pylo_integrations.sharding.pieces import Held, local_part, placed_like

logger = logging.getLogger(__name__)


def check_keys(state_dict: Mapping[str, Any], names: frozenset[str]) -> None:
    """Raise CheckpointError if states of ours are under a key that no group lists, where nothing would read them.

    Other code may have entries of its own there.

    Args:
        state_dict: See :func:`check_form`.
        names: Of the states of the rule.
    """
    indices = {index for group in state_dict["param_groups"] for index in group["params"]}
    others = {key: own for key, own in state_dict["state"].items() if key not in indices and isinstance(own, Mapping)}
    if lost := [key for key, own in others.items() if has_run(own) or not names.isdisjoint(own)]:
        raise CheckpointError(
            f"it has states under {lost!r:.100}, and its groups list no such parameters: keys were renamed, or it is "
            "damaged; load what state_dict() returned"
        )


def read_states(
    groups: Sequence[Mapping[str, Any]],
    saved: Mapping[Any, Mapping[str, Any]],
    entries: Sequence[Entry],
    ledger: Ledger,
    progress: Progress | None,
) -> dict[int, dict[str, Any]]:
    """The states in a state dict for ``entries``, by number, checked, copied and cut to what this rank keeps.

    Args:
        groups: Of the state dict, with as many parameters.
        saved: Its states, but for what :func:`split_run` found.
        entries: Of the optimizer.
        ledger: Of the optimizer.
        progress: What the state dict tells of the run.

    Raises:
        CheckpointError: It does not fit; the message says where.
    """
    blob = blob_of(groups, SMALL)
    small = {} if blob is None else _read_small(blob, entries)
    states: dict[int, dict[str, Any]] = {}
    indices = [index for group in groups for index in group["params"]]
    has_stepped = progress is None or progress.iteration > 0
    converted: Counter[tuple[str, str]] = Counter()
    unread: set[str] = set()
    for number, (index, entry) in enumerate(zip(indices, entries, strict=True)):
        found = {**(saved.get(index) or {}), **small.get(number, {})}
        mine = ledger.names if blob is None else entry.stored  # FSDP1 gives all slices the same states
        unread |= found.keys() & entry.unread
        own = {name: value for name, value in found.items() if name in mine and name not in entry.unread}
        others = {name: value for name, value in found.items() if name not in mine} if blob is None else {}
        if own and not entry.held.numel:  # FSDP1 drops the state of what is not here
            absent = {name: entry.param.new_zeros(0) for name, shape in entry.shapes.items() if shape is None}
            own = (absent if entry.is_slice else {}) | own
        if own or (has_stepped and _lacks_state(others, entry)):
            states[number] = _fit(own, others, index, entry, ledger)
            kinds = _kind_of(own, entry), entry.form.kind
            converted[kinds] += kinds[0] != kinds[1]
        if others:
            states[number] = {**states.get(number, {}), **_copied(others, entry.param.device)}
    if told := "; ".join(f"{old} to {new}, {count} parameters" for (old, new), count in converted.items() if count):
        logger.info("states are stored otherwise here than in the checkpoint, and were converted: %s", told)
    if unread:
        logger.info("states that no weight of this theta reads were left out: %s", ", ".join(sorted(unread)))
    return states


def check_states(
    states: Mapping[int, Mapping[str, Any]], entries: Sequence[Entry], names: Collection[str], *, has_stepped: bool
) -> None:
    """Raise CheckpointError if :func:`read_states` would not take states that are in their place already.

    Args:
        states: By number of the parameter, without what :func:`split_run` found.
        entries: Of the optimizer.
        names: That states of the optimizer have.
        has_stepped: Whether the run is known to be beyond its beginning.
    """
    for number, found in states.items():
        entry = entries[number]
        own = {name: value for name, value in found.items() if name in names and name not in entry.unread}
        others = found.keys() - own.keys() - entry.unread
        if own or (has_stepped and _lacks_state(others, entry)):
            _check_names(own, others, number, entry, entry.form)
            check_values(own, number)


def _lacks_state(others: Collection[Any], entry: Entry) -> bool:
    """Whether there is something of a parameter, but not the rule's state.

    Other code may have come first; but once a step was taken, what is trained has the rule's state.
    """
    return bool(others and entry.shapes and entry.param.requires_grad)


def _copied(value: Any, device: torch.device) -> Any:
    """A copy of what other code keeps among states: tensors are brought to a device, but keep their type."""
    if isinstance(value, Tensor):
        if fault := missing_memory(local_part(value)):
            raise CheckpointError(f"a tensor that other code keeps among its states {fault}")
        return value.detach().to(device if value.dim() else value.device, copy=True)
    if type(value) is dict:
        return {key: _copied(inner, device) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(inner, device) for inner in value)
    return copy.deepcopy(value)


def _read_small(blob: bytes, entries: Sequence[Entry]) -> dict[int, dict[str, Tensor]]:
    """Row and column statistics that were saved apart, see :func:`pack_states`."""
    try:
        _, tensors = sealed.from_bytes(SMALL, blob)
    except ValueError as error:
        raise CheckpointError(f"its row and column statistics cannot be read ({error})") from error
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        owner, _, name = key.rpartition("/")
        by_name.setdefault(owner, {})[name] = tensor
    names = [entry.name for entry in entries]
    if missing := by_name.keys() - set(names):
        raise CheckpointError(
            f"it was written under FSDP1 and names parameters {sorted(missing)}, which this optimizer does not know: "
            "create it from named parameters, or with FSDP1 call bind_model(model) first"
        )
    return {number: by_name[name] for number, name in enumerate(names) if name in by_name}


def _fit(
    tensors: Mapping[str, Any], others: Mapping[str, Any], index: Any, entry: Entry, ledger: Ledger
) -> dict[str, Tensor]:
    """Saved states of a parameter as this rank keeps them, copied; ``others`` are there too, but not the rule's."""
    form = _form_of(tensors, entry)
    _check_names(tensors, others, index, entry, form)
    check_values(tensors, index)
    fitted = ledger.fresh_state(entry)
    with torch.no_grad():
        for name, parts in entry.parts_in(form).items():
            what = f"state {name} of parameter {index}"
            saved = [tensors[part] for part in parts]
            value = saved[0] if len(saved) == 1 else _decoded(form, saved, what)
            if len(mine := entry.parts[name]) == 1:
                _copy_(fitted[name], value, entry.held, what)
                continue
            numbers = ledger.holdings.zero_state(entry.param, entry.held, entry.dtype)
            _copy_(numbers, value, entry.held, what)
            codes = encoded(entry.form, local_part(numbers), name in SECOND_MOMENTS)
            for part, new in zip(mine, codes, strict=True):
                local_part(fitted[part]).copy_(new)
    return fitted


def _form_of(tensors: Collection[str], entry: Entry) -> Format:
    """In which format states of a parameter are, by their names; bfloat16 has those of float32."""
    own = set(tensors)
    forms = (entry.form, *FORMATS.values())
    return next((form for form in forms if set().union(*entry.parts_in(form).values()) == own), entry.form)


def _kind_of(tensors: Mapping[str, Tensor], entry: Entry) -> str:
    """The name of that format; that of ``entry``, too, where it does not matter."""
    form = _form_of(tensors, entry)
    shaped = [name for name, shape in entry.shapes.items() if shape is None]
    if not shaped or form.per_block or entry.dtype != torch.float32:
        return form.kind
    dtypes = {tensors[name].dtype for name in shaped}
    return "bfloat16" if dtypes == {torch.bfloat16} else "float32"


def _decoded(form: Format, saved: Sequence[Tensor], what: str) -> Tensor:
    """Numbers from codes and scales; divided among ranks, or whole, as these are."""
    codes, scales = map(local_part, saved)
    if tuple(scales.shape) != scale_shape(codes.shape):
        raise CheckpointError(
            f"{what} has codes of shape {tuple(codes.shape)} and scales of {tuple(scales.shape)} on this rank, "
            f"expected {scale_shape(codes.shape)}: they were divided among ranks in different ways"
        )
    numbers, whole = decoded(form, [codes, scales]), saved[0]
    return placed_like(numbers, whole, whole.shape) if hasattr(whole, "placements") else numbers


def _check_names(tensors: Mapping[str, Any], others: Collection[Any], index: Any, entry: Entry, form: Format) -> None:
    """Raise CheckpointError unless states of a parameter have the names and shapes of the rule's in a format."""
    shapes = [tuple(entry.param.shape), entry.shape]
    stored = {name: each for parts in entry.parts_in(form).values() for name, each in parts.items()}
    admitted = {
        name: [scale_shape(shape) for shape in shapes if shape]
        if each.per_block
        else [each.shape]
        if each.shape is not None
        else shapes
        for name, each in stored.items()
    }
    found = {
        name: tuple(value.shape) if isinstance(value, Tensor) and not value.is_nested else ()
        for name, value in tensors.items()
    }
    if found.keys() != admitted.keys() or any(found[name] not in admitted[name] for name in found):
        expected = {name: choices[-1] for name, choices in admitted.items()}
        named = f"parameter {index}" + (f" ({entry.name})" if entry.name else "")
        besides = f" and, of other code, {sorted(map(str, others))}" if others else ""
        raise CheckpointError(
            f"{named} of shape {entry.shape} has state {found}{besides}, expected {expected}. Was it written by "
            "another optimizer, or for a model with other shapes, parameter order, or split or stacked of groups?"
        )


def check_values(tensors: Mapping[str, Any], index: Any) -> None:
    """Raise CheckpointError unless states of a parameter hold numbers that a run can have."""
    for name, value in tensors.items():
        local = local_part(value) if isinstance(value, Tensor) else value
        is_code = name.endswith(CODE) and isinstance(local, Tensor)
        flaw = fault_of(local, CODES) if is_code else flaw_of(local)
        if flaw is None and (name in SECOND_MOMENTS or name.endswith(SCALE)) and (local < 0).any():
            flaw = f"is {'a scale' if name.endswith(SCALE) else 'an average of squares'} and holds negative values"
        if flaw:
            raise CheckpointError(
                f"state {name} of parameter {index} {flaw}: the checkpoint is damaged, or of a run that went wrong; "
                "load an earlier one"
            )


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
