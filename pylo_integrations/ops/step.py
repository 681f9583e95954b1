"""A step as an operator of torch's dispatcher, ``pylo_integrations::step``: what a compiled function contains.

The compiler sees one operator and what it changes: parameters, their state, and the run, whose first tensor is the
iteration. What else matters, rule and options, is looked up by a number when the operator runs, so schedules need no
compilation of their own. Torch hears of the operator when the first optimizer is made.
"""

from __future__ import annotations

import itertools
from collections.abc import MutableMapping, Sequence
from functools import cache
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

NAMESPACE = "pylo_integrations"
SCHEMA = (
    "step(int handle, int[] numbers, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, Tensor(c!)[] run, "
    "Tensor? loss) -> ()"
)


class Stepper(Protocol):
    """An optimizer, as the operator knows it."""

    def step_tensors(
        self,
        numbers: Sequence[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Sequence[Tensor],
        run: Sequence[Tensor],
        loss: Tensor | None,
    ) -> None:
        """Take a step in these tensors, whoever they belong to.

        Args:
            numbers: Of each parameter, its number among all of the optimizer.
            params: Parameters to step, in place.
            grads: Their gradients.
            state: Their states, one parameter's after the other's, in place.
            run: Iteration and memory of the run, in place.
            loss: If the rule uses it.
        """


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


def _step(handle: int, *arguments: Any) -> None:
    stepper = _steppers.get(handle)
    if stepper is None:
        raise RuntimeError("the optimizer of this compiled step no longer exists; keep it as long as the function")
    stepper.step_tensors(*arguments)
