"""What the ranks of tests of offloading run; see pylo_integrations.workers."""

from __future__ import annotations

from typing import Any

import torch
from plans import is_native
from sharded_cases import make, random
from torch import nn


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
