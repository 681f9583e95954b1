"""Pictures of what runs logged: ``pylo plot``.

Reads ``metrics.csv`` of Lightning's ``CSVLogger`` and ``trainer_state.json`` of the Hugging Face Trainer; draws the
losses of all runs in a folder and, where a run logged telemetry, the optimizer's update ratio and what it decided.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy

from pylo_integrations.paths import LARGEST_LOG, check_destination, read_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series: TypeAlias = dict[int, float]
"""Values by step."""

_TELEMETRY = re.compile(r"optim/[^/]+/(?:param/(?P<param>.+)|(?P<group>group\d+))/(?P<number>[^/]+)")
_MEANING = {"lr_mult": "learned multiplier of lr", "update_ratio": "update norm / parameter norm"}
_MOST_NAMES = 60  # of parameters, that fit beside a heat map
_MOST_CURVES = 20  # that can be told apart in a panel
_MOST_RUNS = 12  # whose telemetry has panels of its own
_MOST_STEPS = 2000  # columns of a heat map, more than it has pixels
_LONGEST_NAME = 60
_LEAST_VALUE, _LARGEST_VALUE = 1e-150, 1e150  # whose products are neither zero nor infinite
_LARGEST_STEP = 2**53  # beyond, neighbours are the same float
_USUAL_LOSSES = ("train_loss", "loss", "val_loss", "validation_loss", "eval_loss", "test_loss")
_PANELS_ABREAST = 4


class PlotError(ValueError):
    """There is nothing to draw, or nothing to draw it with."""


# -- reading -------------------------------------------------------------------------------------------------------


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
        raise PlotError(f"there is no {path}")
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


# -- drawing -------------------------------------------------------------------------------------------------------


def draw(runs: Sequence[RunLog]) -> Figure:
    """Losses of all runs and, of each run that has telemetry, the update ratio and a heat map over time.

    The heat map shows ``lr_mult`` of every parameter if there is such, else ``update_ratio``; groups stand for
    parameters if telemetry was not per parameter.

    Raises:
        PlotError: matplotlib is not installed.
    """
    return _compose(_panels(runs))


def plot(path: Path, output: Path) -> list[str]:
    """Draw the runs in ``path`` (:func:`read_runs`) into the picture ``output``, whose suffix tells its format.

    Returns:
        What was left out for want of room, a line for each panel.

    Raises:
        PlotError: There is nothing to draw, matplotlib is not installed or does not know the format.
        OSError: The picture cannot be written.
    """
    _check_output(output)
    panels = _panels(read_runs(path))
    _save(_compose(panels), output)
    return [panel.left_out for panel in panels if panel.left_out]


@dataclass(frozen=True)
class _Panel:
    """A part of a picture.

    Attributes:
        height: In inches.
        paint: Draws it.
        left_out: What it does not show, or "".
    """

    height: float
    paint: Callable[[Axes], None]
    left_out: str = ""


def _panels(runs: Sequence[RunLog]) -> list[_Panel]:
    losses = {
        name if len(runs) == 1 else f"{run.name}: {name}": series
        for run in runs
        for name, series in run.losses().items()
    }
    panels = [_lines_panel(3.0, losses, "loss")]
    watched = [run for run in runs if run.telemetry("update_ratio", "group") or _heat_rows(run)[1]]
    for run in watched[:_MOST_RUNS]:
        if ratios := run.telemetry("update_ratio", of="group"):
            panels.append(_lines_panel(2.0, ratios, f"{run.name}: {_MEANING['update_ratio']}"))
        meaning, rows = _heat_rows(run)
        if rows:
            height = 0.8 + 0.1 * min(len(rows), _MOST_NAMES)
            panels.append(_Panel(height, partial(_draw_heat_map, rows=rows, title=f"{run.name}: {meaning}")))
    if rest := [run.name for run in watched[_MOST_RUNS:]]:
        panels[-1] = replace(panels[-1], left_out=_describe_rest("telemetry", "runs", len(watched), rest))
    return panels


def _heat_rows(run: RunLog) -> tuple[str, dict[str, Series]]:
    """The number that a run's heat map shows, by parameter or group: the first of those that there are."""
    for number, meaning in _MEANING.items():
        if rows := run.telemetry(number, of="param") or run.telemetry(number, of="group"):
            return meaning, rows
    return "", {}


def _lines_panel(height: float, series: Mapping[str, Series], title: str) -> _Panel:
    """Curves; of very many the most useful: those with the usual names, then the longest."""

    def use(name: str) -> tuple[bool, int]:
        return name.rpartition(": ")[2] not in _USUAL_LOSSES, -len(series[name])

    chosen = set(sorted(series, key=use)[:_MOST_CURVES])
    shown = {name: line for name, line in series.items() if name in chosen}
    rest = [name for name in series if name not in chosen]
    if not rest:
        return _Panel(height, partial(_draw_lines, series=shown, title=title))
    note = _describe_rest(title, "curves", len(series), rest)
    title = f"{title} ({len(shown)} of {len(series)} curves)"
    return _Panel(height, partial(_draw_lines, series=shown, title=title), note)


def _describe_rest(title: str, kind: str, count: int, rest: Sequence[str]) -> str:
    some = ", ".join(map(_shorten, rest[:3])) + (", ..." if len(rest) > 3 else "")
    return f"{_shorten(title)}: {len(rest)} of {count} {kind} left out: {some}"


def _compose(panels: Sequence[_Panel]) -> Figure:
    heights = [panel.height for panel in panels]
    figure = _figure(figsize=(9, sum(heights) + 0.6 * len(heights)))
    column = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        panel.paint(axes)
    column[-1].set_xlabel("step")
    return figure


def plot_curves(panels: Sequence[tuple[str, str, Mapping[str, Series]]], output: Path) -> None:
    """Draw curves over logarithmic axes into the picture ``output``.

    Args:
        panels: Of each its title, the meaning of its horizontal axis, and its curves by name.
        output: Its suffix tells the format.

    Raises:
        PlotError: matplotlib is not installed or does not know the format.
    """
    figure = _figure(figsize=(9, 4))
    for axes, (title, meaning, curves) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _draw_lines(axes, curves, title, marker="o")
        axes.set_xscale("log")
        axes.set_xlabel(meaning)
    _save(figure, output)


@dataclass(frozen=True)
class Band:
    """A curve with a band around it: ``middle``, between ``low`` and ``high``, at ``steps``."""

    steps: Sequence[int]
    middle: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def plot_bands(panels: Sequence[tuple[str, Mapping[str, Band]]], output: Path, meaning: str) -> None:
    """Draw curves with bands, a panel for each title, into the picture ``output``.

    Args:
        panels: Of each its title, and its curves by name; a name has the same colour everywhere.
        output: Its suffix tells the format.
        meaning: Of the vertical axes.

    Raises:
        PlotError: matplotlib is not installed or does not know the format.
    """
    columns = min(_PANELS_ABREAST, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(figsize=(4.2 * columns, 3 * rows + 0.6))
    names = list(dict.fromkeys(name for _, bands in panels for name in bands))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, bands) in zip(grid, panels, strict=False):
        for name, band in bands.items():
            colour = f"C{names.index(name)}"
            axes.plot(band.steps, band.middle, label=name, color=colour)
            axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
        _scale(axes, [value for band in bands.values() for value in band.middle])
        axes.set_title(title, fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(meaning, fontsize=10)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        list(lines.values()), list(lines), loc="outside upper center", ncols=max(1, min(6, len(names))), fontsize=9
    )
    _save(figure, output)


def _figure(**options: Any) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot, which needs to know about displays
    except ModuleNotFoundError:
        raise PlotError("drawing needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", **options)


def _check_output(output: Path) -> None:
    try:
        check_destination(output, "picture")
    except ValueError as error:
        raise PlotError(str(error)) from None


def _save(figure: Figure, output: Path) -> None:
    _check_output(output)
    try:
        figure.savefig(output, dpi=110)
    except (ValueError, OverflowError) as error:
        raise PlotError(f"{output}: {error}") from None


def _draw_lines(axes: Axes, series: Mapping[str, Series], title: str, marker: str = "") -> None:
    for name, line in series.items():
        steps = sorted(line)
        axes.plot(steps, [_bounded(line[step]) for step in steps], label=_label(name), marker=marker)
    _scale(axes, [value for line in series.values() for value in line.values()])
    axes.set_title(_label(title), fontsize=10)
    if series:
        axes.legend(fontsize=8)


def _shorten(name: str) -> str:
    """A name that may be a stranger's, in few printable characters."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    half = _LONGEST_NAME // 2
    return name if len(name) <= 2 * half + 3 else f"{name[:half]}...{name[-half:]}"


def _label(name: str) -> str:
    """A name as matplotlib draws it as it is: no formula, and not left out of a legend."""
    escaped = _shorten(name).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _bounded(value: float) -> float:
    """A value whose axis matplotlib can compute; beyond, a gap."""
    return value if value == 0 or _LEAST_VALUE < abs(value) < _LARGEST_VALUE else math.nan


def _scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis if all finite values are positive, and a grid."""
    finite = [value for value in map(_bounded, values) if math.isfinite(value)]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if max(finite) < 10 * min(finite) else "")
    axes.grid(alpha=0.3, which="both")


def _draw_heat_map(axes: Axes, rows: Mapping[str, Series], title: str) -> None:
    from matplotlib.colors import LogNorm, Normalize

    names = sorted(rows, key=_natural)
    steps = sorted({step for row in rows.values() for step in row})
    steps = steps[:: math.ceil(len(steps) / _MOST_STEPS)]
    table = numpy.array([[_bounded(rows[name].get(step, math.nan)) for step in steps] for name in names])
    positive = table[table > 0]
    is_signed = bool((table < 0).any()) or not positive.size
    norm = Normalize() if is_signed else LogNorm(positive.min(), positive.max())
    mesh = axes.pcolormesh(steps, range(len(names)), table, shading="nearest", norm=norm, cmap="viridis")
    axes.figure.colorbar(mesh, ax=axes)
    shown = range(0, len(names), math.ceil(len(names) / _MOST_NAMES))
    axes.set_yticks(list(shown), [_label(names[index]) for index in shown], fontsize=5.5)
    axes.invert_yaxis()  # the first layer on top
    axes.set_title(_label(title), fontsize=10)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (0, part) for part in re.split(r"(\d+)", name)]
