"""What ranks run for tests of what survives a path of torch's checkpoints; see pylo_integrations.workers."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from sharded_cases import loss_of, make, net, wrap
from torch import nn

STEPS = 3


def train(model: nn.Module, optimizer: Any, steps: range, rank: int = 0) -> None:
    for step in steps:
        loss = loss_of(model, step, rank, torch.float32)
        loss.backward()
        optimizer.step(loss=loss.detach())
        optimizer.zero_grad()


def start(name: str, wrapper: str, world: int, num_steps: int | None) -> tuple[nn.Module, Any]:
    model: nn.Module = net(torch.float32)
    if wrapper != "plain":
        model = wrap(model, wrapper.replace("shard_step", "ddp"), world)
    optimizer = make(name, model.named_parameters(), shard_step=wrapper == "shard_step")
    optimizer.set_num_steps(num_steps)
    optimizer.bind_model(model)
    return model, optimizer


def progress(optimizer: Any) -> tuple[Any, dict[str, Any]]:
    counts = (optimizer.iteration, optimizer.num_steps, optimizer.nonfinite_steps)
    return counts, {key: value.double().flatten().tolist() for key, value in optimizer._progress.memory.items()}


def flattened(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """As torchtitan saves."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))


def flatten_case(rank: int, world: int, name: str, wrapper: str, folder: str | None) -> tuple[Any, Any, float]:
    """Progress before and after, and how far a resumed run is from the one that went on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    model, optimizer = start(name, wrapper, world, 40)
    train(model, optimizer, range(STEPS))
    twin, other = start(name, wrapper, world, None)
    twin.load_state_dict(model.state_dict())
    state = flattened(model, optimizer)
    if folder is None:
        state = copy.deepcopy(state)
    else:
        dcp.save(state, checkpoint_id=folder)
        state = flattened(twin, other)
        dcp.load(state, checkpoint_id=folder)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    set_optimizer_state_dict(twin, other, state, options=options)
    found = progress(optimizer), progress(other)
    train(model, optimizer, range(STEPS, STEPS + 2))
    train(twin, other, range(STEPS, STEPS + 2))
    return *found, distance(model, twin)


def in_place_case(rank: int, world: int, name: str, wrapper: str, folder: str) -> tuple[Any, Any, float]:
    """``dcp.load(optimizer.state_dict())`` and nothing else."""
    import torch.distributed.checkpoint as dcp

    model, optimizer = start(name, wrapper, world, 40)
    train(model, optimizer, range(STEPS))
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=folder)
    twin, other = start(name, wrapper, world, None)
    other.init_state()
    twin.load_state_dict(model.state_dict())
    dcp.load({"optimizer": other.state_dict()}, checkpoint_id=folder)
    assert other._progress.is_overwritten, "the next step looks at what was loaded"
    found = progress(optimizer), progress(other)
    train(model, optimizer, range(STEPS, STEPS + 2))
    train(twin, other, range(STEPS, STEPS + 2))
    return *found, distance(model, twin)


def first_version_case(rank: int, world: int, name: str, wrapper: str, folder: str) -> tuple[str, Any, Any, float]:
    """A folder without tensors of the run: what loading it says, and what it does with a planner that is content."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, optimizer = start(name, wrapper, world, 40)
    train(model, optimizer, range(STEPS))
    saved = get_optimizer_state_dict(model, optimizer)
    for own in saved["state"].values():
        for key in [key for key in own if key.startswith("run_")]:
            del own[key]
    dcp.save({"optimizer": saved}, checkpoint_id=folder)
    twin, other = start(name, wrapper, world, None)
    twin.load_state_dict(model.state_dict())
    state = {"optimizer": get_optimizer_state_dict(twin, other)}
    told = ""
    try:
        dcp.load(state, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:
        told = str(error)
    dcp.load(state, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    set_optimizer_state_dict(twin, other, state["optimizer"])
    found = progress(optimizer), progress(other)
    train(model, optimizer, range(STEPS, STEPS + 2))
    train(twin, other, range(STEPS, STEPS + 2))
    return told, *found, distance(model, twin)


def damaged_in_place_case(rank: int, world: int, name: str, wrapper: str) -> tuple[str, bool, int]:
    """What a step says after the first rank loaded NaN in place; and how far a run comes once that is mended."""
    model, optimizer = start(name, wrapper, world, 40)
    train(model, optimizer, range(STEPS))
    params = [local(param).clone() for param in model.parameters()]
    state = next(own["momentum_0" if "momentum_0" in own else "rms"] for own in optimizer.state.values())
    values = local(state)
    good = values.clone()
    optimizer._progress.clock.copy_(torch.tensor(STEPS))
    if rank == 0:
        values.fill_(torch.nan)
    told = ""
    try:
        train(model, optimizer, range(STEPS, STEPS + 1), rank)
    except (ValueError, RuntimeError) as error:
        told = f"{type(error).__name__}: {error}"
    optimizer.zero_grad()
    pairs = zip(model.parameters(), params, strict=True)
    unchanged = all(torch.equal(local(param), old) for param, old in pairs) and optimizer.iteration == STEPS
    values.copy_(good)
    train(model, optimizer, range(STEPS, STEPS + 1), rank)
    return told, unchanged, optimizer.iteration


def zero_case(rank: int, world: int, name: str) -> tuple[Any, Any, float]:
    """``ZeroRedundancyOptimizer`` around the class."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    def begin() -> tuple[nn.Module, Any]:
        model = net(torch.float32)
        cls, options = recipe(name)
        return model, ZeroRedundancyOptimizer(model.parameters(), cls, **options)

    model, zero = begin()
    train(model, zero, range(STEPS))
    zero.consolidate_state_dict(0)
    file = io.BytesIO()
    if rank == 0:
        torch.save(zero.state_dict(), file)
    saved = [file.getvalue()]
    if world > 1:
        torch.distributed.broadcast_object_list(saved)
    twin, other = begin()
    other.optim.set_num_steps(None)
    twin.load_state_dict(model.state_dict())
    # Torch puts all arguments into the groups, and with them the theta.
    other.load_state_dict(torch.load(io.BytesIO(saved[0]), weights_only=False))
    found = progress(zero.optim), progress(other.optim)
    train(model, zero, range(STEPS, STEPS + 2))
    train(twin, other, range(STEPS, STEPS + 2))
    assert other.optim.iteration == STEPS + 2
    return *found, distance(model, twin)


def recipe(name: str) -> tuple[type, dict[str, Any]]:
    """Class and options of a catalogue entry, for who makes optimizers himself."""
    from thetas import is_absent, theta_for

    from pylo_integrations import get_optimizer_info

    spec = get_optimizer_info(name)
    options = {**spec.defaults, "num_steps": 40}
    if is_absent(spec.cls):
        options["weights"] = theta_for(name)
    return spec.cls, options


def distance(model: nn.Module, twin: nn.Module) -> float:
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return max(float((local(p) - local(q)).abs().max()) if local(p).numel() else 0.0 for p, q in pairs)


def local(tensor: Any) -> torch.Tensor:
    return tensor.to_local().detach() if hasattr(tensor, "to_local") else tensor.detach()


def post_local_case(rank: int, world: int, name: str) -> tuple[Any, Any, float, tuple[int, int]]:
    """``PostLocalSGDOptimizer`` around the optimizer; progress, distance, and steps of both averagers."""
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    def begin(num_steps: int | None) -> tuple[nn.Module, Any]:
        model = net(torch.float32)
        optimizer = make(name, model.named_parameters())
        optimizer.set_num_steps(num_steps)
        return model, PostLocalSGDOptimizer(optimizer, PeriodicModelAverager(period=2, warmup_steps=1))

    def train_locally(model: nn.Module, wrapper: Any, steps: range) -> None:
        for step in steps:
            loss = loss_of(model, step, rank, torch.float32)
            loss.backward()
            wrapper.optim.observe_loss(loss.detach())  # its step() takes nothing
            wrapper.step()
            wrapper.zero_grad()

    model, wrapper = begin(40)
    train_locally(model, wrapper, range(STEPS))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": wrapper.state_dict()}, file)
    twin, other = begin(None)
    saved = torch.load(io.BytesIO(file.getvalue()))
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    found = progress(wrapper.optim), progress(other.optim)
    train_locally(model, wrapper, range(STEPS, STEPS + 3))
    train_locally(twin, other, range(STEPS, STEPS + 3))
    return *found, distance(model, twin), (wrapper.averager.step, other.averager.step)


def in_backward_case(rank: int, world: int, name: str, folder: str) -> tuple[Any, Any, float, float]:
    """``_apply_optimizer_in_backward``, an optimizer for every parameter.

    Progress of all before and after, how far the run is from that of one optimizer, and a resumed one from it.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

    cls, options = recipe(name)

    def begin(num_steps: int | None) -> tuple[nn.Module, list[Any]]:
        model = net(torch.float32)
        _apply_optimizer_in_backward(cls, model.parameters(), {**options, "num_steps": num_steps})
        return model, _get_in_backward_optimizers(model)

    def descend(model: nn.Module, steps: range) -> None:
        for step in steps:
            loss_of(model, step, rank, torch.float32).backward()

    model, optimizers = begin(40)
    descend(model, range(STEPS))
    dcp.save(get_optimizer_state_dict(model, optimizers), checkpoint_id=folder)
    twin, others = begin(None)
    twin.load_state_dict(model.state_dict())
    state = get_optimizer_state_dict(twin, others)
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(twin, others, state)
    found = [progress(one) for one in optimizers], [progress(one) for one in others]
    descend(model, range(STEPS, STEPS + 2))
    descend(twin, range(STEPS, STEPS + 2))
    plain = net(torch.float32)
    train(plain, cls(plain.parameters(), **options), range(STEPS + 2), rank)
    return *found, distance(model, plain), distance(model, twin)
