"""From a call of ``step()`` to the engine: what is looked at before anything changes, and what is told after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from pylo_integrations.advice import Advice
from pylo_integrations.compiled import CompiledSteps, StepTensors
from pylo_integrations.engine import Engine
from pylo_integrations.fitting import check_gradients, check_memory
from pylo_integrations.hints import warn_user
from pylo_integrations.ledger import Ledger, States
from pylo_integrations.offload import Offload
from pylo_integrations.options import OptionCheck
from pylo_integrations.progress import Progress, as_scalar_loss
from pylo_integrations.resume import Groups, Resumption
from pylo_integrations.sharding.agreement import DisagreementError
from pylo_integrations.sharding.pieces import local_gradient
from pylo_integrations.sharding.rounds import RankError
from pylo_integrations.step.policies import Policies
from pylo_integrations.steplock import StepLock


@dataclass(frozen=True, eq=False)
class Stepping:
    """Takes the steps of one optimizer.

    Attributes:
        owner: What the optimizer is called, for messages.
        ledger: Knows its parameters.
        engine: Of its steps.
        compiled: Those that compiled functions contain.
        options: Checks those of its groups.
        resumption: Takes over what others put among its states.
        progress: Of its run; changed in place only.
        advice: Told when a step is over.
        offload: Stands in for parameters whose state is elsewhere.
        whole: States for checkpoints, which a step makes out of date.
        lock: One step at a time.
    """

    owner: str
    ledger: Ledger
    engine: Engine
    compiled: CompiledSteps
    options: OptionCheck
    resumption: Resumption
    progress: Progress
    advice: Advice
    offload: Offload
    whole: dict[int, dict[str, Tensor]]
    lock: StepLock = field(default_factory=StepLock)

    def take_loss(self, given: Tensor | float | None, result: Any) -> Tensor | None:
        """The loss of this step: given, else observed, else returned by the closure, where that is of use."""
        observed, rule = self.progress.window.take(), self.ledger.rule
        known = given if given is not None else observed
        # Closures may return anything where no loss is needed.
        if known is None and (rule.needs_loss or (rule.early_losses and _is_number(result))):
            known = result
        return None if known is None else as_scalar_loss(known)

    def step(
        self,
        groups: Groups,
        state: dict[Tensor, dict[str, Any]],
        loss: Callable[[], Tensor | None],
        policies: Callable[[], Policies],
        init_state: Callable[[], None],
    ) -> None:
        """Take a step; raises as :meth:`LearnedOptimizer.step`.

        Args:
            groups: Of the optimizer.
            state: Of the optimizer.
            loss: What :meth:`take_loss` says. Called here, as all that may raise, so that other ranks hear of it.
            policies: About gradients; raises if they are not in range.
            init_state: That of the optimizer.
        """
        with self.lock.stepping(), torch.no_grad(), _full_precision(groups):
            try:
                taken = self._step(groups, state, loss, policies, init_state)
            finally:
                self.engine.release_gradients()
        self.advice.after_step(taken, self.progress)

    def step_tensors(
        self, tensors: StepTensors, groups: Groups, state: States, loss: Tensor | None, policies: Callable[[], Policies]
    ) -> None:
        """Take a step in tensors that stand for the optimizer's, as compiled functions do."""
        progress = self.progress
        with self.lock.stepping(), torch.no_grad(), _full_precision(groups):
            self.options.check(groups)
            now = policies()
            self._check_needs(loss, groups, state)
            if progress.is_overwritten:
                self.resumption.check_overwritten(groups, state)
            self.whole.clear()
            own = self.compiled.progress_of(tensors, progress)
            self._look(groups, own)
            used = loss if self.ledger.rule.reads_loss(own.iteration) else None
            try:
                taken = self.compiled.step(tensors, groups, state, own, used, now)
            finally:
                progress.nonfinite_steps += own.nonfinite_steps
        progress.expect(own.iteration)
        self.advice.after_step(taken, own)

    def _step(
        self,
        groups: Groups,
        state: dict[Tensor, dict[str, Any]],
        loss: Callable[[], Tensor | None],
        policies: Callable[[], Policies],
        init_state: Callable[[], None],
    ) -> bool:
        """Check, and step if there is anything to step; False if the step was skipped."""
        engine, progress, rule, offload = self.engine, self.progress, self.ledger.rule, self.offload
        known: set[Tensor] | None = None
        try:
            now = policies()
            self.options.check(groups)
            observed = loss()
            stepped = offload.bring(groups)
            recalled = not progress.is_overwritten and engine.recall(stepped, offload.states(state))
            if not recalled:
                known = set(state)
                check_gradients(groups)
            if observed is None and self._is_state_probe(groups, state, now):
                init_state()
                return True
            is_idle = not recalled and (rule.needs_loss or rule.needs_horizon) and not _has_gradients(groups)
            # Where other ranks may have gradients, a loss here says that they are waiting.
            if is_idle and (observed is None or self.ledger.holdings.ranks.size == 1):
                question = "neither gradients nor a loss"
                if not engine.agreement.is_any(False, question, groups, progress, now, of_replicas=True):
                    return True
            self._check_needs(observed, groups, state)
            check_memory(progress.memory, self.ledger.memory_shapes)
            if not recalled:
                init_state()
        except (DisagreementError, RankError):
            raise
        except Exception as error:
            engine.agreement.tell(error, groups)
            raise
        self.whole.clear()
        self._look(groups, progress)
        used = offload.loss(observed) if rule.reads_loss(progress.iteration) else None
        try:
            taken = engine.step(stepped, offload.states(state), progress, used, now, recalled=recalled)
        except (DisagreementError, RankError):
            # New state may be of the wrong kind for what the ranks will agree on.
            for param in [] if known is None else set(state) - known:
                del state[param]
            raise
        if taken:
            offload.give_back()
        return taken

    def _look(self, groups: Groups, progress: Progress) -> None:
        """At what will not train well."""
        if progress.iteration == 0:
            self.advice.before_first_step(self.owner, self.ledger, groups)
        self.advice.before_step(groups, progress)

    def _check_needs(self, loss: Tensor | None, groups: Groups, state: States) -> None:
        rule = self.ledger.rule
        if rule.needs_loss and loss is None:
            raise RuntimeError(
                f"{self.owner} needs the training loss at every step: call optimizer.step(loss=loss) or "
                "optimizer.step(closure), or observe_loss(loss) before step(); with a framework, use "
                "pylo_integrations.hf.Trainer, pylo_integrations.lightning.LearnedOptimizerCallback or "
                "pylo_integrations.accelerate.attach. An optimizer that steps inside backward() cannot know it: choose "
                "one that does not need it, such as celo2"
            )
        if rule.needs_horizon and self._settled(groups, state).num_steps is None:
            raise RuntimeError(
                f"{self.owner} needs to know how many steps the run takes: pass num_steps= when creating it, or call "
                "optimizer.set_num_steps(n) before the first step"
            )

    def _settled(self, groups: Groups, state: States) -> Progress:
        """The progress, with what a wrapper has put among the states without telling us."""
        warn_user(*self.resumption.settle(groups, state))
        return self.progress

    def _is_state_probe(self, groups: Groups, state: States, policies: Policies) -> bool:
        """Whether this is torch.distributed.checkpoint making us create state: a step with lr 0 and zero gradients."""
        if self._settled(groups, state).iteration > 0 or any(float(group["lr"]) != 0 for group in groups):
            return False
        params = [param for group in groups for param in group["params"]]
        with torch.no_grad():
            nonzero = [local_gradient(param).any() for param in params if param.grad is not None]
        found = torch.stack(nonzero).any() if nonzero else torch.tensor(False, device=params[0].device)
        # Shards may be zero on some ranks only, and all of them have to decide alike.
        question = "lr 0 and no loss, as to create state"
        return not self.engine.agreement.is_any(bool(found), question, groups, self.progress, policies)


def _full_precision(groups: Groups) -> AbstractContextManager[Any]:
    """Autocast switched off where it is on; entering that costs as much as stepping dozens of small tensors."""
    kind = next((param.device.type for group in groups for param in group["params"]), "cpu")
    kind = kind if torch.amp.is_autocast_available(kind) else "cpu"  # the meta device has none
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    return is_number or (isinstance(value, Tensor) and value.numel() == 1)


def _has_gradients(groups: Groups) -> bool:
    return any(param.grad is not None for group in groups for param in group["params"])
