"""Learned optimizers with Accelerate.

``accelerator.prepare(optimizer)`` wraps a learned optimizer as any other, and ``optimizer.step(lambda: loss)`` gives it
the loss in every mode. :func:`attach` does it for loops that call a bare ``optimizer.step()``, and under gradient
accumulation, where the loss of a step is spread over micro-batches.

Training on one device and with DDP is supported; sharded training is not yet.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from types import TracebackType
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer


class Attachment:
    """Stands in for ``accelerator.backward`` and reports each loss to an optimizer; see :func:`attach`."""

    def __init__(self, accelerator: Accelerator, optimizer: LearnedOptimizer) -> None:
        self.optimizer = optimizer
        self._accelerator = accelerator
        self._backward = accelerator.backward
        self._attached = True
        accelerator.backward = self

    def __call__(self, loss: Tensor, **kwargs: Any) -> None:
        """Report the loss, then do what ``accelerator.backward`` does.

        Raises:
            RuntimeError: The accelerator has several optimizers.
        """
        if self._attached and self.optimizer.needs_loss:
            self._observe(loss)
        self._backward(loss, **kwargs)

    def _observe(self, loss: Tensor) -> None:
        optimizer = self.optimizer
        if (count := len(self._accelerator._optimizers)) > 1:
            raise RuntimeError(
                f"the accelerator has {count} optimizers, and which of them a loss belongs to cannot be told in "
                "backward(): remove() this attachment and call optimizer.step(lambda: loss)"
            )
        # Without gradients this backward begins a step. Losses that are still there belong to gradients that were
        # dropped, as those of a step that the GradScaler skipped.
        if all(param.grad is None for group in optimizer.param_groups for param in group["params"]):
            optimizer.clear_observed_loss()
        optimizer.observe_loss(loss.detach() / self._accelerator.gradient_accumulation_steps)

    def remove(self) -> None:
        """Undo :func:`attach`; the horizon stays."""
        self._attached = False  # for a wrapper around us, which would go on calling us
        if vars(self._accelerator).get("backward") is self:
            del self._accelerator.backward

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


def attach(accelerator: Accelerator, optimizer: Optimizer, num_steps: int | None = None) -> Attachment:
    """Report every loss that goes through ``accelerator.backward`` to a learned optimizer.

    It gets what is differentiated: the loss divided by ``gradient_accumulation_steps``, summed over the micro-batches
    of a step. Only this ``accelerator`` is changed, and a second call for the same optimizer adds nothing.

    Args:
        accelerator: With one optimizer. With several, e.g. in a GAN, call ``optimizer.step(lambda: loss)`` instead.
        optimizer: Before or after ``accelerator.prepare``.
        num_steps: The horizon, i.e. the optimizer steps of the whole run; see :func:`count_steps`.

    Returns:
        A handle with ``remove()``, which is a context manager as well.

    Raises:
        TypeError: ``optimizer`` is not a learned optimizer.
        ValueError: ``accelerator`` reports to another optimizer; its training is sharded; or ``num_steps`` is not a
            positive integer.
    """
    learned = unwrap_optimizer(optimizer)
    if learned is None:
        raise TypeError(f"optimizer must be a learned optimizer, not {type(optimizer).__name__}")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{accelerator.distributed_type} shards the model, which learned optimizers do not support yet; use one "
            "device or DDP"
        )
    if num_steps is not None:
        learned.set_num_steps(num_steps)
    attached = accelerator.backward
    if not isinstance(attached, Attachment):
        return Attachment(accelerator, learned)
    if attached.optimizer is not learned:
        raise ValueError(
            "this accelerator already reports its losses to another optimizer, and which of the two a loss belongs to "
            "cannot be told: remove() that attachment, and call optimizer.step(lambda: loss) for each"
        )
    return attached


def count_steps(accelerator: Accelerator, dataloader: Sized, epochs: int = 1) -> int:
    """How many optimizer steps a loop with ``accelerator.accumulate`` takes.

    Args:
        accelerator: Tells over how many batches gradients accumulate, and whether the end of an epoch cuts that short.
        dataloader: As returned by ``accelerator.prepare``; before, it has the batches of all processes together.
        epochs: Passes over ``dataloader``.
    """
    accumulation: int = accelerator.gradient_accumulation_steps
    if accelerator.gradient_state.sync_with_dataloader:
        return math.ceil(len(dataloader) / accumulation) * epochs
    return len(dataloader) * epochs // accumulation
