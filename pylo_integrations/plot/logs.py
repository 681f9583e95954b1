"""What runs logged: reading ``metrics.csv`` and ``trainer_state.json``."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from pylo_integrations.paths import LARGEST_LOG, read_text
from pylo_integrations.plot.errors import PlotError

Series: TypeAlias = dict[int, float]
"""Values by step."""

_TELEMETRY = re.compile(r"optim/[^/]+/(?:param/(?P<param>.+)|(?P<group>group\d+))/(?P<number>[^/]+)")
_LARGEST_STEP = 2**53  # beyond, neighbours are the same float


@dataclass
class RunLog:
    """What one run logged.

    Attributes:
        name: The run's.
        series: By name.
    """

    name: str
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take in what was logged at a step; for the same step, what comes later counts."""
        for name, value in values.items():
            self.series.setdefault(name, {})[step] = value

    def losses(self) -> dict[str, Series]:
        """Series that are named a loss."""
        return {name: series for name, series in self.series.items() if "loss" in name and "/" not in name}

    def telemetry(self, number: str, of: str) -> dict[str, Series]:
        """One number of the telemetry; ``of`` each ``"param"`` or ``"group"``, by its name."""
        matches = [(_TELEMETRY.fullmatch(name), series) for name, series in self.series.items()]
        return {match[of]: series for match, series in matches if match and match[of] and match["number"] == number}


def read_runs(path: Path) -> list[RunLog]:
    """The runs in a folder and the folders below it, or of one log file.

    Raises:
        PlotError: There is none, or a log cannot be read.
    """
    if not path.exists():
        raise PlotError(f"there is no file or folder {path}")
    if not path.is_dir():
        files = [path]
    else:
        states = sorted(path.rglob("trainer_state.json"), key=_place)
        last_states = {_place(file)[0]: file for file in states}.values()  # each holds what those before it do
        files = [*path.rglob("metrics.csv"), *last_states]
    runs = []
    for folder, members in itertools.groupby(sorted(files, key=_place), key=lambda file: _place(file)[0]):
        name = str(folder.relative_to(path)) if folder != path and path.is_dir() else folder.name
        for index, entries in enumerate(_join(_read(file) for file in members)):
            runs.append(RunLog(f"{name} ({index + 1})" if index else name))
            for step, values in entries:
                runs[-1].add(step, values)
    if not any(run.series for run in runs):
        raise PlotError(f"{path} holds no numbers to draw, in {' or '.join(_READERS)}")
    return runs


Entries: TypeAlias = list[tuple[int, dict[str, float]]]
"""Steps and what was logged there."""


def _place(file: Path) -> tuple[Path, int]:
    """The folder of the run that a log belongs to, and the log's place among those there."""
    folder = file.parent
    if match := re.fullmatch(r"(?:version_|checkpoint-)(\d+)", folder.name):
        folder = folder.parent.parent if folder.parent.name == "csv" else folder.parent
    return folder, int(match[1]) if match else sys.maxsize


def _join(logs: Iterable[Entries]) -> Iterator[Entries]:
    """Runs made of the logs in a folder: one that begins after the one before it is its continuation."""
    run: Entries = []
    for entries in logs:
        if run and entries and entries[0][0] <= run[0][0]:
            yield run
            run = []
        run = run + entries
    yield run


def _read(file: Path) -> Entries:
    read = _READERS.get(file.name)
    if read is None:
        raise PlotError(f"{file} is none of {', '.join(_READERS)}")
    try:
        text = read_text(file, LARGEST_LOG, "log")
    except (OSError, ValueError) as error:
        raise PlotError(str(error)) from None
    try:
        return [(_step(entry), _numbers(entry)) for entry in read(text)]
    except RecursionError:
        raise PlotError(f"{file} is not what its name says: it is nested too deeply") from None
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise PlotError(f"{file} is not what its name says: {error!r:.200}") from None


def _read_csv(text: str) -> Iterable[Mapping[str, Any]]:
    return csv.DictReader(text.splitlines())


def _read_trainer_state(text: str) -> Iterable[Mapping[str, Any]]:
    history: list[Mapping[str, Any]] = json.loads(text)["log_history"]
    return [entry for entry in history if "train_runtime" not in entry]  # the summary of a run


_READERS = {"metrics.csv": _read_csv, "trainer_state.json": _read_trainer_state}


def _step(entry: Mapping[str, Any]) -> int:
    step = int(entry["step"])
    if abs(step) > _LARGEST_STEP:
        raise ValueError("a step beyond 2**53")
    return step


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in entry.items()
        if name not in ("step", "epoch") and isinstance(value, (int, float, str)) and value != ""
    }
