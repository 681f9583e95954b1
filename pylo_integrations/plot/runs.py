"""A picture of what runs logged: losses, and what the optimizer's telemetry tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pylo_integrations.plot.axes import (
    MOST_NAMES,
    check_output,
    draw_heat_map,
    draw_lines,
    make_figure,
    save,
    shorten,
)
from pylo_integrations.plot.logs import RunLog, Series, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEANING = {"lr_mult": "learned multiplier of lr", "update_ratio": "update norm / parameter norm"}
_MOST_CURVES = 20  # that can be told apart in a panel
_MOST_RUNS = 12  # whose telemetry has panels of its own
_USUAL_LOSSES = ("train_loss", "loss", "val_loss", "validation_loss", "eval_loss", "test_loss")


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
    check_output(output)
    panels = _panels(read_runs(path))
    save(_compose(panels), output)
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
            height = 0.8 + 0.1 * min(len(rows), MOST_NAMES)
            panels.append(_Panel(height, partial(draw_heat_map, rows=rows, title=f"{run.name}: {meaning}")))
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
        return _Panel(height, partial(draw_lines, series=shown, title=title))
    note = _describe_rest(title, "curves", len(series), rest)
    title = f"{title} ({len(shown)} of {len(series)} curves)"
    return _Panel(height, partial(draw_lines, series=shown, title=title), note)


def _describe_rest(title: str, kind: str, count: int, rest: Sequence[str]) -> str:
    some = ", ".join(map(shorten, rest[:3])) + (", ..." if len(rest) > 3 else "")
    return f"{shorten(title)}: {len(rest)} of {count} {kind} left out: {some}"


def _compose(panels: Sequence[_Panel]) -> Figure:
    heights = [panel.height for panel in panels]
    figure = make_figure(figsize=(9, sum(heights) + 0.6 * len(heights)))
    column = figure.subplots(len(panels), sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        panel.paint(axes)
    column[-1].set_xlabel("step")
    return figure
