"""A learned optimizer whose steps need whole tensors at once, as those of CELO2 do; it exists only in tests.

Its step is the gradient, less its mean over the tensor, times a weight that differs for every element: a piece that
arrives in the wrong place, or a tensor that is not whole, changes it.
"""

from __future__ import annotations

from typing import Any

import torch

from pylo_integrations import LearnedOptimizer
from pylo_integrations.rules.base import Rule, read_gradient


class ToyFinishRule(Rule):
    finishes = True

    def state_shapes(self, layout):
        return {"momentum_0": None}

    def describe_(self, block, prepared, ctx):
        momentum = block.load(("momentum_0",)).lerp_(read_gradient(block, ctx), 0.5)
        block.store_(("momentum_0",), momentum)
        return {}

    def propose(self, block, prepared, sums, control, ctx):
        return block.load(("momentum_0",)) * 0.01

    def finish(self, steps, layout, ctx):
        assert tuple(steps.shape[2:]) == layout.shape
        weight = torch.linspace(0.5, 1.5, layout.numel, dtype=steps.dtype).view(layout.shape)
        return (steps - steps.flatten(1).mean(1).view(-1, *[1] * (steps.dim() - 1))) * weight


class ToyFinishOpt(LearnedOptimizer):
    rule_type = ToyFinishRule

    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        super().__init__(params, ToyFinishRule(), lr=lr, **options)
