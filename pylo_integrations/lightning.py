"""Learned optimizers in Lightning: by name in a ``LightningModule``, and the loss and horizon that some of them need.

What reaches ``optimizer.step`` differs by mode (read in Lightning 2.6): automatic optimization passes a closure that
returns the loss; under ``accumulate_grad_batches=N`` only that of the last micro-batch, divided by N; manual
optimization passes a closure that returns nothing; ``precision="16-mixed"`` passes none at all. What reaches
``backward`` is right in all of them, but for AMP's scale, so that is where :class:`LearnedOptimizerCallback` listens.

DDP, ModelParallelStrategy (FSDP2, tensor parallelism) and FSDPStrategy (FSDP1) are supported; DeepSpeed hides whole
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from torch.optim.optimizer import Optimizer

from pylo_integrations.attach import Attachment, look_after_backward, observe_before_backward, require_learned
from pylo_integrations.attach import attach as attach_to_backward
from pylo_integrations.catalog import create_optimizer
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.sharding.pieces import read_flat_slices
from pylo_integrations.telemetry import TelemetryMode, is_per_parameter

Schedule: TypeAlias = Literal["cosine", "linear"] | Callable[[Optimizer, int], LRScheduler]
"""A decay to zero over the run, or a function of the optimizer and its number of steps that builds a scheduler."""


# -- LightningModule ---------------------------------------------------------------------------------------------------


def configure_optimizers(
    module: LightningModule,
    name: str,
    lr: float | None = None,
    weight_decay: float | None = None,
    *,
    scheduler: Schedule | None = None,
    num_steps: int | None = None,
    **options: Any,
) -> OptimizerLRScheduler:
    """What ``LightningModule.configure_optimizers`` should return to train with a learned optimizer.

    Args:
        module: Its parameters are grouped by :func:`~pylo_integrations.param_groups`.
        name: One of :func:`~pylo_integrations.list_optimizers`.
        lr: Factor on the whole update; by default that of the catalogue entry.
        weight_decay: Decoupled weight decay; by default that of the catalogue entry.
        scheduler: See :data:`Schedule`; stepped after every optimizer step. By default the learning rate is constant.
        num_steps: The horizon; by default Lightning's ``trainer.estimated_stepping_batches``, which takes manual
            optimization to step once per batch.
        **options: Further arguments of :func:`~pylo_integrations.create_optimizer`.

    Raises:
        ValueError: Unknown ``name`` or ``scheduler``; ``num_steps`` is needed and Lightning cannot tell; or the
            optimizer would see a wrong loss for want of a :class:`LearnedOptimizerCallback`.
        TypeError: The optimizer has no such option.
    """
    trainer = _trainer_of(module)
    wrapped = None if trainer is None else trainer.strategy.model
    # FSDPStrategy wraps the whole module, which then knows its parameters as nameless slices.
    model = wrapped if wrapped is not None and read_flat_slices(wrapped) else module
    optimizer = create_optimizer(model, name, lr, weight_decay, **options)
    if num_steps is None and trainer is not None:
        num_steps = _planned_steps(trainer)
    if num_steps is None and (scheduler is not None or optimizer.needs_horizon):
        needs_it = name if optimizer.needs_horizon else f"scheduler={scheduler!r}"
        raise ValueError(f"{needs_it} needs to know how many steps the run takes, {_UNKNOWN}: {_REMEDIES}")
    optimizer.set_num_steps(num_steps)
    if trainer is not None and _needs_callback(optimizer, module, trainer):
        raise ValueError(
            f"{name} needs the loss, and with accumulate_grad_batches={trainer.accumulate_grad_batches} Lightning "
            "shows it only the last micro-batch's: add LearnedOptimizerCallback() to Trainer(callbacks=[...]), or "
            "derive the module from LearnedOptimizerMixin"
        )
    if scheduler is None:
        return {"optimizer": optimizer}
    assert num_steps is not None
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": _build_scheduler(scheduler, optimizer, num_steps), "interval": "step"},
    }


class LearnedOptimizerMixin(LightningModule):
    """A ``LightningModule`` that trains with the learned optimizer its hyper-parameters name.

    Derive from it instead of ``LightningModule``, or before another module: ``class Net(LearnedOptimizerMixin, Task)``.
    It adds a :class:`LearnedOptimizerCallback` and builds the optimizer with :func:`configure_optimizers` from these
    entries of ``self.hparams``: ``optimizer`` (the name), ``lr``, ``weight_decay``, ``scheduler``, ``num_steps`` and
    ``optimizer_options`` (a mapping); all but the first may be missing. Without ``optimizer``, the next class decides.
    """

    def configure_callbacks(self) -> Sequence[Callback] | Callback:
        """Those of the next class, and a :class:`LearnedOptimizerCallback`."""
        callbacks = super().configure_callbacks()
        callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
        if not any(isinstance(callback, LearnedOptimizerCallback) for callback in callbacks):
            callbacks.append(LearnedOptimizerCallback())
        return callbacks

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer that ``self.hparams`` names."""
        hparams = self.hparams
        if "optimizer" not in hparams:
            return super().configure_optimizers()
        return configure_optimizers(
            self,
            hparams["optimizer"],
            hparams.get("lr"),
            hparams.get("weight_decay"),
            scheduler=hparams.get("scheduler"),
            num_steps=hparams.get("num_steps"),
            **(hparams.get("optimizer_options") or {}),
        )


class LearnedOptimizerCallback(Callback):
    """Tells the trainer's learned optimizer, if it has one, the loss of every step, the horizon and the wrapped model.

    The loss is what went into ``backward``, before AMP scaling, summed over the micro-batches of a step. The horizon is
    ``trainer.estimated_stepping_batches``, unless the optimizer was given one.

    It also logs the optimizer's telemetry, if that is on, at the steps at which Lightning logs
    (``Trainer(log_every_n_steps=...)``).

    With several optimizers (always manual optimization) it does nothing: which of them a loss belongs to, only the
    training step knows. Give ``num_steps`` to each optimizer and the loss to each step: ``optimizer.step(loss=loss)``.

    Args:
        telemetry: Switch the optimizer's telemetry on when training starts. False leaves it as it is.

    Raises:
        ValueError: Unknown ``telemetry``.
    """

    def __init__(self, telemetry: TelemetryMode = False) -> None:
        self._per_parameter = is_per_parameter(telemetry)
        self._enables = bool(telemetry)
        self._told_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the model, set the horizon, and switch telemetry on if asked to.

        Before Lightning restores a checkpoint, so that the optimizer warns if that was written with another horizon.

        Raises:
            ValueError: The optimizer needs a horizon and Lightning does not know it; or the trainer has this callback
                more than once.
        """
        if (count := _count_callbacks(trainer)) > 1:
            raise ValueError(f"Trainer(callbacks=...) has {count} LearnedOptimizerCallback; each would add the loss")
        optimizer, self._told_step = _only_optimizer(trainer), trainer.global_step
        if optimizer is not None and self._enables:
            optimizer.enable_telemetry(self._per_parameter)
        if optimizer is None:
            return
        optimizer.bind_model(trainer.strategy.model or pl_module)
        if optimizer.num_steps is not None:
            return
        num_steps = _planned_steps(trainer)
        if num_steps is None and optimizer.needs_horizon:
            raise ValueError(
                f"{type(optimizer).__name__} needs to know how many steps the run takes, {_UNKNOWN}: {_REMEDIES}"
            )
        optimizer.set_num_steps(num_steps)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Report the loss of one micro-batch."""
        optimizer = _only_optimizer(trainer)
        if optimizer is not None and optimizer.needs_loss:
            observe_before_backward(optimizer, loss.detach() / _amp_scale(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See where the gradients went."""
        optimizer = _only_optimizer(trainer)
        if optimizer is not None and optimizer.needs_loss:
            look_after_backward(optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget losses whose gradients are about to be dropped, as after a step that the GradScaler skipped."""
        if learned := unwrap_optimizer(optimizer):
            learned.clear_observed_loss()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log telemetry."""
        optimizer, step, interval = _only_optimizer(trainer), trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if optimizer is None or not trainer.loggers or not interval or step == self._told_step:
            return  # a batch that only accumulates takes no step
        if step % interval == 0 or trainer.should_stop:
            self._told_step = step
            pl_module.log_dict(optimizer.telemetry(), on_step=True, on_epoch=False, batch_size=1)


# -- Fabric ------------------------------------------------------------------------------------------------------------


def attach(fabric: Fabric, optimizer: Optimizer, num_steps: int | None = None) -> Attachment:
    """Report every loss that goes through ``fabric.backward`` to a learned optimizer.

    Only this ``fabric`` is changed, and a second call for the same optimizer adds nothing. Where several optimizers
    share a ``fabric``, call ``optimizer.observe_loss(loss)`` before each step instead: which of them a loss belongs to
    cannot be told here.

    Args:
        fabric: Its ``backward`` must get the loss.
        optimizer: Before or after ``fabric.setup``.
        num_steps: The horizon, i.e. the optimizer steps of the whole run.

    Returns:
        A handle with ``remove()``, which is a context manager as well.

    Raises:
        TypeError: ``optimizer`` is not a learned optimizer.
        ValueError: ``fabric`` reports to another optimizer; or ``num_steps`` is not a positive integer.
    """
    learned = require_learned(optimizer)
    return attach_to_backward(fabric, learned, num_steps, lambda loss: observe_before_backward(learned, loss))


# -- shared ------------------------------------------------------------------------------------------------------------

_UNKNOWN = "which Lightning does not know here"
_REMEDIES = "set Trainer(max_steps=...), or pass num_steps= when creating the optimizer"


def _trainer_of(module: LightningModule) -> Trainer | None:
    if module.fabric is not None:
        return None
    try:
        return module.trainer
    except RuntimeError:  # Lightning's way to say that there is none
        return None


def _planned_steps(trainer: Trainer) -> int | None:
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < math.inf else None  # inf without an end; -1 without an end or a length of the data


def _needs_callback(optimizer: LearnedOptimizer, module: LightningModule, trainer: Trainer) -> bool:
    """Whether a loss would be wrong, not just missing, without the callback."""
    return (
        optimizer.needs_loss
        and module.automatic_optimization
        and trainer.accumulate_grad_batches > 1
        and not _count_callbacks(trainer)
    )


def _count_callbacks(trainer: Trainer) -> int:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(isinstance(callback, LearnedOptimizerCallback) for callback in callbacks)


def _build_scheduler(scheduler: Schedule, optimizer: Optimizer, num_steps: int) -> LRScheduler:
    if callable(scheduler):
        return scheduler(optimizer, num_steps)
    if scheduler == "cosine":
        return CosineAnnealingLR(optimizer, num_steps)
    if scheduler == "linear":
        return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=num_steps)
    names = [name for choice in get_args(Schedule) for name in get_args(choice) if isinstance(name, str)]
    raise ValueError(f"scheduler={scheduler!r} is unknown; choose one of {names} or pass a function")


def _only_optimizer(trainer: Trainer) -> LearnedOptimizer | None:
    return unwrap_optimizer(trainer.optimizers[0]) if len(trainer.optimizers) == 1 else None


def _amp_scale(trainer: Trainer) -> Tensor | float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # get_scale() waits for the device; the method behind it is private, so do without it where it is missing.
    scale: Tensor | float = getattr(scaler, "_get_scale_async", scaler.get_scale)()
    return scale
