"""The held-out tasks, in two suites: networks and data on which no theta of this package was trained or chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pylo_integrations.evaluation.tasks import (
    embeddings,
    fields,
    first,
    generative,
    graphs,
    sequences,
    tabular,
    transfer,
    vision,
)
from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, loss_of

__all__ = [
    "SUITES",
    "TASKS",
    "Examples",
    "HeldOutTask",
    "find_task",
    "loss_of",
    "split_width",
    "suite_of",
]

_SECOND = (tabular, vision, sequences, graphs, generative, fields, embeddings, transfer)

SUITES: Mapping[int, Mapping[str, HeldOutTask]] = {
    1: {task.name: task for task in first.TASKS},
    2: {task.name: task for kind in _SECOND for task in kind.TASKS},
}
"""Tasks by suite and name. Runs of different suites are not compared: a change that changes a loss makes a new one."""

TASKS: Mapping[str, HeldOutTask] = {name: task for suite in SUITES.values() for name, task in suite.items()}
"""All tasks by name."""


def suite_of(name: str) -> int:
    """The suite of a task, whatever its width."""
    return next(number for number, tasks in SUITES.items() if split_width(name)[0] in tasks)


def split_width(name: str) -> tuple[str, str]:
    """``<name>:<width>`` in two; the width is "" where a task has its own."""
    key, _, width = name.partition(":")
    return key, width


def find_task(name: str) -> HeldOutTask:
    """A task by its name, or by ``<name>:<width>`` at another width, with the same seeds.

    Raises:
        ValueError: There is none, the width is no positive number, or the task has weights of its own width.
    """
    key, width = split_width(name)
    if key not in TASKS:
        raise ValueError(f"held-out task {key!r} is unknown; there are {', '.join(TASKS)}")
    task = TASKS[key]
    if key == name:
        return task
    if not width.isdecimal() or len(width) > 6 or int(width) < 1:
        raise ValueError(
            f"width {width[:40]!r} of held-out task {name[:60]!r} is not a positive integer below a million"
        )
    if task.initial:
        raise ValueError(f"{key} begins with trained weights of width {task.width}: it has no other width")
    return replace(task, width=int(width))
