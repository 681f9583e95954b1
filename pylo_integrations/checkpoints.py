"""State dicts: the forms that state takes in checkpoints, and whether a state dict fits an optimizer.

The form is torch's. What is global to the run is in it twice, since every path of a checkpoint drops something:

* as a string of bytes in the first parameter group, which torch, FSDP and the frameworks hand back unchanged;
* as tensors among the states of every parameter, as other optimizers keep ``step``: they go where states go, also where
  tensors are loaded in place, or handed to an optimizer without its knowledge.

What other code keeps among the states of a parameter travels untouched. Reading checks everything before anything is
changed. State comes back as it was stored, bit by bit; that of another format (:mod:`pylo_integrations.formats`) is
converted, and the log says so.
"""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor

from pylo_integrations import sealed
from pylo_integrations.fitting import missing_memory
from pylo_integrations.formats import CODE, CODES, FLOAT32, FORMATS, SCALE, Format, decoded, encoded, scale_shape
from pylo_integrations.ledger import Entry, Ledger
from pylo_integrations.options import OPTIONS, check_group
from pylo_integrations.progress import COUNTS, FLOATS, INTEGERS, LARGEST_COUNT, Progress, fault_of, flaw_of
from pylo_integrations.rules.accumulators import SECOND_MOMENTS
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import Held, local_part, placed_like
from pylo_integrations.sharding.wholes import gather_whole

logger = logging.getLogger(__name__)

PROGRESS = "progress"
"""Key, in the first parameter group, of what is global to the run."""

SMALL = "tensor_state"
"""Key, in the first parameter group, of statistics of FSDP1's slices that are not shaped like them."""

RUN = "run_"
"""Prefix of what is global to the run, among the states of a parameter."""

_RUN_COUNTS = frozenset(f"{RUN}{name}" for name in COUNTS)

States = Mapping[int, Mapping[str, Any]]
"""States by the number of their parameter."""


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


def run_tensors(progress: Progress) -> dict[str, Tensor]:
    """What is global to the run, as states. Loading into them in place is loading; but a horizon that is set stays."""
    counts = dict(progress.counts)
    if progress.num_steps is not None:
        counts["num_steps"] = counts["num_steps"].clone()
    return {f"{RUN}{name}": value for name, value in {**counts, **progress.memory}.items()}


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


# -- reading -----------------------------------------------------------------------------------------------------------


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
            if isinstance(value, Tensor) and (fault := _fault_of_number(value)):
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
    return any(states) or _blob(state_dict["param_groups"], SMALL) is not None


def _blob(groups: Sequence[Mapping[str, Any]], key: str) -> Any:
    """What groups have under a key of ours, but for an empty string, which only keeps its place."""
    values = [group[key] for group in groups if key in group]
    return next((value for value in values if not (value is None or (type(value) is bytes and not value))), None)


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


def has_run(own: Any) -> bool:
    """Whether :func:`run_tensors` put something among the states of a parameter."""
    return isinstance(own, Mapping) and not _RUN_COUNTS.isdisjoint(own)


def split_run(states: Mapping[Any, Any], rule: Rule) -> tuple[dict[Any, dict[str, Any]], dict[Any, Any]]:
    """What :func:`run_tensors` put among states, where it did, and all else."""
    known = _RUN_COUNTS | {f"{RUN}{name}" for name in rule.initial_memory()}
    knows_all = not _remembers_anything(rule)
    runs, rest = dict[Any, dict[str, Any]](), dict(states)
    for index, own in states.items():
        if has_run(own):
            mine = {n for n in own if n in known or (not knows_all and str(n).startswith(RUN))}
            runs[index] = {name: own[name] for name in mine}
            rest[index] = {name: value for name, value in own.items() if name not in mine}
    return runs, rest


def read_progress(
    groups: Sequence[Mapping[str, Any]], runs: Mapping[Any, Mapping[str, Any]], rule: Rule
) -> tuple[Progress | None, str | None]:
    """What a state dict tells of the run as a whole, in either form; and of which theta it is, if that is known.

    Args:
        groups: Of the state dict.
        runs: From :func:`split_run`.
        rule: Of the optimizer.

    Raises:
        CheckpointError: It is damaged, of another rule, or of several runs.
    """
    progress, theta = None, None
    if (blob := _blob(groups, PROGRESS)) is not None:
        progress, theta = _read_blob(blob, rule)
    along = read_run(runs, rule, progress)
    if along is None or progress is None:
        return along or progress, theta
    if along.iteration == progress.iteration:
        progress.memory = along.memory | progress.memory
        return progress, theta
    # Whoever takes the groups, or the states, from a new optimizer, leaves one of the two at the beginning.
    if progress.iteration == 0:
        return along, None
    if along.iteration == 0:
        return progress, theta
    raise CheckpointError(
        f"its groups are of iteration {progress.iteration}, its states of {along.iteration}: take both from one run"
    )


def read_run(runs: Mapping[Any, Mapping[str, Any]], rule: Rule, written: Progress | None = None) -> Progress | None:
    """The progress that :func:`split_run` found, copied; None if there is none.

    Args:
        runs: From :func:`split_run`.
        rule: Of the optimizer.
        written: What the groups say, exactly: of counts that were cast to a narrow type, it tells what they were.

    Raises:
        CheckpointError: It is damaged, or that of several runs.
    """
    found: list[tuple[Any, Progress]] = []
    seen = set()
    for index, run in runs.items():
        identity = tuple((name, id(run[name])) for name in sorted(run))
        if identity in seen:  # most checkpoints have the same tensors for all parameters
            continue
        seen.add(identity)
        found.append((index, _read_one_run(index, run, rule, written)))
        (first, one), (_, other) = found[0], found[-1]
        if not _is_same(one, other):
            raise CheckpointError(
                f"the states of parameters {first} and {index} are of different runs, or of different times of one, "
                f"iteration {one.iteration} and {other.iteration}: load those of one checkpoint"
            )
    return found[0][1] if found else None


def _read_one_run(index: Any, run: Mapping[str, Any], rule: Rule, written: Progress | None) -> Progress:
    """What the state of one parameter says of the run."""
    try:
        counts = {name: _count(name, run.get(f"{RUN}{name}"), written) for name in COUNTS}
        rest = {name.removeprefix(RUN): value for name, value in run.items() if name not in _RUN_COUNTS}
        memory = {name: local_part(value) if isinstance(value, Tensor) else value for name, value in rest.items()}
        progress = Progress.from_record({**counts, "num_steps": counts["num_steps"] or None}, memory)
    except ValueError as error:
        raise CheckpointError(
            f"what the state of parameter {index} says of the run is damaged: {error}; load an earlier checkpoint"
        ) from error
    _check_memory(progress, rule)
    return progress


def _is_same(one: Progress, other: Progress) -> bool:
    memories = one.memory, other.memory
    return (
        one.record() == other.record()
        and memories[0].keys() == memories[1].keys()
        and all(torch.equal(value.cpu(), memories[1][name].cpu()) for name, value in memories[0].items())
    )


def _count(name: str, value: Any, written: Progress | None) -> int:
    """A number of the run; also where other code has cast it to a floating type, with nothing lost.

    Raises:
        ValueError: It is none.
    """
    largest, cast = LARGEST_COUNT, value
    if isinstance(value, Tensor):
        value = local_part(value)
        if fault := _fault_of_number(value):
            raise ValueError(f"{RUN}{name} {fault}")
        cast = value.item()
        if value.is_floating_point():
            if written is not None and math.isfinite(cast) and cast == written.counts[name].to(value.dtype).item():
                return int(written.counts[name])
            largest = int(2 / torch.finfo(value.dtype).eps) - 1  # the next integers are rounded
    if type(cast) is int:
        return cast
    if type(cast) is float and cast.is_integer() and abs(cast) <= largest:
        return int(cast)
    raise ValueError(f"{RUN}{name} is {value!r:.100}, which is no integer, or not certain to be the one that was saved")


def _fault_of_number(value: Tensor) -> str | None:
    """What keeps a tensor from holding one number that can be read, as the end of a sentence, or None."""
    if fault := fault_of(local_part(value), (*INTEGERS, *FLOATS)):
        return fault
    return None if value.numel() == 1 else f"has shape {tuple(value.shape)}, not one element"


def _remembers_anything(rule: Rule) -> bool:
    """Whether a rule may have a memory that it does not declare: one that sees losses, made by its first step."""
    return rule.needs_loss and not rule.initial_memory()


def check_progress(progress: Progress, rule: Rule) -> None:
    """Raise CheckpointError unless :func:`read_run` would take the progress of an optimizer."""
    try:
        Progress.from_record(progress.record(), progress.memory)
    except ValueError as error:
        raise CheckpointError(f"what it says of the run is damaged: {error}; load an earlier checkpoint") from error
    _check_memory(progress, rule)


def _check_memory(progress: Progress, rule: Rule) -> None:
    found = {name: tuple(value.shape) for name, value in progress.memory.items()}
    expected = {name: tuple(value.shape) for name, value in rule.initial_memory().items()}
    if _remembers_anything(rule) or (not found and progress.iteration == 0):
        return
    if found != expected:
        raise CheckpointError(
            f"the memory of the run is {found}, expected {expected}: it is damaged, or of other weights of the rule"
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
    blob = _blob(groups, SMALL)
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


def _read_blob(blob: bytes, rule: Rule) -> tuple[Progress, str | None]:
    try:
        progress, origin = Progress.from_bytes(blob)
    except ValueError as error:
        raise CheckpointError(f"{error}: the checkpoint is damaged or was not written by this package") from error
    written, name = origin.get("rule"), rule.kind  # not in the first checkpoints
    if written not in (None, name):
        raise CheckpointError(
            f"it was written by an optimizer with the rule {written}, and this one has {name}: create the optimizer "
            "that wrote it, or start this one without its state"
        )
    _check_memory(progress, rule)
    return progress, origin.get("theta")


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
