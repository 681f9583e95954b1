"""How a meta-trained theta compares with where it started, and with AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pylo_integrations.metatrain.config import Config
from pylo_integrations.metatrain.evaluation import best_adamw, evaluate
from pylo_integrations.metatrain.learners import Arrays, Learner
from pylo_integrations.metatrain.tasks import Family


def compare(learner: Learner, start: Arrays, best: Arrays, part: str, family: Family, config: Config) -> dict[str, Any]:
    """One family's row of a report.

    Args:
        learner: Who steps.
        start: Theta at the start.
        best: The best theta.
        part: The set that the family is of.
        family: Its tasks.
        config: For everything else.
    """
    first, last = (evaluate(learner, arrays, family, config) for arrays in (start, best))
    row: dict[str, Any] = {"set": part, "family": family.name, "start": vars(first), "theta": vars(last)}
    if config.evaluation.adamw:
        lr, score = best_adamw(family, config, config.evaluation.adamw)
        row["adamw"] = {**vars(score), "lr": lr}
    return row


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
