"""One step of a learned optimizer over all of its tensors.

=========  ======================================================================================
plan       tensors with a gradient, bucketed by rule, layout, dtype, device and group; cached
collect    read-only partial sums of every block
--round--  sums completed over all tensors at once; non-finite policy decided; nothing changed yet
prepare_   factored state of every bucket
control    whole-model decisions of each rule
describe_  parameter-shaped state of every block; sums of squared features
--round--  sums completed
propose    the step of every block
finish     for rules that turn the steps of a whole matrix into another one
apply      ``p <- keep * p - scale * step``
=========  ======================================================================================
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor

from pylo_integrations.decay import keep_and_scale
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.select import Backend, check_backend, select_native
from pylo_integrations.progress import Progress
from pylo_integrations.rules.base import Control, Rule, StepContext, clean_gradient
from pylo_integrations.sharding.blocks import Accumulator, Block, Bucket, PartialSum, Sums, by_tensors
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.sharding.rounds import sum_over_ranks_

NonFinitePolicy = Literal["error", "skip", "zero"]
"""What a step does about non-finite gradients, or a non-finite loss that the rule needs.

``"error"`` raises, ``"skip"`` changes nothing, ``"zero"`` reads the offending gradient elements as zero (and skips if
it is the loss). Whatever the choice, parameters and state stay finite.
"""

CACHE_NUMEL = 32_768
"""Elements per thread of a block on a CPU: measured fastest of 8k to 64k with 2 MiB of L2 cache a core."""


class NonFiniteError(RuntimeError):
    """A gradient or loss was not finite and ``on_nonfinite="error"``; nothing was changed."""


@dataclass
class _Plan:
    key: tuple[Any, ...]
    buckets: list[Bucket]  # hold every parameter, state and group, so that no id in the key can be reused
    rules: list[Rule]
    blocks: list[list[Block]]
    native: dict[tuple[int, ...], NativeStages]  # by the buckets that it steps

    @cached_property
    def natively(self) -> frozenset[int]:
        return frozenset(itertools.chain(*self.native))


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


class Engine:
    """Runs a rule's stages; holds nothing but caches.

    Args:
        rule: The mathematics.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        chunk_bytes: Bound on the temporaries of a step, in bytes.
    """

    def __init__(self, rule: Rule, backend: Backend, chunk_bytes: int) -> None:
        check_backend(backend)
        self._rule = rule
        self._backend: Backend = backend
        self._chunk_bytes = chunk_bytes
        self._plan = _Plan((), [], [], [], {})
        self._constants: dict[tuple[Rule, torch.device, torch.dtype], Mapping[str, Tensor]] = {}

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        progress: Progress,
        loss: Tensor | None,
        on_nonfinite: NonFinitePolicy,
        max_grad_norm: float | None,
    ) -> bool:
        """Take one step; returns False if non-finite values made it change nothing.

        A step reads the device once: the verdict on non-finite values.

        Raises:
            NonFiniteError: See :data:`NonFinitePolicy`.
        """
        plan = self._planned(groups, state)
        if not plan.buckets:
            return True
        norm = self._grad_norm(plan)
        finite = self._are_finite(norm, loss)
        if not all(finite):
            progress.nonfinite_steps += 1
            if on_nonfinite == "error":
                culprit = "loss" if finite[0] else "gradient"
                raise NonFiniteError(
                    f"the {culprit} of step {progress.iteration} is not finite; nothing was changed. "
                    'Pass on_nonfinite="skip" to skip such steps, or "zero" to read the bad elements as zero'
                )
            if on_nonfinite == "skip" or not finite[1]:
                return False
        context = StepContext(
            progress.iteration, progress.num_steps, loss, zero_nonfinite=not finite[0], memory=progress.memory
        )
        if max_grad_norm is not None:
            norm = norm if finite[0] else self._grad_norm(plan, context)
            context.grad_scale = max_grad_norm / norm.clamp_min(max_grad_norm)
        self._run(plan, context)
        progress.iteration += 1
        return True

    def _planned(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> _Plan:
        """This step's buckets; rebuilt only when tensors, states or groups were replaced."""
        stepped = [(group, p) for group in groups for p in group["params"] if p.grad is not None and p.numel()]
        key = tuple((id(g), g["axes"], id(p), p.dtype, p.device, p.shape, id(state[p])) for g, p in stepped)
        if key != self._plan.key or not all(native.is_current() for native in self._plan.native.values()):
            self._plan = self._build(key, stepped, state)
        for bucket in self._plan.buckets:
            bucket.grads = [cast(Tensor, p.grad) for p in bucket.params]
        return self._plan

    def _build(
        self,
        key: tuple[Any, ...],
        stepped: Sequence[tuple[Mapping[str, Any], Tensor]],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> _Plan:
        members: dict[tuple[Any, ...], tuple[Rule, Bucket]] = {}
        for group, param in stepped:
            layout = TensorLayout.of(param, group["axes"])
            rule = self._rule.member(layout, group)
            _, bucket = members.setdefault(
                (id(group), rule, layout, param.dtype, param.device),
                (rule, Bucket(layout, [], [], group, state_dtype(param))),
            )
            bucket.params.append(param)
            bucket.states.append(state[param])
        rules, buckets = [rule for rule, _ in members.values()], [bucket for _, bucket in members.values()]
        blocks = [bucket.blocks(self._block_numel(rule, bucket)) for rule, bucket in members.values()]
        return _Plan(key, buckets, rules, blocks, select_native(self._backend, rules, buckets))

    def _block_numel(self, rule: Rule, bucket: Bucket) -> int:
        numel = max(1, self._chunk_bytes // (rule.workspace * bucket.dtype.itemsize))
        return min(numel, CACHE_NUMEL * torch.get_num_threads()) if bucket.device.type == "cpu" else numel

    def _grad_norm(self, plan: _Plan, context: StepContext | None = None) -> Tensor:
        """0-d L2 norm of all gradients, those that ``context`` reads as zero left out.

        Not finite if a gradient is not, or if it is so large that its square overflows: either would poison the state.
        """
        device = plan.buckets[0].device
        norms: list[Tensor] = []
        for bucket, blocks in zip(plan.buckets, plan.blocks, strict=True):
            grads = bucket.grads if context is None else [clean_gradient(block, context) for block in blocks]
            norms += (norm.to(device) for norm in torch._foreach_norm(list(grads), 2, dtype=bucket.dtype))
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    @staticmethod
    def _are_finite(norm: Tensor, loss: Tensor | None) -> tuple[bool, bool]:
        """Whether gradients and loss are finite, in one read of the device."""
        verdict = torch.isfinite(norm if loss is None else torch.stack([norm, loss.to(norm)])).reshape(-1).tolist()
        return verdict[0], verdict[-1] or loss is None

    def _constants_for(self, rule: Rule, bucket: Bucket) -> Mapping[str, Tensor]:
        key = (rule, bucket.device, bucket.dtype)
        if key not in self._constants:
            self._constants[key] = rule.constants(bucket.device, bucket.dtype)
        return self._constants[key]

    def _run(self, plan: _Plan, context: StepContext) -> None:
        rules, buckets = plan.rules, plan.buckets
        contexts = [
            replace(context, constants=self._constants_for(rule, bucket))
            for rule, bucket in zip(rules, buckets, strict=True)
        ]
        collected = self._round(
            plan, lambda i, block: rules[i].collect(block, contexts[i]), lambda native: native.collect(context)
        )
        for indices, native in plan.native.items():
            native.prepare_([collected[i] for i in indices])
        prepared = [
            {} if i in plan.natively else rule.prepare_(bucket, collected[i], contexts[i])
            for i, (rule, bucket) in enumerate(zip(rules, buckets, strict=True))
        ]
        controls = self._control(plan, collected, contexts)
        described = self._round(
            plan, lambda i, block: rules[i].describe_(block, prepared[i], contexts[i]), NativeStages.describe
        )
        numbers = [keep_and_scale(bucket.group) for bucket in buckets]
        for indices, native in plan.native.items():
            native.apply_([controls[i] for i in indices], contexts[indices[0]].constants, [numbers[i] for i in indices])
        for i, rule in enumerate(rules):
            if i in plan.natively:
                continue
            keep, scale = numbers[i]
            for blocks in by_tensors(plan.blocks[i]):
                proposed = (rule.propose(b, prepared[i], described[i], controls[i], contexts[i]) for b in blocks)
                steps = self._finished(rule, blocks, proposed, contexts[i]) if rule.finishes else proposed
                for block, step in zip(blocks, steps, strict=True):
                    block.store_param_(block.param * keep - step * scale)

    @staticmethod
    def _control(plan: _Plan, collected: Sequence[Sums], contexts: Sequence[StepContext]) -> list[Control]:
        """Every rule decides once, over all of its buckets, in the widest dtype among them."""
        controls: list[Control] = [{}] * len(plan.buckets)
        for rule in dict.fromkeys(plan.rules):
            mine = [i for i, other in enumerate(plan.rules) if other is rule]
            buckets = [plan.buckets[i] for i in mine]
            widest = max(mine, key=lambda i: plan.buckets[i].dtype.itemsize)
            decided = rule.control(buckets, [collected[i] for i in mine], contexts[widest])
            for i, bucket, control in zip(mine, buckets, decided, strict=True):
                controls[i] = {name: value.to(bucket.device, bucket.dtype) for name, value in control.items()}
        return controls

    @staticmethod
    def _finished(rule: Rule, blocks: Sequence[Block], steps: Iterable[Tensor], ctx: StepContext) -> list[Tensor]:
        """The steps of one or more whole tensors, cut into ``blocks``, as the rule finishes them."""
        layout = blocks[0].layout
        whole = torch.cat([step.flatten(2) for step in steps], dim=2)  # boxes come in the order of their elements
        whole = rule.finish(whole.view(*whole.shape[:2], *layout.shape), layout, ctx)
        return [whole[(slice(None), slice(None), *block.box.slices(layout.local.start))] for block in blocks]

    @staticmethod
    def _round(
        plan: _Plan,
        stage: Callable[[int, Block], Mapping[str, PartialSum]],
        native_stage: Callable[[NativeStages], Sequence[Sums]],
    ) -> list[Sums]:
        """Run a stage over every block, or natively, and complete its sums, for all buckets together."""
        sums: list[Sums] = [{}] * len(plan.buckets)
        for indices, native in plan.native.items():
            for i, mine in zip(indices, native_stage(native), strict=True):
                sums[i] = mine
        for i, (bucket, blocks) in enumerate(zip(plan.buckets, plan.blocks, strict=True)):
            if i not in plan.natively:
                accumulator = Accumulator(bucket)
                for block in blocks:
                    accumulator.add_(block, stage(i, block))
                sums[i] = accumulator.sums
        sum_over_ranks_(total for mine in sums for total in mine.values())
        return sums
