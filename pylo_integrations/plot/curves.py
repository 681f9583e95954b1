"""Pictures of numbers that are no log: curves, and curves with bands."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pylo_integrations.plot.axes import draw_lines, make_figure, save, scale
from pylo_integrations.plot.logs import Series

_PANELS_ABREAST = 4


def plot_curves(panels: Sequence[tuple[str, str, Mapping[str, Series]]], output: Path) -> None:
    """Draw curves over logarithmic axes into the picture ``output``.

    Args:
        panels: Of each its title, the meaning of its horizontal axis, and its curves by name.
        output: Its suffix tells the format.

    Raises:
        PlotError: matplotlib is not installed or does not know the format.
    """
    figure = make_figure(figsize=(9, 4))
    for axes, (title, meaning, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_lines(axes, curves, title, marker="o")
        axes.set_xscale("log")
        axes.set_xlabel(meaning)
    save(figure, output)


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
    figure = make_figure(figsize=(4.2 * columns, 3 * rows + 0.6))
    names = list(dict.fromkeys(name for _, bands in panels for name in bands))
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (title, bands) in zip(grid, panels, strict=False):
        for name, band in bands.items():
            colour = f"C{names.index(name)}"
            axes.plot(band.steps, band.middle, label=name, color=colour)
            axes.fill_between(band.steps, band.low, band.high, color=colour, alpha=0.2, linewidth=0)
        scale(axes, [value for band in bands.values() for value in band.middle])
        axes.set_title(title, fontsize=10)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(meaning, fontsize=10)
    lines = {str(line.get_label()): line for axes in figure.axes for line in axes.lines}
    figure.legend(
        list(lines.values()), list(lines), loc="outside upper center", ncols=max(1, min(6, len(names))), fontsize=9
    )
    save(figure, output)
