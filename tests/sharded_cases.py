"""What the ranks of the distributed tests run; see dist_workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pylo_integrations import create_optimizer

# Uneven and empty shards, ties, vectors, a scalar, a kernel, an axis of extent 1.
SHAPES = [(), (1,), (7,), (5, 3), (4, 4), (2, 3, 4), (6, 3, 2, 2), (1, 5), (9, 6), (9, 6)]


def random(shape, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Collectives(TorchDispatchMode):
    """Counts every collective, whoever starts it, by what the dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.names.append(func.__name__.split(".")[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def collectives() -> Iterator[list[str]]:
    with Collectives() as mode:
        yield mode.names


def full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def digest(tensors) -> str:
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()


# -- DTensors, in any placement ----------------------------------------------------------------------------------------


def placements(layout: str, world: int, shape) -> tuple[Any, list[Any]]:
    """Mesh shape, and what each of its axes does to a tensor."""
    from torch.distributed.tensor import Replicate, Shard

    def shard(axis: int):
        return Shard(axis) if len(shape) > axis else Replicate()

    half = (2, world // 2) if world > 1 else (1, 1)
    return {
        "replicate": ((world,), [Replicate()]),
        "shard0": ((world,), [shard(0)]),
        "shard1": ((world,), [shard(1)]),
        "shard_last": ((world,), [shard(len(shape) - 1) if shape else Replicate()]),
        "hsdp": (half, [Replicate(), shard(0)]),
        "both_axes": (half, [shard(0), shard(1)]),
        "same_axis_twice": (half, [shard(0), shard(0)]),
    }[layout]


def distribute(layout: str, world: int) -> Callable[[Tensor], Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    meshes: dict[Any, Any] = {}

    def place(tensor: Tensor) -> Tensor:
        mesh_shape, how = placements(layout, world, tensor.shape)
        if mesh_shape not in meshes:
            meshes[mesh_shape] = init_device_mesh("cpu", mesh_shape)
        return distribute_tensor(tensor, meshes[mesh_shape], how)

    return place


def take_steps(
    place: Callable[[Tensor], Tensor], name: str, dtype: torch.dtype, steps: int, options: dict[str, Any], loss_of: Any
) -> tuple[list[Tensor], list[str], Any]:
    """Train tensors of SHAPES, wherever ``place`` puts them, on gradients that depend on nothing."""
    params = [nn.Parameter(place(random(shape, i, dtype))) for i, shape in enumerate(SHAPES)]
    optimizer = create_optimizer(params, name, num_steps=100, **options)
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = place(random(p.shape, 1000 * step + i + 100, dtype) * 10.0 ** (i % 3))
        with collectives() as counted:
            optimizer.step(loss=loss_of(step))
    return [full(p) for p in params], counted, optimizer


def dtensor_case(rank: int, world: int, layouts, name: str, dtype, steps: int = 3, options=None) -> dict[str, Any]:
    """Trained parameters, collectives of a step, and a digest of them and of all that is replicated, per layout."""
    results = {}
    for layout in layouts:
        runs = []
        for _ in range(2):
            trained, counted, optimizer = take_steps(
                distribute(layout, world), name, dtype, steps, options or {}, lambda step: 1.0 + step + rank
            )
            replicated = [
                value
                for group in optimizer.param_groups
                for p in group["params"]
                for value in optimizer.state[p].values()
                if not hasattr(value, "placements")
            ]
            memory = [value for _, value in sorted(optimizer._progress.memory.items())]
            runs.append((trained, counted, digest([*trained, *replicated, *memory])))
        assert runs[0][2] == runs[1][2], f"{layout}: not repeatable"
        results[layout] = {
            "params": [t.numpy() for t in runs[0][0]],
            "collectives": runs[0][1],
            "digest": runs[0][2],
        }
    return results
