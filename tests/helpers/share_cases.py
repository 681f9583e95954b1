"""What the ranks of tests of shared steps run; see pylo_integrations.workers."""

from __future__ import annotations

import io
from typing import Any
from unittest import mock

import torch
from sharded_cases import (
    SHAPES,
    collectives,
    compare,
    digest,
    full,
    loss_of,
    make,
    net,
    random,
    some_gradients,
    train_shards,
    train_wrapped,
    wrapped_run,
)
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    return tensor


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def state_bytes(optimizer) -> int:
    return sum(local(value).nbytes for state in optimizer.state.values() for value in state.values())


def rounding_case(rank: int, world: int) -> list[Any]:
    """bfloat16 parameters of replicas that share their steps and round stochastically."""
    options = {"stochastic_rounding": True, "shard_step": world > 1}
    params, _, _ = train_shards(whole, "small_fc_lopt", some_gradients(3), dtype=torch.bfloat16, **options)
    return [p.detach().float().numpy() for p in params]


def cost_case(rank: int, world: int, name: str, shard_step: bool) -> dict[str, int]:
    """State bytes of a rank, and elements whose step it computes, for tensors as models have them."""
    shapes = [(64, 32), (64,), (32, 64), (32,), (100, 48), (16, 8, 3, 3), (10,), (1, 20, 16)]
    params = [nn.Parameter(random(shape, i, torch.float32)) for i, shape in enumerate(shapes)]
    optimizer = make(name, params, shard_step=shard_step, backend="reference")
    computed = 0

    def counting(propose):
        def wrapped(self, block, *args):
            nonlocal computed
            computed += len(block) * block.box.numel
            return propose(self, block, *args)

        return wrapped

    rules = {type(optimizer.rule.rule_for(layout, group)) for layout, group in members(optimizer)}
    with mock.patch.multiple(rules.pop(), propose=counting(type(optimizer.rule).propose)):
        assert not rules
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = random(p.shape, 100 * step + i, torch.float32)
            optimizer.step(loss=1.0)
    return {
        "bytes": state_bytes(optimizer),
        "elements": computed // 2,
        "all": sum(p.numel() for p in params),
    }


def members(optimizer):
    from pylo_integrations.sharding.layout import TensorLayout

    for group in optimizer.param_groups:
        for p in group["params"]:
            yield TensorLayout.whole(p.shape, group["axes"]), group


def policy_case(rank: int, world: int, policy: str) -> dict[str, Any]:
    """One element of everybody's gradient is not a number in the second of three steps; it is in one rank's share."""
    grads = some_gradients(3)
    grads[1][8] = grads[1][8].clone()
    grads[1][8][-1, 0] = float("nan")
    options = {"on_nonfinite": policy, "max_grad_norm": 3.0}
    params, optimizer, counted = train_shards(whole, "small_fc_lopt", grads, shard_step=True, **options)
    plain, reference, _ = train_shards(whole, "small_fc_lopt", grads, **options)
    return {
        "error": compare(params, plain),
        "collectives": counted,
        "steps": (optimizer.iteration, optimizer.nonfinite_steps),
        "reference": (reference.iteration, reference.nonfinite_steps),
    }


def clip_case(rank: int, world: int, name: str) -> dict[str, Any]:
    grads = some_gradients(3)
    norms = [torch.stack([g.square().sum() for g in step]).sum().sqrt().item() for step in grads]
    limit = sorted(norms)[1]
    params, _, counted = train_shards(whole, name, grads, shard_step=True, max_grad_norm=limit)
    plain, _, _ = train_shards(whole, name, grads, max_grad_norm=limit)
    free, _, _ = train_shards(whole, name, grads)
    return {"error": compare(params, plain), "effect": compare(plain, free), "collectives": counted}


def absent_case(rank: int, world: int) -> dict[str, Any]:
    """Some tensors have no gradient for some steps: all of them, nowhere, or on one rank only."""
    grads = some_gradients(5)
    grads[0] = [None if i in (3, 9) else g for i, g in enumerate(grads[0])]
    grads[2] = [None if i in (4, 8) else g for i, g in enumerate(grads[2])]
    grads[3] = [None] * len(SHAPES)
    plain_grads = [list(step) for step in grads]
    grads[4][9] = torch.zeros(SHAPES[9], dtype=torch.float64)
    plain_grads[4][9] = grads[4][9]

    def drop(step: int, params: list[Any]) -> None:
        if step == 4 and rank == 0:
            params[9].grad = None

    params, optimizer, _ = train_shards(whole, "small_fc_lopt", grads, drop, shard_step=True)
    plain, reference, _ = train_shards(whole, "small_fc_lopt", plain_grads)
    return {
        "error": compare(params, plain),
        "iterations": (optimizer.iteration, reference.iteration),
        "digest": digest([full(p) for p in params]),
    }


def collection_case(rank: int, world: int) -> list[tuple[bool, int]]:
    """Everyone knows its own rows, as ``chunk()`` cuts them: do all know all rows then, and after how many messages?"""
    from pylo_integrations.sharding.rounds import Ranks
    from pylo_integrations.sharding.shares import Collection, share_axis

    shapes = [(7, 5), (3,), (2, 6), (40, 3), (1, 1), (1, 9, 4), (5, 3, 2, 2), (1,)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    results = []
    for limit in (1, 40, 400, 2**20):
        wholes = [random(shape, i, dtypes[i % len(dtypes)]) for i, shape in enumerate(shapes)]
        wholes[6] = wholes[6].contiguous(memory_format=torch.channels_last)
        wholes[0] = wholes[0].T.contiguous().T
        params = [torch.full_like(tensor, float("nan")) for tensor in wholes]
        for param, tensor in zip(params, wholes, strict=True):
            axis = share_axis(param.shape)
            for i, (mine, known) in enumerate(zip(param.chunk(world, axis), tensor.chunk(world, axis), strict=True)):
                if i == rank:
                    mine.copy_(known)
        with collectives() as names:
            Collection(params, Ranks(), limit).collect_()
        results.append((all(map(torch.equal, params, wholes)), len(names)))
    return results


def message_case(rank: int, world: int, chunk_bytes: int) -> dict[str, Any]:
    """Parameters of several dtypes and memory formats, collected in messages of bounded size."""
    shapes = [(7, 5), (3,), (2, 600), (40, 30), (1, 1), (1, 9, 4), (5, 3, 4, 4), ()]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bfloat16]
    runs = {}
    for shard_step in (True, False):
        params = [
            nn.Parameter(random(shape, i, dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes) for _ in range(2)
        ]
        params[-4] = nn.Parameter(params[-4].detach().contiguous(memory_format=torch.channels_last))
        params[0] = nn.Parameter(params[0].detach().T.contiguous().T)  # rows with gaps between their elements
        optimizer = make("small_fc_lopt", params, shard_step=shard_step, chunk_bytes=chunk_bytes, lr=10.0)
        for step in range(2):
            for i, p in enumerate(params):
                p.grad = random(p.shape, 100 * step + i, torch.float64).to(p.dtype)
            with collectives() as names:
                optimizer.step()
        runs[shard_step] = params, names
    (shared, names), (plain, _) = runs[True], runs[False]
    worst = 0.0
    for p, q in zip(shared, plain, strict=True):
        # One unit in the last place, where sums in another order round a step differently.
        allowed = torch.finfo(p.dtype).eps * max(1.0, q.detach().abs().max().item())
        worst = max(worst, (p.detach() - q.detach()).abs().max().item() / allowed)
    return {
        "ulps": worst,
        "gathers": sum("allgather" in name for name in names),
        "digest": digest([p.detach().double() for p in shared]),
    }


def views_case(rank: int, world: int) -> float:
    """Somebody puts the parameters into new storage between steps, as flattening utilities do."""
    grads = some_gradients(3)

    def move(step: int, params: list[Any]) -> None:
        for p in params:
            p.data = p.data.clone()

    params, _, _ = train_shards(whole, "small_fc_lopt", grads, move, shard_step=True)
    plain, _, _ = train_shards(whole, "small_fc_lopt", grads)
    return compare(params, plain)


def scaler_case(rank: int, world: int) -> dict[str, Any]:
    """Mixed precision with a GradScaler, an overflow in the second step."""
    runs = {}
    for shard_step in (True, False):
        model = nn.parallel.DistributedDataParallel(net(torch.float32))
        optimizer = make("velo", model.parameters(), shard_step=shard_step)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, step, rank, torch.float32)
            scaler.scale(loss).backward()
            if step == 1:
                model.module.up.weight.grad[0, 0] = float("inf")
            optimizer.observe_loss(loss)
            scaler.step(optimizer)
            scaler.update()
            optimizer.clear_observed_loss()
            optimizer.zero_grad()
        runs[shard_step] = list(model.parameters()), optimizer.iteration
    (shared, taken), (plain, also_taken) = runs[True], runs[False]
    return {
        "error": compare(shared, plain),
        "iterations": (taken, also_taken),
        "digest": digest([full(p) for p in shared]),
    }


def telemetry_case(rank: int, world: int) -> list[dict[str, float]]:
    numbers = []
    for shard_step in (True, False):
        params = [nn.Parameter(random(shape, i, torch.float64)) for i, shape in enumerate(SHAPES)]
        optimizer = make("small_fc_lopt", params, shard_step=shard_step)
        optimizer.enable_telemetry(per_parameter=True)
        for p, grad in zip(params, some_gradients(1)[0], strict=True):
            p.grad = grad
        optimizer.step()
        numbers.append(optimizer.telemetry())
    return numbers


def pickle_case(rank: int, world: int) -> str:
    """What saving one rank's state dict says; and whether it can be copied all the same."""
    import copy

    _, optimizer = wrapped_run("shard_step", world, "small_fc_lopt")
    optimizer.init_state()
    copied = copy.deepcopy(optimizer.state_dict())
    assert copied["state"].keys() == optimizer.state_dict()["state"].keys()
    try:
        torch.save(copied, io.BytesIO())
    except ValueError as error:
        return str(error)
    return "it was saved"


def lightning_case(rank: int, world: int) -> tuple[int, bool]:
    """What Lightning's DDP strategy puts into a checkpoint: how many states, and are they those of one device?"""
    from types import SimpleNamespace

    from lightning.pytorch.strategies import Strategy

    model, optimizer = wrapped_run("shard_step", world, "velo")
    train_wrapped(model, optimizer, range(2))
    saved = Strategy.optimizer_state(SimpleNamespace(is_global_zero=rank == 0), optimizer)
    plain, reference = wrapped_run("plain", 1, "velo")
    train_wrapped(plain, reference, range(2))
    if rank:
        return len(saved), True
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    want, got = reference.state_dict()["state"], torch.load(file, weights_only=True)["state"]
    close = all(
        torch.allclose(got[i][key], value, rtol=1e-11, atol=1e-13) for i in want for key, value in want[i].items()
    )
    return len(got), close and got.keys() == want.keys()


def copy_case(rank: int, world: int) -> float:
    """A deep copy goes on as the original."""
    import copy

    model, optimizer = wrapped_run("shard_step", world, "small_fc_lopt")
    train_wrapped(model, optimizer, range(1))
    twin, other = copy.deepcopy((model.module, optimizer))
    assert other.shard_step
    train_wrapped(model, optimizer, range(1, 3))
    train_wrapped(twin, other, range(1, 3))
    return compare(list(twin.parameters()), list(model.parameters()))


def late_case(rank: int, world: int) -> str:
    """The state was created for other ranks than now take a step."""
    import torch.distributed as dist

    params = [nn.Parameter(random(shape, i, torch.float64)) for i, shape in enumerate(SHAPES)]
    optimizer = make("small_fc_lopt", params, shard_step=True)
    optimizer.init_state()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    optimizer.bind_model(nn.Module(), process_group=pairs[rank // 2])
    for p in params:
        p.grad = torch.ones_like(p)
    before = [full(p) for p in params]
    try:
        optimizer.step()
    except TypeError as error:
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
        return str(error)
    return "it stepped"


def group_case(rank: int, world: int) -> tuple[float, str]:
    """Two pairs of ranks train two models; each shares its steps among its own two."""
    import torch.distributed as dist

    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = rank // 2
    runs = []
    for shard_step in (True, False):
        params = [nn.Parameter(random(shape, i, torch.float64)) for i, shape in enumerate(SHAPES)]
        optimizer = make("toy_loss", params, shard_step=shard_step)
        optimizer.bind_model(nn.Module(), process_group=pairs[pair])
        optimizer.bind_model(nn.Module())  # as adapters do, which know of no group
        for step in range(3 - pair):  # the trainings are of different lengths
            for i, p in enumerate(params):
                p.grad = random(p.shape, 1000 * pair + 100 * step + i, torch.float64)
            optimizer.step(loss=float(rank))
        runs.append(params)
    return compare(*runs), digest([full(p) for p in runs[0]])


def misfit_case(rank: int, world: int) -> dict[str, Any]:
    """States of shares in another type are cast; one of another shape is refused by every rank that steps it."""
    shapes = [(8, 6), (4,)]
    params, twins = ([nn.Parameter(random(shape, i, torch.float32)) for i, shape in enumerate(shapes)] for _ in "ab")
    optimizers = [make("small_fc_lopt", ps, shard_step=shares) for ps, shares in ((params, True), (twins, False))]
    for step in range(3):
        for ps, optimizer in zip((params, twins), optimizers, strict=True):
            for i, param in enumerate(ps):
                param.grad = random(param.shape, 10 + step + i, torch.float32)
            if step:
                optimizer.state.update({p: {k: v.double() for k, v in optimizer.state[p].items()} for p in ps})
            optimizer.step()
    error = max((p - q).abs().max().item() for p, q in zip(params, twins, strict=True))
    shared = optimizers[0]
    shared.state[params[0]]["momentum_0"] = torch.zeros(8, 6)
    before = digest([p.detach() for p in params])
    try:
        shared.step()
        refused = ""
    except TypeError as caught:
        refused = str(caught)
    return {"error": error, "refused": refused, "unchanged": digest([p.detach() for p in params]) == before}


def lazy_case(rank: int, world: int) -> dict[str, float]:
    """Replicas that share their steps, with gradients that are lazily negated in one of two runs."""
    runs = []
    for lazy in (False, True):
        params = [nn.Parameter(random(shape, i, torch.float32)) for i, shape in enumerate([(8, 6), (4,)])]
        optimizer = make("small_fc_lopt", params, shard_step=True)
        for step in range(3):
            for i, param in enumerate(params):
                grad = random(param.shape, 10 + step + i, torch.float32)
                param.grad = torch._neg_view(-grad) if lazy and step else grad
            optimizer.step()
        runs.append(torch.cat([param.detach().view(-1) for param in params]))
    start = torch.cat([random(shape, i, torch.float32).view(-1) for i, shape in enumerate([(8, 6), (4,)])])
    return {"error": (runs[0] - runs[1]).abs().max().item(), "moved": (runs[0] - start).abs().max().item()}


def version_case(rank: int, world: int, backend: str) -> dict[str, bool]:
    """Which tensors autograd finds changed after a step, of replicas that share it and of ``DTensor`` s."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    found = {}
    for kind, shares in (("shares", True), ("shards", False)):
        param = nn.Parameter(random((8, 6), 0, torch.float32))
        if kind == "shards":
            param = nn.Parameter(distribute_tensor(param.detach(), mesh, [Shard(0)]))
        optimizer = make("small_fc_lopt", [param], backend=backend, shard_step=shares)
        for step in range(3):
            optimizer.zero_grad()
            loss = (param * param).sum()
            loss.backward()
            late = (param * param).sum()
            watched = [param, *optimizer.state[param].values()] if step else [param]
            watched += [tensor.to_local() for tensor in watched if isinstance(tensor, DTensor)]
            before = [tensor._version for tensor in watched]
            optimizer.step()
            found[f"{kind} {step}"] = all(t._version > v for t, v in zip(watched, before, strict=True))
            try:
                late.backward()
            except RuntimeError as error:
                found[f"{kind} {step} backward"] = "modified by an inplace operation" in str(error)
            else:
                found[f"{kind} {step} backward"] = False
    return found
