"""What is global to the run, among the states of parameters and in the groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylo_integrations.checkpoints.form import PROGRESS, CheckpointError, blob_of, fault_of_number
from pylo_integrations.progress import COUNTS, LARGEST_COUNT, Progress
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.pieces import local_part

RUN = "run_"
"""Prefix of what is global to the run, among the states of a parameter."""

_RUN_COUNTS = frozenset(f"{RUN}{name}" for name in COUNTS)


def run_tensors(progress: Progress) -> dict[str, Tensor]:
    """What is global to the run, as states. Loading into them in place is loading; but a horizon that is set stays."""
    counts = dict(progress.counts)
    if progress.num_steps is not None:
        counts["num_steps"] = counts["num_steps"].clone()
    return {f"{RUN}{name}": value for name, value in {**counts, **progress.memory}.items()}


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
    if (blob := blob_of(groups, PROGRESS)) is not None:
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
        if fault := fault_of_number(value):
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
