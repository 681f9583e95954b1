"""The plan of a step: which tensors are stepped together, in what blocks, and who runs the stages over them.

It follows from groups, states, gradients that there are, and what ranks have agreed on; a step whose tensors are those
of the last one takes the last one's plan.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylo_integrations.fitting import Stepped, fit_gradient, fit_states
from pylo_integrations.formats import wanted_format
from pylo_integrations.ledger import Entry, Groups, Ledger, States
from pylo_integrations.ops.memory import identities_of, look_at
from pylo_integrations.ops.select import Backend, check_backend, find_native, native_stages
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.agreement import compared, may_step
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.components import Component, Origin, part_of_joint
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.sharding.pieces import Held, is_sharded, local_part
from pylo_integrations.sharding.shares import Collection
from pylo_integrations.step.room import CHUNK, block_numel
from pylo_integrations.step.stages import Part, ReferenceStages

_gradient = operator.attrgetter("grad")


class Agreed(NamedTuple):
    """What ranks last agreed on about each sharded tensor.

    Attributes:
        present: Whether it has a gradient on some rank.
        able: Whether native kernels, if they are for it, can step it on every rank: their sums of features are not the
            reference's.
    """

    present: tuple[bool, ...] = ()
    able: tuple[bool, ...] = ()


class Kind(NamedTuple):
    """What buckets have alike that have the same constants.

    Attributes:
        rule: Of the buckets.
        device: Likewise.
        dtype: Likewise, of arithmetic.
    """

    rule: Rule
    device: torch.device
    dtype: torch.dtype


@dataclass
class Plan:
    """Of one step, and of further ones that look the same.

    Attributes:
        key: What it was made for, but for how tensors are in memory: the stages know that.
        agreed: What ranks had agreed on.
        rules: Of each bucket.
        buckets: What is stepped. They hold what the key refers to, so that no id can be reused.
        parts: Who runs the stages of which buckets.
        candidates: Parameters that may be stepped, with their groups.
        sharded: Those of them that ranks divide among themselves.
        able: Of each of these, False if something here is in the native kernels' way.
        idle: Numbers of those that every rank has whole, without a gradient.
        collections: Bring every rank the shares that others have stepped.
        fused: Parameters that several tensors share, with their states: what is stepped are views of them.
        look: Of these, where they were.
        contract: Digest of what all ranks must have alike, once that is known.
    """

    key: tuple[Any, ...] = ()
    agreed: Agreed = Agreed()
    rules: list[Rule] = field(default_factory=list)
    buckets: list[Bucket] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    candidates: list[tuple[Mapping[str, Any], Tensor]] = field(default_factory=list)
    sharded: list[Tensor] = field(default_factory=list)
    able: list[bool] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    collections: list[Collection] = field(default_factory=list)
    fused: list[tuple[Entry, dict[str, Any]]] = field(default_factory=list)
    look: bytes = b""
    contract: bytes | None = None

    @property
    def device(self) -> torch.device:
        """Where ranks meet."""
        return self.candidates[0][1].device

    @cached_property
    def kinds(self) -> Mapping[Kind, Sequence[int]]:
        """The numbers of the buckets of every kind."""
        kinds: dict[Kind, list[int]] = {}
        for i, (rule, bucket) in enumerate(zip(self.rules, self.buckets, strict=True)):
            kinds.setdefault(Kind(rule, bucket.device, bucket.dtype), []).append(i)
        return kinds

    @cached_property
    def recalls(self) -> bool:
        """Whether its parts know a step like the last one when they see it: of whole, plain tensors on a CPU.

        A replicated ``DTensor`` is divided among nobody, but is not where it seems to be either.
        """
        everything = bool(self.parts) and all(stages.recalls for _, stages in self.parts)
        plain = not any(is_sharded(param) for bucket in self.buckets for param in bucket.owners)
        on_cpu = all(bucket.device.type == "cpu" for bucket in self.buckets)
        return everything and not self.sharded and plain and on_cpu

    def is_current(self) -> bool:
        """Whether all tensors are where they were."""
        return self.fused_are_current() and all(stages.is_current() for _, stages in self.parts)

    def fused_are_current(self) -> bool:
        """Whether parameters that several tensors share, and their states, are where they were."""
        return not self.fused or _look_of(self.fused) == self.look

    def release_gradients(self) -> None:
        """Let go of the last step's gradients, which would outlive ``zero_grad()``."""
        for bucket in self.buckets:
            bucket.grads = ()
        for _, stages in self.parts:
            stages.release_gradients()


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc keep what one block frees for the next one.

    It hands freed memory back to the system above a threshold that follows the largest tensor freed so far, up to 32
    MiB; every block would then begin with the system clearing pages. A training usually has freed such a tensor before.
    Measured on a 768x3072 matrix: 1.2 to 2 times as fast.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")  # never touched, so it takes no memory


class Planner:
    """Makes plans.

    Args:
        ledger: Knows the parameters.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        chunk_bytes: Bound on the temporaries of a step, in bytes; None for one that suits the device.
        stochastic_rounding: Whether bfloat16 parameters are rounded stochastically.
    """

    def __init__(self, ledger: Ledger, backend: Backend, chunk_bytes: int | None, stochastic_rounding: bool) -> None:
        check_backend(backend)
        self._ledger = ledger
        self._backend: Backend = backend
        self._chunk_bytes = chunk_bytes
        self._holdings = ledger.holdings
        self._stochastic_rounding = stochastic_rounding

    def recall(self, plan: Plan, groups: Groups, state: States) -> bool:
        """Whether a step needs no checks and no plan, because what is stepped is what ``plan`` was made for.

        Tensors, their memory and the formats of their gradients are compared, in loops that are not Python's. If it
        answers True, the plan has read the gradients.
        """
        if not plan.recalls:
            return False
        params = list(itertools.chain.from_iterable(group["params"] for group in groups))
        grads = list(map(_gradient, params))
        if self._key(groups, state, params, grads, plan.agreed) != plan.key or not plan.fused_are_current():
            return False
        for indices, stages in plan.parts:
            for i in indices:
                plan.buckets[i].grads = _recalled_gradients(plan.buckets[i], grads)
            mine = list(itertools.chain.from_iterable(plan.buckets[i].grads for i in indices))
            if not stages.is_current() or not stages.recognises(mine):
                plan.release_gradients()
                return False
        return True

    def plan(
        self,
        last: Plan,
        groups: Groups,
        state: States,
        agreed: Agreed,
    ) -> Plan:
        """The plan of a step, with its gradients; ``last``, if that will do.

        Raises:
            StateError: Parameters, gradients and states do not fit each other.
            ShardingError: A parameter is distributed in an unsupported way.
        """
        params = [param for group in groups for param in group["params"]]
        key = self._key(groups, state, params, list(map(_gradient, params)), agreed)
        plan = last if key == last.key and last.is_current() else self._make(key, groups, state, agreed)
        for bucket in plan.buckets:
            members = zip(bucket.params, bucket.held, bucket.origins, strict=True)
            bucket.grads = [
                fit_gradient(param, held, bucket.dtype, groups)
                if origin is None
                else origin.cut.view(fit_gradient(origin.param, origin.held, bucket.dtype, groups))
                for param, held, origin in members
            ]
        return plan

    def _key(
        self,
        groups: Groups,
        state: States,
        params: list[Tensor],
        grads: list[Tensor | None],
        agreed: Agreed,
    ) -> tuple[Any, ...]:
        options = [
            (
                *(id(group), group["axes"], group["rule"], wanted_format(group), len(group["params"])),
                *(group.get("split"), group.get("stacked")),
            )
            for group in groups
        ]
        kinds = list(map(type, grads))
        absent = kinds.count(type(None)) > 0
        idle = [p.requires_grad for p, grad in zip(params, grads, strict=True) if grad is None] if absent else []
        identities = identities_of(itertools.chain(params, state, state.values()))
        mode = torch.is_inference_mode_enabled()  # in which tensors may be written that may not be outside
        return self._holdings.ranks.size, agreed, options, len(params), identities, kinds, idle, mode

    def _make(
        self,
        key: tuple[Any, ...],
        groups: Groups,
        state: States,
        agreed: Agreed,
    ) -> Plan:
        every = {p: group for group in groups for p in group["params"]}  # a tied parameter may come twice
        candidates = [(group, p) for p, group in every.items() if may_step(p)]
        entries = [
            (group, self._ledger.entry(param, group))
            for group, param in candidates
            if param.grad is not None or self._holdings.divides(param)
        ]
        sharded = [entry.param for _, entry in entries if entry.held.parts > 1]
        if len(agreed.present) != len(sharded):
            agreed = Agreed((True,) * len(sharded), (True,) * len(sharded))
            key = (key[0], agreed, *key[2:])
        # A rank that holds nothing of a sharded tensor cannot tell by itself whether it has a gradient.
        absent = {param for param, present in zip(sharded, agreed.present, strict=True) if not present}
        total = sum(len(group["params"]) for group in groups)
        number = {id(param): i for i, param in enumerate(p for group in groups for p in group["params"])}
        entries = [
            (group, entry)
            for group, entry in entries
            if entry.layout.numel
            and entry.param not in absent
            and (entry.param.grad is not None or entry.held.parts > 1)
        ]
        fit_states([Stepped(one.param, one.held, state[one.param], one.stored) for _, one in entries], groups)
        alike: dict[tuple[Any, ...], tuple[Rule, Bucket]] = {}
        for group, entry in entries:
            for one in _tensors_of(entry, state[entry.param]):
                param, divisor = entry.param, entry.held.parts
                stored = entry.parts if one.component is None else entry.parts_of(one.component)
                _, bucket = alike.setdefault(
                    (id(group), entry.rule, one.layout, divisor, param.dtype, param.device, entry.form),
                    (
                        entry.rule,
                        Bucket(one.layout, [], [], group, entry.dtype, divisor, stored=stored, form=entry.form),
                    ),
                )
                bucket.params.append(one.param)
                bucket.states.append(one.state)
                bucket.held.append(one.held)
                bucket.origins.append(one.origin)
                bucket.numbers.append(number[id(param)] + (total * one.origin.index if one.origin else 0))
                bucket.rounds_stochastically = self._stochastic_rounding and param.dtype == torch.bfloat16
        rules, buckets = [rule for rule, _ in alike.values()], [bucket for _, bucket in alike.values()]
        if any(bucket.device.type == "cpu" for bucket in buckets):
            _keep_freed_memory()
        for rule, bucket in alike.values():
            bucket.cut_(block_numel(rule, bucket, self._chunk_bytes))
        parts, able = self._divide(rules, buckets, sharded, agreed)
        divided = set(sharded)
        idle = [
            number[id(param)]
            for *_, param in compared(groups, self._holdings)
            if param.grad is None and may_step(param) and param not in divided
        ]
        collections = self._collections([entry for _, entry in entries])
        fused = [(entry, state[entry.param]) for _, entry in entries if entry.components]
        look = _look_of(fused) if fused else b""
        return Plan(
            key, agreed, rules, buckets, parts, candidates, sharded, able, idle, collections, fused=fused, look=look
        )

    def _divide(
        self, rules: Sequence[Rule], buckets: Sequence[Bucket], sharded: Sequence[Tensor], agreed: Agreed
    ) -> tuple[list[Part], list[bool]]:
        """Who runs the stages of which buckets; of each sharded tensor, whether kernels could step it here."""
        able, unable = find_native(self._backend, rules, buckets, self._holdings.ranks)
        unable_here = {param for i in unable for param in buckets[i].owners}
        unable_there = {param for param, everywhere in zip(sharded, agreed.able, strict=True) if not everywhere}
        native = native_stages(rules, buckets, [i for i in able if unable_there.isdisjoint(buckets[i].owners)])
        parts = [Part(indices, stages) for indices, stages in native.items()]
        taken = set(itertools.chain(*native))
        if rest := tuple(i for i in range(len(buckets)) if i not in taken):
            parts.append(Part(rest, ReferenceStages([rules[i] for i in rest], [buckets[i] for i in rest])))
        return parts, [param not in unable_here for param in sharded]

    def _collections(self, entries: Sequence[Entry]) -> list[Collection]:
        """Who brings every rank the shares that others have stepped, by device."""
        shared: dict[torch.device, list[Tensor]] = {}
        for entry in entries:
            if entry.held.share is not None:
                shared.setdefault(entry.param.device, []).append(entry.param)
        room = CHUNK if self._chunk_bytes is None else self._chunk_bytes
        return [Collection(params, self._holdings.ranks, room) for params in shared.values()]


class _Tensor(NamedTuple):
    """A tensor that is stepped: a parameter, or one of those that share it.

    Attributes:
        param: As the optimizer has it; or a view of what is here of it.
        state: Its own, or views of the parameter's.
        held: What is here of it.
        layout: Of the whole.
        component: Where it is in the parameter; None if it is one.
        origin: Likewise.
    """

    param: Tensor
    state: dict[str, Any]
    held: Held
    layout: TensorLayout
    component: Component | None = None
    origin: Origin | None = None


def _tensors_of(entry: Entry, state: dict[str, Any]) -> Iterator[_Tensor]:
    """The tensors of a parameter, with their states, which fit it."""
    if not entry.components:
        yield _Tensor(entry.param, state, entry.held, entry.layout)
        return
    written = (entry.param, *(state[name] for name in entry.stored))
    each = [entry.rule.state_shapes(component.layout) for component in entry.components]
    for index, component in enumerate(entry.components):
        cut = component.cut(entry.held)
        views: dict[str, Any] = {}
        for name, shape in each[index].items():
            for part, stored in entry.parts[name].items():
                local = local_part(state[part])
                if stored.per_block:
                    views[part] = cut.rows(local)
                elif shape is None:
                    views[part] = cut.view(local)
                else:
                    views[part] = part_of_joint(local, [shapes[name] or () for shapes in each], index)
        param = cut.view(entry.held.of(local_part(entry.param.detach())))
        yield _Tensor(
            param, views, cut.held, component.layout, component, Origin(entry.param, entry.held, cut, index, written)
        )


def _recalled_gradients(bucket: Bucket, grads: Sequence[Tensor | None]) -> list[Any]:
    """Those of a bucket's tensors, of gradients of all parameters, which are plain and whole."""
    if not any(bucket.origins):
        return [grads[number] for number in bucket.numbers]
    pairs = zip(bucket.numbers, bucket.origins, strict=True)
    found = [(grads[number % len(grads)], origin) for number, origin in pairs]
    return [grad if origin is None or grad is None else origin.cut.view(grad) for grad, origin in found]


def _look_of(fused: Sequence[tuple[Entry, dict[str, Any]]]) -> bytes:
    """Where parameters and their states are, to be compared; nothing, which is equal to no look, if one is gone."""
    try:
        return look_at([tensor for entry, own in fused for tensor in (entry.param, *(own[n] for n in entry.stored))])
    except (KeyError, ValueError, RuntimeError, BufferError, AttributeError, TypeError):
        return b""
