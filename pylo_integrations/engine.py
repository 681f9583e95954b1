"""One step over all tensors: the stages of rules in order, on any number of ranks.

``plan`` what to step in which blocks -> ``collect`` sums of whole tensors -> agree on them and on everything that may
forbid the step, in one *round* -> ``prepare``, ``control``, ``describe`` -> complete those sums in another round ->
``propose``, ``finish`` -> write. Nothing is changed before ranks have agreed; a step reads the device once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from torch import Tensor

from pylo_integrations.decay import keep_and_scale
from pylo_integrations.ledger import Groups, Ledger, States
from pylo_integrations.ops.select import Backend, select_local
from pylo_integrations.progress import Progress
from pylo_integrations.rules.base import Control, StepContext
from pylo_integrations.sharding.agreement import Agreement, DisagreementError
from pylo_integrations.sharding.blocks import Sums
from pylo_integrations.sharding.rounds import RankError, sum_over_ranks_
from pylo_integrations.step.agreement import Pledge, StepAgreement
from pylo_integrations.step.facts import Facts, Verdict
from pylo_integrations.step.plan import Agreed, Kind, Plan, Planner
from pylo_integrations.step.policies import NonFiniteError, NonFinitePolicy, Policies
from pylo_integrations.step.stages import Factors, run_stages
from pylo_integrations.step.writing import Writer, added_up
from pylo_integrations.telemetry import StepRecord, Telemetry
from pylo_integrations.weights.theta import Theta

__all__ = ["Engine", "NonFiniteError", "NonFinitePolicy", "Policies"]


class Engine:
    """Takes steps; holds nothing but caches, and what watches it.

    Args:
        ledger: Knows the parameters, their rule, and who trains together.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        chunk_bytes: Bound on the temporaries of a step, in bytes; None for one that suits the device.
        stochastic_rounding: Whether bfloat16 parameters are rounded stochastically.
        theta: The weights that the rule was built from, if any; for ranks to compare.
        adamw_scale: See :func:`~pylo_integrations.decay.keep_and_scale`.
        agreement: How ranks compare what they do; by default with each other.

    Attributes:
        telemetry: Gets a record of every step that is taken; None for no such work.
        agreement: What ranks must have alike, and how they find out.
    """

    def __init__(
        self,
        ledger: Ledger,
        backend: Backend,
        chunk_bytes: int | None,
        stochastic_rounding: bool = False,
        theta: Theta | None = None,
        adamw_scale: float = 1.0,
        agreement: Agreement | None = None,
    ) -> None:
        self.telemetry: Telemetry | None = None
        fixed = {"stochastic_rounding": str(stochastic_rounding), "chunk_bytes": str(chunk_bytes)}
        self.agreement = StepAgreement(ledger, theta, fixed, agreement)
        self._rule = ledger.rule
        self._planner = Planner(ledger, backend, chunk_bytes, stochastic_rounding)
        self._writer = Writer(ledger.holdings.ranks)
        self._local = select_local(backend)
        self._adamw_scale = adamw_scale
        self._ranks = ledger.holdings.ranks
        self._plan = Plan()
        self._agreed = Agreed()
        self._constants: dict[Kind, Mapping[str, Tensor]] = {}

    def recall(self, groups: Groups, state: States) -> bool:
        """Whether a step needs no checks and no plan, because it is like the last one; see :meth:`Planner.recall`."""
        return self._planner.recall(self._plan, groups, state)

    def plan(self, groups: Groups, state: States) -> Plan:
        """What a step would do now, which the next one then does.

        Raises:
            StateError: Parameters, gradients and states do not fit each other.
            ShardingError: A parameter is distributed in an unsupported way.
        """
        self._plan = self._planner.plan(self._plan, groups, state, self._agreed)
        self._agreed = self._plan.agreed
        return self._plan

    def release_gradients(self) -> None:
        """Let go of the last step's gradients, which would outlive ``zero_grad()``."""
        self._plan.release_gradients()

    def step(
        self,
        groups: Groups,
        state: States,
        progress: Progress,
        loss: Tensor | None,
        policies: Policies,
        *,
        recalled: bool = False,
    ) -> bool:
        """Take one step, all ranks together; returns False if non-finite values made it change nothing.

        Args:
            groups: Parameter groups.
            state: Of every parameter with a gradient, complete.
            progress: Of the run; goes on by a step.
            loss: 0-d, if the rule uses it.
            policies: About gradients.
            recalled: What :meth:`recall` answered.

        Raises:
            NonFiniteError: See :data:`NonFinitePolicy`.
            StateError: Parameters, gradients and states do not fit each other.
            ShardingError: A parameter is distributed in an unsupported way.
            DisagreementError: Ranks were about to do different things.
            RankError: Another rank raised or is gone.
        """
        agreed = self._agreed
        try:
            plan = self._plan if recalled else self.plan(groups, state)
            is_watched = self.telemetry is not None
            pledge = self.agreement.pledge(plan, groups, progress, loss is not None, policies, is_watched)
        except Exception as error:
            self._agreed = agreed
            if not isinstance(error, (DisagreementError, RankError)):
                self.agreement.tell(error, groups)
            raise
        # A copy, so that a step which fails halfway has not been remembered.
        memory = dict(progress.memory)
        ctx = StepContext(progress.iteration, progress.num_steps, loss, memory=memory, local=self._local)
        collected: list[Sums] | None = None
        while plan.buckets or pledge is not None:
            try:
                facts, collected = self._measure(plan, pledge, ctx)
            except Exception as error:
                # Its exchange comes last, and raises RankError: whatever else is raised, others are still waiting.
                if pledge is not None and not isinstance(error, RankError):
                    self.agreement.tell(error, groups)
                raise
            verdict = facts.read()
            if pledge is not None:
                self.agreement.check(verdict.header, pledge)
            if verdict.agreed != self._agreed:  # what was collected rests on assumptions that do not hold on all ranks
                self._agreed = verdict.agreed
                plan = self.plan(groups, state)
            elif verdict.is_finite or ctx.zero_nonfinite:
                break
            elif self._skips(verdict, progress, policies):
                return False
            else:
                ctx.zero_nonfinite = True
        if not plan.buckets:
            return True
        if loss is not None and facts.loss is not None:
            ctx.loss = facts.loss.to(loss)
        if policies.max_grad_norm is not None and verdict.norm > policies.max_grad_norm:
            ctx.grad_scale = policies.max_grad_norm / facts.squares.sqrt()
            collected = collected and _rescaled(plan, collected, ctx.grad_scale)
        self._write(plan, collected or self._collect(plan, ctx), ctx)
        progress.memory.update(memory)
        progress.iteration += 1
        return True

    def _measure(self, plan: Plan, pledge: Pledge | None, ctx: StepContext) -> tuple[Facts, list[Sums] | None]:
        """What must be known before anything changes, complete; and what had to be collected for that.

        `collect` changes nothing, so ranks collect first and agree in the same round. Alone, they collect first where
        gradients are read only once then: kernels sum their squares as they collect.
        """
        first = plan.recalls and pledge is None and not ctx.zero_nonfinite  # bad elements are to be read as zero
        collected = self._collect(plan, ctx) if first else None
        facts = Facts.measure(plan, ctx, pledge, self._ranks, first)
        return facts, collected if pledge is None else self._collect(plan, ctx, facts)

    @staticmethod
    def _skips(verdict: Verdict, progress: Progress, policies: Policies) -> bool:
        """Whether a step that is not finite is left out; it is counted."""
        progress.nonfinite_steps += 1
        if policies.on_nonfinite == "error":
            raise NonFiniteError(
                f"the {'loss' if verdict.grads_finite else 'gradient'} of step {progress.iteration} is not finite; "
                'nothing was changed. Pass on_nonfinite="skip" to skip such steps, or "zero" to read the bad elements '
                "as zero"
            )
        return policies.on_nonfinite == "skip" or not verdict.loss_finite

    def _collect(self, plan: Plan, ctx: StepContext, facts: Facts | None = None) -> list[Sums]:
        """The sums of every bucket, complete, and ``facts`` with them."""
        contexts = self._contexts(plan, ctx)
        collected: list[Sums] = [{}] * len(plan.buckets)
        for indices, stages in plan.parts:
            for i, sums in zip(indices, stages.collect([contexts[i] for i in indices]), strict=True):
                collected[i] = sums
        if facts is not None:
            self.agreement.confirm(plan.device)
        self._complete(plan, collected, facts)
        return collected

    def _complete(self, plan: Plan, sums: Sequence[Sums], facts: Facts | None = None) -> None:
        """Complete the sums of all buckets over ranks, in place, in one round; and ``facts`` with them."""
        shares = [] if facts is None else facts.shares(self._ranks)
        for bucket, mine in zip(plan.buckets, sums, strict=True):
            if bucket.parts > 1:
                shares += [(total, self._ranks.size // bucket.parts) for total in mine.values()]
        if facts is not None:
            self.agreement.note_size(sum(share.numel() for share, _ in shares))
        sum_over_ranks_(shares, self._ranks)

    def _write(self, plan: Plan, collected: Sequence[Sums], ctx: StepContext) -> None:
        """All stages after `collect`; from here on, parameters and state change."""
        contexts = self._contexts(plan, ctx)
        for bucket in plan.buckets:
            bucket.iteration = ctx.iteration
        factors: list[Factors] = [
            keep_and_scale(bucket.group, rule.lr_mult, self._adamw_scale * rule.schedule(ctx.iteration, ctx.num_steps))
            for rule, bucket in zip(plan.rules, plan.buckets, strict=True)
        ]
        record = None if self.telemetry is None else StepRecord(plan.buckets)
        proposed, controls = run_stages(
            plan.parts,
            collected,
            contexts,
            factors,
            lambda sums: _decide(plan, sums, contexts),
            lambda sums: self._complete(plan, sums),
            record,
        )
        self._writer.write_(plan, proposed, factors, contexts, record)
        ctx.memory.update(self._rule.conclude(added_up(ctx.counted), ctx))
        if self.telemetry is not None and record is not None:
            record.complete_(controls, self._ranks)
            self.telemetry.last = record

    def _contexts(self, plan: Plan, ctx: StepContext) -> list[StepContext]:
        """The context of every bucket, which has the constants of its rule."""
        for kind in plan.kinds.keys() - self._constants.keys():
            self._constants[kind] = kind.rule.constants(kind.device, kind.dtype)
        contexts = [ctx] * len(plan.buckets)
        for kind, indices in plan.kinds.items():
            mine = replace(ctx, constants=self._constants[kind], counts=kind.rule.counts)
            for i in indices:
                contexts[i] = mine
        return contexts


def _decide(plan: Plan, collected: Sequence[Sums], contexts: Sequence[StepContext]) -> list[Control]:
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


def _rescaled(plan: Plan, collected: Sequence[Sums], scale: Tensor) -> list[Sums] | None:
    """Sums that were collected before the gradients' scale was known; None if they cannot be scaled."""
    powers = [
        None if bucket.group["weight_decay_policy"] == "l2" else rule.gradient_power
        for rule, bucket in zip(plan.rules, plan.buckets, strict=True)
    ]
    if None in powers:
        return None
    return [
        {name: total * (scale**power).to(total) for name, total in sums.items()}
        for sums, power in zip(collected, cast(list[int], powers), strict=True)
    ]
