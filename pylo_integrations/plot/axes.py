"""Drawing on matplotlib's axes, whatever names and values come."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from pylo_integrations.paths import check_destination
from pylo_integrations.plot.errors import PlotError
from pylo_integrations.plot.logs import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 60  # of parameters, that fit beside a heat map
_MOST_STEPS = 2000  # columns of a heat map, more than it has pixels
_LONGEST_NAME = 60
_LEAST_VALUE, _LARGEST_VALUE = 1e-150, 1e150  # whose products are neither zero nor infinite


def make_figure(**options: Any) -> Figure:
    """An empty figure.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which needs to know about displays
    except ModuleNotFoundError:
        raise PlotError("drawing needs matplotlib: pip install matplotlib") from None
    return Figure(layout="constrained", **options)


def check_output(output: Path) -> None:
    """Find out before the work whether ``output`` can be written.

    Raises:
        PlotError: It is no path.
        OSError: Its folder does not exist, it is no file, or there is no permission.
    """
    try:
        check_destination(output, "picture")
    except ValueError as error:
        raise PlotError(str(error)) from None


def save(figure: Figure, output: Path) -> None:
    """Write a figure; the suffix of ``output`` tells the format.

    Raises:
        PlotError: matplotlib does not know the format, or :func:`check_output` raises it.
        OSError: The file cannot be written.
    """
    check_output(output)
    try:
        figure.savefig(output, dpi=110)
    except (ValueError, OverflowError) as error:
        raise PlotError(f"{output}: {error}") from None


def draw_lines(axes: Axes, series: Mapping[str, Series], title: str, marker: str = "") -> None:
    """Draw a curve for each name, on a logarithmic axis if that suits the values."""
    for name, line in series.items():
        steps = sorted(line)
        axes.plot(steps, [_bounded(line[step]) for step in steps], label=_label(name), marker=marker)
    scale(axes, [value for line in series.values() for value in line.values()])
    axes.set_title(_label(title), fontsize=10)
    if series:
        axes.legend(fontsize=8)


def shorten(name: str) -> str:
    """A name that may be a stranger's, in few printable characters."""
    name = "".join(character if character.isprintable() else "?" for character in name)
    half = _LONGEST_NAME // 2
    return name if len(name) <= 2 * half + 3 else f"{name[:half]}...{name[-half:]}"


def _label(name: str) -> str:
    """A name as matplotlib draws it as it is: no formula, and not left out of a legend."""
    escaped = shorten(name).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _bounded(value: float) -> float:
    """A value whose axis matplotlib can compute; beyond, a gap."""
    return value if value == 0 or _LEAST_VALUE < abs(value) < _LARGEST_VALUE else math.nan


def scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis if all finite values are positive, and a grid."""
    finite = [value for value in map(_bounded, values) if math.isfinite(value)]
    if finite and min(finite) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}" if max(finite) < 10 * min(finite) else "")
    axes.grid(alpha=0.3, which="both")


def draw_heat_map(axes: Axes, rows: Mapping[str, Series], title: str) -> None:
    """Draw a row for each name, in natural order from the top, over steps."""
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
    shown = range(0, len(names), math.ceil(len(names) / MOST_NAMES))
    axes.set_yticks(list(shown), [_label(names[index]) for index in shown], fontsize=5.5)
    axes.invert_yaxis()  # the first layer on top
    axes.set_title(_label(title), fontsize=10)


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that puts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() and len(part) < 20 else (0, part) for part in re.split(r"(\d+)", name)]
