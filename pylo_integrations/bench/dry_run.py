"""What a step costs the first of many ranks, found on one process without them and without memory for tensors.

A dry run is the optimizer's own step on tensors of the meta device, which have shapes and no numbers, in a fake process
group, whose collectives do nothing: it plans as for so many ranks, makes as much state, and starts the same collectives
with the same number of bytes. Three questions that such a step cannot answer are answered for it: what a read of the
device says (all is finite, every rank has every gradient), whether the other ranks do the same, and which pieces of a
tensor they hold.
"""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pylo_integrations.bench.contenders import DTYPES, make_contender
from pylo_integrations.bench.measure import state_bytes
from pylo_integrations.bench.shapes import ParamShape
from pylo_integrations.bench.strategies import SIMULABLE, STRATEGIES, spread
from pylo_integrations.engine import Engine
from pylo_integrations.ledger import Ledger
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.progress import Progress
from pylo_integrations.sharding.agreement import Agreement, Answer, Statement
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.collectives import Collective, Collectives, is_collective
from pylo_integrations.sharding.exchange import Assembly
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.layout import Box
from pylo_integrations.sharding.pieces import local_part
from pylo_integrations.sharding.rounds import Ranks
from pylo_integrations.step.policies import Policies


@dataclass(frozen=True)
class StepCosts:
    """Of rank 0.

    Attributes:
        elements: Elements of parameters here.
        state_bytes: Of the state of all parameters here.
        collectives: Of one step, in order. In their first step, ranks also tell each other what they hold, if there are
            whole tensors to be put together.
        blocks: How many blocks a step is made of.
        plan_seconds: How long it took to plan the first step, measured: buckets, blocks, and who owns which tensor.
    """

    elements: int
    state_bytes: int
    collectives: tuple[Collective, ...]
    blocks: int
    plan_seconds: float


def dry_run(
    shapes: Sequence[ParamShape], strategy: str, ranks: int, optimizers: Sequence[str], dtype: str = "float32"
) -> dict[str, StepCosts]:
    """Step parameters of given shapes as the first of ``ranks`` would, which holds no less than any; allocates nothing.

    Args:
        shapes: Of whole parameters.
        strategy: A name in :data:`~pylo_integrations.bench.strategies.SIMULABLE`.
        ranks: How many train together.
        optimizers: Catalogue names. Their own torch functions run, as on a device without native kernels.
        dtype: Of parameters and gradients.

    Returns:
        The costs of each optimizer.

    Raises:
        ValueError: The strategy cannot be simulated, or is not for so many ranks.
        RuntimeError: This process is part of a process group already.
    """
    if strategy not in SIMULABLE:
        raise ValueError(f"strategy {strategy!r} cannot be simulated")
    if not STRATEGIES[strategy].allows(ranks):
        raise ValueError(f"strategy {strategy!r} is not for {ranks} ranks")
    with _fake_process_group(ranks):
        _, parameters = spread(shapes, strategy, ranks, DTYPES[dtype], "meta")
        options = STRATEGIES[strategy].options
        return {name: _step_dry(name, parameters, options) for name in optimizers}


def _step_dry(name: str, parameters: Sequence[tuple[Tensor, ParamShape]], options: Mapping[str, Any]) -> StepCosts:
    optimizer, _ = make_contender(name, parameters, **options)
    assert isinstance(optimizer, LearnedOptimizer), f"{name} is no catalogue name"
    groups, state = optimizer.param_groups, optimizer.state
    optimizer.init_state()

    ranks_there = _AbsentRanks()
    ledger = Ledger(optimizer.rule, Holdings(optimizer.shard_step, ranks_there))

    def engine_of(chunk_bytes: int | None) -> Engine:
        return Engine(ledger, "reference", chunk_bytes, agreement=_Unanimous(ranks_there))

    with _DryCollectives() as noted, torch.no_grad():
        start = time.perf_counter()
        plan = engine_of(optimizer.chunk_bytes).plan(groups, state)
        ranks_there.assembled = [
            bucket for rule, bucket in zip(plan.rules, plan.buckets, strict=True) if rule.finishes and bucket.parts > 1
        ]
        if ranks_there.assembled:
            Assembly(ranks_there.assembled, ranks_there)
        plan_seconds = time.perf_counter() - start
        progress = Progress(0, optimizer.num_steps, memory=optimizer.rule.initial_memory())
        loss = torch.ones((), device="meta") if optimizer.needs_loss else None
        # Blocks bound temporaries, and here those take no memory, only time for each operation.
        engine_of(sys.maxsize).step(groups, state, progress, loss, Policies())
    return StepCosts(
        elements=sum(local_part(param.detach()).numel() for param, _ in parameters),
        state_bytes=state_bytes(optimizer),
        collectives=tuple(noted.seen),
        blocks=sum(len(bucket.blocks) for bucket in plan.buckets),
        plan_seconds=plan_seconds,
    )


@contextmanager
def _fake_process_group(ranks: int) -> Iterator[None]:
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that is not part of a process group")
    # Always the same rank: what torch caches of a mesh, such as this process's place in it, outlives the process group.
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class _AbsentRanks(Ranks):
    """Ranks that are not there.

    Attributes:
        assembled: Buckets of whole tensors that ranks put together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.assembled: list[Bucket] = []

    def gather(self, value: Any) -> list[Any]:
        """What :class:`Assembly` asks all ranks for, the boxes that each holds; of those that are not here, computed.

        Raises:
            NotImplementedError: Something else is asked for.
        """
        answers: list[Any] = []
        for rank in range(self.size):
            buckets: list[list[tuple[Box, ...]]] = []
            for bucket in self.assembled:
                # Of parameters that every rank has, the states tell how ranks share their steps.
                divided: list[Any] = [
                    param
                    if hasattr(param, "placements")
                    else next(s for s in state.values() if hasattr(s, "placements"))
                    for param, state in zip(bucket.params, bucket.states, strict=True)
                ]
                buckets.append(
                    [_boxes(tuple(d.shape), tuple(d.device_mesh.shape), d.placements, rank) for d in divided]
                )
            answers.append(buckets)
        if value != answers[0]:
            raise NotImplementedError("a dry run cannot tell what other ranks would answer here")
        return answers


class _Unanimous(Agreement):
    """Agreement with ranks that are not there."""

    def ask(
        self,
        contract: bytes,
        state: Callable[[], Statement],
        device: torch.device,
        measured: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """Take it that the others ask for the same, as they do in their first step."""
        self.contract = contract

    def confirm(self, state: Callable[[], Statement], device: torch.device) -> None:
        """Take it that the others come to the first exchange."""

    def check(self, answer: Answer, state: Callable[[], Statement], asked: bool = False) -> None:
        """Take it that the others do the same."""


class _DryCollectives(Collectives):  # type: ignore[no-untyped-call]
    """Notes collectives, and stands in for the device where it is read."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_collective(func):
            self.note(func, args, kwargs)
            if any(isinstance(leaf, Tensor) and leaf.is_meta for leaf in tree_leaves(args)):
                return _done(func, args)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)


def _done(func: Any, args: Sequence[Any]) -> Any:
    """What a collective returns, without starting it: no process group has them for the meta device."""
    from torch._C._distributed_c10d import FakeWork

    # All of c10d's overwrite their first argument, and return it unless they return nothing but the work.
    work = FakeWork().boxed()  # type: ignore[attr-defined]
    return work if len(func._schema.returns) == 1 else (args[0], work)


@functools.lru_cache(maxsize=4096)
def _boxes(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], rank: int) -> tuple[Box, ...]:
    """What a rank holds of a DTensor on a mesh of all ranks: as torch chunks it, axis of the mesh by axis."""
    start, extents = [0] * len(shape), list(shape)
    for coordinate, count, placement in zip(_unravel(rank, mesh), mesh, placements, strict=True):
        if placement.is_shard():
            axis, extent = placement.dim, extents[placement.dim]
            chunk = math.ceil(extent / count)
            begin = min(coordinate * chunk, extent)
            start[axis] += begin
            extents[axis] = min(chunk, extent - begin)
    return (Box(tuple(start), tuple(extents)),) if math.prod(extents) else ()


def _unravel(rank: int, mesh: Sequence[int]) -> list[int]:
    coordinates = []
    for count in reversed(mesh):
        rank, coordinate = divmod(rank, count)
        coordinates.append(coordinate)
    return coordinates[::-1]
