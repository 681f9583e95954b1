"""What rank 0 of many holds, counted from shapes alone; no rank holds more."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from pylo_integrations.bench.contenders import fresh_parameter, make_contender
from pylo_integrations.bench.shapes import ParamShape
from pylo_integrations.bench.strategies import STRATEGIES
from pylo_integrations.catalog import get_optimizer_info
from pylo_integrations.optimizer import LearnedOptimizer
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


def state_bytes_on_rank_0(optimizer: str | None, shapes: Sequence[ParamShape], strategy: str, ranks: int) -> int:
    """Bytes of float32 state, from what the rule itself says of the shapes of its state.

    State that is shaped like its parameter is sharded like it; the rest is on every rank.

    Args:
        optimizer: A catalogue name; None for AdamW.
        shapes: Of whole parameters.
        strategy: A name in :data:`~pylo_integrations.bench.strategies.STRATEGIES`, which is told by shapes alone.
        ranks: How many train together.
    """
    spec = None if optimizer is None else get_optimizer_info(optimizer)
    rule = AdamWRule() if optimizer is None else _rule(optimizer)
    count = 0
    for kind in shapes:
        layout = TensorLayout.whole(kind.shape, kind.axes)
        group = {"rule": "learned" if spec is None else kind.rule_of(spec)}
        for shape in rule.rule_for(layout, group).state_shapes(layout).values():
            count += stepped_on_rank_0(kind, strategy, ranks) if shape is None else math.prod(shape)
    return torch.float32.itemsize * count


@functools.cache
def _rule(optimizer: str) -> Rule:
    made, _ = make_contender(optimizer, [(fresh_parameter((1, 1), torch.float32, "cpu"), ParamShape((1, 1)))])
    assert isinstance(made, LearnedOptimizer)
    return made.rule
