"""What the ranks of tests of stored state run; see pylo_integrations.workers."""

from __future__ import annotations

from typing import Any

import torch
from sharded_cases import distribute, make, random
from torch import Tensor, nn

from pylo_integrations.checkpoints.writing import whole_states

SHAPES = [(96, 80), (64, 8, 3, 3), (5, 1024), (4096, 2), (7,)]
"""Rows within blocks, and of several; what stays float32 with int8, and always."""

STEPS = 3


def gradient(i: int, step: int) -> Tensor:
    return random(SHAPES[i], 100 * step + i, torch.float32) * 10.0 ** (i - 2)


def trained(layout: str, world: int, name: str, kind: str, shapes: list[int]) -> Any:
    """An optimizer after :data:`STEPS` steps with gradients that are the same in every layout."""
    place = (lambda tensor: tensor) if layout in ("plain", "shard_step") else distribute(layout, world)
    params = [nn.Parameter(place(random(SHAPES[i], i, torch.float32))) for i in shapes]
    options = {"shard_step": layout == "shard_step", "state_dtype": kind, "backend": "reference"}
    optimizer = make(name, params, **options)
    for step in range(STEPS):
        for i, param in zip(shapes, params, strict=True):
            param.grad = place(gradient(i, step))
        optimizer.step(loss=1.0)
    return optimizer


def wholes(optimizer: Any) -> dict[str, Tensor]:
    """States as one device has them."""
    entries = optimizer.ledger.entries(optimizer.param_groups)
    found = optimizer.ledger.complete(entries, optimizer.state)
    whole = whole_states(found, entries, optimizer.ledger.holdings)
    return {f"{index}/{name}": value for index, states in whole for name, value in states.items()}


def layout_case(rank: int, world: int, layout: str, name: str, kind: str) -> dict[str, list[str]]:
    """Which elementwise states are not, bit by bit, those of one device; and of which types the states are."""
    shapes = [2] if layout == "shard1" else list(range(len(SHAPES)))
    optimizer = trained(layout, world, name, kind, shapes)
    found, want = wholes(optimizer), wholes(trained("plain", 1, name, kind, shapes))
    kinds = {str(value.dtype) for state in optimizer.state.values() for value in state.values()}
    elementwise = [key for key in want if key.rpartition("/")[2] not in ("row", "col")]
    return {
        "other": [key for key in elementwise if not torch.equal(found[key], want[key])],
        "kinds": sorted(kinds),
        "all": elementwise,
    }


def refusal_case(rank: int, world: int) -> str:
    """Rows cut within a block."""
    try:
        trained("shard1", world, "pace", "int8", [0])
    except TypeError as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def model_of(world: int) -> tuple[nn.Module, Any]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(80, 97), nn.Tanh(), nn.Linear(97, 300))
    if world:
        fully_shard(model)
    optimizer = make("celo2", list(model.named_parameters()), state_dtype="int8", backend="reference")
    return model, optimizer


def train(model: nn.Module, optimizer: Any) -> None:
    for step in range(2):
        model(random((4, 80), step, torch.float32)).square().mean().backward()
        optimizer.step(loss=1.0)
        optimizer.zero_grad()


def save_case(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Train and save, sharded; all states, whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, optimizer = model_of(world)
    train(model, optimizer)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    return {key: value.numpy() for key, value in wholes(optimizer).items()}


def load_case(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Load on other ranks; all states, whole."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = model_of(world)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    assert optimizer.iteration == 2
    return {key: value.numpy() for key, value in wholes(optimizer).items()}
