"""What rank 0 of many holds, counted from shapes alone; no rank holds more."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence

import torch

from pylo_integrations.bench.contenders import fresh_parameter, make_contender
from pylo_integrations.bench.shapes import ParamShape
from pylo_integrations.bench.strategies import STRATEGIES
from pylo_integrations.catalog import get_optimizer_info
from pylo_integrations.formats import StateDtype, Stored, format_of, scale_shape, stored_parts
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.rules.accumulators import SECOND_MOMENTS
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.layout import TensorLayout


def elements_on_rank_0(shapes: Sequence[ParamShape], strategy: str, ranks: int) -> int:
    """How many elements of parameters rank 0 holds."""
    elements = STRATEGIES[strategy].elements
    assert elements is not None, f"{strategy} is not told by shapes alone"
    return sum(elements(kind, ranks) for kind in shapes)


def stepped_on_rank_0(kind: ParamShape, strategy: str, ranks: int) -> int:
    """How many elements of a parameter rank 0 steps."""
    stepped = STRATEGIES[strategy].stepped
    return stepped(kind, ranks) if stepped else elements_on_rank_0([kind], strategy, ranks)


def state_bytes_on_rank_0(
    optimizer: str | None, shapes: Sequence[ParamShape], strategy: str, ranks: int, form: StateDtype = "float32"
) -> int:
    """Bytes of state, from what the rule itself says of the shapes of its state.

    State that is shaped like its parameter is sharded like it; the rest is on every rank.

    Args:
        optimizer: A catalogue name; None for AdamW.
        shapes: Of whole parameters.
        strategy: A name in :data:`~pylo_integrations.bench.strategies.STRATEGIES`, which is told by shapes alone.
        ranks: How many train together.
        form: How state is stored.
    """
    spec = None if optimizer is None else get_optimizer_info(optimizer)
    rule = AdamWRule() if optimizer is None else _rule(optimizer)
    count = 0
    for kind, times in Counter(shapes).items():
        layout = TensorLayout.whole(kind.shape, kind.axes)
        group = {"rule": "learned" if spec is None else kind.rule_of(spec)}
        states = rule.rule_for(layout, group).state_shapes(layout)
        chosen = format_of(form, layout.shape, torch.float32)
        for parts in stored_parts(states, SECOND_MOMENTS, chosen, torch.float32).values():
            count += times * sum(_bytes(stored, kind, strategy, ranks) for stored in parts.values())
    return count


def _bytes(stored: Stored, kind: ParamShape, strategy: str, ranks: int) -> int:
    if stored.shape is not None:
        return stored.dtype.itemsize * math.prod(stored.shape)
    stepped = stepped_on_rank_0(kind, strategy, ranks)
    if not stored.per_block:
        return stored.dtype.itemsize * stepped
    row = math.prod(kind.shape[1:])
    return stored.dtype.itemsize * math.prod(scale_shape((stepped // row, row)))


@functools.cache
def _rule(optimizer: str) -> Rule:
    made, _ = make_contender(optimizer, [(fresh_parameter((1, 1), torch.float32, "cpu"), ParamShape((1, 1)))])
    assert isinstance(made, LearnedOptimizer)
    return made.rule
