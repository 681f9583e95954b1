"""Parameters of given shapes, spread over ranks as torch's wrappers spread them.

For benchmarks: only what an optimizer sees of a wrapper matters, so the modules have parameters and compute nothing.
Device meshes are those of CPUs; parameters may be on the meta device all the same.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pylo_integrations.bench.contenders import fresh_gradient, fresh_parameter
from pylo_integrations.bench.shapes import ParamShape
from pylo_integrations.sharding.pieces import local_part
from pylo_integrations.sharding.shares import share_axis, share_rows

NODE = 8
"""Ranks among which HSDP shards, where there are more than that: those of one machine."""


class ShapedModule(nn.Module):
    """A module of nothing but parameters."""

    def __init__(self, shapes: Sequence[ParamShape], dtype: torch.dtype, device: str) -> None:
        super().__init__()
        for index, kind in enumerate(shapes):
            self.register_parameter(f"p{index}", fresh_parameter(kind.shape, dtype, device))


@dataclass(frozen=True)
class Strategy:
    """A way to train with many ranks.

    Attributes:
        about: In a few words.
        apply: Spreads a module's parameters over so many ranks; returns what the optimizer is to be bound to.
        elements: How many elements of a parameter rank 0 of so many holds; no rank has more. None if that depends on
            other parameters; such a strategy can be measured, but not simulated.
        stepped: How many of those it steps, and keeps state of; by default all.
        fewest: The smallest number of ranks that it makes sense for.
        multiple: What the number of ranks must be a multiple of.
        options: Of the optimizer.
    """

    about: str
    apply: Callable[[nn.Module, int], nn.Module]
    elements: Callable[[ParamShape, int], int] | None = None
    stepped: Callable[[ParamShape, int], int] | None = None
    fewest: int = 1
    multiple: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    def allows(self, ranks: int) -> bool:
        """Whether there is such a thing with so many ranks."""
        return ranks >= self.fewest and ranks % self.multiple == 0


def _ddp(module: nn.Module, ranks: int) -> nn.Module:
    return module  # the wrapper leaves parameters as they are, and talks in backward() only


def _fsdp2(module: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)))
    return module


def shards_of_hsdp(ranks: int) -> int:
    """Among how many of the ranks HSDP shards here: :data:`NODE`, or half of fewer."""
    return NODE if ranks > NODE and ranks % NODE == 0 else ranks // 2


def _hsdp(module: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shards = shards_of_hsdp(ranks)
    mesh = init_device_mesh("cpu", (ranks // shards, shards), mesh_dim_names=("replicate", "shard"))
    fully_shard(module, mesh=mesh)
    return module


def _tensor_parallel(module: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks,))
    for name, param in list(module.named_parameters()):
        placement = Shard(0) if param.dim() == 2 else Replicate()
        module.register_parameter(name, nn.Parameter(distribute_tensor(param.data, mesh, [placement])))
    return module


def _fsdp1(module: nn.Module, ranks: int) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and says so; for one rank it says that it does nothing
        return FullyShardedDataParallel(module, use_orig_params=True, device_id=torch.device("cpu"))


def _first_chunk(kind: ParamShape, ranks: int) -> int:
    return math.ceil(kind.shape[0] / ranks) * math.prod(kind.shape[1:])


def _all(kind: ParamShape, ranks: int) -> int:
    return math.prod(kind.shape)


def _share(kind: ParamShape, ranks: int) -> int:
    return share_rows(kind.shape, ranks) * math.prod(kind.shape) // kind.shape[share_axis(kind.shape)]


STRATEGIES = {
    "ddp": Strategy("every rank has all", _ddp, _all),
    "shard_step": Strategy(
        "ddp, where every rank steps its share of the rows of all tensors",
        _ddp,
        _all,
        _share,
        options={"shard_step": True},
    ),
    "fsdp2": Strategy("fully_shard()", _fsdp2, _first_chunk),
    "hsdp": Strategy(
        f"fully_shard() within groups of at most {NODE} ranks, replicas of one another",
        _hsdp,
        lambda kind, ranks: _first_chunk(kind, shards_of_hsdp(ranks)),
        fewest=4,
        multiple=2,
    ),
    "tp": Strategy(
        "tensor parallelism of all ranks: matrices are sharded, all else is everywhere",
        _tensor_parallel,
        lambda kind, ranks: _first_chunk(kind, ranks if len(kind.shape) == 2 else 1),
    ),
    "fsdp1": Strategy(
        "FullyShardedDataParallel(use_orig_params=True), all parameters in one unit",
        _fsdp1,
    ),
}
"""By name."""

SIMULABLE = tuple(name for name, strategy in STRATEGIES.items() if strategy.elements)


def label(strategy: str, ranks: int) -> str:
    """A strategy and the number of its ranks, for people."""
    shards = shards_of_hsdp(ranks) if strategy == "hsdp" else ranks
    groups = f"{ranks // shards} x {shards}"
    return f"{strategy}, {groups if strategy == 'hsdp' else ranks} rank{'s' * (ranks > 1)}"


def spread(
    shapes: Sequence[ParamShape], strategy: str, ranks: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[nn.Module, list[tuple[Tensor, ParamShape]]]:
    """This rank's share of parameters with gradients, and the module that they are in.

    Args:
        shapes: Of whole parameters.
        strategy: A name in :data:`STRATEGIES`; its options are for whoever makes the optimizer.
        ranks: The size of the default process group; :meth:`Strategy.allows` it.
        dtype: Of parameters and gradients.
        device: ``"cpu"`` or ``"meta"``.
    """
    module = STRATEGIES[strategy].apply(ShapedModule(shapes, dtype, device), ranks)
    parameters: list[tuple[Tensor, ParamShape]] = list(zip(module.parameters(), shapes, strict=True))
    for param, _ in parameters:
        param.grad = _gradient(param)
    return module, parameters


def _gradient(param: Tensor) -> Tensor:
    with torch.no_grad():
        local = fresh_gradient(local_part(param))
    if not hasattr(param, "placements"):
        return local
    from torch.distributed.tensor import DTensor

    # Not randn_like(param): torch makes ranks agree on random numbers first.
    return DTensor.from_local(
        local,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
