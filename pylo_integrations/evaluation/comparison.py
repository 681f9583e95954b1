"""How a contender compares with a baseline over all tasks of a horizon, in the figures of :mod:`.figures`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from pylo_integrations.evaluation.figures import (
    best_factor,
    distance,
    geometric_mean,
    interval,
    mean_over_tasks,
    step_reduction,
)
from pylo_integrations.evaluation.results import Result, Results


@dataclass(frozen=True)
class Comparison:
    """A contender beside a rival, on the tasks that both were run on.

    Attributes:
        tasks: How many there are.
        steps: Geometric mean of :func:`~pylo_integrations.evaluation.figures.step_reduction`.
        steps_interval: 95 % of a bootstrap over tasks and seeds.
        time: The same of time, by CPU time per step.
        time_interval: Its interval.
        below: On how many the median final training loss is lower.
        validation_below: The same of the validation loss.
        worst_task: Where the step reduction is least.
        worst: That reduction, a geometric mean over seeds.
        diverged: On how many a run diverged.
    """

    tasks: int
    steps: float
    steps_interval: tuple[float, float]
    time: float
    time_interval: tuple[float, float]
    below: int
    validation_below: int
    worst_task: str
    worst: float
    diverged: int


def compare(results: Results, title: str, rival: str) -> Comparison | None:
    """A contender beside a rival; None if no task has both with a common seed."""
    pairs: list[tuple[Result, Result]] = []
    ratios: dict[str, list[float]] = {}
    for task in results.tasks:
        mine, theirs = results.result(task, title), results.result(task, rival)
        if mine and theirs and (seeds := sorted(set(mine.runs) & set(theirs.runs))):
            pairs.append((mine, theirs))
            ratios[task] = [
                step_reduction(mine.runs[seed]["train_curve"], theirs.runs[seed]["train_curve"]) for seed in seeds
            ]
    if not ratios:
        return None
    paces = {mine.task: seconds_per_step(theirs) / seconds_per_step(mine) for mine, theirs in pairs}
    times = {task: [ratio * paces[task] for ratio in of_task] for task, of_task in ratios.items()}
    of_tasks = {task: geometric_mean(of_task) for task, of_task in ratios.items()}
    worst = min(of_tasks, key=lambda task: of_tasks[task])
    return Comparison(
        tasks=len(pairs),
        steps=mean_over_tasks(ratios),
        steps_interval=interval(ratios),
        time=mean_over_tasks(times),
        time_interval=interval(times),
        below=sum(mine.median("train") < theirs.median("train") for mine, theirs in pairs),
        validation_below=sum(mine.median("validation") < theirs.median("validation") for mine, theirs in pairs),
        worst_task=worst,
        worst=of_tasks[worst],
        diverged=sum(mine.diverged > 0 for mine, _ in pairs),
    )


def seconds_per_step(result: Result) -> float:
    """Median CPU time of a step; wall time where there is no other. At least a nanosecond."""
    found = [run.get("step_cpu_seconds") or run["step_seconds"] or 0.0 for run in result.runs.values()]
    return max(median(found), 1e-9)


@dataclass(frozen=True)
class Distance:
    """How far learned optimizers are from the best factor on their learning rate.

    Attributes:
        factors: Those that were run.
        best: By task, the best of them: that of least median final training loss.
        median: The median distance over the tasks, as a factor of at least 1.
        worst: The largest.
    """

    factors: tuple[float, ...]
    best: Mapping[str, float]
    median: float
    worst: float


def distance_of(results: Results, name: str) -> Distance | None:
    """Of an optimizer of :attr:`Results.factors`, over the tasks on which all its factors were run."""
    factors = results.factors[name]
    best = {}
    for task in results.tasks:
        found = {factor: results.result(task, title) for factor, title in factors.items()}
        losses = {factor: result.median("train") for factor, result in found.items() if result}
        if len(losses) == len(factors):
            best[task] = best_factor(losses)
    distances = list(map(distance, best.values()))
    return Distance(tuple(factors), best, median(distances), max(distances)) if distances else None
