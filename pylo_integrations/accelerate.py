"""Learned optimizers with Accelerate.

``accelerator.prepare(optimizer)`` wraps a learned optimizer as any other, and ``optimizer.step(lambda: loss)`` gives it
the loss in every mode. :func:`attach` does it for loops that call a bare ``optimizer.step()``, and under gradient
accumulation, where the loss of a step is spread over micro-batches.

:func:`prepare_scheduler` has a schedule step once with every optimizer step, on however many processes.

DDP, FSDP1 with ``fsdp_use_orig_params: true``, FSDP2 and DeepSpeed's ZeRO, stages 1 and 2, are supported. Under
Megatron-LM Accelerate makes the optimizer itself; :mod:`pylo_integrations.megatron` is for Megatron's own loops.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sized
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.scheduler import AcceleratedScheduler  # type: ignore[import-untyped]
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from pylo_integrations.attach import Attachment, observe_before_backward, require_learned
from pylo_integrations.attach import attach as attach_to_backward
from pylo_integrations.deepspeed import attach as attach_to_engine


def attach(accelerator: Accelerator, optimizer: Optimizer, num_steps: int | None = None) -> Attachment:
    """Report every loss that goes through ``accelerator.backward`` to a learned optimizer.

    It gets what is differentiated: the loss divided by ``gradient_accumulation_steps``, summed over the micro-batches
    of a step. Only this ``accelerator`` is changed, and a second call for the same optimizer adds nothing.

    Args:
        accelerator: With one optimizer, else its ``backward`` raises RuntimeError. With several, e.g. in a GAN, call
            ``optimizer.step(lambda: loss)`` instead.
        optimizer: Before or after ``accelerator.prepare``; with FSDP1, after the model was prepared; with DeepSpeed,
            after ``accelerator.prepare(model, optimizer)`` and before ``accelerator.load_state``.
        num_steps: The horizon, i.e. the optimizer steps of the whole run; see :func:`count_steps`. A prepared scheduler
            of exactly that length, which Accelerate would step once for every process, is stepped once, with a
            RuntimeWarning; :func:`prepare_scheduler` is the way to say so.

    Returns:
        A handle with ``remove()``, which is a context manager as well.

    Raises:
        TypeError: ``optimizer`` is not a learned optimizer.
        ValueError: ``accelerator`` reports to another optimizer; it trains with Megatron-LM; or ``num_steps`` is not a
            positive integer.
        ShardingError: FSDP1 melted parameters together, see :meth:`LearnedOptimizer.bind_model`; or DeepSpeed hides
            whole tensors, see :func:`pylo_integrations.deepspeed.attach`.
    """
    learned = require_learned(optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.deepspeed_engine_wrapped is None:
            raise ValueError("with DeepSpeed, call attach() after accelerator.prepare(model, optimizer)")
        return attach_to_engine(accelerator.deepspeed_engine_wrapped.engine, num_steps)
    if accelerator.distributed_type == DistributedType.MEGATRON_LM:
        raise ValueError(
            f"Accelerate's {accelerator.distributed_type} makes the optimizer itself, one of Megatron-LM's: with "
            "Megatron-Core make it by pylo_integrations.megatron.megatron_optimizer(), see docs/megatron.md; or use "
            "one device, DDP, FSDP or DeepSpeed"
        )
    learned.bind_model(nn.ModuleList(accelerator._models))
    if num_steps is not None:
        _mend_schedules(accelerator, num_steps)

    def observe(loss: Tensor, **_: Any) -> None:
        if (count := len(accelerator._optimizers)) > 1:
            raise RuntimeError(
                f"the accelerator has {count} optimizers, and which of them a loss belongs to cannot be told in "
                "backward(): remove() this attachment and call optimizer.step(lambda: loss)"
            )
        observe_before_backward(learned, loss.detach() / accelerator.gradient_accumulation_steps)

    is_attached = isinstance(accelerator.backward, Attachment)
    attachment = attach_to_backward(accelerator, learned, num_steps, observe)
    if learned.shard_step and not is_attached:

        def consolidate(*args: Any) -> None:
            learned.consolidate_state_dict()  # since the first process alone writes the optimizer's state

        attachment.also_removes(accelerator.register_save_state_pre_hook(consolidate).remove)
    return attachment


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


def prepare_scheduler(accelerator: Accelerator, scheduler: LRScheduler) -> AcceleratedScheduler:
    """``accelerator.prepare(scheduler)``, but for a scheduler that counts optimizer steps.

    Accelerate steps a scheduler once *for every process* with each optimizer step, so one as long as the run is over
    after a part of it, and may rise again. This one steps once, so every scheduler gives the learning rates that it
    gives on one process. In all else it is as Accelerate's: it waits for gradients to accumulate, does not step after
    the ``GradScaler`` skipped a step, and is saved with ``accelerator.save_state``.

    Args:
        accelerator: After it prepared the optimizer.
        scheduler: Any of torch, made for the number of optimizer steps, see :func:`count_steps`; prepared ones too.

    Raises:
        TypeError: ``accelerator`` does not prepare such a scheduler.
    """
    prepared = accelerator.prepare(scheduler)
    if not isinstance(prepared, AcceleratedScheduler):
        raise TypeError(f"scheduler must be one of torch.optim.lr_scheduler, not {type(scheduler).__name__}")
    prepared.split_batches = True  # Accelerate's way to say that the number of processes does not matter
    return prepared


def _mend_schedules(accelerator: Accelerator, num_steps: int) -> None:
    """Have schedulers that are as long as the run step as often as the optimizer does."""
    for prepared in accelerator._schedulers:
        is_multiplied = prepared.step_with_optimizer and not prepared.split_batches and accelerator.num_processes > 1
        if is_multiplied and _length(prepared.scheduler) == num_steps:
            prepared.split_batches = True
            warnings.warn(
                f"the prepared {type(prepared.scheduler).__name__} has the {num_steps} steps of the run, but would "
                "step once for every process with each optimizer step. That was changed to once; to say so, prepare "
                "it with pylo_integrations.accelerate.prepare_scheduler(accelerator, scheduler)",
                RuntimeWarning,
                stacklevel=3,
            )


def _length(scheduler: Any) -> int | None:
    """How many steps a scheduler is for, where it tells."""
    of_torch = (getattr(scheduler, name, None) for name in ("total_steps", "T_max", "total_iters"))
    of_transformers = (
        getattr(lr, "keywords", {}).get("num_training_steps") for lr in getattr(scheduler, "lr_lambdas", ())
    )
    return next((length for length in (*of_torch, *of_transformers) if length is not None), None)


def log_telemetry(accelerator: Accelerator, optimizer: Optimizer, step: int | None = None) -> None:
    """Log what ``optimizer.telemetry()`` tells with the trackers of ``accelerator``; waits for the device.

    Args:
        accelerator: Of ``accelerator.log``.
        optimizer: Before or after ``accelerator.prepare``; logs nothing while its telemetry is off.
        step: Of ``accelerator.log``.

    Raises:
        TypeError: ``optimizer`` is not a learned optimizer.
    """
    if numbers := require_learned(optimizer).telemetry():
        accelerator.log(numbers, step=step)
