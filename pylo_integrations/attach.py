"""Hearing the loss where it goes into ``backward``: what the adapters of Accelerate and Lightning share."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.sharding.pieces import is_sharded


class Attachment:
    """Stands in for the ``backward`` of ``owner`` and reports each loss to an optimizer; made by :func:`attach`.

    Only this one object is changed, until :meth:`remove`, which leaving a ``with`` block calls.
    """

    def __init__(self, owner: Any, optimizer: LearnedOptimizer, observe: Callable[..., None]) -> None:
        self.optimizer = optimizer
        self._owner = owner
        self._observe = observe
        self._backward = owner.backward
        self._attached = True
        self._others: list[Callable[[], None]] = []
        owner.backward = self

    def __call__(self, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Report the loss, then do what ``backward`` does."""
        hears = self._attached and self.optimizer.reads_loss
        if hears:
            self._observe(loss, *args, **kwargs)
        result = self._backward(loss, *args, **kwargs)
        if hears:
            look_after_backward(self.optimizer)
        return result

    def also_removes(self, undo: Callable[[], None]) -> None:
        """Have :meth:`remove` call ``undo``."""
        self._others.append(undo)

    def remove(self) -> None:
        """Undo the attachment; the horizon stays."""
        self._attached = False  # for a wrapper around us, which would go on calling us
        while self._others:
            self._others.pop()()
        if vars(self._owner).get("backward") is self:
            del self._owner.backward

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def attach(owner: Any, optimizer: Optimizer, num_steps: int | None, observe: Callable[..., None]) -> Attachment:
    """Call ``observe`` with all that goes into ``owner.backward``, the loss first; a second call adds nothing.

    Raises:
        TypeError: ``optimizer`` is not a learned optimizer.
        ValueError: ``owner`` reports to another optimizer; or ``num_steps`` is not a positive integer.
    """
    learned = require_learned(optimizer)
    if num_steps is not None:
        learned.set_num_steps(num_steps)
    attached = owner.backward
    if not isinstance(attached, Attachment):
        return Attachment(owner, learned, observe)
    if attached.optimizer is not learned:
        raise ValueError(
            f"this {type(owner).__name__} already reports its losses to another optimizer, and which of the two a loss "
            "belongs to cannot be told: remove() that attachment, and give each optimizer its own loss before its "
            "step: optimizer.observe_loss(loss), or optimizer.step(lambda: loss)"
        )
    return attached


def require_learned(optimizer: Optimizer) -> LearnedOptimizer:
    """The learned optimizer inside a framework's wrapper.

    Raises:
        TypeError: There is none.
    """
    learned = unwrap_optimizer(optimizer)
    if learned is None:
        raise TypeError(f"optimizer must be a learned optimizer, not {type(optimizer).__name__}")
    return learned


def observe_before_backward(optimizer: LearnedOptimizer, loss: Tensor) -> None:
    """Report a loss that is about to go into ``backward``; :func:`look_after_backward` has to follow."""
    # Without gradients this backward begins a step. Losses that are still there belong to gradients that were dropped:
    # a step the GradScaler skipped, the first pass of SAM, a loss that does not depend on these parameters.
    if not (optimizer.loss_window.is_hidden or _has_gradients(optimizer)):
        optimizer.clear_observed_loss()
    optimizer.observe_loss(loss)


def look_after_backward(optimizer: LearnedOptimizer) -> None:
    """See whether gradients are where :func:`observe_before_backward` will look for them."""
    params = (param for group in optimizer.param_groups for param in group["params"])
    optimizer.loss_window.is_hidden = any(map(is_sharded, params)) and not _has_gradients(optimizer)


def _has_gradients(optimizer: LearnedOptimizer) -> bool:
    return any(param.grad is not None for group in optimizer.param_groups for param in group["params"])
