"""``pylo bench --distributed``: what a step of a learned optimizer costs where many ranks train together.

``measure`` steps on real processes of this machine, joined by gloo, one thread each. ``simulate`` makes dry runs
(:mod:`~pylo_integrations.dry_run`) of any size on one process. ``tables`` writes memory and traffic of well-known
models as Markdown; they are computed, nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pylo_integrations import bench, plot
from pylo_integrations.bench import BASELINES, DTYPES, SHAPES, ParamShape, align, make_contender
from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.dry_run import dry_run
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.rules.adamw import AdamW
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.collectives import Collective, Collectives
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.strategies import NODE, SIMULABLE, STRATEGIES, shards_of_hsdp, spread
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
SIMULATED = {
    "simulated": "all but plan_seconds: the optimizer's own step, as rank 0, on meta tensors in a fake process group",
    "measured": "plan_seconds, on this machine: building the plan of one rank's first step",
    "not told": "time of a step, and what a network does with the bytes",
}


# -- measuring -----------------------------------------------------------------------------------------------------


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
        found[name] = {"state_bytes": bench.state_bytes(optimizer), "collectives": noted.seen}

    def agree(count: int) -> int:
        most = torch.tensor(count)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)

    samples = bench.sample_in_turn(steps, repeats, dist.barrier, agree)
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
                **_of_shapes(shapes),
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


def _of_shapes(shapes: str) -> dict[str, Any]:
    kinds = SHAPES[shapes]()
    return {
        "shapes": shapes,
        "parameters": sum(math.prod(kind.shape) for kind in kinds),
        "tensors": len(kinds),
        "rows_and_columns": sum(map(rows_and_columns, kinds)),
    }


def rows_and_columns(kind: ParamShape) -> int:
    """Numbers in the row and column statistics of a tensor, one decay's worth; 0 below rank 2."""
    layout = TensorLayout.whole(kind.shape, kind.axes)
    return sum(math.prod(layout.without(axis)) for axis in layout.factored or ())


def format_measured(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one strategy and number of ranks as a table for people."""
    first = records[0]
    title = (
        f"measured: {first['shapes']}, {first['parameters']:,} parameters in {first['tensors']} tensors, "
        f"{first['dtype']}, {_label(first['strategy'], first['ranks'])} (gloo), "
        f"median of {len(first['step_seconds_samples'])}"
    )
    header = ("optimizer", "collectives", "into each", "ms/step", "min..max", "state MiB/rank")
    rows = []
    for record in records:
        milliseconds = [1e3 * sample for sample in record["step_seconds_samples"]]
        collectives = [Collective(each["name"], max(each["bytes"])) for each in record["collectives"]]
        rows.append(
            (
                record["optimizer"],
                *_describe(collectives),
                f"{1e3 * record['step_seconds']:.4g}",
                f"{min(milliseconds):.4g}..{max(milliseconds):.4g}",
                f"{max(record['state_bytes']) / 2**20:.4g}",
            )
        )
    return "\n".join([title, *align([header, *rows])])


def _describe(collectives: Sequence[Collective]) -> tuple[str, str]:
    """How many of each kind, and the bytes of each."""
    kinds = Counter(collective.kind for collective in collectives)
    names = " + ".join(f"{count} {kind}" for kind, count in kinds.items())
    return names or "none", " + ".join(_size(collective.bytes) for collective in collectives) or "-"


def _size(count: int) -> str:
    """Bytes in the unit that suits them."""
    power = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{_number(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _number(value: float) -> str:
    """Three digits at least, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


# -- simulating ----------------------------------------------------------------------------------------------------


def simulate(shapes: str, dtype: str, strategy: str, ranks: int, optimizers: Sequence[str]) -> list[dict[str, Any]]:
    """Records of dry runs, JSON-serialisable."""
    return [
        {
            **_of_shapes(shapes),
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
        collectives = [Collective(**each) for each in record["collectives"]]
        rows.append(
            (
                record["shapes"],
                f"{record['ranks']:,}",
                f"{record['parameters'] / 1e6:,.1f}",
                f"{record['parameters_per_rank'] / 1e6:,.2f}",
                f"{record['state_bytes'] / 2**20:,.1f}",
                f"{record['state_bytes'] / record['parameters_per_rank']:.2f}",
                f"{record['rows_and_columns']:,}",
                *_describe(collectives),
                f"{_reduced(collectives) / record['rows_and_columns']:.3f}",
                f"{record['plan_seconds']:.2f}",
            )
        )
    return "\n".join([title, *align([header, *rows])])


def _reduced(collectives: Sequence[Collective]) -> int:
    return sum(collective.bytes for collective in collectives if collective.kind == "all_reduce")


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
        sent = _reduced([Collective(**each) for each in record["collectives"]])
        traffic.setdefault(name, {})[record["rows_and_columns"]] = sent / 2**10
    plot.plot_curves(
        [
            ("state of a rank, MiB (simulated)", "parameters per rank", state),
            ("all-reduced in a step, KiB (simulated)", "rows and columns of all tensors", traffic),
        ],
        output,
    )


# -- tables --------------------------------------------------------------------------------------------------------

MODELS = {"ViT-B/16": ("vit_b16", 8), "GPT-2 124M": ("gpt2", 8), "LLaMA-7B": ("llama_7b", 256)}
"""Shapes and number of ranks of the models that the tables are about."""

GROWTH = tuple(itertools.product(("llama_1b", "llama_7b", "llama_65b"), (8, 256)))
"""Shapes and number of ranks of the points of the curve that the tables end with."""

PAGE = """\
# What many ranks cost

Written by `pylo bench --distributed tables`, and kept true by a test. Nothing here was timed, or run on many ranks:
state is counted from the shapes that each rule names, collectives and bytes are those of a dry run, which is the
optimizer's own step as rank 0 of a fake process group, on tensors that have shapes but no memory. Tests compare both
with what real processes hold and send.

Parameters, gradients and state are float32; a model kept in bfloat16 halves the first two and changes nothing else.
Cells tell what rank 0 holds; no rank holds more. A step's temporaries come on top, bounded by `chunk_bytes` whatever
the model.

| strategy | meaning |
|---|---|
{strategies}

Bytes are what a rank puts into a collective. A step that clips the gradient norm repeats its first all-reduce where the
rule's sums do not scale with the gradient (`velo`, `celo`, `celo2_base`, `celo2`, `elo_celo2`).

Under DDP, whatever the model, replicas only average the loss. With `shard_step` they send what sharded parameters do,
and collect the parameters: an all-gather, or more if `chunk_bytes` bounds them, of the rows that a rank has stepped.

{ddp}
"""


def tables() -> str:
    """Memory and traffic of well-known models, a page of Markdown."""
    strategies = "\n".join(f"| {name} | {each.about} |" for name, each in STRATEGIES.items() if each.elements)
    parts = [PAGE.format(strategies=strategies, ddp=traffic_table("tiny", "ddp", 2))]
    for model, (shapes, ranks) in MODELS.items():
        facts = _of_shapes(shapes)
        parts += [
            f"## {model}",
            f"{facts['parameters']:,} parameters in {facts['tensors']} tensors with "
            f"{facts['rows_and_columns']:,} rows and columns.",
            memory_table(shapes, ranks),
            traffic_table(shapes, "fsdp2", ranks),
        ]
    return "\n\n".join(part.strip() for part in [*parts, "## Growth", *_growth()]) + "\n"


def memory_table(shapes: str, ranks: int) -> str:
    """State of every optimizer under every strategy, per parameter and per rank, as Markdown."""
    kinds = SHAPES[shapes]()
    numel = sum(math.prod(kind.shape) for kind in kinds)
    cases = [(name, NODE if name == "tp" else ranks) for name, strategy in STRATEGIES.items() if strategy.elements]
    header = ["memory of a rank", "bytes per parameter", *(_label(*case) for case in cases)]

    def row(label: str, sizes: Sequence[int]) -> tuple[str, ...]:
        return label, f"{sizes[0] / numel:.2f}", *map(_size, sizes)

    rows = [row("parameters and gradients", [8 * elements_on_rank_0(kinds, *case) for case in cases])]
    rows.append(row("state of AdamW", [state_bytes(None, kinds, *case) for case in cases]))
    optimizers = {name: [state_bytes(name, kinds, *case) for case in cases] for name in list_optimizers()}
    rows += [row(f"state of {label}", sizes) for label, sizes in _merged(optimizers)]
    return _markdown(header, rows)


def _label(strategy: str, ranks: int) -> str:
    shards = shards_of_hsdp(ranks) if strategy == "hsdp" else ranks
    groups = f"{ranks // shards} x {shards}"
    return f"{strategy}, {groups if strategy == 'hsdp' else ranks} rank{'s' * (ranks > 1)}"


def elements_on_rank_0(shapes: Sequence[ParamShape], strategy: str, ranks: int) -> int:
    """How many elements of parameters rank 0 holds; no rank has more."""
    elements = STRATEGIES[strategy].elements
    assert elements is not None, f"{strategy} is not told by shapes alone"
    return sum(elements(kind, ranks) for kind in shapes)


def stepped_on_rank_0(kind: ParamShape, strategy: str, ranks: int) -> int:
    """How many elements of a parameter rank 0 steps; no rank steps more."""
    stepped = STRATEGIES[strategy].stepped
    return stepped(kind, ranks) if stepped else elements_on_rank_0([kind], strategy, ranks)


def state_bytes(optimizer: str | None, shapes: Sequence[ParamShape], strategy: str, ranks: int) -> int:
    """Bytes of float32 state on rank 0, from what the rule itself says of the shapes of its state.

    State that is shaped like its parameter is sharded like it; the rest is on every rank.

    Args:
        optimizer: A catalogue name; None for AdamW.
        shapes: Of whole parameters.
        strategy: A name in :data:`~pylo_integrations.strategies.STRATEGIES`, which is told by shapes alone.
        ranks: How many train together.
    """
    spec = None if optimizer is None else get_optimizer_info(optimizer)
    rule = AdamW() if optimizer is None else _rule(optimizer)
    count = 0
    for kind in shapes:
        layout = TensorLayout.whole(kind.shape, kind.axes)
        group = {"rule": "learned" if spec is None else kind.rule_of(spec)}
        for shape in rule.member(layout, group).state_shapes(layout).values():
            count += stepped_on_rank_0(kind, strategy, ranks) if shape is None else math.prod(shape)
    return torch.float32.itemsize * count


@functools.cache
def _rule(optimizer: str) -> Rule:
    made, _ = make_contender(optimizer, [(bench.fresh_parameter((1, 1), torch.float32, "cpu"), ParamShape((1, 1)))])
    assert isinstance(made, LearnedOptimizer)
    return made.rule


def traffic_table(shapes: str, strategy: str, ranks: int) -> str:
    """Collectives and bytes of a step of every optimizer, as Markdown."""
    costs = dry_run(SHAPES[shapes](), strategy, ranks, list_optimizers())
    found = {name: [*_describe(mine.collectives)] for name, mine in costs.items()}
    header = [f"a step under {_label(strategy, ranks)}", "collectives", "into each"]
    return _markdown(header, [(label, *cells) for label, cells in _merged(found)])


def _growth() -> Iterator[str]:
    yield (
        "State grows with the parameters of a rank, and what ranks send with the rows and columns of the model,\n"
        "however many ranks there are: `small_fc_lopt` under fsdp2. `pylo bench --distributed simulate` has others."
    )
    header = [
        "model",
        "parameters",
        "ranks",
        "parameters of a rank",
        "state of a rank",
        "rows and columns",
        "all-reduced",
        "bytes of it per row or column",
    ]
    rows = []
    for shapes, ranks in GROWTH:
        [record] = simulate(shapes, "float32", "fsdp2", ranks, ["small_fc_lopt"])
        sent = _reduced([Collective(**each) for each in record["collectives"]])
        rows.append(
            (
                shapes,
                f"{record['parameters']:,}",
                str(ranks),
                f"{record['parameters_per_rank']:,}",
                _size(record["state_bytes"]),
                f"{record['rows_and_columns']:,}",
                _size(sent),
                f"{sent / record['rows_and_columns']:.2f}",
            )
        )
    yield _markdown(header, rows)


def _merged(rows: Mapping[str, list[Any]]) -> list[tuple[str, list[Any]]]:
    """Rows by label, those with equal cells as one."""
    labels: dict[tuple[Any, ...], list[str]] = {}
    for label, cells in rows.items():
        labels.setdefault(tuple(cells), []).append(f"`{label}`")
    return [(", ".join(same), list(cells)) for cells, same in labels.items()]


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -- command line --------------------------------------------------------------------------------------------------

MODES: Mapping[str, Mapping[str, Any]] = {
    "measure": {
        "shapes": ("vit_ti",),
        "optimizers": ("small_fc_lopt",),
        "strategies": tuple(STRATEGIES),
        "ranks": (1, 2, 4),
        "repeats": 5,
        "dtype": "float32",
        "json": None,
    },
    "simulate": {
        "shapes": ("llama_1b", "llama_7b", "llama_13b", "llama_65b"),
        "optimizers": ("small_fc_lopt",),
        "strategies": ("fsdp2",),
        "ranks": (8, 64, 256, 1024),
        "dtype": "float32",
        "json": None,
        "plot": None,
    },
    "tables": {},
}
"""Options of every mode, and what they are if not given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``pylo bench`` that are about many ranks."""
    group = parser.add_argument_group("where many ranks train together", description=bench.plain(__doc__))
    group.add_argument("--distributed", nargs="?", const="measure", choices=MODES, help="by default measure")
    group.add_argument(
        "--strategies",
        type=bench.names_of("strategy", lambda: list(STRATEGIES)),
        help=f"comma-separated, of {', '.join(STRATEGIES)} (default: all; simulated: fsdp2)",
    )
    group.add_argument("--ranks", type=bench.counts, help="comma-separated (default: 1,2,4; simulated: 8,64,256,1024)")
    group.add_argument("--plot", type=bench.new_file, metavar="FILE", help="also draw what was simulated into FILE")
    parser.set_defaults(run=main, parser=parser)


def main(args: argparse.Namespace) -> int:
    """Run what the options ask for; returns the exit code, 1 if a measurement failed."""
    if args.distributed is None:
        return bench.main(args)
    args = bench.resolve(args, MODES[args.distributed], f"with --distributed {args.distributed}")
    if args.distributed == "tables":
        print(tables(), end="")
        return 0
    cases = [
        (shapes, strategy, ranks)
        for shapes, strategy, ranks in itertools.product(args.shapes, args.strategies, args.ranks)
        if STRATEGIES[strategy].allows(ranks)
    ]
    if not cases:
        args.parser.error(
            f"none of the strategies {', '.join(args.strategies)} is for {' or '.join(map(str, args.ranks))} ranks"
        )
    return _measure(args, cases) if args.distributed == "measure" else _simulate(args, cases)


def _measure(args: argparse.Namespace, cases: Sequence[tuple[str, str, int]]) -> int:
    report, failed = bench.Report(MEASURED), False
    workers = Workers()
    try:
        for shapes, strategy, ranks in cases:
            try:
                records = measure(workers, shapes, args.dtype, strategy, ranks, args.optimizers, args.repeats)
            except RuntimeError as error:
                failed = True
                print(f"{shapes}, {strategy} on {ranks} ranks failed: {error}", file=sys.stderr)
            else:
                report.add(records, format_measured(records))
    finally:
        workers.close()
    report.write(args.json)
    return int(failed)


def _simulate(args: argparse.Namespace, cases: Sequence[tuple[str, str, int]]) -> int:
    if unknown := [name for name in args.strategies if name not in SIMULABLE]:
        args.parser.error(f"strategy {unknown[0]!r} can be measured, but not simulated")
    if chosen := [name for name in args.optimizers if ":" in name]:
        args.parser.error(f"{chosen[0]!r} names a backend, but a simulation runs none: leave it out")
    report = bench.Report(SIMULATED)
    found = [
        record
        for shapes, strategy, ranks in cases
        for record in simulate(shapes, args.dtype, strategy, ranks, args.optimizers)
    ]
    for optimizer, strategy in itertools.product(args.optimizers, args.strategies):
        if records := [each for each in found if (each["optimizer"], each["strategy"]) == (optimizer, strategy)]:
            report.add(records, format_simulated(records))
    report.write(args.json)
    if args.plot:
        try:
            draw(report.results, args.plot)
        except plot.PlotError as error:
            args.parser.error(str(error))
        print(f"written to {args.plot}")
    return 0
