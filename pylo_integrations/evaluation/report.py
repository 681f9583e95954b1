"""Results as Markdown, and a picture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TypeAlias

from pylo_integrations.evaluation.comparison import compare, distance_of
from pylo_integrations.evaluation.results import GLOBAL, Result, Results, number_of, tuned
from pylo_integrations.evaluation.runs import Record
from pylo_integrations.evaluation.tasks import TASKS, split_width
from pylo_integrations.plot import Band, plot_bands


def write_report(records: Sequence[Record], folder: Path, learned: Sequence[str] | None = None) -> list[Path]:
    """Write ``report.md`` and a picture for every horizon, ``report-<steps>.png``.

    Tasks that were run at other widths have a picture of their own, ``widths-<steps>.png``.

    Args:
        records: Runs.
        folder: Where to.
        learned: Names of learned optimizers to show; by default all.

    Returns:
        The files.

    Raises:
        PlotError: matplotlib is not installed.
    """
    horizons = sorted({record["steps"] for record in records})
    results = [Results(records, steps, learned) for steps in horizons]
    text, pictures = folder / "report.md", list[Path]()
    text.write_text("\n\n".join(map(describe, results)) + "\n", encoding="utf-8")
    for found in results:
        for kind, panels in (("report", _panels(found)), ("widths", _width_panels(found))):
            if panels:
                pictures.append(folder / f"{kind}-{found.steps}.png")
                plot_bands(panels, pictures[-1], "training loss")
    return [text, *pictures]


def describe(results: Results) -> str:
    """The results of a horizon in Markdown: counts, losses task by task, and everything."""
    seeds = {len(result.runs) for task in results.tasks for t in results.titles if (result := results.result(task, t))}
    notes = ["No setting of AdamW was run on all tasks."]
    if results.global_setting:
        notes = [f"AdamW's global setting: `{results.global_setting}`."]
    if edge := results.at_the_edge():
        notes.append(f"Best at an end of its grid: {', '.join(edge)}.")
    if len(seeds) > 1:
        notes.append(f"Incomplete: settings have between {min(seeds)} and {max(seeds)} seeds.")
    return "\n\n".join(
        [
            f"## {results.steps} steps",
            _table(["optimizer", *(head for head, *_ in _COUNTS)], _count_rows(results)),
            " ".join(notes),
            *_comparisons(results),
            *_distances(results),
            f"### Final training loss, {results.steps} steps",
            _table(["task", *results.titles], _rows(results, "train")),
            f"### Final validation loss, {results.steps} steps",
            _table(["task", *results.titles], _rows(results, "validation")),
            f"### All figures, {results.steps} steps",
            *(_details(results, task) for task in results.tasks),
        ]
    )


_COUNTS = (
    ("reaches tuned AdamW", "reaches", tuned("adamw")),
    ("ends below tuned AdamW", "tuned_train", tuned("adamw")),
    ("validation below tuned AdamW", "tuned_validation", tuned("adamw")),
    ("ends below global AdamW", "global_train", GLOBAL),
    ("validation below global AdamW", "global_validation", GLOBAL),
    ("diverged", "diverged", ""),
)
"""Columns: their heads, attributes of :class:`Counts`, and whom they compare with."""


def _count_rows(results: Results) -> Iterable[list[str]]:
    for title in results.titles:
        counts = results.counts(title)
        cells = ("" if title == rival else f"{getattr(counts, name)} of {counts.tasks}" for _, name, rival in _COUNTS)
        yield [title, *cells]


_COMPARISON = (
    "optimizer",
    "tasks",
    "fewer steps",
    "less time",
    "ends below",
    "validation below",
    "worst task",
    "diverged",
)


def _comparisons(results: Results) -> Iterable[str]:
    """A table for each baseline that others are measured by."""
    for rival in (tuned("adamw"), tuned("muon")):
        rows = []
        for title in results.contenders:
            if title == rival or (found := compare(results, title, rival)) is None:
                continue
            cells = [f"{found.below} of {found.tasks}", f"{found.validation_below} of {found.tasks}"]
            rows.append(
                [
                    title,
                    str(found.tasks),
                    _ratio(found.steps, found.steps_interval),
                    _ratio(found.time, found.time_interval),
                    *cells,
                    f"{found.worst_task} {found.worst:.2f}",
                    f"{found.diverged} of {found.tasks}",
                ]
            )
        if rows:
            yield f"### Against {rival}, {results.steps} steps"
            yield _table(_COMPARISON, rows)


def _ratio(mean: float, interval: tuple[float, float]) -> str:
    return f"{mean:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _distances(results: Results) -> Iterable[str]:
    """How far learning rates are from the best ones, where several factors on them were run."""
    found = {name: distance for name in results.factors if (distance := distance_of(results, name))}
    if found:
        yield f"### Best factor on the learning rate, {results.steps} steps"
        rows = [["median distance", *(f"{distance.median:g}" for distance in found.values())]]
        rows += [["largest distance", *(f"{distance.worst:g}" for distance in found.values())]]
        rows += [
            [task, *(f"{distance.best[task]:g}" if task in distance.best else "" for distance in found.values())]
            for task in results.tasks
        ]
        yield _table(["task", *(f"{name}, of {_factors(distance.factors)}" for name, distance in found.items())], rows)


def _factors(factors: Sequence[float]) -> str:
    return ", ".join(f"{factor:g}" for factor in factors)


def _rows(results: Results, name: str) -> Iterable[list[str]]:
    """A line a task, medians; bold where the median is not above tuned AdamW's."""
    for task in results.tasks:
        cells = [task]
        rival = results.result(task, tuned("adamw"))
        for title in results.titles:
            result = results.result(task, title)
            if result is None:
                cells.append("")
                continue
            value = result.median(name)
            wins = rival is not None and title != tuned("adamw") and value <= rival.median(name)
            cells.append(f"**{_loss(value)}**" if wins else _loss(value))
        yield cells


_DETAILS = (
    "optimizer",
    "setting",
    "train",
    "best train",
    "batches",
    "best batches",
    "largest spike",
    "validation",
    "accuracy",
    "steps to tuned AdamW",
    "ms/step",
    "in the optimizer",
)


def _details(results: Results, task: str) -> str:
    found = [result for title in results.titles if (result := results.result(task, title))]
    name, width = split_width(task)
    title = f"#### {task}" + (f": {TASKS[name].description}" if name in TASKS else "") + ", at that width" * bool(width)
    return f"{title}\n\n{_table(_DETAILS, map(_detail_row, found))}"


def _detail_row(result: Result) -> list[str]:
    diverged = f" ({result.diverged} of {len(result.runs)} diverged)" if result.diverged else ""
    losses = [_spread(result, name) for name in ("train", "train_best", "batches", "batches_best")]
    spikes = [run["spike"] for run in result.runs.values() if run.get("spike") is not None]
    accuracies = [run["accuracy"] for run in result.runs.values() if run["accuracy"] is not None]
    times = [f"{1e3 * result.median(name):.2f}" for name in ("step_seconds", "optimizer_seconds")]
    return [
        result.title,
        f"`{result.setting}`{diverged}",
        *losses,
        f"{max(spikes):.2f}" if spikes else "",
        _spread(result, "validation"),
        f"{median(accuracies):.3f}" if accuracies else "",
        _reach(result),
        *times,
    ]


def _reach(result: Result) -> str:
    if not result.reach:
        return ""
    reached = sum(map(math.isfinite, result.reach.values()))
    steps = f"{result.steps:g}" if math.isfinite(result.steps) else "not reached"
    return steps if reached in (0, len(result.reach)) else f"{steps} ({reached} of {len(result.reach)} seeds)"


def _spread(result: Result, name: str) -> str:
    values = result.values(name)
    middle = _loss(median(values))
    return middle if len(values) == 1 else f"{middle} [{_loss(min(values))}, {_loss(max(values))}]"


def _loss(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


Panels: TypeAlias = "list[tuple[str, dict[str, Band]]]"


def _panels(results: Results) -> Panels:
    """The training losses of a horizon, a panel a task: medians over seeds, and bands from the least to the most."""
    return [
        (task, {title: _band(result) for title in results.titles if (result := results.result(task, title))})
        for task in results.tasks
        if not split_width(task)[1]
    ]


def _width_panels(results: Results) -> Panels:
    """The same of tasks at several widths, a panel for an optimizer on a task, and a band a width."""
    panels: dict[str, dict[str, Band]] = {}
    for title, task in itertools.product(results.titles, results.tasks):
        name, width = split_width(task)
        if width and (result := results.result(task, title)):
            panels.setdefault(f"{name}, {title}", {})[f"width {width}"] = _band(result)
    return list(panels.items())


def _band(result: Result) -> Band:
    curves = [
        {at: number_of({"value": value}, "value") for at, value in run["train_curve"]} for run in result.runs.values()
    ]
    common = sorted(set.intersection(*map(set, curves)))
    values = [[curve[step] for curve in curves] for step in common]
    return Band(common, [median(v) for v in values], [min(v) for v in values], [max(v) for v in values])
