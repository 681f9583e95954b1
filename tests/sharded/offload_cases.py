"""What the ranks of tests of offloading run; see pylo_integrations.workers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from far_device import Far, far_parameters
from plans import is_native
from sharded_cases import make, random
from torch import nn

from pylo_integrations.sharding.pieces import ShardingError


def offload_case(rank: int, world: int, name: str, kind: str) -> dict[str, Any]:
    """FSDP2 with parameters, gradients and state on the CPU, beside FSDP2 without; how far the two are apart."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    models = []
    for policy in ({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, {}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(80, 97), nn.Tanh(), nn.Linear(97, 300))
        fully_shard(model, **policy)
        optimizer = make(name, list(model.named_parameters()), state_dtype=kind, backend="native")
        for step in range(3):
            model(random((4, 80), step, torch.float32)).square().mean().backward()
            optimizer.step(loss=1.0)
            optimizer.zero_grad()
        models.append((model, optimizer))
    (offloaded, optimizer), (plain, _) = models
    pairs = zip(offloaded.parameters(), plain.parameters(), strict=True)
    return {
        "native": is_native(optimizer),
        "devices": sorted({str(p.device) for p in offloaded.parameters()}),
        "error": max((a.full_tensor() - b.full_tensor()).abs().max().item() for a, b in pairs),
    }


def replica_case(rank: int, world: int) -> dict[str, Any]:
    """Replicas elsewhere whose state is here, and which exchange their losses, beside such that are here."""
    torch.manual_seed(0)
    near = [nn.Parameter(torch.randn(64, 80)), nn.Parameter(torch.randn(7))]
    far = far_parameters(near)
    plain, offloaded = make("velo", near), make("velo", far, offload_state=True)
    said = ""
    for step in range(3):
        for one, its in zip(near, far, strict=True):
            one.grad = random(one.shape, step, torch.float32)
            its.grad = Far(one.grad.clone())
        plain.step(loss=1.0 + rank)
        offloaded.step(loss=Far(torch.tensor(1.0 + rank)))
    group = dist.new_group(backend="cuda:gloo")
    offloaded._holdings.ranks.bind(group)
    before = [p.data.near.clone() for p in far]
    try:
        offloaded.step(loss=1.0)
    except ShardingError as error:
        said = str(error)
    return {
        "equal": all(torch.equal(one, its.data.near) for one, its in zip(near, far, strict=True)),
        "unchanged": all(torch.equal(old, its.data.near) for old, its in zip(before, far, strict=True)),
        "said": said,
        "sum": near[0].sum().item(),
    }
