"""A loss-driven, horizon-needing learned optimizer that exists only in tests.

It proves that an adapter delivers the loss and the horizon: its step is momentum, scaled by an average of all losses so
far and by the fraction of the run that is left, so any loss that is wrong, lost or not checkpointed changes parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pylo_integrations import LearnedOptimizer, OptimizerSpec, register_optimizer, unregister_optimizer
from pylo_integrations.rules.base import Rule, read_gradient

NAME = "toy_loss"


class ToyLossRule(Rule):
    needs_loss = True
    needs_horizon = True

    def __init__(self) -> None:
        self.seen_losses: list[float] = []
        """Every loss a step was given, in order; not part of the checkpoint."""

    def state_shapes(self, layout):
        return {"momentum_0": None}

    def control(self, buckets, sums, ctx):
        self.seen_losses.append(ctx.loss.item())
        average = ctx.memory.get("loss_average", torch.zeros(()))
        ctx.memory["loss_average"] = average + 0.1 * (ctx.loss.cpu() - average)
        left = 1 - ctx.iteration / ctx.num_steps
        return [{"scale": 0.02 * left * (1 + torch.tanh(ctx.memory["loss_average"]))}] * len(buckets)

    def describe_(self, block, prepared, ctx):
        momentum = block.load(("momentum_0",)).lerp_(read_gradient(block, ctx), 0.5)
        block.store_(("momentum_0",), momentum)
        return {}

    def propose(self, block, prepared, sums, control, ctx):
        return block.load(("momentum_0",)) * control["scale"]


class ToyLossOpt(LearnedOptimizer):
    rule_type = ToyLossRule

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        weight_decay: float = 0.0,
        num_steps: int | None = None,
        max_grad_norm: float | None = None,
        backend: Any = "auto",
        shard_step: bool = False,
    ) -> None:
        super().__init__(
            params,
            ToyLossRule(),
            lr=lr,
            weight_decay=weight_decay,
            num_steps=num_steps,
            max_grad_norm=max_grad_norm,
            backend=backend,
            shard_step=shard_step,
        )


@contextmanager
def toy_loss_optimizer() -> Iterator[OptimizerSpec]:
    """Have ``"toy_loss"`` in the catalogue for the duration."""
    spec = OptimizerSpec(NAME, ToyLossOpt, "momentum scaled by the average loss; for tests")
    register_optimizer(spec)
    try:
        yield spec
    finally:
        unregister_optimizer(NAME)
