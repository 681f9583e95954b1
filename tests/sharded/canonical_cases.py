"""What the ranks of tests of canonical states run; see pylo_integrations.workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sharded_cases import everything, full_tensors, loss_of, make, net, train_wrapped, wrapped_run
from torch import Tensor

from pylo_integrations.state import from_canonical, load_canonical, save_canonical, to_canonical


def tensors_of(canonical: dict[str, Any]) -> dict[str, Tensor]:
    found = {f"memory/{name}": value for name, value in canonical["memory"].items()}
    for param, states in canonical["state"].items():
        found |= {f"{param}/{name}": value for name, value in states.items()}
    return found


def distance(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys()
    assert all(got[key].shape == want[key].shape and got[key].dtype == want[key].dtype for key in want)
    return max(((got[k] - want[k]).abs().max() / want[k].abs().max().clamp_min(1e-12)).item() for k in want)


def plain_run(name: str, steps: int):
    model, optimizer = wrapped_run("plain", 1, name)
    train_wrapped(model, optimizer, range(steps))
    return model, optimizer


def leave_case(rank: int, world: int, wrapper: str, name: str, path: str, rank0_only: bool = False) -> float:
    """Train two steps, save; how far the state is from that of one device."""
    model, optimizer = wrapped_run(wrapper, world, name)
    train_wrapped(model, optimizer, range(2))
    before = everything(model, optimizer)
    canonical = to_canonical(optimizer, model, rank0_only=rank0_only)
    after = everything(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before) and optimizer.iteration == 2
    weights = full_tensors(model)
    plain, reference = plain_run(name, 2)
    want = to_canonical(reference, plain)
    if rank0_only and rank:
        assert canonical == {}
    else:
        plain_values = [{k: v for k, v in c.items() if k not in ("memory", "state")} for c in (canonical, want)]
        assert plain_values[0] == plain_values[1]
    if rank == 0:
        torch.save((canonical, weights), path)
    return 0.0 if not canonical else distance(tensors_of(canonical), tensors_of(want))


def arrive_case(rank: int, world: int, wrapper: str, name: str, paths: list[str], rank0_only: bool = False) -> float:
    """Go on from every saved run; the largest distance from a run that was never interrupted."""
    plain, reference = plain_run(name, 4)
    want = tensors_of(to_canonical(reference, plain)) | full_tensors(plain)
    worst = 0.0
    for path in paths:
        canonical, weights = torch.load(path, weights_only=True)
        model, optimizer = wrapped_run(wrapper, world, name, weights)
        from_canonical(optimizer, model, canonical if rank == 0 or not rank0_only else {}, rank0_only=rank0_only)
        assert optimizer.iteration == 2
        train_wrapped(model, optimizer, range(2, 4))
        got = tensors_of(to_canonical(optimizer, model)) | full_tensors(model)
        worst = max(worst, distance(got, want))
    return worst


def after_evaluation_case(rank: int, world: int, folder: str) -> float:
    """FSDP2 keeps gathered parameters after a forward pass without a backward one; files of either kind."""
    model, optimizer = wrapped_run("fsdp2", world, "small_fc_lopt")
    train_wrapped(model, optimizer, range(2))
    with torch.no_grad():
        loss_of(model, 0, 0)
    canonical = to_canonical(optimizer, model)
    path = Path(folder) / f"{rank}.safetensors"
    save_canonical(canonical, path)
    again = load_canonical(path)
    assert {**again, "state": 0, "memory": 0} == {**canonical, "state": 0, "memory": 0}
    plain, reference = plain_run("small_fc_lopt", 2)
    return distance(tensors_of(again), tensors_of(to_canonical(reference, plain)))


def refusal_case(rank: int, world: int) -> list[str]:
    """Only the first rank's state is damaged, and it alone has one: do all ranks say so?"""
    model, optimizer = wrapped_run("shard_step", world, "small_fc_lopt")
    train_wrapped(model, optimizer, range(1))
    canonical = to_canonical(optimizer, model)
    before = everything(model, optimizer)
    del canonical["state"]["up.weight"]
    messages = []
    for spoiled in (canonical, {}, None):
        try:
            from_canonical(optimizer, model, spoiled if rank == 0 else None, rank0_only=True)
        except ValueError as error:
            messages.append(str(error))
    after = everything(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    return messages


def unused(name: str):
    """A model whose optimizer does not step everything."""
    model = net()
    model.conv.requires_grad_(False)
    return model, make(name, [p for p in model.parameters() if p.requires_grad])
