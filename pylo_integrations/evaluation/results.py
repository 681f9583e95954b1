"""What runs amount to: how baselines are tuned, who reaches whom, and who wins."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from pylo_integrations.evaluation.baselines import BASELINES
from pylo_integrations.evaluation.contenders import default_of
from pylo_integrations.evaluation.runs import Record
from pylo_integrations.evaluation.tasks import TASKS, split_width


def tuned(baseline: str) -> str:
    """What a baseline is called at the best setting of each task."""
    return f"{baseline} tuned"


def at_global(baseline: str) -> str:
    """What it is called at the one setting that is best for all tasks."""
    return f"{baseline} global"


def at_default(baseline: str) -> str:
    """What it is called at the setting of its documentation."""
    return f"{baseline} default"


GLOBAL = at_global("adamw")
"""AdamW at the one setting for all tasks."""


@dataclass(frozen=True)
class Result:
    """The runs of one setting on one task.

    Attributes:
        task: Name of the task.
        title: ``<baseline> tuned``, ``global`` or ``default``, or a learned optimizer as on the command line.
        setting: Its name with learning rate and schedule.
        runs: By seed.
        reach: By seed, the steps until the training loss was at most the final one of tuned AdamW with the same seed;
            infinite if it never was.
    """

    task: str
    title: str
    setting: str
    runs: Mapping[int, Record]
    reach: Mapping[int, float]

    def values(self, name: str) -> list[float]:
        """A number of all runs; infinite where a run has none."""
        return [number_of(run, name) for run in self.runs.values()]

    def median(self, name: str) -> float:
        """The median of a number over the runs."""
        return median(self.values(name))

    @property
    def steps(self) -> float:
        """Median steps until tuned AdamW's final training loss is reached."""
        return median(self.reach.values()) if self.reach else math.inf

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(run["diverged"] for run in self.runs.values())


@dataclass(frozen=True)
class Counts:
    """Over the tasks of a horizon.

    Attributes:
        tasks: How many there are.
        reaches: On how many tuned AdamW's final training loss is reached in no more steps than it takes.
        tuned_train: On how many the final training loss is below tuned AdamW's.
        tuned_validation: The same for the validation loss.
        global_train: On how many the final training loss is below that of AdamW's global setting.
        global_validation: The same for the validation loss.
        diverged: On how many a run diverged.
    """

    tasks: int
    reaches: int
    tuned_train: int
    tuned_validation: int
    global_train: int
    global_validation: int
    diverged: int


def number_of(run: Record, name: str) -> float:
    """A number of a run; infinite if it has none."""
    value = run[name]
    return math.inf if value is None else float(value)


def medians_of_grid(runs: Mapping[str, Mapping[int, Record]]) -> dict[str, float]:
    """The median final training loss of every setting, over the seeds that all of them have."""
    if not runs:
        return {}
    common = set.intersection(*(set(seeds) for seeds in runs.values()))
    return {
        name: median(number_of(seeds[s], "train") for s in sorted(common)) for name, seeds in runs.items() if common
    }


def ranks_of(values: Mapping[str, float]) -> dict[str, float]:
    """1 for the least; equal values share the mean of their ranks."""
    everyone = list(values.values())
    return {
        name: 1 + sum(other < value for other in everyone) + (sum(other == value for other in everyone) - 1) / 2
        for name, value in values.items()
    }


class Results:
    """The runs of one horizon.

    Args:
        records: Runs; those of other horizons are left out.
        steps: The horizon.
        learned: Names of the learned optimizers to look at; by default all.

    Attributes:
        steps: The horizon.
        tasks: Those that were run.
        titles: Who has a column of losses, see :attr:`Result.title`: tuned baselines, AdamW's global setting, and
            learned optimizers at their own learning rates.
        learned: The last of these.
        best: For every task, the best setting of every baseline.
        global_settings: By baseline, the best setting for all tasks, where one was run on all of them.
        factors: By learned optimizer, the names of its runs by factor on its learning rate, where it has several.
    """

    def __init__(self, records: Iterable[Record], steps: int, learned: Sequence[str] | None = None) -> None:
        self.steps = steps
        self._runs: dict[str, dict[str, dict[int, Record]]] = {}  # by task, setting and seed
        self._optimizer: dict[str, str] = {}
        factors: dict[str, dict[float, str]] = {}
        for record in records:
            if record["steps"] == steps:
                self._runs.setdefault(record["task"], {}).setdefault(record["name"], {})[record["seed"]] = record
                self._optimizer[record["name"]] = record["setting"]["optimizer"]
                factor = record["setting"].get("factor", 1.0)
                factors.setdefault(record["name"].replace(f"*{factor:g}", ""), {})[factor] = record["name"]
        self.tasks = sorted(self._runs, key=_place)
        medians = {task: {base: medians_of_grid(self._grid(task, base)) for base in BASELINES} for task in self.tasks}
        self.best = {
            task: {base: min(found, key=lambda name: found[name]) for base, found in of_task.items() if found}
            for task, of_task in medians.items()
        }
        found = {base: self._global([of_task[base] for of_task in medians.values()]) for base in BASELINES}
        self.global_settings = {base: setting for base, setting in found.items() if setting}
        self.titles = [tuned(base) for base in BASELINES if any(base in best for best in self.best.values())]
        if self.global_setting:
            self.titles.insert(1, GLOBAL)
        own = sorted(
            name
            for name, optimizer in self._optimizer.items()
            if optimizer not in BASELINES and factors.get(name, {}).get(1.0) == name
        )
        self.learned = own if learned is None else [name for name in learned if name in own]
        self.titles += self.learned
        self.factors = {
            name: dict(sorted(found.items()))
            for name, found in sorted(factors.items())
            if len(found) > 1 and (learned is None or not set(learned).isdisjoint(found.values()))
        }

    def _grid(self, task: str, baseline: str) -> dict[str, dict[int, Record]]:
        return {name: runs for name, runs in self._runs[task].items() if self._optimizer[name] == baseline}

    @staticmethod
    def _global(medians: Sequence[Mapping[str, float]]) -> str | None:
        """The setting of least mean rank over the tasks."""
        common = set.intersection(*(set(found) for found in medians)) if medians else set()
        ranks = [ranks_of({name: found[name] for name in found if name in common}) for found in medians]
        return min(sorted(common), key=lambda name: fmean(found[name] for found in ranks), default=None)

    def setting_of(self, task: str, title: str) -> str | None:
        """The name of the setting that a title stands for."""
        base, _, kind = title.rpartition(" ")
        if base not in BASELINES or "=" in kind:
            return title
        if kind == "default":
            return default_of(base).name
        return self.global_settings.get(base) if kind == "global" else self.best[task].get(base)

    @property
    def global_setting(self) -> str | None:
        """AdamW's, for all tasks; None if no setting was run on all of them."""
        return self.global_settings.get("adamw")

    @property
    def contenders(self) -> list[str]:
        """All titles that figures are made of: learned optimizers, and baselines tuned and not."""
        bases = [base for base in BASELINES if any(base in best for best in self.best.values())]
        rest = [title(base) for title in (tuned, at_global, at_default) for base in bases]
        return [*self.learned, *(title for title in rest if any(self.result(task, title) for task in self.tasks))]

    def result(self, task: str, title: str) -> Result | None:
        """The runs that a title stands for; None if there are none."""
        setting = self.setting_of(task, title)
        runs = self._runs[task].get(setting, {}) if setting else {}
        if setting is None or not runs:
            return None
        rival = self._runs[task].get(self.best[task].get("adamw", ""), {})
        reach = {
            seed: steps_until(run, number_of(rival[seed], "train"))
            for seed, run in sorted(runs.items())
            if seed in rival
        }
        return Result(task, title, setting, dict(sorted(runs.items())), reach)

    def counts(self, title: str) -> Counts:
        """How a title fares on all tasks."""
        found = [result for task in self.tasks if (result := self.result(task, title))]

        def wins(rival: str, name: str) -> int:
            pairs = [(mine, other) for mine in found if (other := self.result(mine.task, rival))]
            return sum(mine.median(name) < other.median(name) for mine, other in pairs)

        return Counts(
            tasks=len(found),
            reaches=sum(result.steps <= self.steps for result in found),
            tuned_train=wins(tuned("adamw"), "train"),
            tuned_validation=wins(tuned("adamw"), "validation"),
            global_train=wins(GLOBAL, "train"),
            global_validation=wins(GLOBAL, "validation"),
            diverged=sum(result.diverged > 0 for result in found),
        )

    def at_the_edge(self) -> list[str]:
        """Baselines, and where their best learning rate ends their grid, which may be too narrow there."""
        return [
            f"{base} on {task}" for task in self.tasks for base in self.best[task] if self._is_at_the_edge(task, base)
        ]

    def _is_at_the_edge(self, task: str, baseline: str) -> bool:
        rates = {name: next(iter(runs.values()))["setting"]["lr"] for name, runs in self._grid(task, baseline).items()}
        return rates[self.best[task][baseline]] in (min(rates.values()), max(rates.values()))


def _place(task: str) -> tuple[int, int, str]:
    """Where a task stands in lists: as in the suite, then by its width if that is another."""
    order, (name, width) = list(TASKS), split_width(task)
    return order.index(name) if name in TASKS else len(order), int(width or 0), name


def steps_until(run: Record, target: float) -> float:
    """Steps until the training loss is at most ``target``; infinite if it never is."""
    return next((at for at, value in run["train_curve"] if value is not None and value <= target), math.inf)
