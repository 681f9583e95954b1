"""Runs of optimizers on held-out tasks, and the file that keeps them."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import pylo_integrations
from pylo_integrations.evaluation.contenders import SCHEDULES, Setting
from pylo_integrations.evaluation.tasks import SUITES, Examples, HeldOutTask, find_task, suite_of
from pylo_integrations.formats import FORMATS
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.paths import LARGEST_LOG, read_bytes

WINDOW = 0.05
"""Part of a run over whose steps the losses of batches are averaged."""

SPIKE_WINDOW = 100
"""Batches whose mean loss is looked at for spikes. Some of their noise is left, how much depends on the task."""

WARM_UP = 0.05
"""Part of a run in which no spikes are looked for."""

POINTS = 20
"""How often, beside the start, the loss is measured on the same training examples."""

VALIDATIONS = 5
"""How often, beside the start, loss and accuracy are measured on validation examples."""

Record: TypeAlias = "Mapping[str, Any]"
"""A run as :func:`train` returns it."""


class RunsError(ValueError):
    """The file of runs cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Run:
    """One training from the start.

    Attributes:
        task: Name of a held-out task.
        setting: Who trains.
        steps: Optimizer steps.
        seed: Of the initial weights and the batches.
    """

    task: str
    setting: Setting
    steps: int
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells runs apart in a file."""
        return self.task, self.setting.name, self.steps, self.seed


def train(run: Run) -> dict[str, Any]:
    """Train, on one thread and in float32, and tell how it went.

    The record has the attributes of the run, and

    * ``train_curve``: pairs of a step and the loss on fixed training examples, with the network in evaluation mode: at
      the start, every twentieth of the run, and at the end;
    * ``validation_curve``: a step, the loss and the accuracy (None for regression) on fixed validation examples: at the
      start, every fifth of the run, and at the end;
    * ``train``, ``validation``, ``accuracy``: the last of them;
    * ``train_best``: the least loss in ``train_curve``;
    * ``batches``, ``batches_best``: the mean loss, before the update, of the last batches, 5 % of all, and the least
      such mean of so many batches in a row;
    * ``spike``: the largest mean loss of a hundred batches in a row over the least such mean before it, after the first
      twentieth of the run; at most 1 if losses only fall; None in a run without two such means;
    * ``diverged``: whether a loss was not finite, which ends the run, or ``train`` is not below what it was at the
      start;
    * ``step_seconds``, ``optimizer_seconds``: wall time per step, in all and in the optimizer; ``step_cpu_seconds``:
      CPU time of the thread.

    Returns:
        The record, JSON-serialisable; None stands for numbers that are not finite.
    """
    with _one_thread():
        return _train(run)


def _train(run: Run) -> dict[str, Any]:
    task, setting, steps = find_task(run.task), run.setting, run.steps
    (examples, _), (training, validation) = task.data(), task.samples()
    model = task.model(run.seed, setting.base_width)
    optimizers = setting.optimizers(model, task, steps)
    factor = SCHEDULES[setting.schedule]
    schedulers = [LambdaLR(optimizer, lambda step: factor(min(1.0, step / steps))) for optimizer in optimizers]
    train_points, validation_points = _evenly(steps, POINTS), _evenly(steps, VALIDATIONS)
    train_curve = [(0, *_measure(task, model, optimizers, training))]
    validation_curve = [(0, *_measure(task, model, optimizers, validation))]
    losses: list[float] = []
    wall = cpu = inside = 0.0
    for step, index in enumerate(task.batches(run.seed, steps), start=1):
        inputs, targets = examples.rows(index)
        began, began_cpu = time.perf_counter(), time.thread_time()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        before_step = time.perf_counter()
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            if isinstance(optimizer, LearnedOptimizer):
                optimizer.step(loss=loss.detach())
            else:
                optimizer.step()
            scheduler.step()
        ended = time.perf_counter()
        wall, inside, cpu = wall + ended - began, inside + ended - before_step, cpu + time.thread_time() - began_cpu
        if step in train_points:
            train_curve.append((step, *_measure(task, model, optimizers, training)))
        if step in validation_points:
            validation_curve.append((step, *_measure(task, model, optimizers, validation)))
    is_whole = len(losses) == steps and math.isfinite(losses[-1])
    averages = _averages(losses, max(1, round(WINDOW * steps)))
    final, first = train_curve[-1][1] if is_whole else math.inf, train_curve[0][1]
    _, validation_loss, accuracy = validation_curve[-1] if is_whole else (steps, math.inf, None)
    return {
        "suite": suite_of(run.task),
        "task": run.task,
        "name": setting.name,
        "setting": asdict(setting),
        "steps": steps,
        "seed": run.seed,
        "diverged": not (final < first and math.isfinite(validation_loss)),
        "train": _number(final),
        "train_best": _number(min((loss for _, loss, _ in train_curve if math.isfinite(loss)), default=math.inf)),
        "batches": _number(averages[-1] if is_whole else math.inf),
        "batches_best": _number(min(averages, default=math.inf)),
        "spike": _number(_spike(losses)),
        "validation": _number(validation_loss),
        "accuracy": _number(accuracy),
        "train_curve": [[step, _number(loss)] for step, loss, _ in train_curve],
        "validation_curve": [[step, _number(loss), _number(right)] for step, loss, right in validation_curve],
        "step_seconds": _number(wall / len(losses)),
        "optimizer_seconds": _number(inside / len(losses)),
        "step_cpu_seconds": _number(cpu / len(losses)),
        "package": pylo_integrations.__version__,
        "torch": torch.__version__,
    }


def _evenly(steps: int, points: int) -> set[int]:
    """So many steps, at equal distances, to the last."""
    return {round(index * steps / points) for index in range(1, points + 1)}


def _measure(
    task: HeldOutTask, model: nn.Module, optimizers: Sequence[Optimizer], examples: Examples
) -> tuple[float, float | None]:
    """Loss and accuracy in evaluation mode: of the network, and of optimizers that have one, as Schedule-Free has."""
    modes: list[Any] = [model, *(optimizer for optimizer in optimizers if hasattr(optimizer, "eval"))]
    for each in modes:
        each.eval()
    with torch.no_grad():
        outputs = model(examples.inputs)
    for each in modes:
        each.train()
    return float(task.loss(outputs, examples.targets)), task.accuracy(outputs, examples.targets)


def _averages(losses: Sequence[float], window: int) -> list[float]:
    """Means of every ``window`` losses in a row, all finite but perhaps the last."""
    sums = [0.0, *itertools.accumulate(losses)]
    means = [(after - before) / window for before, after in zip(sums, sums[window:], strict=False)]
    return [mean for mean in means if math.isfinite(mean)]


def _spike(losses: Sequence[float]) -> float | None:
    """How far averaged losses rise above their least before; None if there are no two averages."""
    means = _averages(losses[round(WARM_UP * len(losses)) :], SPIKE_WINDOW)
    return max(
        (mean / least for mean, least in zip(means[1:], itertools.accumulate(means, min), strict=False) if least),
        default=None,
    )


def _number(value: float | None) -> float | int | None:
    """With six digits; JSON has no infinity, so None stands for it too."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums are the same on any machine of a kind, and processes do not wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_all(runs: Sequence[Run], jobs: int) -> Iterator[dict[str, Any]]:
    """The records of ``runs`` as they end, made by ``jobs`` processes, or by this one if that is 1."""
    if jobs == 1 or len(runs) < 2:
        yield from map(train, runs)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with ProcessPoolExecutor(min(jobs, len(runs)), mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(train, run) for run in runs]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "name"), (str,)),
    **dict.fromkeys(("steps", "seed"), (int,)),
    "diverged": (bool,),
    "setting": (dict,),
    **dict.fromkeys(("train", "train_best", "batches", "batches_best", "validation"), (int, float, type(None))),
    **dict.fromkeys(("accuracy", "step_seconds", "optimizer_seconds"), (int, float, type(None))),
    **dict.fromkeys(("train_curve", "validation_curve"), (list,)),
}
"""Types of what others read of a record."""


_SETTING = {entry.name for entry in fields(Setting)}


def _is_run(record: Mapping[str, Any]) -> bool:
    """Whether a record that was read has all that reports need."""
    if not all(isinstance(record.get(name, ...), kinds) for name, kinds in _KINDS.items()):
        return False
    if not isinstance(record.get("spike"), (int, float, type(None))):  # runs of 0.1.0 have none
        return False
    setting, curve = record["setting"], record["train_curve"]
    if any(isinstance(record[name], int) and abs(record[name]) >= 2**63 for name in _KINDS):
        return False
    if not setting.keys() <= _SETTING or not isinstance(setting.get("factor", 1.0), (int, float)):
        return False
    if setting.get("state_dtype", "float32") not in FORMATS:
        return False
    return all(isinstance(setting.get(name), str) for name in ("optimizer", "schedule", "sha256")) and all(
        isinstance(point, list) and len(point) == 2 and isinstance(point[0], int) for point in curve
    )


class RunsFile:
    """The records of an evaluation, one a line, in the order in which runs ended.

    A record is written whole before the next begins, and a line that a kill cut short is dropped, so that whatever was
    interrupted can go on.

    Args:
        path: The file; it need not exist yet.

    Raises:
        RunsError: It holds something else, or runs of another version of the suite.
        OSError: It cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        content = b""
        if path.exists():
            content = read_bytes(path, LARGEST_LOG, "file of runs")
        whole, _, rest = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                suite = record["suite"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise RunsError(f"line {number} of {path} is not a run of pylo evaluate") from None
            if suite not in list(SUITES):  # a file's may be of any type
                raise RunsError(
                    f"{path} holds runs of suite {suite!r:.40}, and there are {', '.join(map(str, SUITES))}; give "
                    "another --output"
                )
            if not _is_run(record):
                raise RunsError(f"line {number} of {path} is a damaged run: delete the line, and it is run again")
            self.records.append(record)
        if rest:
            os.truncate(path, len(content) - len(rest))

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those of ``runs`` that the file lacks.

        Raises:
            RunsError: The file holds one of them with another theta, or runs of another suite.
        """
        runs = list(runs)
        suites = {record["suite"] for record in self.records} | {suite_of(run.task) for run in runs}
        if len(suites) > 1:
            raise RunsError(
                f"{self.path} would hold runs of suites {' and '.join(map(str, sorted(suites)))}; give each an "
                "--output of its own"
            )
        known = {(r["task"], r["name"], r["steps"], r["seed"]): r["setting"]["sha256"] for r in self.records}
        for run in runs:
            if known.get(run.key, run.setting.sha256) != run.setting.sha256:
                raise RunsError(
                    f"{self.path} holds runs of {run.setting.name} with another theta, sha256 {known[run.key][:12]}, "
                    f"not {run.setting.sha256[:12]}; give another --output, or a copy of the file without them"
                )
        return [run for run in runs if run.key not in known]

    def add(self, record: Record) -> None:
        """Append a record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
