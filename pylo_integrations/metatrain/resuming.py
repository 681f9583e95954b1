"""Checkpoints of a meta-training: what they hold, and how one that is damaged, or another run's, is told."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pylo_integrations import sealed
from pylo_integrations.checkpoints import CheckpointError
from pylo_integrations.metatrain.config import Config
from pylo_integrations.metatrain.estimators import Group
from pylo_integrations.metatrain.running import VectorEpisode

_RECORD = "metatrain"  # key of what a checkpoint says besides tensors
_ENTRIES = {"config", "progress", "taken", "groups"}


class ResumeError(CheckpointError):
    """A folder cannot be resumed, or would be overwritten; the message says what to do."""


@contextmanager
def errors_told(checkpoint: Path) -> Iterator[None]:
    """Let whatever a checkpoint makes fail be a :class:`ResumeError` that names it.

    What is not of the form that :func:`write` gives it can fail anywhere.
    """
    try:
        yield
    except ResumeError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ResumeError(
            f"{checkpoint} is damaged, or no checkpoint of a meta-training ({reason:.300}): put a copy of it "
            "there, or begin again in another folder"
        ) from error


def write(checkpoint: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Replace a checkpoint as a whole."""
    sealed.save(checkpoint, _RECORD, record, tensors)


def read(checkpoint: Path, config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`write` has written for a run of this config; call it under :func:`errors_told`."""
    record, tensors = sealed.load(checkpoint, _RECORD)
    if record.keys() != _ENTRIES:
        raise ValueError(f"its entries are {sorted(record)}")
    saved, ours = record["config"], json.loads(json.dumps(config.record()))
    if differing := [key for key in {**ours, **saved} if ours.get(key) != saved.get(key)]:
        raise ResumeError(
            f"{checkpoint.parent} holds a run of another config: {', '.join(differing)} differ. Choose another folder, "
            "or undo the changes"
        )
    return record, tensors


def group_states(groups: Mapping[tuple[str, int], Group]) -> tuple[dict[str, dict[str, int]], dict[str, Tensor]]:
    """Counters of groups by their prefix, and tensors by names that begin with it."""
    counters: dict[str, dict[str, int]] = {}
    tensors: dict[str, Tensor] = {}
    for key, group in groups.items():
        mine = prefix(key)
        counters[mine] = {"begun": group.begun, "perturbed": group.perturbed}
        if isinstance(group.episode, VectorEpisode):
            counters[mine]["iteration"] = group.episode.iteration
            tensors |= {f"{mine}episode/{name}": value for name, value in group.episode.inner.tensors().items()}
        if group.drift is not None:
            tensors[f"{mine}drift"] = group.drift
    return counters, _on_cpu(tensors)


def restore_group_(group: Group, counters: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Bring a group to where :func:`group_states` saw it; names are those behind its prefix."""
    group.begun, group.perturbed = count(counters["begun"]), count(counters["perturbed"])
    group.drift = tensors.get("drift")
    if "iteration" in counters:
        episode = group.begin(group.begun - 1)
        assert isinstance(episode, VectorEpisode)
        episode.inner.restore(below(tensors, "episode/"), count(counters["iteration"]))
        group.episode = episode


def prefix(key: tuple[str, int]) -> str:
    """Of the names of a group's tensors."""
    return f"group/{key[0]}/{key[1]}/"


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def like(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``found``, in the order of ``expected``; ValueError if names, shapes or types differ or values are not finite."""
    for name in expected.keys() | found.keys():
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(f"its tensor {name!r:.100} is {None if theirs is None else tuple(theirs.shape)}")
        if not theirs.isfinite().all():
            raise ValueError(f"its tensor {name!r:.100} has values that are not finite")
    return {name: found[name] for name in expected}


def count(value: Any) -> int:
    """A number of things; ValueError if it is none."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.50} is no count")
    return value


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
