"""What a step of learned optimizers costs beside AdamW's and Muon's, as records and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pylo_integrations.bench import text
from pylo_integrations.bench.contenders import BASELINES, EIGHT_BIT, Setting, missing_package
from pylo_integrations.bench.measure import in_fresh_process, measure_memory, paired_ratio, sample_step_seconds
from pylo_integrations.bench.shapes import SHAPES, numel
from pylo_integrations.formats import FORMATS


def compared(optimizers: Sequence[str]) -> tuple[list[str], list[str]]:
    """Who of :data:`EIGHT_BIT` is measured too, if some of ``optimizers`` store state in few bits; why others not."""
    if not any(name.partition(":")[2] in FORMATS for name in optimizers):
        return [], []
    absent = {name: package for name in EIGHT_BIT if (package := missing_package(name))}
    reasons = [f"{name} is left out: {package} is not installed" for name, package in absent.items()]
    return [name for name in EIGHT_BIT if name not in absent], reasons


def run_bench(setting: Setting, optimizers: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure ``optimizers`` and the baselines; one record each, JSON-serialisable, the ratios being paired."""
    names = [*optimizers, *BASELINES, *compared(optimizers)[0]]
    samples = in_fresh_process(sample_step_seconds, setting, names, repeats)
    kinds = SHAPES[setting.shapes]()
    parameters = numel(kinds)
    records = []
    for name in names:
        state_bytes, peak = in_fresh_process(measure_memory, setting, name)
        median = statistics.median(samples[name])
        records.append(
            {
                **asdict(setting),
                "optimizer": name,
                "parameters": parameters,
                "tensors": len(kinds),
                "step_seconds": median,
                "step_seconds_samples": samples[name],
                "parameters_per_second": parameters / median,
                "ns_per_parameter": 1e9 * median / parameters,
                **{f"times_{base}": paired_ratio(samples, name, base) for base in BASELINES},
                "peak_temporaries_bytes": peak,
                "state_bytes_per_parameter": state_bytes,
            }
        )
    return records


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one setting as a table for people."""
    first = records[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    title = (
        f"{first['shapes']}: {first['parameters']:,} parameters in {first['tensors']} tensors, {first['dtype']}, "
        f"{first['device']}, {threads}, median of {len(first['step_seconds_samples'])}"
    )
    header = (
        "optimizer",
        "ms/step",
        "min..max",
        "Mparam/s",
        "ns/param",
        *(f"x {base.removeprefix('adamw_')}" for base in BASELINES),
        "peak MiB",
        "state B/p",
    )
    return text.table(header, [_row(record) for record in records], title)


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    peak = record["peak_temporaries_bytes"]
    return (
        record["optimizer"],
        *text.milliseconds(record),
        f"{record['parameters_per_second'] / 1e6:.4g}",
        f"{record['ns_per_parameter']:.3g}",
        *(f"{record[f'times_{base}']:.3g}" for base in BASELINES),
        "unknown" if peak is None else f"{peak / 2**20:.1f}",
        f"{record['state_bytes_per_parameter']:.4g}",
    )
