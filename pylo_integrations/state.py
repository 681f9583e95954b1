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
shapes of their own. Dtype is float32, or float64 for float64 parameters. ``torch.save`` writes it and
``torch.load(..., weights_only=True)`` reads it; :func:`save_canonical` and :func:`load_canonical` do without pickle.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pylo_integrations.checkpoints import PROGRESS, CheckpointError, Member, whole_states
from pylo_integrations.files import write_whole
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.progress import COUNTS, Progress
from pylo_integrations.sharding.pieces import parameter_names, read_flat_slices

VERSION = 1

_KEYS = {"version", "rule", "progress", "memory", "groups", "state"}
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
    else changes.

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
    names, members = _named(learned, model)
    learned.init_state()
    holdings, progress = learned._holdings, learned._progress
    to = 0 if rank0_only else None
    states = dict(whole_states(learned._states(members), members, holdings, to, device))
    if to not in (None, holdings.ranks.rank):
        return {}
    origin = learned._origin()
    return {
        "version": VERSION,
        "rule": origin["rule"],
        "progress": {name: getattr(progress, name) for name in COUNTS} | {"theta": origin["theta"]},
        "memory": {name: value.detach().to(device, copy=True) for name, value in progress.memory.items()},
        "groups": [
            {"params": [names[param] for param in group["params"]], **_options(group)} for group in learned.param_groups
        ],
        "state": {names[members[index].param]: tensors for index, tensors in states.items()},
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
        CheckpointError: Version, rule, parameter names, shapes or groups do not fit; nothing was changed.
        ShardingError: A parameter is distributed in a way that hides whole tensors.
    """
    learned = _learned(optimizer)
    if rank0_only:
        canonical = _from_first_rank(learned, canonical)
    _check(canonical, learned)
    names, members = _named(learned, model)
    mine = {names[member.param] for member in members}
    required = {names[member.param] for member in members if member.param.requires_grad}
    _check_names(canonical["state"].keys(), mine, required, "state")
    record = canonical["progress"]
    progress = Progress(**{name: record[name] for name in COUNTS}, memory=dict(canonical["memory"]))
    blob = progress.to_bytes(theta=record["theta"], rule=canonical["rule"])
    numbers = iter(range(len(members)))
    groups = [
        {
            **group,
            **_saved_options(group, names, canonical["groups"]),
            "params": [next(numbers) for _ in group["params"]],
        }
        for group in learned.param_groups
    ]
    groups[0][PROGRESS] = blob
    state = {
        index: dict(canonical["state"][names[member.param]])
        for index, member in enumerate(members)
        if names[member.param] in canonical["state"]
    }
    learned.load_state_dict({"state": state, "param_groups": groups})


def save_canonical(canonical: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a canonical state as a ``.safetensors`` file; one rank is enough.

    The file appears when it is complete, in place of one that was there.
    """
    tensors = {f"memory/{name}": value for name, value in canonical["memory"].items()}
    for param, states in canonical["state"].items():
        tensors |= {f"state/{param}/{name}": value for name, value in states.items()}
    header = {key: value for key, value in canonical.items() if key not in ("memory", "state")}
    header["state"] = list(canonical["state"])
    contiguous = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {_HEADER: json.dumps(header)}
    write_whole(Path(path), lambda temporary: safetensors.torch.save_file(contiguous, str(temporary), metadata))


def load_canonical(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what :func:`save_canonical` wrote; tensors are on the CPU.

    Raises:
        FileNotFoundError: There is no such file.
        CheckpointError: The file holds something else, or is damaged.
    """
    try:
        with safetensors.safe_open(os.fspath(path), "pt") as file:
            canonical: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
            canonical["memory"], canonical["state"] = {}, {name: {} for name in canonical["state"]}
            for key in file.keys():  # noqa: SIM118 # not a mapping
                kind, _, rest = key.partition("/")
                param, _, name = rest.rpartition("/")
                (canonical["state"][param] if kind == "state" else canonical["memory"])[name] = file.get_tensor(key)
    except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{os.fspath(path)} is no canonical optimizer state ({type(error).__name__}: {error}): pass a file that "
            "save_canonical() wrote"
        ) from error
    return canonical


def _learned(optimizer: torch.optim.Optimizer) -> LearnedOptimizer:
    learned = unwrap_optimizer(optimizer)
    if learned is None:
        raise TypeError(f"optimizer is {type(optimizer).__name__}, not a learned optimizer or a wrapper of one")
    return learned


def _named(optimizer: LearnedOptimizer, model: nn.Module) -> tuple[dict[Tensor, str], list[Member]]:
    """Names of the optimizer's parameters, and what is here of them."""
    for module in model.modules():
        reshard = getattr(module, "reshard", None)  # of fully_shard(): a forward pass leaves gathered parameters
        if callable(reshard) and hasattr(module, "unshard"):
            reshard()
    optimizer._holdings.flat_slices.update(read_flat_slices(model))
    names, members = parameter_names(model), optimizer._members()
    if strange := [i for i, member in enumerate(members) if member.param not in names]:
        raise CheckpointError(
            f"parameters {strange} of the optimizer are not parameters of the model: pass the model, wrapped as it is "
            "trained, whose parameters the optimizer steps"
        )
    counts = Counter(names[member.param] for member in members)
    if double := sorted(name for name, count in counts.items() if count > 1):
        raise CheckpointError(f"several parameters are named {double} once wrappers are left out: rename the modules")
    return names, members


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that are plain values; tensors of one element become numbers."""
    numbers = {key: value.item() for key, value in group.items() if isinstance(value, Tensor) and value.numel() == 1}
    plain = (bool, int, float, str, type(None))
    return {key: value for key, value in {**group, **numbers}.items() if isinstance(value, plain)}


def _saved_options(group: Mapping[str, Any], names: Mapping[Tensor, str], saved: Any) -> dict[str, Any]:
    """What the saved groups say about the options of a group; numbers take the form that they have here."""
    mine = {names[param] for param in group["params"]}
    matching = [{k: v for k, v in other.items() if k != "params"} for other in saved if mine & set(other["params"])]
    if any(options != matching[0] for options in matching):
        differing = sorted(key for key in matching[0] if any(other.get(key) != matching[0][key] for other in matching))
        raise CheckpointError(
            f"a parameter group has parameters whose saved groups differ in {differing}: group the parameters as in "
            "the run that was saved"
        )
    found = dict(matching[0]) if matching else {}
    for key, value in found.items():
        if isinstance(group.get(key), Tensor):
            found[key] = torch.full_like(group[key], value)
    return found


def _check(canonical: Mapping[str, Any], optimizer: LearnedOptimizer) -> None:
    version = canonical.get("version")
    if version != VERSION or not canonical.keys() >= _KEYS:
        raise CheckpointError(
            f"canonical has version {version!r} and keys {sorted(canonical)}; this package reads version {VERSION} "
            f"with keys {sorted(_KEYS)}: pass what to_canonical() returned, and newer versions to a newer package"
        )
    rule = type(optimizer.rule).__name__
    if canonical["rule"] != rule:
        raise CheckpointError(
            f"canonical is of an optimizer with the rule {canonical['rule']}, and {type(optimizer).__name__} has "
            f"{rule}: create the optimizer that was saved, or start this one without its state"
        )


def _check_names(found: Any, mine: set[str], required: set[str], what: str) -> None:
    missing, unknown = sorted(required - set(found)), sorted(set(found) - mine)
    if missing or unknown:
        raise CheckpointError(
            f"the {what} in canonical lacks parameters {missing} and has unknown ones {unknown}: pass the same model "
            "as to to_canonical(), from the same module on, and an optimizer of the same parameters"
        )


def _from_first_rank(optimizer: LearnedOptimizer, canonical: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the first rank passed, one parameter at a time."""
    ranks = optimizer._holdings.ranks
    plain = {key: value for key, value in dict(canonical or {}).items() if key != "state"}
    plain, names = ranks.broadcast((plain, list((canonical or {}).get("state", ()))))
    mine: Mapping[str, Any] = canonical["state"] if ranks.rank == 0 and names else {}
    return {**plain, "state": {name: ranks.broadcast(mine.get(name)) for name in names}}
