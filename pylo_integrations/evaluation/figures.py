"""What curves of losses say of two optimizers: how many times fewer steps, how much less time, and how sure that is."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TypeAlias

Curve: TypeAlias = "Sequence[tuple[float, float | None]]"
"""Steps, from 0 on, and the loss there; None where it was not finite."""

LEAST = 1 / 20
"""What a ratio below is taken for, and its inverse: curves have twenty points, and a run that diverged has none."""

DRAWS = 2000
"""Of the bootstrap."""


def steps_to(curve: Curve, target: float) -> float:
    """Steps until the loss is at most ``target``, along lines between points; infinite if it never is."""
    before_step, before = 0.0, math.inf
    for step, loss in curve:
        if loss is not None and loss <= target:
            if math.isfinite(before):
                return before_step + (step - before_step) * (before - target) / (before - loss)
            return float(step)
        before_step, before = step, math.inf if loss is None else loss
    return math.inf


def step_reduction(mine: Curve, theirs: Curve) -> float:
    """How many times fewer steps than all of its own another optimizer needed for where it ended.

    If its final loss was not reached, the number is below 1: the part of its run after which it was where we ended.
    Between :data:`LEAST` and its inverse.

    Args:
        mine: The curve of the one that is judged.
        theirs: That of the baseline, over as many steps.
    """
    horizon, target = theirs[-1]
    if target is None:  # it did not get through its run
        return 1 / LEAST if mine[-1][1] is not None else 1.0
    steps = steps_to(mine, target)
    if math.isfinite(steps):
        return min(1 / LEAST, horizon / max(steps, LEAST * horizon))
    end = mine[-1][1]
    return LEAST if end is None or mine[-1][0] < horizon else max(LEAST, steps_to(theirs, end) / horizon)


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers."""
    return math.exp(fmean(map(math.log, values)))


def mean_over_tasks(ratios: Mapping[str, Sequence[float]]) -> float:
    """The geometric mean over tasks of those over seeds: tasks count alike, however many seeds they have."""
    return geometric_mean([geometric_mean(of_task) for of_task in ratios.values()])


def interval(ratios: Mapping[str, Sequence[float]], level: float = 0.95) -> tuple[float, float]:
    """Where :func:`mean_over_tasks` lies, by a bootstrap that draws tasks, and then seeds of each task.

    It is paired as the ratios are: each is of two runs with the same seed. The same ratios give the same interval.
    """
    generator = random.Random(0)
    logs = [[math.log(ratio) for ratio in of_task] for of_task in ratios.values()]

    def draw() -> float:
        tasks = generator.choices(logs, k=len(logs))
        return fmean(fmean(generator.choices(of_task, k=len(of_task))) for of_task in tasks)

    means = sorted(draw() for _ in range(DRAWS))
    cut = round((1 - level) / 2 * (DRAWS - 1))
    return math.exp(means[cut]), math.exp(means[-1 - cut])


def distance(factor: float) -> float:
    """How far a factor is from 1, upwards or downwards: at least 1."""
    return max(factor, 1 / factor)


def best_factor(losses: Mapping[float, float]) -> float:
    """The factor of least loss; of several the one nearest to 1."""
    return min(losses, key=lambda factor: (losses[factor], distance(factor)))
