"""From proposed steps to parameters: steps are finished, scaled, recorded and stored."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pylo_integrations.rounding import box_noise, noise_keys, round_stochastically
from pylo_integrations.rules.base import Rule, StepContext
from pylo_integrations.sharding.blocks import Block, by_tensors
from pylo_integrations.sharding.exchange import Assembly
from pylo_integrations.sharding.rounds import Ranks, sum_over_ranks_
from pylo_integrations.step.plan import Plan
from pylo_integrations.step.stages import Factors
from pylo_integrations.telemetry import StepRecord


class Writer:
    """Writes parameters.

    Args:
        ranks: Who trains together.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._assembly: Assembly | None = None

    def write_(
        self,
        plan: Plan,
        proposed: Sequence[Iterator[Tensor] | None],
        factors: Sequence[Factors],
        contexts: Sequence[StepContext],
        record: StepRecord | None,
    ) -> None:
        """Step all parameters that have not been stepped yet, and have every rank collect what others stepped.

        Args:
            plan: Of the step.
            proposed: For every bucket the steps of its blocks; None where its parameters have been stepped.
            factors: What parameters and steps of every bucket are multiplied with.
            contexts: Of every bucket.
            record: Gets the updates, if the step is watched.
        """
        proposed = self._finished_by_owners(plan, proposed, contexts)
        for i, (rule, bucket, steps) in enumerate(zip(plan.rules, plan.buckets, proposed, strict=True)):
            if steps is None:
                continue
            keep, scale = factors[i]
            for blocks in by_tensors(bucket.blocks):
                mine: Iterable[Tensor] = itertools.islice(steps, len(blocks))
                if rule.finishes and bucket.parts == 1:
                    mine = finished(rule, blocks, mine, contexts[i])
                for block, step in zip(blocks, mine, strict=True):
                    if record is not None:
                        record.add(i, block, step * scale, contexts[i])
                    block.store_param_(_rounded(block.param * keep - step * scale, block, contexts[i]))
        for collection in plan.collections:
            collection.collect_()

    def _finished_by_owners(
        self, plan: Plan, proposed: Sequence[Iterator[Tensor] | None], contexts: Sequence[StepContext]
    ) -> Sequence[Iterator[Tensor] | None]:
        """The same, with steps finished where rules finish tensors that no rank has the whole of.

        Every such tensor has an owner among the ranks, which gets its proposed step, finishes it, and returns it.
        """
        mine = [i for i, rule in enumerate(plan.rules) if rule.finishes and plan.buckets[i].parts > 1]
        if not mine:
            return proposed
        buckets = [plan.buckets[i] for i in mine]
        if self._assembly is None or not self._assembly.fits(buckets):
            self._assembly = Assembly(buckets, self._ranks)
        blocks = [bucket.blocks for bucket in buckets]
        wholes = self._assembly.gather(blocks, [list(proposed[i] or ()) for i in mine])
        counted: dict[str, list[Tensor]] = {}  # here; what whole tensors have counted everywhere is not to be added
        done = [
            plan.rules[i].finish(whole, bucket.layout, replace(contexts[i], counted=counted)) if len(whole) else whole
            for i, bucket, whole in zip(mine, buckets, wholes, strict=True)
        ]
        self._count_everywhere(plan, mine, counted, contexts)
        returned = dict(zip(mine, self._assembly.scatter(blocks, done), strict=True))
        return [iter(returned[i]) if i in returned else steps for i, steps in enumerate(proposed)]

    def _count_everywhere(
        self,
        plan: Plan,
        indices: Sequence[int],
        counted: Mapping[str, list[Tensor]],
        contexts: Sequence[StepContext],
    ) -> None:
        """Count for all ranks what owners have counted, of some buckets."""
        context_of = {name: contexts[i] for i in indices for name in plan.rules[i].counts}
        names = sorted(context_of)
        if not names:
            return
        widest = max((plan.buckets[i].dtype for i in indices), key=lambda dtype: dtype.itemsize)
        sums = torch.zeros(len(names), dtype=torch.promote_types(widest, torch.float32), device=plan.device)
        for name, total in added_up(counted).items():
            sums[names.index(name)] = total
        sum_over_ranks_([(sums, 1)], self._ranks)
        for name, total in zip(names, sums.view(-1, 1), strict=True):
            context_of[name].count(name, total)


def added_up(counted: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Sums over all tensors of what rules counted, 0-d."""
    return {name: torch.cat([value.to(values[0].device) for value in values]).sum() for name, values in counted.items()}


def finished(rule: Rule, blocks: Sequence[Block], steps: Iterable[Tensor], ctx: StepContext) -> list[Tensor]:
    """The steps of one or more whole tensors, cut into ``blocks``, as the rule finishes them."""
    layout, bucket = blocks[0].layout, blocks[0].bucket
    origin = (0,) * len(layout.shape)
    pieces = [(slice(None), slice(None), *block.box.slices(origin)) for block in blocks]
    whole = torch.empty(len(blocks[0]), 1, *layout.shape, dtype=bucket.dtype, device=bucket.device)
    for piece, step in zip(pieces, steps, strict=True):
        whole[piece] = step
    del step  # what kernels proposed is one tensor as large as the whole
    whole = rule.finish(whole, layout, ctx)
    return [whole[piece] for piece in pieces]


def _rounded(values: Tensor, block: Block, ctx: StepContext) -> Tensor:
    """New parameters as they can be stored, where that is not to be the nearest."""
    if not block.bucket.rounds_stochastically:
        return values
    keys = [noise_keys(ctx.iteration, number) for number in block.bucket.numbers[block.tensors]]
    noise = box_noise(block.box.start, block.box.shape, block.layout.shape, keys, block.bucket.device)
    return round_stochastically(values, noise.unsqueeze(1))
