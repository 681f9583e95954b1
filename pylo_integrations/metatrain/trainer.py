"""The meta-trainer: stages, checkpoints, evaluations and logs."""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import pylo_integrations
from pylo_integrations import plot
from pylo_integrations.files import write_whole
from pylo_integrations.metatrain import resuming
from pylo_integrations.metatrain.config import Config
from pylo_integrations.metatrain.estimators import Estimate, mean_gradient
from pylo_integrations.metatrain.evaluation import Score, evaluate
from pylo_integrations.metatrain.learners import Learner
from pylo_integrations.metatrain.logs import RunLog
from pylo_integrations.metatrain.outer import Outer
from pylo_integrations.metatrain.processes import Processes, device_of_rank
from pylo_integrations.metatrain.progress import Progress
from pylo_integrations.metatrain.provenance import commit
from pylo_integrations.metatrain.report import compare, describe_report
from pylo_integrations.metatrain.resuming import ResumeError
from pylo_integrations.metatrain.running import RunningStage, linear_space
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.ops.compiled import CompiledLocal
from pylo_integrations.profiles import architecture_of
from pylo_integrations.rules.base import as_written
from pylo_integrations.schedules import cosine
from pylo_integrations.weights.sources import load_theta
from pylo_integrations.weights.theta import Theta

CHECKPOINT, METRICS, THETA, LAST, REPORT, PLOT = (
    "checkpoint.safetensors",
    "metrics.csv",
    "theta.safetensors",
    "last.safetensors",
    "report.json",
    "plot.png",
)
LOG_EVERY = 10
"""Iterations in a row of the log, which holds their means."""


class MetaTrainer:
    """Meta-trains the theta of a config.

    The same config gives the same theta, bit for bit, on the same machine and versions, whether or not it was
    interrupted, and on however many ranks: those of the default process group divide the episodes among them, and all
    call this alike. All that a run writes is in one folder:

    ============================  ==================================================================================
    ``checkpoint.safetensors``    everything to go on from, replaced as a whole now and then
    ``metrics.csv``               objectives by family, throughput; what ``pylo plot`` reads
    ``theta.safetensors``         the best theta by the score on the selection families
    ``last.safetensors``          the theta at the end
    ``report.json``               scores at the start, of the best theta and of AdamW
    ``plot.png``                  the curves, if matplotlib is installed
    ============================  ==================================================================================

    Args:
        config: What to do.
        output: The folder.
        resume: Go on from the folder's checkpoint, if it has one.
        quiet: Print nothing.

    Raises:
        ResumeError: The folder holds a run and ``resume`` is False, or that of another config, or its checkpoint is
            damaged. It is a :class:`~pylo_integrations.CheckpointError`.
        ValueError: ``start.weights`` do not fit the optimizer.
    """

    def __init__(self, config: Config, output: str | os.PathLike[str], *, resume: bool = False, quiet: bool = False):
        self.config, self.output, self._processes = config, Path(output), Processes.current()
        self._quiet = quiet or not self._processes.leads
        self._device = device_of_rank(config.device)
        self._progress = Progress()
        self._began = time.process_time()
        checkpoint = self.output / CHECKPOINT
        if checkpoint.exists() and not resume:
            raise ResumeError(f"{self.output} holds a run already: resume it, or choose another folder")
        self._hyper, self._template = self._start()
        local = CompiledLocal() if config.compile else as_written
        self._learner = Learner.learned(config.optimizer, self._template, self._hyper, config.lr, local)
        self._best = dict(self._template)
        self._log: RunLog | None = None
        if checkpoint.exists():
            self._restore(checkpoint)
        else:
            self._enter_stage()

    # -- running ---------------------------------------------------------------------------------------------------

    def run(self, iterations: int | None = None) -> Theta:
        """Meta-train to the end, or for some iterations; returns the best theta so far.

        Raises:
            DataError: A family's data set is not on this machine.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(self.config.threads)
        try:
            self._run(iterations)
        finally:
            torch.set_num_threads(threads)
            if self._log is not None:
                self._log.close()
        return self.theta(best=True)

    def _run(self, iterations: int | None) -> None:
        progress, total = self._progress, sum(stage.iterations for stage in self.config.stages)
        self._check_data()
        if self._processes.leads:
            self.output.mkdir(parents=True, exist_ok=True)
            self._log = RunLog(self.output / METRICS, self._columns(), progress.iteration, bool(progress.curve))
        last = total if iterations is None else min(total, progress.iteration + iterations)
        saved = time.monotonic()
        with tqdm(initial=progress.iteration, total=total, unit="it", disable=True if self._quiet else None) as bar:
            if progress.iteration == 0 and not progress.curve:
                self._evaluate(bar)
            while progress.iteration < last:
                if progress.done == self.config.stages[progress.stage].iterations:
                    progress.stage, progress.done = progress.stage + 1, 0
                    self._enter_stage()
                self._iterate(bar)
                if progress.iteration % self.config.evaluation.every == 0 or progress.iteration == total:
                    self._evaluate(bar)
                elif progress.iteration % LOG_EVERY == 0:
                    self._write_row({})
                if self._processes.leaders(time.monotonic() - saved > self.config.checkpoint_seconds):
                    self._save()
                    saved = time.monotonic()
                bar.update()
        self._save()
        if self._processes.leads:
            self.theta(best=False).save(self.output / LAST, overwrite=True)
        if progress.iteration == total:
            self._report()

    def _iterate(self, bar: Any) -> None:
        progress, running, stage = self._progress, self._running, self._running.stage
        began, estimates = time.process_time(), dict[str, list[Estimate]]()
        drawn = running.drawn(progress.iteration)

        def estimate(key: tuple[str, int]) -> Estimate | None:
            if key[0] not in drawn:
                return None
            return running.estimator.estimate(self._outer.vector, running.groups[key])

        # Of all groups, so that each stays on its rank.
        for (name, _), found in self._processes.all_of(list(running.groups), estimate).items():
            if found is not None:
                estimates.setdefault(name, []).append(found)
        gradient = mean_gradient(estimates, {family.name: family.weight for family in self.config.train})
        rate = stage.lr * (stage.lr_end + (1 - stage.lr_end) * cosine(progress.done / stage.iterations))
        self._outer.step_(gradient, rate, stage.average)
        progress.done += 1
        progress.iteration += 1
        progress.inner_steps += sum(each.steps for mine in estimates.values() for each in mine)
        progress.training_seconds += self._processes.sum(time.process_time() - began)
        self._account()
        for name, mine in estimates.items():
            progress.window.setdefault(name, []).append(fmean(each.objective for each in mine))
        bar.set_postfix({name: f"{fmean(values):.3f}" for name, values in progress.window.items()}, refresh=False)

    def steps_per_cpu_second(self) -> float:
        """Throughput: optimizer steps of single networks in training episodes, per second of CPU time."""
        return self._progress.inner_steps / max(self._progress.training_seconds, 1e-9)

    # -- theta -----------------------------------------------------------------------------------------------------

    def theta(self, best: bool) -> Theta:
        """The best theta by the selection score, or the current average, with its record."""
        progress, config = self._progress, self.config
        arrays = self._best if best else self._current()
        return Theta(
            architecture_of(config.optimizer),
            arrays,
            self._hyper,
            name=config.name,
            provenance=f"meta-trained by pylo-integrations {pylo_integrations.__version__}, config {config.name}",
            licence=config.licence,
            training={
                "config": config.record(),
                "package": pylo_integrations.__version__,
                "commit": commit(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
                "iteration": progress.best_iteration if best else progress.iteration,
                "iterations": progress.iteration,
                "inner_steps": progress.inner_steps,
                "cpu_seconds": round(progress.cpu_seconds, 1),
                "processes": self._processes.size,
                "curve": [
                    {name: value if value is None else round(value, 4) for name, value in point.items()}
                    for point in progress.curve[:: max(1, len(progress.curve) // 50)]
                ],
            },
        )

    def _current(self) -> dict[str, Tensor]:
        return {name: array.detach() for name, array in self._running.space.theta(self._outer.average).items()}

    def _start(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Constants and arrays to start from."""
        start = self.config.start
        if not start.weights:
            space = linear_space(self.config)
            return space.hyper, space.theta(space.start)
        theta = load_theta(start.weights, self.config.optimizer)
        if theta.architecture != architecture_of(self.config.optimizer):
            raise ValueError(
                f"start.weights={start.weights!r} are for {theta.architecture}, not {self.config.optimizer}"
            )
        return dict(theta.hyper), dict(theta.arrays)

    # -- stages ----------------------------------------------------------------------------------------------------

    def _enter_stage(self) -> None:
        """Begin the current stage at the best theta so far; where none is chosen, where the stage before ended."""
        if self._progress.iteration:
            self._template = dict(self._best) if self.config.selection else self._current()
        self._running = self._stage()
        self._outer = Outer.at(self._running.space.start)

    def _stage(self) -> RunningStage:
        return RunningStage(self.config, self._progress.stage, self._learner, self._template, self._device)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _check_data(self) -> None:
        """Find out now, and not after hours, that a data set is missing."""
        for part, family in self.config.families():
            task = family.sample(generator_of("check", part, family.name), self.config.base_width)
            task.batches(generator_of("check"), 1, True)

    def _evaluate(self, bar: Any) -> None:
        """Score the average of theta; keep it if it is the best so far."""
        progress, current = self._progress, self._current()
        scores = self._score(current)
        selection = [
            family.weight * scores[f"selection_loss_{family.name}"].objective for family in self.config.selection
        ]
        score = fmean(selection) if selection else None
        objectives = {name: found.objective for name, found in scores.items()}
        progress.curve.append({"iteration": progress.iteration, "score": score, **objectives})
        if score is None or score < progress.best_score:
            progress.best_score, progress.best_iteration = math.inf if score is None else score, progress.iteration
            self._best = current
            if self._processes.leads:
                self.theta(best=True).save(self.output / THETA, overwrite=True)
        self._write_row(objectives | ({} if score is None else {"selection_loss": score}))
        if not self._quiet:
            told = " ".join(f"{name.replace('_loss_', ':')}={value:.3f}" for name, value in objectives.items())
            best = " (best)" if progress.best_iteration == progress.iteration else ""
            bar.write(
                f"iteration {progress.iteration}: "
                + (f"selection score {score:.4f}{best}; " if score is not None else "")
                + f"{told}; {self.steps_per_cpu_second():.0f} inner steps per CPU-second",
                file=sys.stdout,
            )
            sys.stdout.flush()

    def _score(self, arrays: Mapping[str, Tensor]) -> dict[str, Score]:
        """By set and family; only the sets that theta is not trained on."""
        families = {f"{part}_loss_{family.name}": family for part, family in self.config.families() if part != "train"}
        scores = self._processes.all_of(
            list(families), lambda name: evaluate(self._learner, arrays, families[name], self.config)
        )
        self._account()
        return scores

    def _report(self) -> None:
        """Compare where theta started, the best theta and AdamW, on every family."""
        if self._processes.leaders((self.output / REPORT).exists()):
            return
        families = {family.name: (part, family) for part, family in self.config.families()}
        _, start = self._start()
        rows = self._processes.all_of(
            list(families), lambda name: compare(self._learner, start, self._best, *families[name], self.config)
        )
        self._account()
        if not self._processes.leads:
            return
        report = {
            "iteration": self._progress.best_iteration,
            "horizon": self.config.evaluation.horizon,
            "steps_per_cpu_second": round(self.steps_per_cpu_second()),
            "cpu_seconds": round(self._progress.cpu_seconds, 1),
            "families": list(rows.values()),
        }
        write_whole(self.output / REPORT, lambda path: path.write_text(json.dumps(report, indent=2), encoding="utf-8"))
        try:
            plot.plot(self.output / METRICS, self.output / PLOT)
        except plot.PlotError as error:
            if not self._quiet:
                print(f"no {PLOT}: {error}")
        if not self._quiet:
            print(describe_report(report))

    # -- logs ------------------------------------------------------------------------------------------------------

    def _columns(self) -> list[str]:
        columns = ["step", "cpu_seconds", "steps_per_cpu_second"]
        columns += [f"loss_{family.name}" for family in self.config.train] + ["selection_loss"]
        return columns + [f"{part}_loss_{family.name}" for part, family in self.config.families() if part != "train"]

    def _write_row(self, values: Mapping[str, float]) -> None:
        progress = self._progress
        row: dict[str, float] = {
            "step": progress.iteration,
            "cpu_seconds": round(progress.cpu_seconds, 1),
            "steps_per_cpu_second": round(self.steps_per_cpu_second(), 1),
        }
        row |= {f"loss_{name}": fmean(window) for name, window in progress.window.items()}
        progress.window = {}
        if self._log is not None:
            self._log.write(row | dict(values))

    def _account(self) -> None:
        """Add up what all ranks have spent since the last time."""
        now = time.process_time()
        self._progress.cpu_seconds += self._processes.sum(now - self._began)
        self._began = now

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write everything that the rest of the run depends on."""
        self._account()
        groups = {key: self._running.groups[key] for key in self._processes.mine(list(self._running.groups))}
        counters, states = resuming.group_states(groups)
        counters, states = self._processes.everyones(counters), self._processes.everyones(states)
        if not self._processes.leads:
            return
        tensors = {f"outer/{name}": value for name, value in self._outer.tensors().items()}
        tensors |= {f"template/{name}": value for name, value in self._template.items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()} | states
        record = {
            "config": self.config.record(),
            "progress": vars(self._progress),
            "taken": self._outer.taken,
            "groups": counters,
        }
        resuming.write(self.output / CHECKPOINT, record, tensors)

    def _restore(self, checkpoint: Path) -> None:
        with resuming.errors_told(checkpoint):
            self._continue(*resuming.read(checkpoint, self.config))

    def _continue(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._progress = Progress.restored(record["progress"], self.config.stages)
        self._template = resuming.like(self._template, resuming.below(tensors, "template/"))
        self._best = resuming.like(self._template, resuming.below(tensors, "best/"))
        self._running = self._stage()
        outer = resuming.like(Outer.at(self._running.space.start).tensors(), resuming.below(tensors, "outer/"))
        if (outer["second"] < 0).any() or resuming.count(record["taken"]) != self._progress.done:
            raise ValueError("the averages of its gradients are not those of the run")
        self._outer = Outer.restored(outer, record["taken"])
        groups = self._running.groups
        if record["groups"].keys() != {resuming.prefix(key) for key in groups}:
            raise ValueError(f"its groups are {sorted(record['groups'])}")
        for key in self._processes.mine(list(groups)):
            mine = resuming.prefix(key)
            resuming.restore_group_(groups[key], record["groups"][mine], resuming.below(tensors, mine))
