"""What ranks of the test of torchtitan run; see pylo_integrations.workers."""

from __future__ import annotations

from typing import Any

import torch
from sharded_cases import full, random
from torch import Tensor, nn

STEPS, BREAK = 4, 2


class Part(nn.Module):
    """As much of a language model as optimizers see."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(11, 8)
        self.layers = nn.ModuleDict({"0": nn.Linear(8, 12), "1": nn.Linear(12, 8)})
        self.norm = nn.LayerNorm(8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.layers["0"](self.tok_embeddings(tokens)))
        return self.norm(self.layers["1"](hidden)) @ self.tok_embeddings.weight.T


def part(shards: bool) -> Part:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = Part()
    if shards:
        for layer in model.layers.values():
            fully_shard(layer)
        fully_shard(model)
    return model


def built(name: str, model: nn.Module) -> tuple[Any, Any]:
    from torchtitan.components.optimizer import LRSchedulersContainer

    from pylo_integrations.torchtitan import LearnedOptimizers, LearnedSchedule

    optimizers = LearnedOptimizers.Config(name=name).build(model_parts=[model])
    schedule = LearnedSchedule.Config(warmup_steps=1)
    assert isinstance(schedule, LRSchedulersContainer.Config)
    return optimizers, schedule.build(optimizers=optimizers, training_steps=STEPS)


def train(model: nn.Module, optimizers: Any, schedulers: Any, steps: range) -> None:
    for step in steps:
        tokens = random((4, 5), step, torch.float64).abs().mul(100).long() % 11
        optimizers.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
        optimizers.step()
        schedulers.step()


def resume_case(rank: int, world: int, name: str, folder: str) -> dict[str, Any]:
    """A run that goes on, one that is saved and loaded as torchtitan does, and one without ranks."""
    import torch.distributed.checkpoint as dcp

    model = part(shards=True)
    optimizers, schedulers = built(name, model)
    train(model, optimizers, schedulers, range(BREAK))
    dcp.save({"model": model.state_dict(), "optimizer": optimizers, "schedule": schedulers}, checkpoint_id=folder)
    train(model, optimizers, schedulers, range(BREAK, STEPS))

    again = part(shards=True)
    other, rates = built(name, again)
    states = {"model": again.state_dict(), "optimizer": other, "schedule": rates}
    dcp.load(states, checkpoint_id=folder)
    (learned,) = other
    resumed_at = learned.iteration
    train(again, other, rates, range(BREAK, STEPS))

    alone = part(shards=False)
    alone_optimizers, alone_rates = built(name, alone)
    train(alone, alone_optimizers, alone_rates, range(STEPS))
    wholes = [{key: full(p) for key, p in each.named_parameters()} for each in (model, again, alone)]
    return {
        "resumed_at": resumed_at,
        "num_steps": learned.num_steps,
        "rates": rates.get_metrics(),
        "equal": all(torch.equal(wholes[0][key], wholes[1][key]) for key in wholes[0]),
        "error": max((wholes[0][key] - wholes[2][key]).abs().max().item() for key in wholes[0]),
        "flat": sorted(key for key in optimizers.state_dict() if key.startswith("state.layers.0.weight")),
    }
