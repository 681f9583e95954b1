"""What a step costs where many ranks train together, told by dry runs as records, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pylo_integrations import plot
from pylo_integrations.bench import text
from pylo_integrations.bench.dry_run import dry_run
from pylo_integrations.bench.shapes import SHAPES, describe_shapes
from pylo_integrations.sharding.collectives import Collective

SIMULATED = {
    "simulated": "all but plan_seconds: the optimizer's own step, as rank 0, on meta tensors in a fake process group",
    "measured": "plan_seconds, on this machine: building the plan of one rank's first step",
    "not told": "time of a step, and what a network does with the bytes",
}


def simulate(shapes: str, dtype: str, strategy: str, ranks: int, optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """Records of dry runs, JSON-serialisable."""
    return [
        {
            **describe_shapes(shapes),
            "dtype": dtype,
            "strategy": strategy,
            "ranks": ranks,
            "optimizer": name,
            "parameters_per_rank": costs.elements,
            "state_bytes": costs.state_bytes,
            "collectives": [asdict(collective) for collective in costs.collectives],
            "blocks": costs.blocks,
            "plan_seconds": costs.plan_seconds,
        }
        for name, costs in dry_run(SHAPES[shapes](), strategy, ranks, optimizers, dtype).items()
    ]


def format_simulated(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one optimizer and strategy as a table for people, with what they are proportional to."""
    first = records[0]
    title = f"simulated (but for the time to plan): {first['optimizer']}, {first['dtype']}, {first['strategy']}, rank 0"
    header = (
        "shapes",
        "ranks",
        "Mparam",
        "Mparam/rank",
        "state MiB",
        "B/param here",
        "rows+cols",
        "collectives",
        "into each",
        "all_reduce B/(rows+cols)",
        "plan s",
    )
    rows = []
    for record in records:
        rows.append(
            (
                record["shapes"],
                f"{record['ranks']:,}",
                f"{record['parameters'] / 1e6:,.1f}",
                f"{record['parameters_per_rank'] / 1e6:,.2f}",
                f"{record['state_bytes'] / 2**20:,.1f}",
                f"{record['state_bytes'] / record['parameters_per_rank']:.2f}",
                f"{record['rows_and_columns']:,}",
                *text.traffic(_collectives(record)),
                f"{all_reduced(record) / record['rows_and_columns']:.3f}",
                f"{record['plan_seconds']:.2f}",
            )
        )
    return text.table(header, rows, title)


def all_reduced(record: Mapping[str, Any]) -> int:
    """Bytes that a rank puts into the all-reduces of a step."""
    return sum(collective.bytes for collective in _collectives(record) if collective.kind == "all_reduce")


def _collectives(record: Mapping[str, Any]) -> list[Collective]:
    return [Collective(**each) for each in record["collectives"]]


def draw(records: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Draw state against parameters per rank, and traffic against rows and columns.

    Raises:
        PlotError: matplotlib is not installed or does not know the format.
    """
    state: dict[str, dict[int, float]] = {}
    traffic: dict[str, dict[int, float]] = {}
    for record in records:
        name = f"{record['optimizer']}, {record['strategy']}"
        state.setdefault(name, {})[record["parameters_per_rank"]] = record["state_bytes"] / 2**20
        traffic.setdefault(name, {})[record["rows_and_columns"]] = all_reduced(record) / 2**10
    plot.plot_curves(
        [
            ("state of a rank, MiB (simulated)", "parameters per rank", state),
            ("all-reduced in a step, KiB (simulated)", "rows and columns of all tensors", traffic),
        ],
        output,
    )
