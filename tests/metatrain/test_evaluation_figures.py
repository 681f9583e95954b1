"""Are the figures of an evaluation what one works out by hand?"""

from __future__ import annotations

import math

import pytest

pytest.importorskip("sklearn")  # for the digits

from test_evaluation import record

from pylo_integrations.evaluation.comparison import compare, distance_of
from pylo_integrations.evaluation.figures import (
    LEAST,
    best_factor,
    distance,
    geometric_mean,
    interval,
    mean_over_tasks,
    step_reduction,
    steps_to,
)
from pylo_integrations.evaluation.report import describe
from pylo_integrations.evaluation.results import Results

FALLING = [(0, 9.0), (50, 5.0), (100, 1.0)]


@pytest.mark.parametrize(
    ("target", "steps"), [(9.0, 0), (10.0, 0), (7.0, 25), (5.0, 50), (2.0, 87.5), (1.0, 100), (0.5, math.inf)]
)
def test_steps_lie_on_lines_between_points(target, steps):
    assert steps_to(FALLING, target) == steps


def test_a_point_without_a_number_is_no_end_of_a_line():
    assert steps_to([(0, 9.0), (50, None), (100, 1.0)], 5.0) == 100


@pytest.mark.parametrize(
    ("mine", "ratio"),
    [
        ([(0, 9.0), (50, 1.0), (100, 0.5)], 2),  # theirs ends at 1
        ([(0, 9.0), (50, 5.0), (100, 1.0)], 1),
        ([(0, 9.0), (50, 6.0), (100, 3.0)], 0.75),  # theirs is at 3 after 75 of 100
        ([(0, 9.0), (50, 9.0), (100, 9.0)], LEAST),
        ([(0, 9.0), (50, 5.0), (100, None)], LEAST),
        ([(0, 9.0), (50, 5.0)], LEAST),  # it broke off
        ([(0, 9.0), (1, 0.5), (100, 0.4)], 1 / LEAST),
    ],
)
def test_a_reduction_of_steps(mine, ratio):
    assert step_reduction(mine, FALLING) == pytest.approx(ratio)


def test_whoever_ends_beats_a_baseline_that_does_not():
    diverged = [(0, 9.0), (50, 5.0), (100, None)]
    assert step_reduction(FALLING, diverged) == 1 / LEAST and step_reduction(diverged, diverged) == 1


def test_means_count_tasks_alike():
    assert geometric_mean([1, 4]) == pytest.approx(2)
    assert mean_over_tasks({"a": [4.0, 4.0, 4.0], "b": [1.0]}) == pytest.approx(2)


def test_the_interval_is_that_of_its_distribution():
    assert interval({"a": [2.0, 2.0], "b": [2.0]}) == pytest.approx((2, 2))
    # Four tasks of 1 or 4: the mean of logs is that of four coins, whose ends have probability 1/16 each, over 2.5 %.
    low, high = interval({"a": [1.0], "b": [1.0], "c": [4.0], "d": [4.0]})
    assert (low, high) == pytest.approx((1, 4))
    # Many tasks: about plus and minus 1.96 standard errors of the mean of logs.
    many = {str(number): [math.exp(number % 2)] for number in range(100)}
    low, high = map(math.log, interval(many))
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.015)
    assert interval(many) == interval(many)


def test_the_best_factor_is_the_nearest_of_the_best():
    assert best_factor({0.25: 3.0, 1.0: 2.0, 8.0: 1.0}) == 8 and distance(8.0) == 8 and distance(0.25) == 4
    assert best_factor({0.25: 1.0, 2.0: 1.0, 8.0: 1.0}) == 2
    assert best_factor({0.5: math.inf, 1.0: 2.0}) == 1


def runs():
    """Tuned AdamW ends at 1 on a and at 2 on b, Muon at 0.5 and at 1."""
    found = []
    for seed in (0, 1):
        for task, scale in (("a", 1.0), ("b", 2.0)):
            found += [record(task, "adamw lr=0.001", seed, scale), record(task, "adamw lr=0.01", seed, 3 * scale)]
            found += [record(task, "muon lr=0.03", seed, scale / 2)]
        # From 9 at step 40 to 1 at step 50: AdamW's end is reached in half of its steps on a.
        found.append(record("a", "new", seed, 0.75, 0.5, reached={s: 1.0 for s in (50, 60, 70, 80, 90)}))
        # AdamW falls from 9 at step 90 to 2 at step 100, and is at 5.5 in the middle.
        found.append(record("b", "new", seed, 5.5, 2.0))
    return found


def test_a_comparison():
    results = Results(runs(), 100)
    found = compare(results, "new", "adamw tuned")
    assert (found.tasks, found.below, found.validation_below, found.diverged) == (2, 1, 1, 0)
    assert found.steps == pytest.approx((2 * 0.95) ** 0.5) and found.time == pytest.approx(found.steps)
    assert found.steps_interval == pytest.approx((0.95, 2)) and found.worst_task == "b"
    assert found.worst == pytest.approx(0.95)
    # On a Muon falls from 9 at step 90 to 0.5 at step 100: it is at 0.75 after 10 * 8.25 / 8.5 more.
    muon = compare(results, "new", "muon tuned")
    assert muon.steps == pytest.approx(((90 + 82.5 / 8.5) / 100 * (90 + 35 / 8) / 100) ** 0.5)
    assert compare(results, "new", "sgd tuned") is None


def test_time_is_by_cpu_time_per_step():
    slow = [{**run, "step_cpu_seconds": 0.004} if run["name"] == "new" else run for run in runs()]
    found = compare(Results(slow, 100), "new", "adamw tuned")
    assert found.time == pytest.approx(found.steps / 4)


def test_contenders_are_baselines_tuned_global_and_as_documented():
    results = Results(runs(), 100)
    assert results.contenders[:3] == ["new", "adamw tuned", "muon tuned"]
    assert set(results.contenders[3:]) == {"adamw global", "muon global", "adamw default"}
    assert results.result("a", "adamw default").setting == "adamw lr=0.001"


def test_distances_to_the_best_factor():
    found = []
    for task, losses in (("a", (3.0, 2.0, 1.0)), ("b", (3.0, 1.0, 2.0)), ("c", (1.0, 2.0, 3.0))):
        for factor, loss in zip((0.25, 1.0, 2.0), losses, strict=True):
            run = record(task, f"new*{factor:g}" if factor != 1 else "new", 0, loss)
            found.append({**run, "setting": {**run["setting"], "factor": factor}})
        found.append(record(task, "adamw lr=0.001", 0, 1.0))
    results = Results(found, 100)
    assert results.learned == ["new"] and results.factors == {"new": {0.25: "new*0.25", 1.0: "new", 2.0: "new*2"}}
    distances = distance_of(results, "new")
    assert distances.best == {"a": 2.0, "b": 1.0, "c": 0.25} and (distances.median, distances.worst) == (2, 4)
    text = describe(results)
    assert "| task | new, of 0.25, 1, 2 |" in text and "| median distance | 2 |" in text and "| c | 0.25 |" in text


def test_the_report_has_the_comparisons():
    text = describe(Results(runs(), 100))
    assert "### Against adamw tuned, 100 steps" in text and "### Against muon tuned, 100 steps" in text
    row = "| new | 2 | 1.38 [0.95, 2.00] | 1.38 [0.95, 2.00] | 1 of 2 | 1 of 2 | b 0.95 | 0 of 2 |"
    assert row in text
