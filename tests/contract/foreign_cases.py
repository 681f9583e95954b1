"""What ranks run for tests of entries that other code keeps among an optimizer's states."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from sharded_cases import full, train_wrapped, wrapped_run
from torch import Tensor

from pylo_integrations.state import to_canonical


def marked_case(rank: int, world: int, wrapper: str, how: str) -> dict[str, Any]:
    """Every parameter gets an average of its own, and a number; are they the same after saving and loading?"""
    model, optimizer = wrapped_run(wrapper, world, "celo2")
    train_wrapped(model, optimizer, range(2))
    for number, p in enumerate(model.parameters()):
        optimizer.state[p]["average"] = torch.full_like(p.detach(), number + 1.0)
        optimizer.state[p]["seen"] = torch.tensor(float(number))
    twin, other = wrapped_run(wrapper, world, "celo2")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        carry(model, optimizer, twin, other, how)
        canonical = to_canonical(optimizer, model)
    names = {name for states in canonical["state"].values() for name in states}
    found = [other.state[p] for p in twin.parameters()]
    same = [
        isinstance(own.get("average"), Tensor)
        and bool((full(own["average"]) == number + 1).all())
        and full(own["average"]).shape == full(p).shape
        and float(own["seen"]) == number
        for number, (own, p) in enumerate(zip(found, twin.parameters(), strict=True))
    ]
    train_wrapped(twin, other, range(2, 3))
    return {"same": same, "told": [str(warning.message) for warning in caught], "canonical": names}


def carry(model: Any, optimizer: Any, twin: Any, other: Any, how: str) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    if how == "dcp":
        set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, optimizer))
    elif how == "consolidated":
        optimizer.consolidate_state_dict()
        file = io.BytesIO()
        if optimizer._holdings.ranks.rank == 0:
            torch.save(optimizer.state_dict(), file)
        saved = [file.getvalue()]
        torch.distributed.broadcast_object_list(saved)
        other.load_state_dict(torch.load(io.BytesIO(saved[0]), weights_only=True))
    else:
        other.load_state_dict(optimizer.state_dict())
