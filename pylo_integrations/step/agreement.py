"""What ranks must have alike to take a step together, and how they find out.

What is to be compared is known here; :mod:`pylo_integrations.sharding.agreement` compares it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylo_integrations.ledger import Groups, Ledger, state_dtype
from pylo_integrations.progress import Progress
from pylo_integrations.sharding.agreement import (
    Agreement,
    Answer,
    Statement,
    checksums,
    constants_of,
    contract_of,
    digest_of,
    may_step,
    named_options,
    options_of,
)
from pylo_integrations.sharding.pieces import ShardingError
from pylo_integrations.step.plan import Plan
from pylo_integrations.step.policies import Policies
from pylo_integrations.weights.theta import Theta


class Pledge(NamedTuple):
    """What this rank is about to do, for others to compare.

    Attributes:
        digest: Of all of it.
        state: Tells it, if ranks turn out to disagree.
    """

    digest: bytes
    state: Callable[[], Statement]


class StepAgreement:
    """Compares the steps of ranks.

    Args:
        ledger: Knows the parameters, their rule, and who trains together.
        theta: The weights that the rule was built from, if any.
        fixed: Further settings that all ranks must have alike, in words.
        agreement: How it is compared; by default with those ranks.
    """

    def __init__(
        self,
        ledger: Ledger,
        theta: Theta | None,
        fixed: Mapping[str, str],
        agreement: Agreement | None = None,
    ) -> None:
        self._rule = ledger.rule
        self._theta = theta
        self._holdings = ledger.holdings
        self._fixed = fixed
        self._ranks = ledger.holdings.ranks
        self._agreement = agreement or Agreement(self._ranks)

    def tell(self, error: Exception, groups: Groups) -> None:
        """Let ranks that would wait for this one know that it raises ``error`` in place of a step, so that they do too.

        Where that may be all that ranks have in common, they are not told: who they are may be what is wrong.
        """
        try:
            expected = self._talks(groups) or self._averages_losses
        except ShardingError:
            return
        if expected:
            self._agreement.fail(error, self._device_of(groups))

    def is_any(
        self,
        flag: bool,
        question: str,
        groups: Groups,
        progress: Progress,
        policies: Policies,
        *,
        of_replicas: bool = False,
    ) -> bool:
        """Whether ``flag`` is set on any of the ranks that divide parameters, all of which have to ask before a step.

        Args:
            flag: Of this rank.
            question: What is asked, for ranks that do not.
            groups: As those of a step; so are the others.
            progress: Of the run.
            policies: Of the step.
            of_replicas: Ask also where nothing is divided, of ranks that have to exchange their losses.

        Raises:
            DisagreementError: Another rank does not ask.
            RankError: Another rank raised or is gone.
        """
        if not self._talks(groups) and not (of_replicas and self._averages_losses):
            return flag
        values = _values(groups, progress, policies, False, [])
        return self._agreement.vote(
            question, flag, lambda: {"this step": question, **self._statement(groups, values)}, self._device_of(groups)
        )

    def pledge(
        self,
        plan: Plan,
        groups: Groups,
        progress: Progress,
        has_loss: bool,
        policies: Policies,
        is_watched: bool,
    ) -> Pledge | None:
        """What this rank will do, once all agree on what is to last; None if ranks do not talk in this step.

        Args:
            plan: Of the step.
            groups: The parameter groups.
            progress: Of the run.
            has_loss: Whether the rule sees a loss, which ranks average.
            policies: Of the step.
            is_watched: Whether its numbers are recorded.

        Raises:
            DisagreementError: Ranks do not all ask for the same.
            RankError: Another rank raised or is gone.
        """
        if self._ranks.size == 1:
            return None
        agreement = self._agreement
        # Replicas that see no loss stay equal without talking.
        exchanges = bool(plan.candidates) and (bool(plan.sharded) or has_loss)
        agreement.renew()
        if not exchanges and agreement.contract is None:
            return None
        if plan.contract is None:
            plan.contract = digest_of(self._contract(groups))
        watches = is_watched and bool(plan.sharded)  # sums of replicas are complete without the others
        values = _values(groups, progress, policies, watches, plan.idle)
        state = functools.partial(self._statement, groups, values)
        if plan.contract != agreement.contract:
            agreement.ask(plan.contract, state, self._device_of(groups), self._gradient_norms(groups))
            if not exchanges:
                agreement.end()
                return None
        return Pledge(digest_of(plan.contract, values), state)

    def confirm(self, device: torch.device) -> None:
        """Find out, before the first exchange under a contract, whether all ranks come to it.

        Raises:
            RankError: Another rank failed.
        """
        self._agreement.confirm(dict, device)

    def note_size(self, numel: int) -> None:
        """Have a rank that fails send as many numbers in place of the exchange that begins the next step."""
        self._agreement.numel = numel

    def check(self, header: Sequence[float], pledge: Pledge) -> None:
        """Raise on all ranks unless all of them pledged the same.

        Args:
            header: Of all ranks, added up.
            pledge: Of this rank.

        Raises:
            DisagreementError: Ranks were about to do different things.
            RankError: Another rank raised.
        """
        self._agreement.check(Answer.read(header, pledge.digest, self._ranks.size), pledge.state)

    @property
    def _averages_losses(self) -> bool:
        return self._ranks.size > 1 and self._rule.needs_loss

    def _talks(self, groups: Groups) -> bool:
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

    def _contract(self, groups: Groups) -> dict[str, str]:
        """What decides which numbers ranks exchange, and what they mean."""
        shares = any(self._holdings.shares(param) for group in groups for param in group["params"])
        fixed = {name: value for name, value in self._fixed.items() if shares or name != "chunk_bytes"}
        holdings = {"shard_step": str(self._holdings.shares_steps), "offload_state": str(self._holdings.offloads)}
        common = {**self._about_rule, **holdings, **fixed}
        return contract_of(groups, self._holdings, common)

    @cached_property
    def _about_rule(self) -> dict[str, str]:
        theta = {} if self._theta is None else {"theta": f"sha256 {self._theta.sha256[:12]}"}
        constants = {f"{name} of the rule": value for name, value in constants_of(self._rule)}
        return {"rule": self._rule.kind, **theta, **constants}

    def _gradient_norms(self, groups: Groups) -> dict[str, Tensor | None]:
        """Of gradients that ranks must have alike, since each of them reads its share of its own."""
        return {
            f"norm of the gradient of parameter {position} of group {index}": None
            if param.grad is None
            else torch.linalg.vector_norm(param.grad, dtype=state_dtype(param))
            for index, group in enumerate(groups)
            for position, param in enumerate(group["params"])
            if self._holdings.shares(param)
        }

    def _device_of(self, groups: Groups) -> torch.device:
        """Where ranks talk before there is a plan."""
        return self._holdings.home(next(param for group in groups for param in group["params"]))

    def _statement(self, groups: Groups, values: tuple[Any, ...]) -> dict[str, str]:
        """All that ranks must have alike, in words; reads every parameter whose step they share."""
        *run, _, idle = values
        subjects = ("steps taken", "num_steps", *Policies._fields[::-1], "telemetry")
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


def _values(
    groups: Groups, progress: Progress, policies: Policies, is_watched: bool, idle: list[int]
) -> tuple[Any, ...]:
    """What may change from step to step, and is compared at every one."""
    return progress.iteration, progress.num_steps, *policies[::-1], is_watched, options_of(groups), idle
