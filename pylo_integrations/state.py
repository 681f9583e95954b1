"""The state of a run by parameter names, whoever distributed it: from any wrapper to any other, on any number of ranks.

A *canonical* state is a dictionary of plain values and whole tensors, all on one device::

    {
        "version": 1,
        "rule": "VeLORule",                         # class of the rule; who loads it must have the same
        "progress": {                               # of the run as a whole
            "iteration": 120,                       # steps taken
            "num_steps": 1000,                      # the horizon, or None
            "nonfinite_steps": 0,
            "theta": "5f0c...",                     # sha256 of the weights, or None
        },
        "memory": {"loss_means": tensor, ...},      # whole-model memory of the rule
        "groups": [                                 # options of the parameter groups
            {"params": ["up.weight", ...], "lr": 1.0, "weight_decay": 0.0, ...},
        ],
        "state": {                                  # by parameter, names as in the model without wrappers
            "up.weight": {"momentum_0": tensor, ...},
        },
    }

A state that follows its parameter has the parameter's original shape; row and column statistics and LSTM rows have
shapes of their own. Dtype is float32, or float64 for float64 parameters, whatever ``state_dtype`` is: what is stored in
another format is decoded, which loses nothing, and whoever loads it encodes it anew: the same format gives it back bit
by bit, another one rounds, and with ``"int8"`` loses digits. ``torch.save`` writes it and
``torch.load(..., weights_only=True)`` reads it; :func:`save_canonical` and :func:`load_canonical` do without pickle,
and their files have a digest by which damage is noticed. What wrappers keep among an optimizer's states is not in it.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pylo_integrations import sealed
from pylo_integrations.checkpoints.form import PROGRESS, CheckpointError, check_groups
from pylo_integrations.checkpoints.writing import foreign_names, whole_states
from pylo_integrations.ledger import Entry
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.options import USUAL
from pylo_integrations.progress import Progress
from pylo_integrations.sharding.pieces import parameter_names, read_flat_slices

VERSION = 1

_KEYS = {"version", "rule", "progress", "memory", "groups", "state"}
_PLAIN = (bool, int, float, str, type(None))
_HEADER = "canonical"  # key of the plain values in the metadata of a file


def to_canonical(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    device: torch.device | str = "cpu",
    rank0_only: bool = False,
) -> dict[str, Any]:
    """The state of a run in the form that depends on nothing but parameter names; see :mod:`pylo_integrations.state`.

    All ranks that train together have to call it, between steps. State is created where there is none yet; nothing
    else changes. What other code keeps among the states is left out, with a warning.

    Args:
        optimizer: A learned optimizer, or a framework's wrapper of one.
        model: As wrapped for training.
        device: Of the tensors.
        rank0_only: Return it on the first rank, and an empty dictionary on all others, which need no memory for it.

    Raises:
        TypeError: ``optimizer`` is not a learned one.
        CheckpointError: A parameter of the optimizer is not in the model.
        ShardingError: A parameter is distributed in a way that hides whole tensors.
    """
    learned = _learned(optimizer)
    names, entries = _named(learned, model)
    learned.init_state()
    ledger, progress = learned.ledger, learned._progress
    to = 0 if rank0_only else None
    found = ledger.complete(entries, learned.state)
    if foreign := foreign_names([found[index] for index in found], [entries[index] for index in found]):
        warnings.warn(
            f"a canonical state has no place for what other code keeps among the states of parameters: {foreign} are "
            "left out",
            RuntimeWarning,
            stacklevel=2,
        )
    states = dict(whole_states(found, entries, ledger.holdings, to, device))
    if to not in (None, ledger.holdings.ranks.rank):
        return {}
    origin = learned._resumption.origin()
    return {
        "version": VERSION,
        "rule": origin["rule"],
        "progress": {**progress.record(), "theta": origin["theta"]},
        "memory": {name: value.detach().to(device, copy=True) for name, value in progress.memory.items()},
        "groups": [
            {"params": [names[param] for param in group["params"]], **_options(group)} for group in learned.param_groups
        ],
        "state": {names[entries[index].param]: tensors for index, tensors in states.items()},
    }


def from_canonical(
    optimizer: torch.optim.Optimizer, model: nn.Module, canonical: Mapping[str, Any], *, rank0_only: bool = False
) -> None:
    """Go on from the state that :func:`to_canonical` returned: under the same wrapper or another, on as many ranks.

    All ranks that train together have to call it, with the same ``canonical``. Load the model's own weights as ever.
    A horizon set on ``optimizer`` is kept, with a warning if the state has another.

    Args:
        optimizer: A learned optimizer with the same rule, or a framework's wrapper of one. Its parameters may be
            grouped otherwise, if those of a group had the same options.
        model: As wrapped for training.
        canonical: The state; tensors may be on any device.
        rank0_only: Only the first rank has ``canonical``, and sends it to all others, which may pass anything.

    Raises:
        TypeError: ``optimizer`` is not a learned one.
        CheckpointError: Version, rule, parameter names, shapes, values or groups do not fit; nothing was changed.
        ShardingError: A parameter is distributed in a way that hides whole tensors.
    """
    learned = _learned(optimizer)
    if rank0_only:
        canonical = _from_first_rank(learned, canonical)
    progress = _check(canonical)
    _check_rule(canonical["rule"], learned)
    names, entries = _named(learned, model)
    mine = {names[entry.param] for entry in entries}
    required = {names[entry.param] for entry in entries if entry.param.requires_grad}
    _check_names(canonical["state"].keys(), mine, required, "state")
    _check_names({name for group in canonical["groups"] for name in group["params"]}, None, required, "groups")
    blob = progress.to_bytes(theta=canonical["progress"]["theta"], rule=canonical["rule"])
    numbers = iter(range(len(entries)))
    groups = [
        {
            **group,
            **_saved_options(group, names, canonical["groups"]),
            "params": [next(numbers) for _ in group["params"]],
        }
        for group in learned.param_groups
    ]
    groups[0][PROGRESS] = blob
    check_groups(groups, learned.param_groups, learned.rule.choices)
    for entry in learned.ledger.entries(learned.param_groups, groups):
        found, expected = canonical["state"].get(name := names[entry.param], entry.shapes), entry.shapes
        if found.keys() - entry.unread != expected.keys():
            raise CheckpointError(
                f"parameter {name} has state {sorted(found)} in canonical, expected {sorted(expected)}. Was it "
                "written by another optimizer?"
            )
    state = {
        index: dict(canonical["state"][names[entry.param]])
        for index, entry in enumerate(entries)
        if names[entry.param] in canonical["state"]
    }
    learned.load_state_dict({"state": state, "param_groups": groups})


def save_canonical(canonical: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a canonical state as a ``.safetensors`` file; one rank is enough.

    The file appears when it is complete, in place of one that was there. It has a digest of all that is in it.

    Raises:
        CheckpointError: This is no canonical state; nothing was written.
    """
    _check(canonical)
    if strange := sorted(map(str, canonical.keys() - _KEYS)):
        raise CheckpointError(f"canonical has entries {strange}, for which its files have no place: leave them out")
    tensors = {f"memory/{name}": value for name, value in canonical["memory"].items()}
    for param, states in canonical["state"].items():
        tensors |= {f"state/{param}/{name}": value for name, value in states.items()}
    header = {key: value for key, value in canonical.items() if key not in ("memory", "state")}
    header["state"] = list(canonical["state"])
    sealed.save(path, _HEADER, header, tensors)


def load_canonical(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save_canonical` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
        CheckpointError: The file holds something else, or is damaged. Files of version 0.1.0 have no digest, so there
            only what makes no sense is noticed.
    """
    try:
        canonical, tensors = sealed.load(path, _HEADER)
        names = canonical.get("state")
        if canonical.keys() != _KEYS - {"memory"} or not isinstance(names, list):
            raise CheckpointError(f"its entries are {sorted(canonical)}")
        canonical |= {"memory": {}, "state": {name: {} for name in names if isinstance(name, str)}}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            param, _, name = rest.rpartition("/")
            if kind == "memory":
                canonical["memory"][rest] = value
            elif kind == "state" and param in canonical["state"]:
                canonical["state"][param][name] = value
            else:
                raise CheckpointError(f"it has a tensor {key!r:.100}")
        _check(canonical)
    except ValueError as error:
        raise CheckpointError(
            f"{os.fspath(path)} is no canonical optimizer state, or damaged ({error}): pass a file that "
            "save_canonical() wrote"
        ) from error
    return canonical


def _learned(optimizer: torch.optim.Optimizer) -> LearnedOptimizer:
    learned = unwrap_optimizer(optimizer)
    if learned is None:
        raise TypeError(f"optimizer is {type(optimizer).__name__}, not a learned optimizer or a wrapper of one")
    return learned


def _named(optimizer: LearnedOptimizer, model: nn.Module) -> tuple[dict[Tensor, str], list[Entry]]:
    """Names of the optimizer's parameters, and what is here of them."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)  # of fully_shard(): a forward pass leaves gathered parameters
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()
    optimizer.ledger.holdings.flat_slices.update(read_flat_slices(model))
    names, entries = parameter_names(model), optimizer.ledger.entries(optimizer.param_groups)
    if strange := [i for i, entry in enumerate(entries) if entry.param not in names]:
        raise CheckpointError(
            f"parameters {strange} of the optimizer are not parameters of the model: pass the model, wrapped as it is "
            "trained, whose parameters the optimizer steps"
        )
    counts = Counter(names[entry.param] for entry in entries)
    if double := sorted(name for name, count in counts.items() if count > 1):
        raise CheckpointError(f"several parameters are named {double} once wrappers are left out: rename the modules")
    return names, entries


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that are plain values; tensors of one element become numbers."""
    numbers = {key: value.item() for key, value in group.items() if isinstance(value, Tensor) and value.numel() == 1}
    plain = {key: value for key, value in {**group, **numbers}.items() if isinstance(value, _PLAIN)}
    return {key: value for key, value in plain.items() if key not in USUAL}


def _saved_options(group: Mapping[str, Any], names: Mapping[Tensor, str], saved: Any) -> dict[str, Any]:
    """What the saved groups say about the options of a group; numbers take the form that they have here."""
    mine = {names[param] for param in group["params"]}
    left_out = {"params", *USUAL}
    matching = [{k: v for k, v in other.items() if k not in left_out} for other in saved if mine & set(other["params"])]
    if any(options != matching[0] for options in matching):
        differing = sorted(key for key in matching[0] if any(other.get(key) != matching[0][key] for other in matching))
        raise CheckpointError(
            f"a parameter group has parameters whose saved groups differ in {differing}: group the parameters as in "
            "the run that was saved"
        )
    found = dict(matching[0]) if matching else {}
    for key, value in found.items():
        if isinstance(group.get(key), Tensor) and isinstance(value, (int, float)) and not isinstance(value, bool):
            found[key] = torch.full_like(group[key], value)
    return found


def _check(canonical: Mapping[str, Any]) -> Progress:
    """Raise CheckpointError unless this has the form of a canonical state; returns what it says of the run."""
    if not isinstance(canonical, Mapping):
        raise CheckpointError(
            f"canonical is {type(canonical).__name__}, not a dict with a version: pass what to_canonical() returned"
        )
    version = canonical.get("version")
    if type(version) is not int or version != VERSION or not canonical.keys() >= _KEYS:
        raise CheckpointError(
            f"canonical has version {version!r} and keys {sorted(map(str, canonical))}; this package reads version "
            f"{VERSION} with keys {sorted(_KEYS)}: pass what to_canonical() returned, and newer versions to a newer "
            "package"
        )
    kinds: dict[str, Any] = {
        "rule": str,
        "progress": Mapping,
        "memory": Mapping,
        "groups": (list, tuple),
        "state": Mapping,
    }
    if wrong := {
        key: type(canonical[key]).__name__ for key, kind in kinds.items() if not isinstance(canonical[key], kind)
    }:
        raise CheckpointError(f"canonical has entries of other types than to_canonical() gives them: {wrong}")
    try:
        progress = Progress.from_record(canonical["progress"], canonical["memory"])
    except ValueError as error:
        raise CheckpointError(f"canonical has a damaged progress: {error}") from error
    if not isinstance(theta := canonical["progress"].get("theta", 0), str | None):
        raise CheckpointError(f"canonical has a damaged progress: theta is {theta!r:.50}, not a digest or None")
    _check_groups(canonical["groups"])
    for param, states in canonical["state"].items():
        if not (
            isinstance(param, str) and isinstance(states, Mapping) and all(isinstance(name, str) for name in states)
        ):
            raise CheckpointError(f"the state of {param!r:.100} in canonical is not a dict of tensors by name")
        if wrong := {name: type(value).__name__ for name, value in states.items() if not isinstance(value, Tensor)}:
            raise CheckpointError(f"the state of {param} in canonical has what are not tensors: {wrong}")
    return progress


def _check_groups(groups: Any) -> None:
    """Raise CheckpointError unless these are groups of options and names, as :func:`_options` makes them."""
    names: list[str] = []
    for group in groups:
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise CheckpointError("the groups in canonical are not dicts with a list of names, 'params'")
        names += group["params"]
        options = {key: value for key, value in group.items() if key != "params"}
        if wrong := [key for key, value in options.items() if not (isinstance(key, str) and isinstance(value, _PLAIN))]:
            raise CheckpointError(f"a group in canonical has options {wrong!r:.200} that are no plain values")
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError("the groups in canonical have parameters that are no names")
    if double := sorted(name for name, count in Counter(names).items() if count > 1):
        raise CheckpointError(f"the groups in canonical have parameters {double} twice")


def _check_rule(found: str, optimizer: LearnedOptimizer) -> None:
    rule = optimizer.rule.kind
    if found != rule:
        raise CheckpointError(
            f"canonical is of an optimizer with the rule {found}, and {type(optimizer).__name__} has {rule}: create "
            "the optimizer that was saved, or start this one without its state"
        )


def _check_names(found: Any, mine: set[str] | None, required: set[str], what: str) -> None:
    missing, unknown = sorted(required - set(found)), sorted(set(found) - mine) if mine is not None else []
    if missing or unknown:
        raise CheckpointError(
            f"the {what} in canonical lacks parameters {missing} and has unknown ones {unknown}: pass the same model "
            "as to to_canonical(), from the same module on, and an optimizer of the same parameters"
        )


def _from_first_rank(optimizer: LearnedOptimizer, canonical: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first rank passed, one parameter at a time.

    Raises:
        CheckpointError: It is no canonical state; on all ranks, none of which waits for another.
    """
    ranks = optimizer.ledger.holdings.ranks
    problem = None
    if ranks.rank == 0:
        try:
            _check(canonical)
        except CheckpointError as error:
            problem = str(error)
    if problem := ranks.broadcast(problem):
        raise CheckpointError(problem)
    mine: Mapping[str, Any] = canonical if ranks.rank == 0 else {"state": {}}
    plain = {key: value for key, value in mine.items() if key != "state"}
    plain, names = ranks.broadcast((plain, list(mine["state"])))
    return {**plain, "state": {name: ranks.broadcast(mine["state"].get(name)) for name in names}}
