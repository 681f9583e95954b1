"""What the ranks of the distributed tests run; see pylo_integrations.workers."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from plans import is_native
from thetas import create
from torch import Tensor, nn

from pylo_integrations.sharding.collectives import Collectives

# Uneven and empty shards, ties, vectors, a scalar, a kernel, an axis of extent 1.
SHAPES = [(), (1,), (7,), (5, 3), (4, 4), (2, 3, 4), (6, 3, 2, 2), (1, 5), (9, 6), (9, 6)]


def random(shape, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@contextmanager
def collectives() -> Iterator[list[str]]:
    """Names of the collectives inside, which are there once it has been left."""
    names: list[str] = []
    with Collectives() as noted:
        yield names
    names[:0] = [collective.name for collective in noted.seen]


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


# -- DTensors, in any placement ----------------------------------------------------------------------------------------


def rows_of_ranks(world: int) -> tuple[int, int]:
    """A mesh of two axes: two rows, or one if the number of ranks is odd."""
    return (1, world) if world % 2 else (2, world // 2)


@functools.cache
def mesh(shape: tuple[int, ...], names: tuple[str, ...] | None = None) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def placements(layout: str, world: int, shape) -> tuple[Any, list[Any]]:
    """Mesh shape, and what each of its axes does to a tensor."""
    from torch.distributed.tensor import Replicate, Shard

    def shard(axis: int):
        return Shard(axis) if len(shape) > axis else Replicate()

    return {
        "replicate": ((world,), [Replicate()]),
        "shard0": ((world,), [shard(0)]),
        "shard1": ((world,), [shard(1)]),
        "shard_last": ((world,), [shard(len(shape) - 1) if shape else Replicate()]),
        "hsdp": (rows_of_ranks(world), [Replicate(), shard(0)]),
        "both_axes": (rows_of_ranks(world), [shard(0), shard(1)]),
        "same_axis_twice": (rows_of_ranks(world), [shard(0), shard(0)]),
    }[layout]


def distribute(layout: str, world: int) -> Callable[[Tensor], Tensor]:
    from torch.distributed.tensor import distribute_tensor

    def place(tensor: Tensor) -> Tensor:
        mesh_shape, how = placements(layout, world, tensor.shape)
        return distribute_tensor(tensor, mesh(mesh_shape), how)

    return place


def promised(name: str, world: int, sharded: bool) -> list[str]:
    """The collectives of a step."""
    rule = make(name, [nn.Parameter(torch.zeros(3, 2))]).rule
    if world == 1:
        return []
    if not sharded:
        return ["allreduce_"] * rule.needs_loss
    rounds = 1 if name.startswith("toy") or name in ("celo_adam", "pace") else 2  # those need no sums of features
    finishing = ["alltoall_base_", *["allreduce_"] * bool(rule.counts), "alltoall_base_"]
    return ["allreduce_"] * rounds + finishing * rule.finishes


# -- real wrappers around a model -------------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution, a norm and two linear layers of uneven sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3)
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 14)
        self.down = nn.Linear(14, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(self.conv(x).mean((2, 3))))))

    def parallelize_(self, tp: Any) -> None:
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        parallelize_module(self, tp, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def loss_of(model: nn.Module, step: int, rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = random((4, 2, 5, 5), 100 * step + rank, dtype)
    return (model(x) - x[:, 0, 0, :3]).square().mean()


def wrap(model: nn.Module, wrapper: str, world: int) -> nn.Module:
    """``model`` as a user of ``wrapper`` distributes it."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard

    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if wrapper.startswith("fsdp1"):
        options: dict[str, Any] = {"use_orig_params": wrapper != "fsdp1_melted", "device_id": torch.device("cpu")}
        if wrapper == "fsdp1_hsdp":
            options["device_mesh"] = mesh(rows_of_ranks(world), ("replica", "shard"))
            options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
        if wrapper == "fsdp1_no_shard":
            options["sharding_strategy"] = ShardingStrategy.NO_SHARD
        model.up = FullyShardedDataParallel(model.up, **options)
        return FullyShardedDataParallel(model, **options)
    meshes = {
        "fsdp2": ((world,), ("dp",)),
        "hsdp": (rows_of_ranks(world), ("replica", "dp")),
        "tp": ((world,), ("tp",)),
        "fsdp2_tp": (rows_of_ranks(world)[::-1], ("dp", "tp")),
    }
    shape, names = meshes[wrapper]
    ranks = mesh(shape, names)
    if "tp" in names:
        model.parallelize_(ranks["tp"])
    if wrapper == "tp":
        return model
    dp = ranks["dp"] if "tp" in names else ranks
    fully_shard(model.up, mesh=dp)
    fully_shard(model, mesh=dp)
    return model


def full_tensors(model: nn.Module, of_gradients: bool = False) -> dict[str, Tensor]:
    """Whole parameters, or gradients, by name, as the wrapper itself puts them together."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    def read(module: nn.Module) -> dict[str, Tensor]:
        tensors = {
            name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): p.grad if of_gradients else p
            for name, p in module.named_parameters()
        }
        return {name: full(t).clone() for name, t in tensors.items() if t is not None}

    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return read(model)
    return read(model)


def make(name: str, params: Any, **options: Any):
    """A catalogue entry, or a toy."""
    from toy_finish_rule import ToyFinishOpt
    from toy_loss_rule import ToyLossOpt

    toys = {"toy_loss": ToyLossOpt, "toy_finish": ToyFinishOpt}
    if name in toys:
        return toys[name](params, num_steps=100, **options)
    return create(params, name, num_steps=100, **options)


def wrapper_case(
    rank: int,
    world: int,
    wrapper: str,
    name: str,
    steps: int = 3,
    options: dict[str, Any] | None = None,
    frozen: str | None = None,
    dtype: torch.dtype = torch.float64,
    shard_step: bool = False,
) -> dict[str, Any]:
    """Train a wrapped model, and a plain one on the same gradients."""
    import torch.distributed as dist

    options = options or {}
    model, plain = net(dtype), net(dtype)
    if frozen is not None:
        model.get_submodule(frozen).requires_grad_(False)
    model = wrap(model, wrapper, world)
    optimizer = make(name, model.parameters(), shard_step=shard_step, **options)
    reference = make(name, plain.parameters(), **options)
    optimizer.bind_model(model)
    counted: list[list[str]] = []
    # Data differs between data-parallel ranks only.
    data_rank = {"tp": 0, "fsdp2_tp": rank // max(1, world // 2)}.get(wrapper, rank)
    for step in range(steps):
        loss = loss_of(model, step, data_rank, dtype)
        loss.backward()
        gradients = full_tensors(model, of_gradients=True)
        for key, p in plain.named_parameters():
            p.grad = gradients.get(key)
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        reference.step(loss=mean_loss / world)
        with collectives() as names:
            optimizer.step(loss=loss.detach())
        counted.append(names)
        optimizer.zero_grad()
    trained, want = full_tensors(model), full_tensors(plain)
    assert trained.keys() == want.keys()
    small = [
        value
        for p in model.parameters()
        for key, value in optimizer.state[p].items()
        if key in ("row", "col") and value is not None
    ]
    moved = {key: (want[key] - start).abs().max().item() for key, start in full_tensors(net(dtype)).items()}
    # Rules that step in proportion to a parameter hardly move biases, which start near 0.
    error = max((trained[key] - want[key]).abs().max().item() / max(moved[key], 1e-3) for key in want)
    return {
        "error": error,
        "relative": max(((trained[key] - want[key]).abs().max() / want[key].abs().max()).item() for key in want),
        "moved": min(value for key, value in moved.items() if frozen is None or not key.startswith(frozen)),
        "frozen": [value for key, value in moved.items() if frozen is not None and key.startswith(frozen)],
        "native": is_native(optimizer),
        "collectives": counted,
        "digest": digest([*trained.values(), *small, *optimizer._progress.memory.values()]),
    }


def refusal_case(rank: int, world: int, what: str) -> str:
    """The message of the error that a step raises, after checking that nothing changed."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    from pylo_integrations import ShardingError, SmallFCLOpt

    model: nn.Module | None = None
    if what.startswith("fsdp1"):
        model = wrap(net(), what, world)
        params = list(model.parameters())
    elif what == "partial":
        mesh = init_device_mesh("cpu", (world,))
        params = [nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Partial()]))]
    elif what == "outside_mesh":
        mesh = DeviceMesh("cpu", [0, 1])
        params = [nn.Parameter(DTensor.from_local(torch.zeros(3, 2), mesh, [Replicate()], run_check=False))]
    else:
        mesh = DeviceMesh("cpu", [0, 1])
        local = torch.zeros(3, 2)
        params = [nn.Parameter(distribute_tensor(local, mesh, [Shard(0)]) if rank < 2 else local)]
        if rank == 2:  # whatever it has, the others must not wait for it
            return "process_group"
    optimizer = SmallFCLOpt(params)
    try:
        if what == "fsdp1_melted":
            optimizer.bind_model(model)
        if model is not None:
            loss_of(model, 0, rank).backward()
        else:
            for p in params:
                p.grad = torch.zeros_like(p)
        optimizer.step()
    except ShardingError as error:
        assert not optimizer.state
        return str(error)
    finally:
        dist.barrier() if what.startswith("fsdp1") else None
    return "it was not refused"


# -- agreement between ranks -------------------------------------------------------------------------------------------


def train_shards(
    place: Callable[[Tensor], Tensor],
    name: str,
    gradients: list[list[Tensor | None]],
    edit=None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[list[Any], Any, list[list[str]]]:
    """Train tensors of SHAPES on the gradients of every step; ``edit(step, params)`` may spoil them first.

    They are of ``dtype``: by default float64, or float32 with ``backend="native"``.
    """
    dtype = dtype or (torch.float32 if options.get("backend") == "native" else torch.float64)
    params = [nn.Parameter(place(random(shape, i, dtype))) for i, shape in enumerate(SHAPES)]
    optimizer = make(name, params, **options)
    counted = []
    for step, grads in enumerate(gradients):
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else place(grad.to(dtype))
        if edit:
            edit(step, params)
        with collectives() as names:
            try:
                optimizer.step(loss=1.0)
            except Exception as error:
                names.append(type(error).__name__)
        counted.append(names)
    return params, optimizer, counted


def some_gradients(steps: int) -> list[list[Tensor | None]]:
    return [[random(shape, 50 * step + i, torch.float64) for i, shape in enumerate(SHAPES)] for step in range(steps)]


def compare(sharded: list[Any], plain: list[Any]) -> float:
    pairs = [(full(a), full(b)) for a, b in zip(sharded, plain, strict=True)]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def nonfinite_case(rank: int, world: int, policy: str, backend: str) -> dict[str, Any]:
    """One element of one rank's gradient is not a number in the second of three steps."""
    grads = some_gradients(3)
    spoiled = [list(step) for step in grads]
    spoiled[1][8] = spoiled[1][8].clone()
    spoiled[1][8][-1, 0] = float("nan")
    options = {"on_nonfinite": policy, "max_grad_norm": 3.0, "backend": backend}
    params, optimizer, counted = train_shards(distribute("shard0", world), "small_fc_lopt", spoiled, **options)
    plain, reference, _ = train_shards(lambda t: t, "small_fc_lopt", spoiled, **options)
    return {
        "error": compare(params, plain),
        "collectives": counted,
        "steps": (optimizer.iteration, optimizer.nonfinite_steps),
        "reference": (reference.iteration, reference.nonfinite_steps),
    }


def scaler_case(rank: int, world: int, wrapper: str) -> dict[str, Any]:
    """In the second of four steps one element of a gradient overflows, which only the last rank holds."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    from pylo_integrations.sharding.pieces import local_part

    model = wrap(net(torch.float32), wrapper, world)
    optimizer = make("toy_loss", model.named_parameters())
    optimizer.bind_model(model)
    scaler = ShardedGradScaler(device="cpu", init_scale=1024.0)
    scales = []
    for step in range(4):
        loss = loss_of(model, step, rank, torch.float32)
        scaler.scale(loss).backward()
        if step == 1 and rank == world - 1:
            here = (local_part(p.grad) for p in model.parameters() if p.grad is not None)
            next(grad for grad in here if grad.numel()).view(-1)[0] = float("inf")
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return {
        "steps": (optimizer.iteration, optimizer.nonfinite_steps),
        "scales": scales,
        "seen": [float(loss) for loss in optimizer.rule.seen_losses],
        "digest": digest(full_tensors(model).values()),
    }


def clipping_case(rank: int, world: int, layout: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    grads = some_gradients(3)
    norms = [torch.stack([g.square().sum() for g in step]).sum().sqrt().item() for step in grads]
    limit = 1.001 * sorted(norms)[1]  # clips one step, and not the others, in float32 too
    params, _, counted = train_shards(distribute(layout, world), name, grads, max_grad_norm=limit, **options)
    plain, _, _ = train_shards(lambda t: t, name, grads, max_grad_norm=limit, **options)
    free, _, _ = train_shards(lambda t: t, name, grads, **options)
    return {
        "error": compare(params, plain),
        "effect": compare(plain, free),
        "collectives": counted,
        "clipped": [norm > limit for norm in norms],
    }


def absence_case(rank: int, world: int, backend: str) -> dict[str, Any]:
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

    place = distribute("shard0", world)
    params, optimizer, counted = train_shards(place, "small_fc_lopt", grads, drop, backend=backend)
    plain, reference, _ = train_shards(lambda t: t, "small_fc_lopt", plain_grads, backend=backend)
    return {
        "error": compare(params, plain),
        "collectives": counted,
        "iterations": (optimizer.iteration, reference.iteration),
    }


def probe_case(rank: int, world: int) -> tuple[bool, bool]:
    """With lr 0: is a step on zero gradients a probe, and one where rank 0 alone has zeros a step?"""
    zeros = [[torch.zeros(shape, dtype=torch.float64) for shape in SHAPES]]
    last_row = torch.zeros(SHAPES[8], dtype=torch.float64)
    last_row[-1] = 1.0
    some = [[last_row if i == 8 else g for i, g in enumerate(zeros[0])]]
    iterations = []
    for grads in (zeros, some):
        params = [nn.Parameter(distribute("shard0", world)(random(s, i, torch.float64))) for i, s in enumerate(SHAPES)]
        optimizer = make("small_fc_lopt", params, lr=0.0)
        for p, grad in zip(params, grads[0], strict=True):
            p.grad = distribute("shard0", world)(grad)
        optimizer.step()
        assert len(optimizer.state) == len(params)
        iterations.append(optimizer.iteration)
    return iterations[0] == 0, iterations[1] == 1


def disagreement_case(rank: int, world: int, name: str) -> dict[str, Any]:
    """In the second and third of five steps, one rank is without kernels."""
    from pylo_integrations.ops import loader

    load = loader.load
    place = distribute("shard0", world)
    params = [nn.Parameter(place(random(shape, i, torch.float32))) for i, shape in enumerate(SHAPES)]
    plain = [nn.Parameter(random(shape, i, torch.float32)) for i, shape in enumerate(SHAPES)]
    optimizers = [make(name, params), make(name, plain, backend="reference")]
    counted, native = [], []
    try:
        for step in range(5):
            if rank == 1:
                loader.load = (lambda: "not here") if step in (1, 2) else load
            optimizers[0].state.update({p: dict(state) for p, state in optimizers[0].state.items()})  # a new plan
            for i, (p, q) in enumerate(zip(params, plain, strict=True)):
                q.grad = random(q.shape, 1000 * step + i, torch.float32)
                p.grad = place(q.grad)
            with collectives() as names:
                optimizers[0].step(loss=1.0)
            optimizers[1].step(loss=1.0)
            counted.append(names)
            native.append(is_native(optimizers[0]))
    finally:
        loader.load = load
    starts = [random(shape, i, torch.float32) for i, shape in enumerate(SHAPES)]
    moved = [(q.detach() - start).abs().max() for q, start in zip(plain, starts, strict=True)]
    errors = [((full(p) - q.detach()).abs().max() / m).item() for p, q, m in zip(params, plain, moved, strict=True)]
    return {"collectives": counted, "native": native, "error": max(errors)}


def pending_case(rank: int, world: int) -> float:
    """Gradients that are still to be summed over ranks, as sequence parallelism leaves them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    whole = random((5, 3), 0, torch.float64)
    params = [nn.Parameter(distribute_tensor(whole, mesh, [Replicate()])), nn.Parameter(whole.clone())]
    optimizers = [make("small_fc_lopt", [p]) for p in params]
    for step in range(3):
        shares = [random((5, 3), 10 * step + r, torch.float64) for r in range(world)]
        params[0].grad = DTensor.from_local(shares[rank], mesh, [Partial()])
        params[1].grad = torch.stack(shares).sum(0)
        for optimizer in optimizers:
            optimizer.step()
    return compare(params[:1], params[1:])


def two_trainings_case(rank: int, world: int) -> tuple[int, float, str]:
    """Two halves of the ranks train two models, each with its own data and loss."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("model", "dp"))
    half = rank // (world // 2)
    model, plain = net(), net()
    fully_shard(model, mesh=mesh["dp"])
    optimizer, reference = make("toy_loss", model.parameters()), make("toy_loss", plain.parameters())
    group = mesh["dp"].get_group()
    optimizer.bind_model(model, process_group=group)
    reference.bind_model(plain, process_group=group)
    for step in range(3):
        if half and step == 2:
            break  # the trainings are of different lengths
        loss = loss_of(model, step, rank)
        loss.backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = full(p.grad)
        mean = loss.detach().clone()
        dist.all_reduce(mean, group=group)
        reference.step(loss=mean / (world // 2))
        optimizer.step(loss=loss)
        optimizer.zero_grad()
    error = compare(list(model.parameters()), list(plain.parameters()))
    return half, error, digest([full(p) for p in model.parameters()])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def train_wrapped(model: nn.Module, optimizer, gradient_steps) -> None:
    """Steps on gradients that are the same whatever the wrapper and the number of ranks."""
    for step in gradient_steps:
        loss_of(model, step, 0).backward()  # every rank has the same data, so averages over ranks change nothing
        optimizer.step(loss=float(step))
        optimizer.zero_grad()


def wrapped_run(wrapper: str, world: int, name: str, weights: dict[str, Tensor] | None = None):
    model: nn.Module = net()
    if weights is not None:
        model.load_state_dict(weights)
    if wrapper != "plain":
        model = wrap(model, wrapper.replace("shard_step", "ddp"), world)
    optimizer = make(name, model.named_parameters(), shard_step=wrapper == "shard_step")
    optimizer.bind_model(model)
    return model, optimizer


def everything(model: nn.Module, optimizer) -> dict[str, Tensor]:
    """Parameters and what can be compared of the state across wrappers: what is not sliced by FSDP1."""
    found = full_tensors(model)
    names = [name.replace("_fsdp_wrapped_module.", "").removeprefix("module.") for name, _ in model.named_parameters()]
    for name, p in zip(names, model.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            if not getattr(p, "_fsdp_flattened", False) or key in ("row", "col"):
                found[f"{name}/{key}"] = full(value)
    return found


def save_case(rank: int, world: int, wrapper: str, name: str, folder: str, how: str) -> None:
    """Train two steps and save."""
    model, optimizer = wrapped_run(wrapper, world, name)
    train_wrapped(model, optimizer, range(2))
    before = everything(model, optimizer)
    checkpoint(model, optimizer, folder, how, rank, save=True)
    if how == "async":  # which steps on meanwhile
        return
    after = everything(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before) and optimizer.iteration == 2


def load_case(rank: int, world: int, wrapper: str, name: str, folder: str, how: str) -> float:
    """Load into a new model and optimizer, go on, and compare with a plain run that never stopped."""
    model, optimizer = wrapped_run(wrapper, world, name)
    checkpoint(model, optimizer, folder, how, rank, save=False)
    assert optimizer.iteration == 2
    train_wrapped(model, optimizer, range(2, 4))
    plain, reference = wrapped_run("plain", 1, name)
    train_wrapped(plain, reference, range(4))
    got, want = everything(model, optimizer), everything(plain, reference)
    assert len(got) >= len(full_tensors(plain)) and got.keys() <= want.keys()
    return max(((got[key] - want[key]).abs().max() / want[key].abs().max()).item() for key in got)


def checkpoint(model: nn.Module, optimizer, folder: str, how: str, rank: int, save: bool) -> None:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    path = f"{folder}/checkpoint.pt"
    if how in ("dcp", "async"):
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        if save and how == "async":
            # A group of its own, or its messages would meet those of the steps.
            saved = dcp.async_save(state, checkpoint_id=folder, process_group=dist.new_group())
            train_wrapped(model, optimizer, range(2, 3))  # what is being saved is a copy
            saved.result(30)
            return
        if save:
            dcp.save(state, checkpoint_id=folder)
            return
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return
    if how in ("full", "broadcast"):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=how == "broadcast" and not save)
        if save:
            state = get_state_dict(model, optimizer, options=options)
            if rank == 0:
                torch.save(state, path)
            dist.barrier()
            return
        state = ({}, {})
        if how == "full" or rank == 0:
            state = torch.load(path, weights_only=True)
        # One call for both would skip the model on ranks that have nothing to give.
        set_model_state_dict(model, state[0], options=options)
        set_optimizer_state_dict(model, optimizer, state[1], options=options)
        return
    if how == "consolidated":
        # As frameworks do it for DDP: whoever writes has called this on every rank.
        if save:
            optimizer.consolidate_state_dict()
            if rank == 0:
                torch.save((model.module.state_dict(), optimizer.state_dict()), path)
            dist.barrier()
            return
        model_state, optimizer_state = torch.load(path, weights_only=True)
        getattr(model, "module", model).load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)
        return
    if how == "fsdp1":  # offload_to_cpu=True merges all states into one on a CPU, of torch's own Adam too
        FSDP.set_state_dict_type(
            model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), FullOptimStateDictConfig(offload_to_cpu=False)
        )
        if save:
            state = (model.state_dict(), FSDP.optim_state_dict(model, optimizer))
            if rank == 0:
                torch.save(state, path)
            dist.barrier()
            return
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(FSDP.optim_state_dict_to_load(model, optimizer, state[1]))
        return
    assert how == "local"
    path = f"{folder}/checkpoint{rank}.pt"
    if save:
        torch.save((model.state_dict(), optimizer.state_dict()), path)
    else:
        model_state, optimizer_state = torch.load(path, weights_only=False)
        model.load_state_dict(model_state)
        optimizer.load_state_dict(optimizer_state)


def kernel_agreement_case(
    rank: int, world: int, *, say: str, late: int | None = None, patience: float = 60
) -> list[bool]:
    """What a rank hears that asks twice whether all can use kernels; one may come when nobody waits any more."""
    import torch.distributed as dist

    from pylo_integrations.sharding.rounds import Ranks

    ranks = Ranks()
    question = f"{say} {late}"
    if rank == late:
        dist.barrier()  # which the others reach when they have lost patience
    heard = [ranks.agree(question, say[rank] == "y", patience)]
    if late is not None and rank != late:
        dist.barrier()
    return [*heard, ranks.agree(question, True, patience)]


def auto_agreement_case(rank: int, world: int, *, say: str) -> tuple[list[int], list[str]]:
    """Which bucket of a CUDA device a replica leaves to the kernels, and what it says about that."""
    import logging
    from types import SimpleNamespace

    from pylo_integrations import formats
    from pylo_integrations.ops import cuda, select, self_check
    from pylo_integrations.sharding.rounds import Ranks

    # An answer lasts as long as the process group, so every case has a question of its own.
    rule: Any = SimpleNamespace(kind=f"rule of {say}", kernel_spec=None)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    bucket = SimpleNamespace(
        device=torch.device("cuda", rank), layout=SimpleNamespace(shape=(3, 2)), form=formats.FLOAT32
    )
    kept = select.obstacle, select.local_obstacle, select.entangled_buckets, cuda.load, self_check.verdict
    select.obstacle = select.local_obstacle = lambda rule, bucket: None
    select.entangled_buckets = lambda buckets: set()
    cuda.load = lambda device: SimpleNamespace()
    self_check.verdict = lambda device, subject: self_check.Verdict(say[rank] == "y", "matrices: WRONG")
    self_check._tell.cache_clear()
    self_check.logger.addHandler(handler)
    try:
        able, _ = select.find_native("auto", [rule], [bucket], Ranks())
    finally:
        self_check.logger.removeHandler(handler)
        select.obstacle, select.local_obstacle, select.entangled_buckets, cuda.load, self_check.verdict = kept
    return able, records
