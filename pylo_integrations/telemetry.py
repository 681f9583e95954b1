"""What the last step did, in numbers.

An engine that is being watched adds four sums per tensor to what a step computes. They stay on the device: only
reading them, :meth:`LearnedOptimizer.telemetry`, waits for it. The sums are plain sums over blocks, completed like
those of a rule, so they mean the whole tensor wherever its pieces are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pylo_integrations.rules.base import Control, StepContext, read_gradient
from pylo_integrations.sharding.blocks import Accumulator, Block, Bucket, PartialSum
from pylo_integrations.sharding.rounds import Ranks, sum_over_ranks_

TelemetryMode: TypeAlias = bool | Literal["per_parameter"]
"""Off, on for each parameter group, or on for each group and each parameter."""


def is_per_parameter(mode: TelemetryMode) -> bool:
    """Whether ``mode`` asks for numbers of each parameter.

    Raises:
        ValueError: Not a :data:`TelemetryMode`.
    """
    if mode not in (True, False, "per_parameter"):
        raise ValueError(f"telemetry={mode!r} is unknown; choose one of False, True, 'per_parameter'")
    return mode == "per_parameter"


class StepRecord:
    """The sums of one step, for every tensor of ``buckets``."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = buckets
        self._totals = [Accumulator(bucket) for bucket in buckets]
        self._controls: list[dict[str, Tensor]] = []

    def add(self, index: int, block: Block, update: Tensor, ctx: StepContext) -> None:
        """Add a block of bucket ``index``, before it is stored.

        Args:
            index: Of the bucket.
            block: Its parameters are still the old ones.
            update: ``(tensors, 1, *box)``: what will be subtracted, learning rate included, weight decay not.
            ctx: For the gradient as the rule saw it.
        """
        param, grad = block.param, read_gradient(block, ctx)
        pairs = {"update": (update, update), "param": (param, param), "grad": (grad, grad), "descent": (update, grad)}
        axes = range(len(block.box.shape))
        sums = {name: PartialSum.of(left * right, axes, block.box.shape) for name, (left, right) in pairs.items()}
        self._totals[index].add_(block, sums)

    def add_applied(self, index: int, before: list[Tensor], keep: float | Tensor, ctx: StepContext) -> None:
        """Add all blocks of a bucket whose parameters were stored already; ``before`` are the old ones.

        The update is then told as the dtype of the parameters rounded it.
        """
        old = replace(self.buckets[index], params=before)
        for block in old.blocks:
            earlier = replace(block, bucket=old)
            self.add(index, earlier, earlier.param * keep - block.param, ctx)

    def complete_(self, controls: Sequence[Control], ranks: Ranks) -> None:
        """Complete the sums; keep what the rule decided for each bucket, where that is one number a tensor."""
        shares = [
            (total, ranks.size // bucket.parts)
            for bucket, totals in zip(self.buckets, self._totals, strict=True)
            if bucket.parts > 1
            for total in totals.sums.values()
        ]
        sum_over_ranks_(shares, ranks)
        for bucket, control in zip(self.buckets, controls, strict=True):
            count = len(bucket)
            shown = {
                name: value.reshape(-1).expand(count)
                for name, value in control.items()
                if value.numel() == 1 or value.numel() == value.shape[0] == count
            }
            self._controls.append(shown)

    def columns(self) -> list[dict[str, Tensor]]:
        """For each bucket, the sums and then the decisions by name, each ``(tensors,)``."""
        return [
            {**{name: total.reshape(-1) for name, total in totals.sums.items()}, **control}
            for totals, control in zip(self._totals, self._controls, strict=True)
        ]


@dataclass
class Telemetry:
    """Watches an engine.

    Attributes:
        per_parameter: Whether :meth:`read` tells of each parameter too.
        last: The last step that was taken; None before the first.
    """

    per_parameter: bool = False
    last: StepRecord | None = None

    def read(self, groups: Sequence[Mapping[str, Any]], features: Mapping[str, Tensor]) -> dict[str, float]:
        """The numbers by name; waits for the device, once.

        Args:
            groups: The optimizer's parameter groups, which give indices and names.
            features: Further tensors of one element, told as they are.
        """
        buckets = [] if self.last is None else self.last.buckets
        columns = [] if self.last is None else self.last.columns()
        wanted = [column for named in columns for column in named.values()]
        values = iter(_to_host([*(feature.reshape(1) for feature in features.values()), *wanted]))
        numbers = {name: next(values) for name in features}
        rows: dict[int, dict[str, dict[str, float]]] = {}  # of the tensors of every parameter
        for bucket, named in zip(buckets, columns, strict=True):
            tensors = list(zip(bucket.owners, bucket.origins or [None] * len(bucket), strict=True))
            for name in named:
                for param, origin in tensors:
                    own = rows.setdefault(id(param), {}).setdefault(f"[{origin.index}]" if origin else "", {})
                    own["numel"], own[name] = bucket.layout.numel, next(values)
        for index, group in enumerate(groups):
            if mine := [row for param in group["params"] for row in rows.get(id(param), {}).values()]:
                numbers |= _prefixed(f"group{index}", _describe(mine))
        if self.per_parameter:
            for index, group in enumerate(groups):
                names = group.get("param_names") or [f"{index}.{position}" for position in range(len(group["params"]))]
                for name, param in zip(names, group["params"], strict=True):
                    for which, row in rows.get(id(param), {}).items():
                        numbers |= _prefixed(f"param/{name}{which}", _describe([row]))
        return numbers


def _to_host(columns: Sequence[Tensor]) -> list[float]:
    if not columns:
        return []
    values: list[float] = torch.cat([column.to(columns[-1].device) for column in columns]).tolist()
    return values


def _prefixed(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": number for name, number in numbers.items()}


_SUMS = ("numel", "update", "param", "grad", "descent")


def _describe(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Numbers of some tensors together; nan where there is no parameter or gradient but zero to compare with."""
    numel, update, param, grad, descent = (sum(row[name] for row in rows) for name in _SUMS)
    numbers = {
        "update_rms": math.sqrt(update / numel),
        "update_ratio": math.sqrt(update / param) if param else math.nan,
        "cosine": descent / math.sqrt(update) / math.sqrt(grad) if update and grad else math.nan,
    }
    for name in dict.fromkeys(name for row in rows for name in row if name not in _SUMS):
        decided = [row[name] for row in rows if name in row]
        numbers[name] = sum(decided) / len(decided)
    return numbers
