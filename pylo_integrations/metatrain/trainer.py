"""The meta-trainer: stages, checkpoints, evaluations and logs."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import pylo_integrations
from pylo_integrations import plot, sealed
from pylo_integrations.checkpoints import CheckpointError
from pylo_integrations.files import write_whole
from pylo_integrations.metatrain.config import Config, Stage
from pylo_integrations.metatrain.episodes import Episode
from pylo_integrations.metatrain.estimators import PES, Estimate, Estimator, Group, TruncatedBackprop, mean_gradient
from pylo_integrations.metatrain.evaluation import Score, best_adamw, evaluate
from pylo_integrations.metatrain.learners import Learner
from pylo_integrations.metatrain.logs import RunLog
from pylo_integrations.metatrain.outer import Outer
from pylo_integrations.metatrain.processes import Processes, device_of_rank
from pylo_integrations.metatrain.seeds import generator_of, seed_of
from pylo_integrations.metatrain.spaces import LINEAR_SPACES, FullSpace, LinearSpace, Space
from pylo_integrations.metatrain.tasks import Family
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

_RECORD = "metatrain"  # key of what a checkpoint says besides tensors
_RECORD_KEYS = {"config", "progress", "taken", "groups"}


class ResumeError(CheckpointError):
    """A folder cannot be resumed, or would be overwritten; the message says what to do."""


class _VectorEpisode:
    """An episode whose members' theta are vectors of a space."""

    def __init__(self, episode: Episode, space: Space) -> None:
        self.inner, self._space, self.horizon = episode, space, episode.horizon

    @property
    def iteration(self) -> int:
        return self.inner.iteration

    def unroll(self, vectors: Tensor, steps: int) -> Tensor:
        return self.inner.unroll(self._space.arrays(vectors), steps)

    def detach_(self) -> None:
        self.inner.detach_()


@dataclass
class _Progress:
    """What a run has come to, besides tensors; JSON-serialisable.

    Attributes:
        stage: Index of the stage.
        done: Iterations done in the stage.
        iteration: Iterations done in all.
        cpu_seconds: Spent by all ranks, and those of the runs that this one resumed.
        training_seconds: The part of them that unrolled training episodes.
        inner_steps: Optimizer steps in training episodes, over all members.
        window: Objectives by family since the last row of the log.
        curve: Evaluations: iteration, score, and the objective of every family.
        best_score: Of the best theta.
        best_iteration: When it was.
    """

    stage: int = 0
    done: int = 0
    iteration: int = 0
    cpu_seconds: float = 0.0
    training_seconds: float = 0.0
    inner_steps: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = math.inf
    best_iteration: int = 0

    @classmethod
    def restored(cls, record: Mapping[str, Any], stages: Sequence[Stage]) -> _Progress:
        """From the values of another; ValueError or TypeError if they are not those of a run of these stages."""
        progress = cls(**record)
        for name, value in vars(progress).items():
            kind = type(getattr(cls(), name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name} is {type(value).__name__}")
            if kind in (int, float) and not (value >= 0 or name == "best_score"):
                raise ValueError(f"{name} is {value}")
        if progress.stage >= len(stages) or progress.done > stages[progress.stage].iterations:
            raise ValueError(f"it is at iteration {progress.done} of stage {progress.stage}")
        if progress.iteration != progress.done + sum(stage.iterations for stage in stages[: progress.stage]):
            raise ValueError(f"it is at iteration {progress.iteration}")
        for values in progress.window.values():
            fmean(values)
        if any(type(value) not in (int, float, NoneType) for point in progress.curve for value in point.values()):
            raise ValueError("its curve has what are not numbers")
        return progress


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
        self._progress = _Progress()
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
        progress, stage = self._progress, self._stage
        began, estimates = time.process_time(), dict[str, list[Estimate]]()
        drawn = self._drawn()

        def estimate(key: tuple[str, int]) -> Estimate | None:
            if key[0] not in drawn:
                return None
            return self._estimator.estimate(self._outer.vector, self._groups[key])

        # Of all groups, so that each stays on its rank.
        for (name, _), found in self._processes.all_of(list(self._groups), estimate).items():
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

    def _drawn(self) -> set[str]:
        """Names of the families of this iteration."""
        names, count = [family.name for family in self.config.train], self._stage.families
        if count is None:
            return set(names)
        generator = generator_of("families", self.config.seed, self._progress.iteration)
        return {names[int(index)] for index in torch.randperm(len(names), generator=generator)[:count]}

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
                "commit": _commit(),
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
        return {name: array.detach() for name, array in self._space.theta(self._outer.average).items()}

    def _start(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Constants and arrays to start from."""
        start = self.config.start
        if not start.weights:
            space = self._linear_space()
            return space.hyper, space.theta(space.start)
        theta = load_theta(start.weights, self.config.optimizer)
        if theta.architecture != architecture_of(self.config.optimizer):
            raise ValueError(
                f"start.weights={start.weights!r} are for {theta.architecture}, not {self.config.optimizer}"
            )
        return dict(theta.hyper), dict(theta.arrays)

    def _linear_space(self) -> LinearSpace:
        space = LINEAR_SPACES[architecture_of(self.config.optimizer)]
        return space(**self.config.start.construction(), seed=self.config.seed)

    # -- stages ----------------------------------------------------------------------------------------------------

    @property
    def _stage(self) -> Stage:
        return self.config.stages[self._progress.stage]

    def _enter_stage(self) -> None:
        """Begin the current stage at the best theta so far; where none is chosen, where the stage before ended."""
        if self._progress.iteration:
            self._template = dict(self._best) if self.config.selection else self._current()
        self._make_stage()
        self._outer = Outer.at(self._space.start)

    def _make_stage(self) -> None:
        stage = self._stage
        self._space: Space = (
            self._linear_space() if stage.space == "linear" else FullSpace(self._template, stage.scales)
        )
        self._estimator = _make_estimator(stage)
        self._groups = {
            (family.name, index): self._make_group(family, index)
            for family in self.config.train
            for index in range(stage.groups)
        }

    def _make_group(self, family: Family, index: int) -> Group:
        key = (self.config.seed, self._progress.stage, family.name, index)
        return Group(functools.partial(self._begin, family, key), lambda count: generator_of("noise", *key, count))

    def _begin(self, family: Family, key: tuple[object, ...], number: int) -> _VectorEpisode:
        """Episode ``number`` of a group."""
        config, stage = self.config, self._stage
        generator = generator_of("episode", *key, number)
        low, high = map(math.log, stage.horizon)
        draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        horizon = round(math.exp(low + (high - low) * draw[0]))
        if number == 0 and stage.estimator != "es":
            # Episodes of different groups must not begin together for ever: the first ends early.
            horizon = max(1, round(horizon * draw[1]))
        episode = Episode(
            self._learner,
            family.sample(generator, config.base_width),
            config.objective,
            horizon,
            [seed_of("member", *key, number, pair) for pair in range(stage.pairs)],
            self._estimator.copies,
            config.reparametrisation,
            config.schedules[int(torch.randint(len(config.schedules), (), generator=generator))],
            self._device,
        )
        return _VectorEpisode(episode, self._space)

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
        rows = self._processes.all_of(list(families), lambda name: self._compare(*families[name]))
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

    def _compare(self, part: str, family: Family) -> dict[str, Any]:
        """One family's row of the report."""
        _, start = self._start()
        first, best = (evaluate(self._learner, arrays, family, self.config) for arrays in (start, self._best))
        row: dict[str, Any] = {"set": part, "family": family.name, "start": vars(first), "theta": vars(best)}
        if self.config.evaluation.adamw:
            lr, score = best_adamw(family, self.config, self.config.evaluation.adamw)
            row["adamw"] = {**vars(score), "lr": lr}
        return row

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
        groups, states = self._group_states()
        if not self._processes.leads:
            return
        tensors = {f"outer/{name}": value for name, value in self._outer.tensors().items()}
        tensors |= {f"template/{name}": value for name, value in self._template.items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()} | states
        record = {
            "config": self.config.record(),
            "progress": vars(self._progress),
            "taken": self._outer.taken,
            "groups": groups,
        }
        sealed.save(self.output / CHECKPOINT, _RECORD, record, tensors)

    def _group_states(self) -> tuple[dict[str, dict[str, int]], dict[str, Tensor]]:
        """Counters by group and tensors by name, of the groups of all ranks."""
        counters: dict[str, dict[str, int]] = {}
        tensors: dict[str, Tensor] = {}
        for key in self._processes.mine(list(self._groups)):
            group, prefix = self._groups[key], _prefix(key)
            counters[prefix] = {"begun": group.begun, "perturbed": group.perturbed}
            if isinstance(group.episode, _VectorEpisode):
                counters[prefix]["iteration"] = group.episode.iteration
                inner = group.episode.inner.tensors()
                tensors |= {f"{prefix}episode/{name}": value for name, value in inner.items()}
            if group.drift is not None:
                tensors[f"{prefix}drift"] = group.drift
        return self._processes.everyones(counters), self._processes.everyones(_on_cpu(tensors))

    def _restore(self, checkpoint: Path) -> None:
        try:
            record, tensors = sealed.load(checkpoint, _RECORD)
            if record.keys() != _RECORD_KEYS:
                raise ValueError(f"its entries are {sorted(record)}")
            self._check_config(record["config"])
            self._continue(record, tensors)
        except ResumeError:
            raise
        # What is not of the form that `_save` gives it can fail anywhere.
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ResumeError(
                f"{checkpoint} is damaged, or no checkpoint of a meta-training ({reason:.300}): put a copy of it "
                "there, or begin again in another folder"
            ) from error

    def _check_config(self, saved: Mapping[str, Any]) -> None:
        config = json.loads(json.dumps(self.config.record()))
        if differing := [key for key in {**config, **saved} if config.get(key) != saved.get(key)]:
            raise ResumeError(
                f"{self.output} holds a run of another config: {', '.join(differing)} differ. Choose another folder, "
                "or undo the changes"
            )

    def _continue(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self._progress = _Progress.restored(record["progress"], self.config.stages)
        self._template = _like(self._template, _below(tensors, "template/"))
        self._best = _like(self._template, _below(tensors, "best/"))
        self._make_stage()
        outer = _like(Outer.at(self._space.start).tensors(), _below(tensors, "outer/"))
        if (outer["second"] < 0).any() or _count(record["taken"]) != self._progress.done:
            raise ValueError("the averages of its gradients are not those of the run")
        self._outer = Outer.restored(outer, record["taken"])
        if record["groups"].keys() != {_prefix(key) for key in self._groups}:
            raise ValueError(f"its groups are {sorted(record['groups'])}")
        for key in self._processes.mine(list(self._groups)):
            group, entry = self._groups[key], record["groups"][_prefix(key)]
            state = _below(tensors, _prefix(key))
            group.begun, group.perturbed = _count(entry["begun"]), _count(entry["perturbed"])
            group.drift = state.get("drift")
            if "iteration" in entry:
                episode = group.begin(group.begun - 1)
                assert isinstance(episode, _VectorEpisode)
                episode.inner.restore(_below(state, "episode/"), _count(entry["iteration"]))
                group.episode = episode


def describe_report(report: Mapping[str, Any]) -> str:
    """A report as a table of the objective and, in brackets, of the validation loss; lower is better."""
    columns = [key for key in ("start", "theta", "adamw") if key in report["families"][0]]
    width = max(len(row["family"]) for row in report["families"])
    titles = {"start": "start", "theta": "meta-trained", "adamw": "AdamW, best lr"}
    lines = [f"{'set':10} {'family':{width}} " + " ".join(f"{titles[key]:>24}" for key in columns)]
    for row in report["families"]:
        cells = [
            f"{row[key]['objective']:.3f} ({row[key]['validation']:.3f})"
            + (f" {row[key]['lr']:g}" if "lr" in row[key] else "")
            for key in columns
        ]
        lines.append(f"{row['set']:10} {row['family']:{width}} " + " ".join(f"{cell:>24}" for cell in cells))
    return "\n".join(
        [
            f"mean objective over {report['horizon']} steps (validation loss after them), lower is better:",
            *lines,
            f"{report['steps_per_cpu_second']} inner steps per CPU-second, {report['cpu_seconds']:.0f} CPU-seconds",
        ]
    )


def _make_estimator(stage: Stage) -> Estimator:
    if stage.estimator == "backprop":
        return TruncatedBackprop(stage.pairs, stage.truncation, stage.clip)
    return PES(stage.pairs, stage.sigma, None if stage.estimator == "es" else stage.truncation, stage.clip)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _like(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``found``, in the order of ``expected``; ValueError if names, shapes or types differ or values are not finite."""
    for name in expected.keys() | found.keys():
        ours, theirs = expected.get(name), found.get(name)
        if ours is None or theirs is None or (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
            raise ValueError(f"its tensor {name!r:.100} is {None if theirs is None else tuple(theirs.shape)}")
        if not theirs.isfinite().all():
            raise ValueError(f"its tensor {name!r:.100} has values that are not finite")
    return {name: found[name] for name in expected}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.50} is no count")
    return value


def _prefix(key: tuple[str, int]) -> str:
    """Of the names of a group's tensors."""
    return f"group/{key[0]}/{key[1]}/"


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}


@functools.cache
def _commit() -> str | None:
    """The commit of this package's sources, marked if they were changed; None if they are not a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # else it may be the checkout of something else
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
