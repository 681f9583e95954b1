"""Memory and traffic of well-known models as a page of Markdown; all is computed, nothing is timed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pylo_integrations.bench import text
from pylo_integrations.bench.counts import elements_on_rank_0, state_bytes_on_rank_0
from pylo_integrations.bench.dry_run import dry_run
from pylo_integrations.bench.shapes import SHAPES, describe_shapes, numel
from pylo_integrations.bench.simulation import all_reduced, simulate
from pylo_integrations.bench.strategies import NODE, STRATEGIES, label
from pylo_integrations.catalog import list_optimizers

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

Bytes are what a rank puts into a collective. Steps of `pace` are those after its first hundred, which average the loss
as well, where it is told. A step that clips the gradient norm repeats its first all-reduce where the
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
        facts = describe_shapes(shapes)
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
    parameters = numel(kinds)
    cases = [(name, NODE if name == "tp" else ranks) for name, strategy in STRATEGIES.items() if strategy.elements]
    header = ["memory of a rank", "bytes per parameter", *(label(*case) for case in cases)]

    def row(name: str, sizes: Sequence[int]) -> tuple[str, ...]:
        return name, f"{sizes[0] / parameters:.2f}", *map(text.size, sizes)

    rows = [row("parameters and gradients", [8 * elements_on_rank_0(kinds, *case) for case in cases])]
    rows.append(row("state of AdamW", [state_bytes_on_rank_0(None, kinds, *case) for case in cases]))
    optimizers = {name: [state_bytes_on_rank_0(name, kinds, *case) for case in cases] for name in list_optimizers()}
    rows += [row(f"state of {names}", sizes) for names, sizes in merged(optimizers)]
    return text.markdown(header, rows)


def traffic_table(shapes: str, strategy: str, ranks: int) -> str:
    """Collectives and bytes of a step of every optimizer, as Markdown."""
    costs = dry_run(SHAPES[shapes](), strategy, ranks, list_optimizers())
    found = {name: [*text.traffic(mine.collectives)] for name, mine in costs.items()}
    header = [f"a step under {label(strategy, ranks)}", "collectives", "into each"]
    return text.markdown(header, [(names, *cells) for names, cells in merged(found)])


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
        sent = all_reduced(record)
        rows.append(
            (
                shapes,
                f"{record['parameters']:,}",
                str(ranks),
                f"{record['parameters_per_rank']:,}",
                text.size(record["state_bytes"]),
                f"{record['rows_and_columns']:,}",
                text.size(sent),
                f"{sent / record['rows_and_columns']:.2f}",
            )
        )
    yield text.markdown(header, rows)


def merged(rows: Mapping[str, list[Any]]) -> list[tuple[str, list[Any]]]:
    """Rows by name, those with equal cells as one."""
    names: dict[tuple[Any, ...], list[str]] = {}
    for name, cells in rows.items():
        names.setdefault(tuple(cells), []).append(f"`{name}`")
    return [(", ".join(same), list(cells)) for cells, same in names.items()]
