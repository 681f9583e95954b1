"""What a step costs the first of many ranks, found on one process without them and without memory for tensors.

A dry run is the optimizer's own step on tensors of the meta device, which have shapes and no numbers, in a fake process
group, whose collectives do nothing: it plans as for so many ranks, makes as much state, and starts the same collectives
with the same number of bytes. Three questions that such a step cannot answer are answered for it: what a read of the
device says (all is finite, every rank has every gradient), whether the other ranks do the same, and which pieces of a
tensor they hold.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
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
from pylo_integrations.sharding.absent import AbsentRanks, Unanimous
from pylo_integrations.sharding.collectives import Collective, Collectives, is_collective
from pylo_integrations.sharding.exchange import Assembly
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import local_part
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

    ranks_there = AbsentRanks()
    ledger = Ledger(optimizer.rule, Holdings(optimizer.shard_step, ranks_there))

    def engine_of(chunk_bytes: int | None) -> Engine:
        return Engine(ledger, "reference", chunk_bytes, agreement=Unanimous(ranks_there))

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
