"""Tables and numbers as people read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pylo_integrations.sharding.collectives import Collective


def table(header: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> str:
    """Cells in columns, the first to the left and the others to the right, below a title if there is one."""
    cells = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    return "\n".join([title, *lines] if title else lines)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table of Markdown, the first column to the left and the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def milliseconds(record: Mapping[str, Any]) -> tuple[str, str]:
    """A record's time of a step, and the range of its samples, in milliseconds."""
    samples = [1e3 * sample for sample in record["step_seconds_samples"]]
    return f"{1e3 * record['step_seconds']:.4g}", f"{min(samples):.4g}..{max(samples):.4g}"


def traffic(collectives: Sequence[Collective]) -> tuple[str, str]:
    """How many of each kind, and the bytes of each."""
    kinds = Counter(collective.kind for collective in collectives)
    names = " + ".join(f"{count} {kind}" for kind, count in kinds.items())
    return names or "none", " + ".join(size(collective.bytes) for collective in collectives) or "-"


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    power = min(3, max(0, count.bit_length() - 1) // 10)
    return f"{_number(count / 1024**power)} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _number(value: float) -> str:
    """Three digits at least, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
