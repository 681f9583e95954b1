"""A step as an operator of torch's dispatcher, ``pylo_integrations::step``: what a compiled function contains.

The compiler sees one operator and what it changes: parameters, their state, and the run, whose first tensor is the
iteration. What else matters, rule and options, is looked up by a number when the operator runs, so schedules need no
compilation of their own. Torch hears of the operator when the first optimizer is made.

Inside, a compiled function has tensors of its own in the place of an optimizer's: the step is taken in *twins*, groups
and states like the optimizer's but with those tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, MutableMapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pylo_integrations.engine import Engine
from pylo_integrations.fitting import check_gradients
from pylo_integrations.formats import wanted_format
from pylo_integrations.ledger import Groups, States, state_dtype
from pylo_integrations.progress import Progress
from pylo_integrations.step.policies import Policies

NAMESPACE = "pylo_integrations"
SCHEMA = (
    "step(int handle, int[] numbers, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor(c!)[] run, "
    "Tensor? loss) -> ()"
)


class StepTensors(NamedTuple):
    """The tensors of a step, whoever they belong to.

    Attributes:
        numbers: Of each parameter, its number among all of the optimizer.
        params: Parameters to step, in place.
        grads: Their gradients.
        state: Their states, one parameter's after the other's, in place.
        run: Iteration and memory of the run, in place.
    """

    numbers: Sequence[int]
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    state: Sequence[Tensor]
    run: Sequence[Tensor]


class Stepper(Protocol):
    """An optimizer, as the operator knows it."""

    def step_tensors(self, tensors: StepTensors, loss: Tensor | None) -> None:
        """Take a step in these tensors, by a loss if the rule uses it."""


_steppers: MutableMapping[int, Stepper] = WeakValueDictionary()
_handles = itertools.count()


def register(stepper: Stepper) -> int:
    """The number by which the operator finds an optimizer, as long as that lives."""
    _define()
    handle = next(_handles)
    _steppers[handle] = stepper
    return handle


@cache
def _define() -> torch.library.Library:
    """Tell torch of the operator; it is known as long as what is returned is kept."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(SCHEMA)  # type: ignore[no-untyped-call]
    for device in ("CPU", "CUDA"):
        library.impl("step", _step, device)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::step", lambda *arguments: None, lib=library)
    return library


def _step(handle: int, *tensors_and_loss: Any) -> None:
    stepper = _steppers.get(handle)
    if stepper is None:
        raise RuntimeError("the optimizer of this compiled step no longer exists; keep it as long as the function")
    *tensors, loss = tensors_and_loss
    stepper.step_tensors(StepTensors(*tensors), loss)


class _Twins(NamedTuple):
    """Groups and states like an optimizer's own, but with other tensors in the place of some of its parameters.

    Attributes:
        key: Where those tensors are.
        groups: The parameter groups.
        states: By parameter.
        params: Those that are others.
    """

    key: tuple[Any, ...]
    groups: list[dict[str, Any]]
    states: dict[Tensor, dict[str, Any]]
    params: list[Tensor]


class CompiledSteps:
    """Takes an optimizer's steps in tensors that stand for its own.

    Args:
        engine: Of such steps only: what it caches is of those tensors.
        state_names: Of the states that the optimizer's rules keep; others are not passed.
    """

    def __init__(self, engine: Engine, state_names: Collection[str]) -> None:
        self._engine = engine
        self._names = tuple(state_names)  # torch 2.6 has no guard for other collections
        self._twins: _Twins | None = None

    def allows(self, groups: Groups, state: States) -> bool:
        """Whether a compiled function can contain the step. If not, it breaks there, and the step runs as ever."""
        if any(wanted_format(group) != "float32" for group in groups):
            return False
        stepped = [param for group in groups for param in group["params"] if param.grad is not None]
        states = [(param, state.get(param, {})) for param in stepped]
        # torch 2.6 traces no method of a set that it has not made.
        if any(not any(name in own for name in self._names) for _, own in states):
            return False
        # A step casts other states, and what stands for them in a compiled function would not be what it cast.
        return all(
            isinstance(value, Tensor) and value.dtype == state_dtype(param)
            for param, own in states
            for name, value in own.items()
            if name in self._names
        )

    def tensors_of(self, groups: Groups, state: States, progress: Progress) -> StepTensors:
        """The tensors of an optimizer's next step."""
        everything = [param for group in groups for param in group["params"]]
        first = {param: i for i, param in reversed(list(enumerate(everything)))}  # a tied one may come twice
        numbers = [i for i, param in enumerate(everything) if param.grad is not None and first[param] == i]
        params = [everything[i] for i in numbers]
        states = [value for param in params for name, value in state[param].items() if name in self._names]
        memory = progress.memory
        run = [progress.clock, *[memory[name] for name in sorted(memory)]]
        return StepTensors(numbers, params, [param.grad for param in params], states, run)

    def progress_of(self, tensors: StepTensors, own: Progress) -> Progress:
        """Of the run in whose tensors a step is taken, where ``own`` is that of the optimizer."""
        memory = dict(zip(sorted(own.memory), tensors.run[1:], strict=True))
        return Progress(int(tensors.run[0]), own.num_steps, memory=memory)

    def step(
        self,
        tensors: StepTensors,
        groups: Groups,
        state: States,
        progress: Progress,
        loss: Tensor | None,
        policies: Policies,
    ) -> bool:
        """Take a step in these tensors; returns False if non-finite values made it change nothing.

        Args:
            tensors: In place.
            groups: Those of the optimizer.
            state: That of the optimizer.
            progress: From :meth:`progress_of`; goes on by a step.
            loss: If the rule uses it.
            policies: About gradients.
        """
        _, twin_groups, states, twins = self._twins_of(tensors, groups, state)
        memory = dict(progress.memory)
        try:
            for twin, grad in zip(twins, tensors.grads, strict=True):
                twin.grad = grad
            recalled = self._engine.recall(twin_groups, states)
            if not recalled:
                check_gradients(twin_groups)
            taken = self._engine.step(twin_groups, states, progress, loss, policies, recalled=recalled)
        finally:
            self._engine.release_gradients()
            for twin in twins:
                twin.grad = None
        tensors.run[0].fill_(progress.iteration)
        for name, value in memory.items():
            value.copy_(progress.memory[name])
        return taken

    def _twins_of(self, tensors: StepTensors, groups: Groups, state: States) -> _Twins:
        """These tensors in the place of the optimizer's; the same objects for the same memory, with today's options."""
        memory = [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg()) for t in (*tensors.params, *tensors.state)]
        key = tuple(tensors.numbers), memory, [len(group["params"]) for group in groups]
        if self._twins is None or self._twins.key != key:
            everything: list[Tensor] = [param for group in groups for param in group["params"]]
            twins, values = [param.detach() for param in tensors.params], iter(tensors.state)
            states: dict[Tensor, dict[str, Any]] = {}
            twin_of: dict[Tensor, Tensor] = {}
            for twin, number in zip(twins, tensors.numbers, strict=True):
                param = everything[number]
                states[twin] = {name: next(values) for name in state[param] if name in self._names}
                twin_of[param] = twin
            rest = iter([twin_of.get(param, param) for param in everything])
            made = [{**group, "params": [next(rest) for _ in group["params"]]} for group in groups]
            self._twins = _Twins(key, made, states, twins)
        for twin_group, group in zip(self._twins.groups, groups, strict=True):
            twin_group.update({name: value for name, value in group.items() if name != "params"})
        return self._twins
