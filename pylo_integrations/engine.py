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

import contextlib
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from pylo_integrations.decay import keep_and_scale
from pylo_integrations.fitting import Stepped, fit_gradient, fit_states
from pylo_integrations.ops.memory import read_memory
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.select import Backend, check_backend, find_native, native_stages, select_local
from pylo_integrations.progress import Progress
from pylo_integrations.rounding import block_noise, round_stochastically
from pylo_integrations.rules.base import Control, Rule, StepContext, clean_gradient
from pylo_integrations.sharding.agreement import (
    Agreement,
    Answer,
    DisagreementError,
    Statement,
    checksums,
    compared,
    constants_of,
    contract_of,
    digest_of,
    header,
    may_step,
    named_options,
    options_of,
)
from pylo_integrations.sharding.blocks import Accumulator, Block, Bucket, PartialSum, Sums, by_tensors
from pylo_integrations.sharding.exchange import Assembly
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.sharding.pieces import ShardingError, is_sharded, local_part
from pylo_integrations.sharding.rounds import RankError, Ranks, sum_over_ranks_
from pylo_integrations.sharding.shares import Collection
from pylo_integrations.telemetry import StepRecord, Telemetry
from pylo_integrations.weights.theta import Theta

NonFinitePolicy = Literal["error", "skip", "zero"]
"""What a step does about non-finite gradients, or a non-finite loss that the rule needs.

``"error"`` raises, ``"skip"`` changes nothing, ``"zero"`` reads the offending gradient elements as zero (and skips if
it is the loss). Whatever the choice, parameters and state stay finite.
"""

CACHE_NUMEL = 32_768
"""Elements per thread of a block on a CPU: measured fastest of 8k to 64k with 2 MiB of L2 cache a core."""


_gradient, _device = operator.attrgetter("grad"), operator.attrgetter("device")

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
    idle: list[int] = field(default_factory=list)  # numbers of those that every rank has whole, without a gradient
    contract: bytes | None = None  # digest of what all ranks must have alike, once that is known
    look: Any = None  # of all parameters, and of the states that no kernel steps

    @property
    def device(self) -> torch.device:
        return self.candidates[0][1].device

    @cached_property
    def natively(self) -> frozenset[int]:
        return frozenset(itertools.chain(*self.native))

    def look_now(self) -> Any:
        """To be compared with ``look``; None if one of the tensors is gone."""
        params = [param for _, param in self.candidates]
        try:
            states = [
                state[name]
                for i, (rule, bucket) in enumerate(zip(self.rules, self.buckets, strict=True))
                if i not in self.natively
                for state in bucket.states
                for name in rule.state_shapes(bucket.layout)
            ]
            return _look_of([*params, *states])
        except (KeyError, TypeError, AttributeError):  # gone, or no tensor
            return None

    @cached_property
    def wrappers(self) -> list[Tensor]:
        """``DTensor`` s of which torch's functions write the inside: autograd counts versions of the outside."""
        theirs = [
            tensor
            for i, (rule, bucket) in enumerate(zip(self.rules, self.buckets, strict=True))
            if i not in self.natively
            for param, state in zip(bucket.params, bucket.states, strict=True)
            for tensor in (param, *(state[name] for name in rule.state_shapes(bucket.layout)))
        ]
        return [tensor for tensor in theirs if local_part(tensor) is not tensor]

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


class _Pledge(NamedTuple):
    """What this rank is about to do, for others to compare.

    Attributes:
        digest: Of all of it.
        state: Tells it, if ranks turn out to disagree.
    """

    digest: bytes
    state: Callable[[], Statement]


@dataclass
class _Verdict:
    norm: float
    grads_finite: bool
    loss_finite: bool
    agreed: _Agreed
    header: list[float]


@dataclass
class _Facts:
    """What ranks must agree on before state may change; each rank's share, until a round completes it.

    Attributes:
        header: See :func:`~pylo_integrations.sharding.agreement.header`; without elements if ranks do not talk.
        squares: Sum of all squared gradients, 0-d. Not finite if a gradient is not, or if it is so large that its
            square overflows: either would poison the state.
        loss: Mean over the ranks, 0-d; None if the rule does not use it.
        present: Per sharded tensor, on how many ranks it has a gradient.
        able: Per sharded tensor, on what part of the ranks nothing is in the native kernels' way.
    """

    header: Tensor
    squares: Tensor
    loss: Tensor | None
    present: Tensor
    able: Tensor

    def shares(self, ranks: Ranks) -> list[tuple[Tensor, int]]:
        loss = [] if self.loss is None else [(self.loss, ranks.size)]
        return [(self.header, 1), (self.squares, 1), *loss, (self.present, 1), (self.able, ranks.size)]

    def read(self) -> _Verdict:
        """The one read of the device in a step."""
        loss = [] if self.loss is None else [self.loss]
        parts = (self.header, self.squares, *loss, self.present, self.able)
        numbers = torch.cat([part.view(-1) for part in parts if part.numel()]).tolist()
        head, (squares, *rest) = numbers[: len(self.header)], numbers[len(self.header) :]
        loss_value = rest.pop(0) if loss else 0.0
        present, able = rest[: len(self.present)], rest[len(self.present) :]
        finite = math.isfinite(squares)
        return _Verdict(
            math.sqrt(squares) if finite else squares,
            finite,
            math.isfinite(loss_value),
            _Agreed(tuple(count > 0 for count in present), tuple(part == 1 for part in able)),
            head,
        )


def _device_of(groups: Sequence[Mapping[str, Any]]) -> torch.device:
    """Where ranks talk before there is a plan."""
    device: torch.device = next(param.device for group in groups for param in group["params"])
    return device


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def _look_of(tensors: Sequence[Tensor]) -> Any:
    """What a plan depends on of tensors that torch's own functions step: which, where and of what kind they are."""
    negated = list(map(Tensor.is_neg, tensors))
    devices = {device.type for device in set(map(_device, tensors))}
    if set(map(type, tensors)) <= {Tensor, nn.Parameter} and devices <= {"cpu", "cuda"}:
        with contextlib.suppress(RuntimeError, BufferError):  # one has no memory, as sparse ones
            return read_memory(tensors, len(tensors)).tobytes(), negated
    return [(id(tensor), tensor.dtype, tensor.device, tensor.shape) for tensor in tensors], negated


class Engine:
    """Runs a rule's stages; holds nothing but caches, and what watches it.

    Args:
        rule: The mathematics.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        chunk_bytes: Bound on the temporaries of a step, in bytes.
        holdings: Who trains together, and what is here of every parameter.
        stochastic_rounding: Whether bfloat16 parameters are rounded stochastically.
        theta: The weights that ``rule`` was built from, if any; for ranks to compare.
        adamw_scale: See :func:`~pylo_integrations.decay.keep_and_scale`.

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
        theta: Theta | None = None,
        adamw_scale: float = 1.0,
    ) -> None:
        self.telemetry: Telemetry | None = None
        check_backend(backend)
        self._rule = rule
        self._backend: Backend = backend
        self._local = select_local(backend)
        self._chunk_bytes = chunk_bytes
        self._holdings = holdings
        self._stochastic_rounding = stochastic_rounding
        self._adamw_scale = adamw_scale
        self._ranks = holdings.ranks
        self._plan = _Plan()
        self._agreed = _Agreed()
        self._agreement = Agreement(self._ranks)
        self._theta = theta
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
            DisagreementError: Ranks were about to do different things.
            RankError: Another rank raised or is gone.
        """
        agreed = self._agreed
        try:
            plan = self._plan if recalled else self._planned(groups, state)
            pledge = self._pledged(plan, groups, progress, loss, on_nonfinite, max_grad_norm)
        except Exception as error:
            self._agreed = agreed
            if not isinstance(error, (DisagreementError, RankError)):
                self.tell(error, groups)
            raise
        # A copy, so that a step which fails halfway has not been remembered.
        memory = dict(progress.memory)
        context = StepContext(progress.iteration, progress.num_steps, loss, memory=memory, local=self._local)
        # `collect` changes nothing. So ranks collect first and agree in the same round; in the rare step where they
        # find that they collected under wrong assumptions, they do it again.
        while plan.buckets or pledge is not None:
            # The kernels sum squared gradients as they collect, but for bad elements that are to be read as zero.
            alone = plan.is_native and pledge is None and not context.zero_nonfinite
            collected = self._collect(plan, context) if alone else None
            facts = self._measure(plan, context, loss, pledge, collected is not None)
            if pledge is not None:
                collected = self._collect(plan, context, facts)
            verdict = facts.read()
            if pledge is not None:
                answer = Answer.read(verdict.header, pledge.digest, self._ranks.size)
                self._agreement.check(answer, pledge.state)
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

    # -- what ranks must have alike ------------------------------------------------------------------------------------

    def tell(self, error: Exception, groups: Sequence[Mapping[str, Any]]) -> None:
        """Let ranks that would wait for this one know that it raises ``error`` in place of a step, so that they do too.

        Where that may be all that ranks have in common, they are not told: who they are may be what is wrong.
        """
        try:
            expected = self._talks(groups) or (self._ranks.size > 1 and self._rule.needs_loss)
        except ShardingError:
            return
        if expected:
            self._agreement.fail(error, _device_of(groups))

    def is_any(
        self,
        flag: bool,
        question: str,
        groups: Sequence[Mapping[str, Any]],
        progress: Progress,
        on_nonfinite: NonFinitePolicy,
        max_grad_norm: float | None,
        *,
        of_replicas: bool = False,
    ) -> bool:
        """Whether ``flag`` is set on any of the ranks that divide parameters, all of which have to ask before a step.

        Args:
            flag: Of this rank.
            question: What is asked, for ranks that do not.
            groups: As those of :meth:`step`; so are the others.
            of_replicas: Ask also where nothing is divided, of ranks that have to exchange their losses.

        Raises:
            DisagreementError: Another rank does not ask.
            RankError: Another rank raised or is gone.
        """
        if not self._talks(groups) and not (of_replicas and self._ranks.size > 1 and self._rule.needs_loss):
            return flag
        values = self._values(groups, progress, on_nonfinite, max_grad_norm, True, [])
        return self._agreement.vote(
            question, flag, lambda: {"this step": question, **self._statement(groups, values)}, _device_of(groups)
        )

    def _talks(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether other ranks begin their step with an exchange, as far as can be told without a plan."""
        if self._ranks.size == 1:
            return False
        self._agreement.renew()
        divided = (
            self._holdings.divides(param) and self._holdings.locate(param)[1].parts > 1
            for group in groups
            for param in group["params"]
            if may_step(param)
        )
        return self._agreement.contract is not None or any(divided)

    def _pledged(
        self,
        plan: _Plan,
        groups: Sequence[Mapping[str, Any]],
        progress: Progress,
        loss: Tensor | None,
        on_nonfinite: NonFinitePolicy,
        max_grad_norm: float | None,
    ) -> _Pledge | None:
        """What this rank will do, once all agree on what is to last; None if ranks do not talk in this step."""
        if self._ranks.size == 1:
            return None
        agreement, exchanges = self._agreement, self._exchanges(plan, loss)
        agreement.renew()
        if not exchanges and agreement.contract is None:
            return None
        if plan.contract is None:
            plan.contract = digest_of(self._contract(groups))
        is_divided = bool(plan.sharded)
        values = self._values(groups, progress, on_nonfinite, max_grad_norm, is_divided, plan.idle)
        state = functools.partial(self._statement, groups, values)
        if plan.contract != agreement.contract:
            agreement.ask(plan.contract, state, _device_of(groups), self._gradient_norms(groups))
            if not exchanges:
                agreement.end()
                return None
        return _Pledge(digest_of(plan.contract, values), state)

    def _contract(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """What decides which numbers ranks exchange, and what they mean."""
        shares = any(self._holdings.shares(param) for group in groups for param in group["params"])
        return contract_of(
            groups,
            self._holdings,
            {
                **self._about_rule,
                "shard_step": str(self._holdings.shares_steps),
                "stochastic_rounding": str(self._stochastic_rounding),
                **({"chunk_bytes": str(self._chunk_bytes)} if shares else {}),
            },
        )

    @cached_property
    def _about_rule(self) -> dict[str, str]:
        theta = {} if self._theta is None else {"theta": f"sha256 {self._theta.sha256[:12]}"}
        constants = {f"{name} of the rule": value for name, value in constants_of(self._rule)}
        return {"rule": type(self._rule).__name__, **theta, **constants}

    def _gradient_norms(self, groups: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | None]:
        """Of gradients that ranks must have alike, since each of them reads its share of its own."""
        return {
            f"norm of the gradient of parameter {position} of group {index}": None
            if param.grad is None
            else torch.linalg.vector_norm(param.grad, dtype=state_dtype(param))
            for index, group in enumerate(groups)
            for position, param in enumerate(group["params"])
            if self._holdings.shares(param)
        }

    def _values(
        self,
        groups: Sequence[Mapping[str, Any]],
        progress: Progress,
        on_nonfinite: NonFinitePolicy,
        max_grad_norm: float | None,
        is_divided: bool,
        idle: list[int],
    ) -> tuple[Any, ...]:
        """What may change from step to step, and is compared at every one."""
        watches = is_divided and self.telemetry is not None  # sums of replicas are complete without the others
        run = progress.iteration, progress.num_steps, max_grad_norm, on_nonfinite, watches
        return *run, options_of(groups), idle

    def _statement(self, groups: Sequence[Mapping[str, Any]], values: tuple[Any, ...]) -> dict[str, str]:
        """All that ranks must have alike, in words; reads every parameter whose step they share."""
        *run, _, idle = values
        subjects = ("steps taken", "num_steps", "max_grad_norm", "on_nonfinite", "telemetry")
        labels = [
            f"{position} of group {i}" for i, group in enumerate(groups) for position in range(len(group["params"]))
        ]
        params = [param for group in groups for param in group["params"]]
        shared = [number for number, param in enumerate(params) if may_step(param) and self._holdings.shares(param)]
        sums = checksums([params[number] for number in shared])
        return {
            **self._contract(groups),
            **{subject: repr(value) for subject, value in zip(subjects, run, strict=True)},
            **named_options(groups),
            "parameters without a gradient": ", ".join(labels[number] for number in idle) or "none",
            **{f"checksum of parameter {labels[i]}": str(number) for i, number in zip(shared, sums, strict=True)},
        }

    # -- plans ---------------------------------------------------------------------------------------------------------

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
        plan = self._plan
        is_current = key == plan.key and plan.look is not None and plan.look == plan.look_now()
        if not is_current or not all(native.is_current() for native in plan.native.values()):
            self._plan = self._build(key, groups, state)
            self._plan.look = self._plan.look_now()
        for bucket in self._plan.buckets:
            pairs = zip(bucket.params, bucket.held, strict=True)
            bucket.grads = [fit_gradient(param, held, bucket.dtype, groups) for param, held in pairs]
        return self._plan

    def _build(
        self,
        key: tuple[Any, ...],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> _Plan:
        every = {p: group for group in groups for p in group["params"]}  # a tied parameter may come twice
        candidates = [(group, p) for p, group in every.items() if may_step(p)]
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
        members: dict[tuple[Any, ...], tuple[Rule, Bucket]] = {}
        stepped: list[Stepped] = []
        for group, param, shape, held in located:
            layout = TensorLayout.whole(shape, group["axes"])
            if layout.numel == 0 or param in absent or (param.grad is None and held.parts == 1):
                continue
            rule = self._rule.member(layout, group)
            dtype = state_dtype(param)
            stepped.append(Stepped(param, held, state[param], rule.state_shapes(layout), dtype))
            _, bucket = members.setdefault(
                (id(group), rule, layout, held.parts, param.dtype, param.device),
                (rule, Bucket(layout, [], [], group, dtype, held.parts)),
            )
            bucket.params.append(param)
            bucket.states.append(state[param])
            bucket.held.append(held)
            bucket.numbers.append(number[id(param)])
            bucket.rounds_stochastically = self._stochastic_rounding and param.dtype == torch.bfloat16
        fit_states(stepped, groups)
        rules, buckets = [rule for rule, _ in members.values()], [bucket for _, bucket in members.values()]
        if any(bucket.device.type == "cpu" for bucket in buckets):
            _keep_freed_memory()
        blocks = [bucket.blocks(self._block_numel(rule, bucket)) for rule, bucket in members.values()]
        able, unable = find_native(self._backend, rules, buckets)
        unable_here = {param for i in unable for param in buckets[i].params}
        unable_there = {param for param, everywhere in zip(sharded, self._agreed.able, strict=True) if not everywhere}
        native = native_stages(rules, buckets, [i for i in able if unable_there.isdisjoint(buckets[i].params)])
        able_here = [param not in unable_here for param in sharded]
        shares = self._collections(buckets)
        divided = set(sharded)
        idle = [
            number[id(param)]
            for *_, param in compared(groups, self._holdings)
            if param.grad is None and may_step(param) and param not in divided
        ]
        return _Plan(key, buckets, rules, blocks, native, candidates, sharded, able_here, shares, idle)

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

    def _measure(
        self, plan: _Plan, context: StepContext, loss: Tensor | None, pledge: _Pledge | None, is_collected: bool
    ) -> _Facts:
        if is_collected:
            squares = torch.stack([native.grad_squares for native in plan.native.values()]).sum()
        else:
            squares = self._grad_squares(plan, context, pledge is not None)
        mine = None if loss is None else loss.to(squares, copy=True)
        if pledge is None:
            return _Facts(squares.new_empty(0), squares, mine, squares.new_empty(0), squares.new_empty(0))
        sent, present = header(pledge.digest), [param.grad is not None for param in plan.sharded]
        numbers = torch.tensor([*sent, *present, *plan.able], dtype=torch.float64, device=squares.device)
        head, having, able = torch.split(numbers, [len(sent), len(present), len(present)])
        return _Facts(head, squares, mine, having, able)

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
        numbers = [
            keep_and_scale(bucket.group, rule.lr_mult, self._adamw_scale)
            for rule, bucket in zip(rules, buckets, strict=True)
        ]
        if plan.wrappers:
            torch.autograd.graph.increment_version(plan.wrappers)
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
        if facts is not None:
            self._agreement.numel = sum(share.numel() for share, _ in shares)
        sum_over_ranks_(shares, self._ranks)
        return sums
