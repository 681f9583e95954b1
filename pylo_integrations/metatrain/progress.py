"""What a meta-training has come to, besides tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from types import NoneType
from typing import Any

from pylo_integrations.metatrain.config import Stage


@dataclass
class Progress:
    """Counters and curves of a run; JSON-serialisable.

    Attributes:
        stage: Index of the stage.
        done: Iterations done in the stage.
        iteration: Iterations done in all.
        cpu_seconds: Spent by all ranks, and those of the runs that this one resumed.
        training_seconds: The part of them that unrolled training episodes.
        inner_steps: Optimizer steps in training episodes, over all members.
        window: Objectives by family since the last row of the log.
        curve: Evaluations: iteration, score, and the objective of every family.
        best_score: Of the best theta.
        best_iteration: When it was.
    """

    stage: int = 0
    done: int = 0
    iteration: int = 0
    cpu_seconds: float = 0.0
    training_seconds: float = 0.0
    inner_steps: int = 0
    window: dict[str, list[float]] = field(default_factory=dict)
    curve: list[dict[str, Any]] = field(default_factory=list)
    best_score: float = math.inf
    best_iteration: int = 0

    @classmethod
    def restored(cls, record: Mapping[str, Any], stages: Sequence[Stage]) -> Progress:
        """From the values of another; ValueError or TypeError if they are not those of a run of these stages."""
        progress = cls(**record)
        for name, value in vars(progress).items():
            kind = type(getattr(cls(), name))
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name} is {type(value).__name__}")
            if kind in (int, float) and not (value >= 0 or name == "best_score"):
                raise ValueError(f"{name} is {value}")
        if progress.stage >= len(stages) or progress.done > stages[progress.stage].iterations:
            raise ValueError(f"it is at iteration {progress.done} of stage {progress.stage}")
        if progress.iteration != progress.done + sum(stage.iterations for stage in stages[: progress.stage]):
            raise ValueError(f"it is at iteration {progress.iteration}")
        for values in progress.window.values():
            fmean(values)
        if any(type(value) not in (int, float, NoneType) for point in progress.curve for value in point.values()):
            raise ValueError("its curve has what are not numbers")
        return progress
