"""Configs of meta-training: YAML files, read into checked records."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import torch

from pylo_integrations.catalog import get_optimizer_info
from pylo_integrations.metatrain.episodes import Objective, Reparametrisation
from pylo_integrations.metatrain.spaces import LINEAR_SPACES
from pylo_integrations.metatrain.tasks import Family, find_family
from pylo_integrations.paths import LARGEST_CONFIG, read_text
from pylo_integrations.profiles import architecture_of
from pylo_integrations.schedules import Shape

_T = TypeVar("_T")

LARGEST_COUNT = 2**31 - 1
MOST_THREADS = 1024
LARGEST_EXPONENT = 20  # whose power of ten float32 can square
WIDEST_THETA = 2**14
"""Of networks that are constructed; counts, threads and widths beyond these are slips that would fail after hours."""


class ConfigError(ValueError):
    """A config is wrong; the message names the file, the entry and the remedy."""


@dataclass(frozen=True)
class Start:
    """Where theta starts: weights, or a theta constructed by :mod:`pylo_integrations.metatrain.spaces`.

    Attributes:
        weights: A ``weights`` argument, such as a path or ``builtin:<name>``; "" to construct a theta.
        hidden: Width of the constructed MLP; this and the others by default as the space has it.
        lstm: Width of the constructed LSTM, of optimizers that have one.
        step: Root mean square of the first step; of ``celo``, relative to that of the parameter.
        exp_mult: The rule's constant.
        step_mult: The rule's constant.
    """

    weights: str = ""
    hidden: int | None = None
    lstm: int | None = None
    step: float | None = None
    exp_mult: float | None = None
    step_mult: float | None = None

    def construction(self) -> dict[str, float]:
        """What is given of a theta to construct."""
        given = {name: getattr(self, name) for name in ("hidden", "lstm", "step", "exp_mult", "step_mult")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Stage:
    """A part of meta-training. One iteration unrolls every group of its families by one truncation.

    Attributes:
        iterations: How many.
        space: What of theta is free, see :mod:`pylo_integrations.metatrain.spaces`.
        scales: For space ``full``, factors on the changes of arrays, by patterns of their names.
        estimator: See :mod:`pylo_integrations.metatrain.estimators`.
        pairs: Antithetic pairs in a group; members, for ``backprop``.
        groups: Of each family, in different phases of their episodes.
        families: Drawn at random for every iteration; None for all of them, every time.
        truncation: Steps.
        horizon: Least and greatest length of an episode; lengths are log-uniform between.
        sigma: Standard deviation of perturbations.
        clip: Bound on the difference within a pair; for ``backprop``, on the gradient's norm.
        lr: Of Adam, which moves theta's vector.
        lr_end: Fraction of ``lr`` at the end; it falls along a cosine.
        average: Decay of the average of theta that is evaluated and saved.
    """

    iterations: int
    space: Literal["full", "linear"] = "full"
    scales: Mapping[str, float] = field(default_factory=dict)
    estimator: Literal["pes", "es", "backprop"] = "pes"
    pairs: int = 8
    groups: int = 1
    families: int | None = None
    truncation: int = 20
    horizon: tuple[int, int] = (100, 1000)
    sigma: float = 0.03
    clip: float = 0.3
    lr: float = 0.01
    lr_end: float = 0.1
    average: float = 0.98


@dataclass(frozen=True)
class Evaluation:
    """How theta is scored on the selection and the held-out families.

    Attributes:
        every: Iterations between evaluations.
        horizon: Steps of every run.
        tasks: Drawn from every family, the same each time.
        seeds: Networks of every task.
        adamw: Learning rates of AdamW to compare with at the end; empty for no comparison.
    """

    every: int = 50
    horizon: int = 200
    tasks: int = 2
    seeds: int = 2
    adamw: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 0.1)


@dataclass(frozen=True)
class Config:
    """A meta-training.

    Attributes:
        name: Of the theta.
        optimizer: Catalogue name.
        train: Families that theta is trained on.
        selection: Families by whose score the theta to keep is chosen.
        held_out: Families that only report.
        stages: In order; each begins at the best theta so far, or where the one before ended if there is no selection.
        start: Where theta starts.
        seed: Of everything random.
        device: A torch device.
        threads: Of the CPU; results are the same bit for bit only for the same number.
        compile: Whether the rule's local functions go through ``torch.compile``.
        objective: What is lowered.
        reparametrisation: None to use parameters as they are.
        lr: The learning rate; None for the optimizer's default.
        schedules: Of the learning rate; every episode draws one, and scores are means over all.
        base_width: Width at which muP's multipliers are 1; None for no multipliers.
        evaluation: How theta is scored.
        checkpoint_seconds: Wall time between checkpoints.
        licence: Of the theta, an SPDX identifier.
    """

    name: str
    optimizer: str
    train: tuple[Family, ...]
    stages: tuple[Stage, ...]
    selection: tuple[Family, ...] = ()
    held_out: tuple[Family, ...] = ()
    start: Start = field(default_factory=Start)
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    objective: Objective = field(default_factory=Objective)
    reparametrisation: Reparametrisation | None = None
    lr: float | None = None
    schedules: tuple[Shape, ...] = ("constant",)
    base_width: int | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint_seconds: float = 60.0
    licence: str = ""

    def families(self) -> Iterator[tuple[str, Family]]:
        """All families with the set that each is in."""
        for part in ("train", "selection", "held_out"):
            for family in getattr(self, part):
                yield part, family

    def record(self) -> dict[str, Any]:
        """The config as JSON-serialisable data."""
        plain: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("train", "selection", "held_out"):
                value = [
                    {
                        "kind": family.kind,
                        "name": family.name,
                        "weight": family.weight,
                        **{k: list(v) for k, v in family.options.items()},
                    }
                    for family in value
                ]
            elif isinstance(value, tuple):
                value = [_plain(item) for item in value]
            plain[entry.name] = _plain(value)
        return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {key: _plain(item) for key, item in dataclasses.asdict(value).items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


# -- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: Path, **overrides: Any) -> Config:
    """Read a YAML file.

    Args:
        path: The file.
        overrides: Entries that replace those of the file.

    Raises:
        ConfigError: No such file, no YAML, or wrong contents.
    """
    import yaml

    try:
        text = read_text(path, LARGEST_CONFIG, "config")
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from None
    try:
        entries = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    except Exception as error:  # what the parser meets in values such as !!int "", of any type
        raise ConfigError(f"{path} holds a value that YAML cannot read: {error!r:.200}") from None
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} must be a mapping of entries such as name, optimizer, train and stages")
    try:
        return read_config({**entries, **overrides}, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_config(entries: Mapping[str, Any], folder: Path) -> Config:
    """Check entries and make a config of them.

    Args:
        entries: As in a YAML file.
        folder: What paths of task files are relative to.

    Raises:
        ConfigError: Unknown or missing entries, wrong types or values; families that are in two sets.
    """
    values = dict(entries)
    for part in ("train", "selection", "held_out"):
        if part in values:
            values[part] = _read_families(values[part], part, folder)
    config = _read(Config, values, "")
    _check(config)
    return config


def _read_families(entries: Any, part: str, folder: Path) -> tuple[Family, ...]:
    if not isinstance(entries, list):
        raise ConfigError(f"{part} must be a list of families such as {{kind: image_mlp, width: [16, 32]}}")
    families = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
            raise ConfigError(f"{part}[{index}] must be a mapping with a kind, not {_show(entry)}")
        options = dict(entry)
        try:
            families.append(find_family(options.pop("kind"), folder)(**options))
        except (TypeError, ValueError, OSError) as error:
            raise ConfigError(f"{part}[{index}]: {error}") from None
    return tuple(families)


def _read(cls: type[_T], entries: Any, where: str) -> _T:
    """A dataclass from a mapping, entry by entry."""
    if not isinstance(entries, Mapping):
        raise ConfigError(f"{where or 'the config'} must be a mapping, not {_show(entries)}")
    hints = typing.get_type_hints(cls)
    known = {entry.name: entry for entry in dataclasses.fields(cls)}  # type: ignore[arg-type]
    dot = f"{where}." if where else ""
    for key in entries:
        if key not in known:
            shown = key if isinstance(key, str) and len(key) < 60 else _show(key)
            near = difflib.get_close_matches(shown, known, n=1)
            hint = f"did you mean {dot}{near[0]}?" if near else f"there are {', '.join(sorted(known))}"
            raise ConfigError(f"unknown entry {dot}{shown}; {hint}")
    for name, entry in known.items():
        if name not in entries and entry.default is entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"entry {dot}{name} is missing")
    return cls(**{key: _convert(value, hints[key], f"{dot}{key}") for key, value in entries.items()})


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # aliases make a few lines of YAML unfold to gigabytes


def _show(value: Any) -> str:
    """A value for a message."""
    try:
        return f"{_SHORT.repr(value):.200}"
    except ValueError:  # an integer of thousands of digits
        return f"a huge {type(value).__name__}"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A value as its type hint wants it."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return value if isinstance(value, hint) else _read(hint, value, where)
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        if not isinstance(value, str) or value not in args:
            raise ConfigError(f"{where}={_show(value)} is unknown; choose one of {list(args)}")
        return value
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, next(arg for arg in args if arg is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where}={_show(value)} must be a list")
        if args[-1] is not ...:
            if len(value) != len(args):
                raise ConfigError(f"{where}={_show(value)} must have {len(args)} entries")
            return tuple(_convert(item, arg, where) for item, arg in zip(value, args, strict=True))
        return tuple(_convert(item, args[0], f"{where}[{index}]") for index, item in enumerate(value))
    if origin is not None:  # a mapping of numbers
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={_show(value)} must be a mapping")
        return {str(key): _convert(item, args[1], f"{where}.{key}") for key, item in value.items()}
    return _convert_plain(value, hint, where)


def _convert_plain(value: Any, hint: type, where: str) -> Any:
    if hint is float:
        try:  # YAML reads 1e-3 as a string
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ConfigError(f"{where}={_show(value)} must be a finite number")
        return number
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{where}={_show(value)} must be of type {hint.__name__}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}={_show(value)} has more than 64 bits")
    return value


def _check(config: Config) -> None:
    """What no type can tell."""
    try:
        get_optimizer_info(config.optimizer)
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from None
    try:
        torch.empty(1, device=config.device).cpu()  # which "meta" cannot do
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ConfigError(f"device={config.device!r}: not usable here, {error!s:.200}; use 'cpu'") from None
    if not config.train:
        raise ConfigError("train needs at least one family")
    if not config.schedules:
        raise ConfigError("schedules needs at least one, such as 'constant'")
    if not config.stages:
        raise ConfigError("stages needs at least one stage")
    constructs = not config.start.weights
    architecture = architecture_of(config.optimizer)
    if constructs and architecture not in LINEAR_SPACES:
        raise ConfigError(
            f"start.weights is needed for {config.optimizer}: only a theta of {' or '.join(LINEAR_SPACES)} can be "
            "constructed; give a path or builtin:<name> to begin from"
        )
    widest = max(config.start.hidden or 0, config.start.lstm or 0)
    if widest > WIDEST_THETA:
        raise ConfigError(f"start: a width of {widest} must be at most {WIDEST_THETA}")
    if constructs:
        try:
            LINEAR_SPACES[architecture](**config.start.construction())
        except (TypeError, ValueError) as error:
            raise ConfigError(f"start: {error}") from None
    positive: dict[str, float] = {"threads": config.threads, "checkpoint_seconds": config.checkpoint_seconds}
    positive |= {
        f"evaluation.{name}": getattr(config.evaluation, name) for name in ("every", "horizon", "tasks", "seeds")
    }
    positive |= {f"objective.{name}": getattr(config.objective, name) for name in ("floor", "ceiling")}
    positive |= {name: value for name in ("lr", "base_width") if (value := getattr(config, name)) is not None}
    for index, stage in enumerate(config.stages):
        where = f"stages[{index}]"
        names = ("iterations", "pairs", "groups", "families", "truncation", "sigma", "clip", "lr")
        positive |= {f"{where}.{name}": value for name in names if (value := getattr(stage, name)) is not None}
        if stage.families is not None and stage.families > len(config.train):
            raise ConfigError(f"{where}.families={stage.families} must be at most those of train, {len(config.train)}")
        low, high = stage.horizon
        if not 1 <= low <= high <= LARGEST_COUNT:
            raise ConfigError(f"{where}.horizon={[low, high]} must be the least and the greatest length, both positive")
        if not 0 <= stage.average < 1:
            raise ConfigError(f"{where}.average={stage.average} must be in [0, 1)")
        if not 0 <= stage.lr_end <= 1:
            raise ConfigError(f"{where}.lr_end={stage.lr_end} must be a fraction of lr, in [0, 1]")
        if stage.space == "linear" and (index or not constructs):
            raise ConfigError(f"{where}.space='linear' is for the first stage only, of a theta that is constructed")
        if stage.scales and stage.space == "linear":
            raise ConfigError(f"{where}.scales are for space 'full'")
    lrs = config.evaluation.adamw
    positive |= {f"evaluation.adamw[{index}]": lr for index, lr in enumerate(lrs)}
    for name, value in positive.items():
        if not value > 0:
            raise ConfigError(f"{name}={value} must be positive")
        most = MOST_THREADS if name == "threads" else LARGEST_COUNT
        if value > most:
            raise ConfigError(f"{name}={value} must be at most {most}")
    if (drawn := config.reparametrisation) and not -LARGEST_EXPONENT <= drawn.low <= drawn.high <= LARGEST_EXPONENT:
        raise ConfigError(
            f"reparametrisation.low={drawn.low} must be at most high={drawn.high}, both within +-{LARGEST_EXPONENT}"
        )
    _check_disjoint(list(config.families()))


def _check_disjoint(families: list[tuple[str, Family]]) -> None:
    """Names differ, and no task can be drawn from families of two sets."""
    for index, (part, family) in enumerate(families):
        for earlier_part, earlier in families[:index]:
            if part != earlier_part and family.overlaps(earlier):
                raise ConfigError(
                    f"family {family.name} is in {part} and as {earlier.name} in {earlier_part}: the sets must be "
                    "disjoint. Leave it out of one, or give some option values that have none in common"
                )
            if family.name == earlier.name:
                raise ConfigError(
                    f"two families are called {family.name} ({earlier_part}, {part}); give one another name:"
                )
