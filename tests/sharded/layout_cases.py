"""Tensors under every layout, and what ranks of the tests of layouts run on them; see pylo_integrations.workers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sharded_cases import (
    collectives,
    digest,
    distribute,
    full,
    full_tensors,
    is_native,
    make,
    random,
    wrap,
)
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

SHAPES = [(), (5,), (5, 3), (5, 3), (4, 1, 2, 4)]
"""Uneven shards, and empty ones on four ranks; axes that tie, and one of extent 1; two that may be stepped as one."""
STEPS = 20
REPEATED = 3
"""Steps of the second run, which must have the bits of the first: what differs between runs differs early."""
COUNTED = (1, STEPS - 1)
"""Steps whose collectives are counted: not the first, in which those with owners also tell everyone who holds what."""


@functools.cache
def gradients(step: int) -> list[Tensor]:
    """Those of a step, whole, whatever the layout; float64."""
    return [random(shape, 1000 * step + i + 100, torch.float64) * 10.0 ** (i % 3) for i, shape in enumerate(SHAPES)]


def starts(dtype: torch.dtype) -> list[Tensor]:
    return [random(shape, i, dtype) for i, shape in enumerate(SHAPES)]


def dtype_of(backend: str) -> torch.dtype:
    return torch.float32 if backend == "native" else torch.float64


@dataclass
class Placed:
    """Tensors of SHAPES as a layout has them.

    Attributes:
        params: What the optimizer gets.
        gradients: For every step, of each of them.
        model: Which they belong to, if a wrapper distributes them.
        options: Of the optimizer.
    """

    params: list[Tensor]
    gradients: list[list[Tensor | None]]
    model: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._begin = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def reset_(self) -> None:
        """Back to the start."""
        for p, value in zip(self.params, self._begin, strict=True):
            p.copy_(value)

    def wholes(self) -> list[Tensor]:
        """All tensors, put together again."""
        if self.model is None:
            return [full(p).clone() for p in self.params]  # of a replicated one, full_tensor() is its own memory
        return [full(self.params[0]), *full_tensors(self.model).values()]


# -- layouts -----------------------------------------------------------------------------------------------------------


def plain(world: int, dtype: torch.dtype, shard_step: bool = False) -> Placed:
    """Replicas, which may share their steps."""
    params = [nn.Parameter(start) for start in starts(dtype)]
    steps = [[grad.to(dtype) for grad in gradients(step)] for step in range(STEPS)]
    return Placed(params, steps, options={"shard_step": shard_step})


def dtensors(world: int, dtype: torch.dtype, kinds: list[str], **options: Any) -> Placed:
    """DTensors, each of the next kind; ``"plain"`` are none."""

    def placed(tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, kinds * len(tensors), strict=False)
        return [t.to(dtype) if kind == "plain" else distribute(kind, world)(t.to(dtype)) for t, kind in pairs]

    params = [nn.Parameter(start) for start in placed(starts(dtype))]
    return Placed(params, [placed(gradients(step)) for step in range(STEPS)], options=options)


class Unit(nn.Module):
    """Tensors whose gradients are what it is called with, whatever they are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(tensors)

    def forward(self, wanted: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(())
        for p, grad in zip(self.tensors, wanted, strict=True):
            if hasattr(p, "placements"):
                total = total + (p * distribute_tensor(grad, p.device_mesh, p.placements)).sum().full_tensor()
            else:
                total = total + (p * grad).sum()
        return total


class TwoUnits(nn.Module):
    """What :func:`sharded_cases.wrap` may wrap."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.down, self.up = Unit(tensors[:2]), Unit(tensors[2:])

    def forward(self, wanted: Sequence[Tensor]) -> Tensor:
        return self.down(wanted[:2]) + self.up(wanted[2:])

    def parallelize_(self, tp: Any) -> None:
        for unit in (self.down, self.up):
            unit.tensors = nn.ParameterList(distribute_tensor(p.detach(), tp, [Shard(0)]) for p in unit.tensors)


def wrapped(world: int, dtype: torch.dtype, wrapper: str, **options: Any) -> Placed:
    """What a wrapper makes of parameters, and of gradients in its backward passes.

    The scalar stays outside: FSDP takes none.
    """
    scalar, *tensors = starts(dtype)
    model = wrap(TwoUnits(tensors), wrapper, world)
    params = [nn.Parameter(scalar), *model.parameters()]
    steps: list[list[Tensor | None]] = []
    for step in range(STEPS):
        first, *rest = (grad.to(dtype) for grad in gradients(step))
        model(rest).backward()
        steps.append([first, *(p.grad if p.grad is None else p.grad.clone() for p in params[1:])])
        model.zero_grad()
    return Placed(params, steps, model, options)


LAYOUTS: dict[str, Callable[..., Placed]] = {
    "local": plain,
    "shard_step": functools.partial(plain, shard_step=True),
    "replicate": functools.partial(dtensors, kinds=["replicate"]),
    "shard0": functools.partial(dtensors, kinds=["shard0"]),
    "shard1": functools.partial(dtensors, kinds=["shard1"]),
    # In one optimizer; the plain one shares its step.
    "mixed": functools.partial(
        dtensors, kinds=["replicate", "plain", "same_axis_twice", "both_axes", "shard_last"], shard_step=True
    ),
    **{
        wrapper: functools.partial(wrapped, wrapper=wrapper)
        for wrapper in ("ddp", "fsdp2", "hsdp", "fsdp2_tp", "fsdp1", "fsdp1_hsdp")
    },
}
"""Called with ``world`` and ``dtype``."""


# -- runs --------------------------------------------------------------------------------------------------------------


class Run:
    """An optimizer on tensors as they were at the start.

    Attributes:
        counted: Collectives of the steps of COUNTED.
    """

    def __init__(self, placed: Placed, name: str, backend: str, rank: int = 0, world: int = 1) -> None:
        placed.reset_()
        self._placed, self._rank, self._world = placed, rank, world
        self.optimizer = make(name, placed.params, lr=10.0, backend=backend, max_grad_norm=math.inf, **placed.options)
        if placed.model is not None:
            self.optimizer.bind_model(placed.model)
        self.counted: list[list[str]] = []

    def step_to(self, end: int) -> str:
        """A digest of all that every rank must have alike after so many steps."""
        for step in range(self.optimizer.iteration, end):
            for p, grad in zip(self._placed.params, self._placed.gradients[step], strict=True):
                p.grad = grad
            loss = 1.0 + step + self._rank - (self._world - 1) / 2  # its mean over ranks is that of one
            if step in COUNTED:
                with collectives() as names:
                    self.optimizer.step(loss=loss)
                self.counted.append(names)
            else:
                self.optimizer.step(loss=loss)
        self.wholes = self._placed.wholes()
        alike = [
            value
            for p in self._placed.params
            for key, value in self.optimizer.state[p].items()
            if not hasattr(value, "placements") and (key in ("row", "col") or not hasattr(p, "_fsdp_flattened"))
        ]
        memory = [value for _, value in sorted(self.optimizer._progress.memory.items())]
        return digest([*self.wholes, *alike, *memory])


def unsharded(name: str, backend: str) -> list[Tensor]:
    run = Run(plain(1, dtype_of(backend)), name, backend)
    run.step_to(STEPS)
    return run.wholes


def layout_case(rank: int, world: int, layout: str, cells: Sequence[tuple[str, str]]) -> dict[Any, dict[str, Any]]:
    """By name and backend: trained tensors, collectives of a step, and a digest of what ranks have alike."""
    found = {}
    placed = {dtype: LAYOUTS[layout](world, dtype) for dtype in {dtype_of(backend): None for _, backend in cells}}
    for name, backend in cells:
        here = placed[dtype_of(backend)]
        early = Run(here, name, backend, rank, world).step_to(REPEATED)
        run = Run(here, name, backend, rank, world)
        repeated = run.step_to(REPEATED) == early
        digest = run.step_to(STEPS)
        found[name, backend] = {
            "params": [t.numpy() for t in run.wholes] if rank == 0 else [],
            "collectives": run.counted,
            "digest": digest,
            "repeated": repeated,
            "native": is_native(run.optimizer),
        }
    return found
