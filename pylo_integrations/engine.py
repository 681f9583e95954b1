"""One step of a learned optimizer over all of its tensors.

=========  ======================================================================================
plan       tensors with a gradient, bucketed by rule, layout, dtype, device and group; cached
collect    read-only partial sums of every block
--round--  sums completed over all tensors and ranks at once, and with them what ranks must agree on: non-finite
           values, loss, gradient norm, which tensors are stepped; nothing changed yet
prepare_   factored state of every bucket
control    whole-model decisions of each rule
describe_  parameter-shaped state of every block; sums of squared features
--round--  sums completed
propose    the step of every block
finish     for rules that turn the steps of a whole matrix into another one
apply      ``p <- keep * p - scale * step``
collect_   where ranks share the work: the new rows of all others
=========  ======================================================================================
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pylo_integrations.decay import keep_and_scale
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.select import Backend, check_backend, find_native, native_stages, select_local
from pylo_integrations.progress import Progress
from pylo_integrations.rounding import block_noise, round_stochastically
from pylo_integrations.rules.base import Control, Rule, StepContext, clean_gradient
from pylo_integrations.sharding.blocks import Accumulator, Block, Bucket, PartialSum, Sums, by_tensors
from pylo_integrations.sharding.exchange import Assembly
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.sharding.pieces import Held, ShardingError, is_sharded, local_gradient, local_part
from pylo_integrations.sharding.rounds import Ranks, sum_over_ranks_
from pylo_integrations.sharding.shares import Collection
from pylo_integrations.telemetry import StepRecord, Telemetry

NonFinitePolicy = Literal["error", "skip", "zero"]
"""What a step does about non-finite gradients, or a non-finite loss that the rule needs.

``"error"`` raises, ``"skip"`` changes nothing, ``"zero"`` reads the offending gradient elements as zero (and skips if
it is the loss). Whatever the choice, parameters and state stay finite.
"""

CACHE_NUMEL = 32_768
"""Elements per thread of a block on a CPU: measured fastest of 8k to 64k with 2 MiB of L2 cache a core."""


_gradient = operator.attrgetter("grad")

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Types whose norm torch computes in any type that states have."""


@functools.cache
def _keep_freed_memory() -> None:
    """Have glibc keep what one block frees for the next one.

    It hands freed memory back to the system above a threshold that follows the largest tensor freed so far, up to 32
    MiB; every block would then begin with the system clearing pages. A training usually has freed such a tensor before.
    Measured on a 768x3072 matrix: 1.2 to 2 times as fast.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8, device="cpu")  # never touched, so it takes no memory


class NonFiniteError(RuntimeError):
    """A gradient or loss was not finite and ``on_nonfinite="error"``; nothing was changed."""


@dataclass
class _Plan:
    key: tuple[Any, ...] = ()
    buckets: list[Bucket] = field(default_factory=list)  # hold what the key refers to, so that no id can be reused
    rules: list[Rule] = field(default_factory=list)
    blocks: list[list[Block]] = field(default_factory=list)
    native: dict[tuple[int, ...], NativeStages] = field(default_factory=dict)  # by the buckets that it steps
    candidates: list[tuple[Mapping[str, Any], Tensor]] = field(default_factory=list)
    sharded: list[Tensor] = field(default_factory=list)  # those of the candidates that ranks divide among themselves
    able: list[bool] = field(default_factory=list)  # of each of them, False if something here is in the kernels' way
    shares: list[Collection] = field(default_factory=list)  # of parameters that every rank has
    formats: list[Any] = field(default_factory=list)  # of all parameters: dtype, device and shape

    @property
    def device(self) -> torch.device:
        return self.candidates[0][1].device

    @cached_property
    def _kept(self) -> list[tuple[dict[str, Any], frozenset[str]]]:
        """The state of every tensor, and the names of what its rule keeps there."""
        names = [
            frozenset(rule.state_shapes(bucket.layout)) for rule, bucket in zip(self.rules, self.buckets, strict=True)
        ]
        pairs = zip(self.buckets, names, strict=True)
        return [(state, mine) for bucket, mine in pairs for state in bucket.states]

    @property
    def has_states(self) -> bool:
        """Whether all states are there. Other code may remove some."""
        return all(state.keys() >= names for state, names in self._kept)

    @cached_property
    def natively(self) -> frozenset[int]:
        return frozenset(itertools.chain(*self.native))

    @cached_property
    def is_native(self) -> bool:
        """Whether the kernels do all of it, on a CPU, without other ranks, to plain tensors.

        A replicated ``DTensor`` is divided among nobody, but is not where it seems to be either.
        """
        everything = len(self.natively) == len(self.buckets) > 0 and not self.sharded
        plain = not any(is_sharded(param) for bucket in self.buckets for param in bucket.params)
        return everything and plain and all(bucket.device.type == "cpu" for bucket in self.buckets)


class _Agreed(NamedTuple):
    """What ranks last agreed on about each sharded tensor.

    Attributes:
        present: Whether it has a gradient on some rank.
        able: Whether native kernels, if they are for it, can step it on every rank: their sums of features are not the
            reference's.
    """

    present: tuple[bool, ...] = ()
    able: tuple[bool, ...] = ()


@dataclass
class _Verdict:
    norm: float
    grads_finite: bool
    loss_finite: bool
    agreed: _Agreed


@dataclass
class _Facts:
    """What ranks must agree on before state may change; each rank's share, until a round completes it.

    Attributes:
        squares: Sum of all squared gradients, 0-d. Not finite if a gradient is not, or if it is so large that its
            square overflows: either would poison the state.
        loss: Mean over the ranks, 0-d; None if the rule does not use it.
        present: Per sharded tensor, on how many ranks it has a gradient.
        able: Per sharded tensor, on what part of the ranks nothing is in the native kernels' way.
    """

    squares: Tensor
    loss: Tensor | None
    present: Tensor
    able: Tensor

    def shares(self, ranks: Ranks) -> list[tuple[Tensor, int]]:
        loss = [] if self.loss is None else [(self.loss, ranks.size)]
        return [(self.squares, 1), *loss, (self.present, 1), (self.able, ranks.size)]

    def read(self) -> _Verdict:
        """The one read of the device in a step."""
        loss = [] if self.loss is None else [self.loss]
        parts = [part.view(-1) for part in (self.squares, *loss, self.present, self.able) if part.numel()]
        squares, *rest = torch.cat(parts).tolist()
        loss_value = rest.pop(0) if loss else 0.0
        present, able = rest[: len(self.present)], rest[len(self.present) :]
        finite = math.isfinite(squares)
        return _Verdict(
            math.sqrt(squares) if finite else squares,
            finite,
            math.isfinite(loss_value),
            _Agreed(tuple(count > 0 for count in present), tuple(part == 1 for part in able)),
        )


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _check_state(
    shapes: Mapping[str, tuple[int, ...] | None], state: Mapping[str, Tensor], param: Tensor, held: Held
) -> None:
    """Raise ShardingError if the state is not that of what is here of its parameter, ValueError if some is missing."""
    if missing := [name for name in shapes if name not in state]:
        raise ValueError(
            f"the state of a parameter of shape {tuple(param.shape)} lacks {missing}: remove all of its state with "
            "optimizer.state.pop(p), and it begins anew, or load a checkpoint"
        )
    found = {name: local_part(state[name]).numel() for name, shape in shapes.items() if shape is None}
    if any(numel != held.numel for numel in found.values()):
        raise ShardingError(
            f"the state of a parameter of shape {tuple(param.shape)} has {found} elements, where this rank steps "
            f"{held.numel}: it was created, or loaded, when other ranks trained together. Initialise "
            "torch.distributed and call bind_model() before the first step, and carry state from one number of ranks "
            "to another in a checkpoint"
        )


def _may_be_stepped(param: Tensor) -> bool:
    return (param.requires_grad or param.grad is not None) and not is_lazy(param)


def _overlapping(params: Iterable[Tensor]) -> set[int]:
    """Which parameters share memory with others, as views of one tensor do, by ``id``."""
    spans: list[tuple[int, int, int]] = []
    for param in params:
        local = local_part(param)
        if local.numel() and local.device.type != "meta":
            size = 1 + sum((n - 1) * step for n, step in zip(local.shape, local.stride(), strict=True))
            spans.append((local.data_ptr(), local.data_ptr() + size * local.element_size(), id(param)))
    found: set[int] = set()
    reach, last = 0, 0  # how far memory is taken, and by whom
    for start, stop, number in sorted(spans):
        if start < reach:
            found |= {number, last}
        if stop > reach:
            reach, last = stop, number
    return found


class Engine:
    """Runs a rule's stages; holds nothing but caches, and what watches it.

    Args:
        rule: The mathematics.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        chunk_bytes: Bound on the temporaries of a step, in bytes.
        holdings: Who trains together, and what is here of every parameter.
        stochastic_rounding: Whether bfloat16 parameters are rounded stochastically.

    Attributes:
        telemetry: Gets a record of every step that is taken; None for no such work.
    """

    def __init__(
        self,
        rule: Rule,
        backend: Backend,
        chunk_bytes: int,
        holdings: Holdings,
        stochastic_rounding: bool = False,
    ) -> None:
        self.telemetry: Telemetry | None = None
        check_backend(backend)
        self._rule = rule
        self._backend: Backend = backend
        self._local = select_local(backend)
        self._chunk_bytes = chunk_bytes
        self._holdings = holdings
        self._stochastic_rounding = stochastic_rounding
        self._ranks = holdings.ranks
        self._plan = _Plan()
        self._agreed = _Agreed()
        self._assembly: Assembly | None = None
        self._constants: dict[tuple[Rule, torch.device, torch.dtype], Mapping[str, Tensor]] = {}

    def step(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        progress: Progress,
        loss: Tensor | None,
        on_nonfinite: NonFinitePolicy,
        max_grad_norm: float | None,
        *,
        recalled: bool = False,
    ) -> bool:
        """Take one step, all ranks together; returns False if non-finite values made it change nothing.

        ``recalled`` is what :meth:`recall` answered. A step reads the device once: the verdict on non-finite values.

        Raises:
            NonFiniteError: See :data:`NonFinitePolicy`.
            ShardingError: A parameter is distributed in an unsupported way.
        """
        plan = self._plan if recalled else self._planned(groups, state)
        # A copy, so that a step which fails halfway has not been remembered.
        memory = dict(progress.memory)
        context = StepContext(progress.iteration, progress.num_steps, loss, memory=memory, local=self._local)
        # `collect` changes nothing. So ranks collect first and agree in the same round; in the rare step where they
        # find that they collected under wrong assumptions, they do it again.
        while plan.buckets or self._exchanges(plan, loss):
            exchanges = self._exchanges(plan, loss)
            # The kernels sum squared gradients as they collect, but for bad elements that are to be read as zero.
            alone = plan.is_native and not exchanges and not context.zero_nonfinite
            collected = self._collect(plan, context) if alone else None
            facts = self._measure(plan, context, loss, collected is not None)
            if exchanges:
                collected = self._collect(plan, context, facts)
            verdict = facts.read()
            if verdict.agreed != self._agreed:
                self._agreed = verdict.agreed
                plan = self._planned(groups, state)
            elif (verdict.grads_finite and verdict.loss_finite) or context.zero_nonfinite:
                break
            else:
                progress.nonfinite_steps += 1
                if on_nonfinite == "error":
                    culprit = "loss" if verdict.grads_finite else "gradient"
                    raise NonFiniteError(
                        f"the {culprit} of step {progress.iteration} is not finite; nothing was changed. "
                        'Pass on_nonfinite="skip" to skip such steps, or "zero" to read the bad elements as zero'
                    )
                if on_nonfinite == "skip" or not verdict.loss_finite:
                    return False
                context.zero_nonfinite = True
        if not plan.buckets:
            return True
        if loss is not None and facts.loss is not None:
            context.loss = facts.loss.to(loss)
        if max_grad_norm is not None and verdict.norm > max_grad_norm:
            context.grad_scale = max_grad_norm / facts.squares.sqrt()
            collected = collected and self._rescaled(plan, collected, context)
        self._run(plan, collected or self._collect(plan, context), context)
        progress.memory.update(memory)
        progress.iteration += 1
        return True

    def release_gradients(self) -> None:
        """Let go of the last step's gradients, which would outlive ``zero_grad()``."""
        for bucket in self._plan.buckets:
            bucket.grads = ()
        for native in self._plan.native.values():
            native.release_gradients()

    def _exchanges(self, plan: _Plan, loss: Tensor | None) -> bool:
        """Whether ranks talk in this step. Replicas that see no loss stay equal without."""
        return self._ranks.size > 1 and bool(plan.candidates) and (bool(plan.sharded) or loss is not None)

    def recall(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether a step needs no checks and no plan, because the kernels step what they stepped last, as it was then.

        Tensors, their memory and the formats of their gradients are compared, in loops that are not Python's. If it
        answers True, it has read the gradients for :meth:`step`.
        """
        plan = self._plan
        if not plan.is_native:
            return False
        params = list(itertools.chain.from_iterable(group["params"] for group in groups))
        grads = list(map(_gradient, params))
        if self._key(groups, state, params, grads) != plan.key:
            return False
        for indices, native in plan.native.items():
            for i in indices:
                plan.buckets[i].grads = [grads[number] for number in plan.buckets[i].numbers]
            mine = list(itertools.chain.from_iterable(plan.buckets[i].grads for i in indices))
            if not native.is_current() or not native.recognises(mine):
                self.release_gradients()
                return False
        return True

    def _key(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
        params: list[Tensor],
        grads: list[Tensor | None],
    ) -> tuple[Any, ...]:
        """What a plan was made for, but for how tensors are in memory."""
        options = [(id(group), group["axes"], group["rule"], len(group["params"])) for group in groups]
        kinds = list(map(type, grads))
        absent = kinds.count(type(None)) > 0
        idle = [p.requires_grad for p, grad in zip(params, grads, strict=True) if grad is None] if absent else []
        identities = [list(map(id, objects)) for objects in (params, state, state.values())]
        return self._ranks.size, self._agreed, options, identities, kinds, idle

    def _planned(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> _Plan:
        """This step's buckets; rebuilt only when tensors, states or groups were replaced."""
        params = [param for group in groups for param in group["params"]]
        key = self._key(groups, state, params, list(map(_gradient, params)))
        formats = [(param.dtype, param.device, param.shape) for param in params if not is_lazy(param)]
        is_current = key == self._plan.key and formats == self._plan.formats and self._plan.has_states
        if not is_current or not all(native.is_current() for native in self._plan.native.values()):
            self._plan = self._build(key, groups, state)
            self._plan.formats = formats
        for bucket in self._plan.buckets:
            pairs = zip(bucket.params, bucket.held, strict=True)
            bucket.grads = [held.of(local_gradient(param)) for param, held in pairs]
        return self._plan

    def _build(
        self,
        key: tuple[Any, ...],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> _Plan:
        every = {p: group for group in groups for p in group["params"]}  # a tied parameter may come twice
        candidates = [(group, p) for p, group in every.items() if _may_be_stepped(p)]
        located = [
            (group, param, *self._holdings.locate(param))
            for group, param in candidates
            if param.grad is not None or self._holdings.divides(param)
        ]
        sharded = [param for _, param, _, held in located if held.parts > 1]
        if len(self._agreed.present) != len(sharded):
            self._agreed = _Agreed((True,) * len(sharded), (True,) * len(sharded))
            key = (key[0], self._agreed, *key[2:])
        # A rank that holds nothing of a sharded tensor cannot tell by itself whether it has a gradient.
        absent = {param for param, present in zip(sharded, self._agreed.present, strict=True) if not present}
        number = {id(param): i for i, param in enumerate(p for group in groups for p in group["params"])}
        overlapping = _overlapping([param for _, param, _, _ in located if param.grad is not None])
        members: dict[tuple[Any, ...], tuple[Rule, Bucket]] = {}
        for group, param, shape, held in located:
            layout = TensorLayout.whole(shape, group["axes"])
            if layout.numel == 0 or param in absent or (param.grad is None and held.parts == 1):
                continue
            rule = self._rule.member(layout, group)
            _check_state(rule.state_shapes(layout), state[param], param, held)
            _, bucket = members.setdefault(
                (id(group), rule, layout, held.parts, param.dtype, param.device, id(param) in overlapping),
                (rule, Bucket(layout, [], [], group, state_dtype(param), held.parts)),
            )
            bucket.params.append(param)
            bucket.states.append(state[param])
            bucket.held.append(held)
            bucket.numbers.append(number[id(param)])
            bucket.rounds_stochastically = self._stochastic_rounding and param.dtype == torch.bfloat16
        rules, buckets = [rule for rule, _ in members.values()], [bucket for _, bucket in members.values()]
        if any(bucket.device.type == "cpu" for bucket in buckets):
            _keep_freed_memory()
        blocks = [bucket.blocks(self._block_numel(rule, bucket)) for rule, bucket in members.values()]
        together = [i for i, bucket in enumerate(buckets) if id(bucket.params[0]) in overlapping]
        able, unable = find_native(self._backend, rules, buckets, together)
        unable_here = {param for i in unable for param in buckets[i].params}
        unable_there = {param for param, everywhere in zip(sharded, self._agreed.able, strict=True) if not everywhere}
        native = native_stages(rules, buckets, [i for i in able if unable_there.isdisjoint(buckets[i].params)])
        able_here = [param not in unable_here for param in sharded]
        shares = self._collections(buckets)
        return _Plan(key, buckets, rules, blocks, native, candidates, sharded, able_here, shares)

    def _collections(self, buckets: Sequence[Bucket]) -> list[Collection]:
        """Who brings every rank the shares that others have stepped, by device."""
        shared: dict[torch.device, list[Tensor]] = {}
        for bucket in buckets:
            mine = [param for param, held in zip(bucket.params, bucket.held, strict=True) if held.share is not None]
            shared.setdefault(bucket.device, []).extend(mine)
        return [Collection(params, self._ranks, self._chunk_bytes) for params in shared.values() if params]

    def _block_numel(self, rule: Rule, bucket: Bucket) -> int:
        numel = max(1, self._chunk_bytes // (rule.workspace * bucket.dtype.itemsize))
        return min(numel, CACHE_NUMEL * torch.get_num_threads()) if bucket.device.type == "cpu" else numel

    def _measure(self, plan: _Plan, context: StepContext, loss: Tensor | None, is_collected: bool) -> _Facts:
        if is_collected:
            squares = torch.stack([native.grad_squares for native in plan.native.values()]).sum()
        else:
            squares = self._grad_squares(plan, context, self._exchanges(plan, loss))
        present = squares.new_tensor([param.grad is not None for param in plan.sharded])
        able = squares.new_tensor(plan.able)
        return _Facts(squares, None if loss is None else loss.to(squares, copy=True), present, able)

    def _grad_squares(self, plan: _Plan, context: StepContext, exchanges: bool) -> Tensor:
        """This rank's share of the sum of all squared gradients, 0-d."""
        dtype = max((bucket.dtype for bucket in plan.buckets), key=lambda dtype: dtype.itemsize, default=torch.float32)
        squares = torch.zeros((), dtype=dtype, device=plan.device)
        alike: dict[tuple[Any, ...], list[Tensor]] = {}  # a call for each bucket would cost more than small tensors do
        for bucket, blocks in zip(plan.buckets, plan.blocks, strict=True):
            # In the round, tensors that several ranks hold must count once.
            copies = self._ranks.size // bucket.parts if exchanges else 1
            grads = [clean_gradient(block, context) for block in blocks] if context.zero_nonfinite else bucket.grads
            for grad in grads:
                # Gradients may be of another type than their parameters, and are then read as the state is.
                grad = grad if grad.dtype in _NARROW or grad.dtype == bucket.dtype else grad.to(bucket.dtype)
                alike.setdefault((bucket.dtype, copies, grad.dtype, bucket.device), []).append(grad)
        for (wide, copies, *_), tensors in alike.items():
            norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
            squares += (norms.square().sum() / copies).to(squares)
        return squares

    def _constants_for(self, rule: Rule, device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
        key = rule, device, dtype
        if key not in self._constants:
            self._constants[key] = rule.constants(device, dtype)
        return self._constants[key]

    def _contexts(self, plan: _Plan, context: StepContext) -> list[StepContext]:
        """The context with the constants of each bucket's rule."""
        keys = [(rule, bucket.device, bucket.dtype) for rule, bucket in zip(plan.rules, plan.buckets, strict=True)]
        made = {key: replace(context, constants=self._constants_for(*key)) for key in dict.fromkeys(keys)}
        return [made[key] for key in keys]

    def _collect(self, plan: _Plan, context: StepContext, facts: _Facts | None = None) -> list[Sums]:
        contexts = [] if len(plan.natively) == len(plan.buckets) else self._contexts(plan, context)
        return self._round(
            plan,
            lambda i, block: plan.rules[i].collect(block, contexts[i]),
            lambda native: native.collect(context),
            facts,
        )

    def _rescaled(self, plan: _Plan, collected: list[Sums], context: StepContext) -> list[Sums] | None:
        """Sums that were collected before the gradients' scale was known; None if they cannot be scaled."""
        powers = [
            None if bucket.group["weight_decay_policy"] == "l2" else rule.gradient_power
            for rule, bucket in zip(plan.rules, plan.buckets, strict=True)
        ]
        scale = context.grad_scale
        if scale is None or None in powers:
            return None
        return [
            {name: total * (scale**power).to(total) for name, total in sums.items()}
            for sums, power in zip(collected, cast(list[int], powers), strict=True)
        ]

    def _run(self, plan: _Plan, collected: Sequence[Sums], context: StepContext) -> None:
        rules, buckets = plan.rules, plan.buckets
        contexts = self._contexts(plan, context)
        numbers = [keep_and_scale(bucket.group, rule.lr_mult) for rule, bucket in zip(rules, buckets, strict=True)]
        for indices, native in plan.native.items():  # from here on, parameters and state change
            native.prepare_([collected[i] for i in indices], context)
        prepared = [
            {} if i in plan.natively else rule.prepare_(bucket, collected[i], contexts[i])
            for i, (rule, bucket) in enumerate(zip(rules, buckets, strict=True))
        ]
        controls = self._control(plan, collected, contexts)
        described = self._round(
            plan, lambda i, block: rules[i].describe_(block, prepared[i], contexts[i]), NativeStages.describe
        )

        def propose(i: int) -> Iterator[Tensor]:
            blocks = plan.blocks[i]
            return (rules[i].propose(block, prepared[i], described[i], controls[i], contexts[i]) for block in blocks)

        proposed = [propose(i) for i in range(len(rules))]
        record = None if self.telemetry is None else StepRecord(buckets)
        done: set[int] = set()
        for indices, native in plan.native.items():
            decided, ctx = [controls[i] for i in indices], contexts[indices[0]]
            if rules[indices[0]].finishes or buckets[indices[0]].rounds_stochastically:
                steps_of = native.propose_([plan.blocks[i] for i in indices], decided, ctx)
                for i, mine in zip(indices, steps_of, strict=True):
                    proposed[i] = mine
                continue
            before = [] if record is None else [[p.clone() for p in buckets[i].params] for i in indices]
            native.apply_(decided, ctx, [numbers[i] for i in indices])
            done.update(indices)
            if record is not None:
                for i, params in zip(indices, before, strict=True):
                    record.add_applied(i, params, plan.blocks[i], numbers[i][0], contexts[i])
        finished = self._finish_sharded(plan, proposed, contexts)
        for i, rule in enumerate(rules):
            if i in done:
                continue
            keep, scale = numbers[i]
            for blocks in by_tensors(plan.blocks[i]):
                steps: Iterable[Tensor] = itertools.islice(finished.get(i, proposed[i]), len(blocks))
                if rule.finishes and i not in finished:
                    steps = self._finished(rule, blocks, steps, contexts[i])
                for block, step in zip(blocks, steps, strict=True):
                    if record is not None:
                        record.add(i, block, step * scale, contexts[i])
                    block.store_param_(self._rounded(block.param * keep - step * scale, block, context))
        for collection in plan.shares:
            collection.collect_()
        if self.telemetry is not None and record is not None:
            record.complete_(controls, self._ranks)
            self.telemetry.last = record

    @staticmethod
    def _rounded(values: Tensor, block: Block, context: StepContext) -> Tensor:
        """New parameters as they can be stored, where that is not to be the nearest."""
        if not block.bucket.rounds_stochastically:
            return values
        noise = block_noise(block, block.bucket.numbers[block.tensors], context.iteration)
        return round_stochastically(values, noise)

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
        layout, bucket = blocks[0].layout, blocks[0].bucket
        origin = (0,) * len(layout.shape)
        pieces = [(slice(None), slice(None), *block.box.slices(origin)) for block in blocks]
        whole = torch.empty(len(blocks[0]), 1, *layout.shape, dtype=bucket.dtype, device=bucket.device)
        for piece, step in zip(pieces, steps, strict=True):
            whole[piece] = step
        del step  # what kernels proposed is one tensor as large as the whole
        whole = rule.finish(whole, layout, ctx)
        return [whole[piece] for piece in pieces]

    def _finish_sharded(
        self, plan: _Plan, proposed: Sequence[Iterator[Tensor]], contexts: Sequence[StepContext]
    ) -> dict[int, Iterator[Tensor]]:
        """Finished steps of every block, by bucket, where rules finish tensors that no rank has the whole of.

        Every such tensor has an owner among the ranks, which gets its proposed step, finishes it, and returns it.
        """
        mine = [i for i, rule in enumerate(plan.rules) if rule.finishes and plan.buckets[i].parts > 1]
        if not mine:
            return {}
        buckets = [plan.buckets[i] for i in mine]
        if self._assembly is None or not self._assembly.fits(buckets):
            self._assembly = Assembly(buckets, self._ranks)
        wholes = self._assembly.gather([plan.blocks[i] for i in mine], [list(proposed[i]) for i in mine])
        finished = [
            plan.rules[i].finish(whole, bucket.layout, contexts[i]) if len(whole) else whole
            for i, bucket, whole in zip(mine, buckets, wholes, strict=True)
        ]
        returned = self._assembly.scatter([plan.blocks[i] for i in mine], finished)
        return {i: iter(steps) for i, steps in zip(mine, returned, strict=True)}

    def _round(
        self,
        plan: _Plan,
        stage: Callable[[int, Block], Mapping[str, PartialSum]],
        native_stage: Callable[[NativeStages], Sequence[Sums]],
        facts: _Facts | None = None,
    ) -> list[Sums]:
        """Run a stage over every block, or natively, and complete its sums, and ``facts``, for all buckets together."""
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
        shares = [] if facts is None else facts.shares(self._ranks)
        for bucket, mine in zip(plan.buckets, sums, strict=True):
            if bucket.parts > 1:
                copies = self._ranks.size // bucket.parts
                shares += [(total, copies) for total in mine.values()]
        sum_over_ranks_(shares, self._ranks)
        return sums
