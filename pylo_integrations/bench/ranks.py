"""What a step costs where many ranks train together, measured on real processes of this machine."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from pylo_integrations.bench import text
from pylo_integrations.bench.contenders import BASELINES, DTYPES, make_contender
from pylo_integrations.bench.measure import sample_in_turn, state_bytes
from pylo_integrations.bench.shapes import SHAPES, describe_shapes
from pylo_integrations.bench.strategies import STRATEGIES, label, spread
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.sharding.collectives import Collective, Collectives
from pylo_integrations.workers import Workers

TIMEOUT = 600
"""Seconds that all contenders of one strategy may take on one number of ranks."""

MEASURED = {
    "collectives": "counted by torch's dispatcher in a step after the first, with the bytes that each rank puts in",
    "state_bytes": "counted from the optimizer's state tensors, on each rank",
    "step_seconds": "perf_counter around steps of all contenders in turn, between barriers, on the slowest rank; "
    "processes of one thread each, which share this machine",
    "gradients": "random; neither a model nor the wrapper's own communication runs",
}


def measure_rank(
    rank: int, world: int, *, shapes: str, dtype: str, strategy: str, optimizers: Sequence[str], repeats: int
) -> dict[str, dict[str, Any]]:
    """One rank's part in a measurement: by contender, its ``state_bytes``, ``collectives`` and ``samples``."""
    torch.manual_seed(0)
    module, parameters = spread(SHAPES[shapes](), strategy, world, DTYPES[dtype])
    steps, found = {}, {}
    for name in [*optimizers, *BASELINES]:
        optimizer, steps[name] = make_contender(name, parameters, **STRATEGIES[strategy].options)
        if isinstance(optimizer, LearnedOptimizer):
            optimizer.bind_model(module)
        steps[name]()
        with Collectives() as noted:
            steps[name]()
        found[name] = {"state_bytes": state_bytes(optimizer), "collectives": noted.seen}

    def agree(count: int) -> int:
        most = torch.tensor(count)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    samples = sample_in_turn(steps, repeats, dist.barrier, agree)
    return {name: {**mine, "samples": samples[name]} for name, mine in found.items()}


def measure(
    workers: Workers, shapes: str, dtype: str, strategy: str, ranks: int, optimizers: Sequence[str], repeats: int
) -> list[dict[str, Any]]:
    """Measure contenders and baselines on real ranks; one record each, JSON-serialisable.

    Raises:
        RuntimeError: A rank failed or took too long, or ranks did not start the same collectives.
    """
    options: dict[str, Any] = {
        "shapes": shapes,
        "dtype": dtype,
        "strategy": strategy,
        "optimizers": optimizers,
        "repeats": repeats,
    }
    by_rank = workers.run(ranks, measure_rank, timeout=TIMEOUT, **options)
    records = []
    for name in [*optimizers, *BASELINES]:
        mine = [found[name] for found in by_rank]
        if len({tuple(c.name for c in found["collectives"]) for found in mine}) > 1:
            raise RuntimeError(f"ranks of {name} under {strategy} did not start the same collectives")
        samples = [max(times) for times in zip(*(found["samples"] for found in mine), strict=True)]
        records.append(
            {
                **describe_shapes(shapes),
                "dtype": dtype,
                "strategy": strategy,
                "ranks": ranks,
                "optimizer": name,
                "collectives": [
                    {"name": same[0].name, "bytes": [collective.bytes for collective in same]}
                    for same in zip(*(found["collectives"] for found in mine), strict=True)
                ],
                "state_bytes": [found["state_bytes"] for found in mine],
                "step_seconds": statistics.median(samples),
                "step_seconds_samples": samples,
            }
        )
    return records


def format_measured(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one strategy and number of ranks as a table for people."""
    first = records[0]
    title = (
        f"measured: {first['shapes']}, {first['parameters']:,} parameters in {first['tensors']} tensors, "
        f"{first['dtype']}, {label(first['strategy'], first['ranks'])} (gloo), "
        f"median of {len(first['step_seconds_samples'])}"
    )
    header = ("optimizer", "collectives", "into each", "ms/step", "min..max", "state MiB/rank")
    rows = []
    for record in records:
        collectives = [Collective(each["name"], max(each["bytes"])) for each in record["collectives"]]
        rows.append(
            (
                record["optimizer"],
                *text.traffic(collectives),
                *text.milliseconds(record),
                f"{max(record['state_bytes']) / 2**20:.4g}",
            )
        )
    return text.table(header, rows, title)
