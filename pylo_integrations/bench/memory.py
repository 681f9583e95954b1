"""State of well-known models in every format, as tables of Markdown; all is computed, nothing is made."""

from __future__ import annotations

from collections.abc import Iterator

from pylo_integrations.bench import text
from pylo_integrations.bench.counts import state_bytes_on_rank_0
from pylo_integrations.bench.shapes import SHAPES, numel
from pylo_integrations.bench.strategies import label
from pylo_integrations.bench.tables import merged
from pylo_integrations.catalog import list_optimizers
from pylo_integrations.formats import FORMATS, StateDtype

MODELS = {
    "ViT-B/16": ("vit_b16", 8),
    "GPT-2 124M": ("gpt2", 8),
    "1B": ("llama_1b", 8),
    "7B": ("llama_7b", 8),
    "70B": ("llama_70b", 64),
}
"""Shapes and number of ranks of the models that the tables are about."""


def memory_tables() -> str:
    """The calculator of the page on memory, Markdown."""
    parts = ["### Bytes per parameter", _bytes_per_parameter()]
    for model, (shapes, ranks) in MODELS.items():
        parts += [f"### {model}", f"{numel(SHAPES[shapes]()):,} parameters.", _table(shapes, ranks)]
    return "\n\n".join(parts) + "\n"


def _bytes_per_parameter() -> str:
    """Of one process, by model, optimizer and format."""
    models = [shapes for shapes, _ in MODELS.values()]
    numels = [numel(SHAPES[shapes]()) for shapes in models]

    def cells(name: str | None, kind: StateDtype) -> list[str]:
        sizes = (state_bytes_on_rank_0(name, SHAPES[shapes](), "ddp", 1, kind) for shapes in models)
        return [f"{size / count:.2f}" for size, count in zip(sizes, numels, strict=True)]

    rows = [("AdamW", *cells(None, "float32"))]
    for kind in FORMATS:
        found = {name: cells(name, kind) for name in list_optimizers()}
        rows += [(f"{names}, {kind}", *mine) for names, mine in merged(found)]
    return text.markdown(["state", *MODELS], rows)


def _table(shapes: str, ranks: int) -> str:
    """State of rank 0 under a few strategies."""
    kinds = SHAPES[shapes]()
    cases = [("ddp", 1), ("shard_step", ranks), ("fsdp2", ranks)]

    def rows() -> Iterator[tuple[str, ...]]:
        sizes = [state_bytes_on_rank_0(None, kinds, *case) for case in cases]
        yield "AdamW", *map(text.size, sizes)
        for kind in FORMATS:
            found = {
                name: [state_bytes_on_rank_0(name, kinds, *case, kind) for case in cases] for name in list_optimizers()
            }
            for names, mine in merged(found):
                yield f"{names}, {kind}", *map(text.size, mine)

    return text.markdown(["state of a rank", "one process", *(label(*case) for case in cases[1:])], list(rows()))
