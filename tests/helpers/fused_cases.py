"""Parameters that are several tensors, and the same tensors as parameters of their own; what ranks run on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sharded_cases import distribute, full, make, random
from torch import Tensor, nn


class Kind(NamedTuple):
    """A parameter that is several tensors: its shape, options of its group, and what cuts it by hand."""

    shape: tuple[int, ...]
    options: dict[str, Any]
    cut: Callable[[Tensor], list[Tensor]]


KINDS = {
    "equal": Kind((18, 10), {"split": 3}, lambda w: list(w.split(6))),
    "unequal": Kind((20, 8), {"split": (12, 4, 4)}, lambda w: list(w.split([12, 4, 4]))),
    "in_out": Kind((10, 18), {"split": 3, "axes": "in_out"}, lambda w: list(w.split(6, 1))),
    "vector": Kind((18,), {"split": 3}, lambda w: list(w.split(6))),
    "experts": Kind((11, 6, 4), {"stacked": True}, lambda w: list(w)),
    "gates of experts": Kind((3, 12, 5), {"stacked": True, "split": 2}, lambda w: [h for e in w for h in e.split(6)]),
    "experts in_out": Kind(
        (3, 5, 12), {"stacked": True, "split": 2, "axes": "in_out"}, lambda w: [h for e in w for h in e.split(6, 1)]
    ),
}

START, STEPS = 1, 4


def fused_and_apart(kind: str, name: str, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """An optimizer of one parameter, and one of the tensors in it."""
    shape, group, cut = KINDS[kind]
    whole = random(shape, START, dtype)
    apart = [nn.Parameter(part.clone()) for part in cut(whole)]
    axes = group.get("axes", "out_in")
    return (
        make(name, [{"params": [nn.Parameter(whole)], **group}], **options),
        make(name, [{"params": apart, "axes": axes}], **options),
    )


def train(optimizer: Any, kind: str, steps: range, place: Callable[[Tensor], Tensor] = lambda whole: whole) -> None:
    """Some steps on gradients that depend on nothing but their number."""
    (params,) = (group["params"] for group in optimizer.param_groups)
    for step in steps:
        grad = random(KINDS[kind].shape, 100 + step, torch.float64)
        grads = [place(grad.to(params[0].dtype))] if len(params) == 1 else KINDS[kind].cut(grad)
        for param, mine in zip(params, grads, strict=True):
            param.grad = mine.to(param.dtype).clone()
        optimizer.step(loss=1.0 + 1 / (1 + step))


def pieces_of(optimizer: Any, kind: str) -> list[Tensor]:
    """The tensors that an optimizer has trained, one by one."""
    (params,) = (group["params"] for group in optimizer.param_groups)
    return KINDS[kind].cut(full(params[0])) if len(params) == 1 else [param.detach() for param in params]


# -- on ranks ----------------------------------------------------------------------------------------------------------


def layout_case(rank: int, world: int, layout: str, kind: str, name: str, backend: str) -> dict[str, Any]:
    """How far a parameter that ranks divide ends from its tensors on one device; and what is kept of it."""
    dtype = torch.float32 if backend == "native" else torch.float64
    shape, group, _ = KINDS[kind]
    place = (lambda whole: whole) if layout == "shard_step" else distribute(layout, world)
    param = nn.Parameter(place(random(shape, START, dtype)))
    optimizer = make(name, [{"params": [param], **group}], backend=backend, shard_step=layout == "shard_step")
    train(optimizer, kind, range(STEPS), place)
    _, apart = fused_and_apart(kind, name, dtype, backend=backend)
    train(apart, kind, range(STEPS))
    pairs = list(zip(pieces_of(optimizer, kind), pieces_of(apart, kind), strict=True))
    starts = KINDS[kind].cut(random(shape, START, dtype))
    return {
        "error": max((mine - other).abs().max().item() for mine, other in pairs),
        "moved": min((mine - start).abs().max().item() for (mine, _), start in zip(pairs, starts, strict=True)),
        "shapes": {key: tuple(value.shape) for key, value in optimizer.state[param].items()},
    }


class Attention(nn.Module):
    """Fused projections whose parts no even division among ranks meets."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        return self.out(torch.tanh(query * key) + value)


def wrapper_case(rank: int, world: int, wrapper: str, name: str) -> dict[str, Any]:
    """How far a wrapped model ends from a plain one, both with ``split``; and from one without."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    from pylo_integrations import param_groups

    def model() -> Attention:
        torch.manual_seed(0)
        return Attention().double()

    def trained(net: nn.Module, split: bool) -> dict[str, Tensor]:
        optimizer = make(name, param_groups(net, split=split))
        optimizer.bind_model(net)
        for step in range(STEPS):
            loss = net(random((5, 6), step, torch.float64)).square().mean()
            loss.backward()
            optimizer.step(loss=loss.detach())
            optimizer.zero_grad()
        if isinstance(net, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(net):
                return {n.replace("_fsdp_wrapped_module.", ""): full(p) for n, p in net.named_parameters()}
        return {n: full(p) for n, p in net.named_parameters()}

    wrapped: nn.Module = model()
    if wrapper == "fsdp1":
        wrapped = FullyShardedDataParallel(wrapped, use_orig_params=True, device_id=torch.device("cpu"))
    else:
        fully_shard(wrapped)
    mine, plain, whole = trained(wrapped, True), trained(model(), True), trained(model(), False)
    return {
        "error": max((mine[key] - plain[key]).abs().max().item() for key in plain),
        "differs": max((whole[key] - plain[key]).abs().max().item() for key in plain),
    }


def refusal_case(rank: int, world: int) -> str:
    """What FSDP1's slices of a weight stored (in, out) are refused with."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel

    from pylo_integrations import ShardingError

    class Stored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    model = FullyShardedDataParallel(Stored(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = make("celo2", [{"params": list(model.parameters()), "axes": "in_out", "split": 3}])
    try:
        optimizer.bind_model(model)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    except ShardingError as error:
        return str(error)
    finally:
        dist.barrier()
    return "it was not refused"
