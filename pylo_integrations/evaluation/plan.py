"""What an evaluation has to run."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from pylo_integrations.evaluation.baselines import USUAL
from pylo_integrations.evaluation.contenders import Setting, default_of, grid_of
from pylo_integrations.evaluation.results import Results
from pylo_integrations.evaluation.runs import Record, Run, RunsFile, train_all
from pylo_integrations.evaluation.tasks import SUITES, find_task
from pylo_integrations.paths import check_destination

RUNS = "runs.jsonl"
"""Name of the file of runs in the folder of an evaluation."""


def evaluate(
    learned: Sequence[Setting],
    folder: Path,
    *,
    tasks: Sequence[str] = tuple(SUITES[1]),
    baselines: Sequence[str] = USUAL,
    steps: Sequence[int] = (1000,),
    seeds: int = 3,
    tuning_seeds: int | None = None,
    jobs: int = 1,
) -> list[Record]:
    """Run what ``<folder>/runs.jsonl`` lacks, appending run by run.

    Args:
        learned: Learned optimizers.
        folder: Where the runs are kept.
        tasks: Names of held-out tasks of one suite, with ``:<width>`` for another width.
        baselines: Names of baselines.
        steps: Horizons.
        seeds: How many, from 0 on.
        tuning_seeds: On how many of them every setting of the baselines is run; on the others only the best ones are.
            By default all; 0 for no baselines.
        jobs: Processes, of one thread each.

    Returns:
        All runs in the file.

    Raises:
        ValueError: Unknown task or width.
        DataError: The data of a task are not on this machine.
        RunsError: The file of runs cannot be used.
        OSError: The folder or the file cannot be read or written.
    """
    for task in tasks:
        find_task(task).data()  # not after hours
    folder.mkdir(parents=True, exist_ok=True)
    check_destination(folder / RUNS, "file of runs")
    file = RunsFile(folder / RUNS)
    tuning = range(seeds if tuning_seeds is None else min(seeds, tuning_seeds))
    grid = [setting for name in baselines for setting in grid_of(name)]
    everything = [
        Run(task, setting, horizon, seed)
        for horizon in steps
        for seed in range(seeds)
        for task in tasks
        for setting in (*learned, *(grid if seed in tuning else ()))
    ]
    _run_missing(file, everything, jobs)
    best = [
        Run(task, setting, horizon, seed)
        for horizon in steps
        for task, setting in _best(Results(file.records, horizon), grid)
        for seed in range(seeds)
        if task in tasks
    ]
    _run_missing(file, best, jobs)
    return file.records


def _best(results: Results, grid: Sequence[Setting]) -> Iterator[tuple[str, Setting]]:
    """Every task, and the settings of the grid that are reported there."""
    for task in results.tasks:
        names = {*results.best[task].values(), *results.global_settings.values()}
        names |= {default_of(setting.optimizer).name for setting in grid}
        yield from ((task, setting) for setting in grid if setting.name in names)


def _run_missing(file: RunsFile, runs: Sequence[Run], jobs: int) -> None:
    missing = file.missing(runs)
    # A line a minute where nobody watches.
    interval = 0.5 if sys.stderr.isatty() else 60
    with tqdm(train_all(missing, jobs), total=len(missing), unit="run", mininterval=interval) as bar:
        for record in bar:
            file.add(record)
