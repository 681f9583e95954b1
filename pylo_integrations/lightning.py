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
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
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
        num_steps: The horizon; by default the optimizer steps that the fit will take. It is counted again when
            training starts, after Lightning's finders, and the schedule follows it. Manual optimization is taken to
            step once per batch.
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
    is_given = num_steps is not None
    if trainer is not None and not is_given:
        num_steps = _planned_steps(trainer, optimizer)
    if num_steps is None and (scheduler is not None or optimizer.needs_horizon):
        needs_it = name if optimizer.needs_horizon else f"scheduler={scheduler!r}"
        raise ValueError(f"{needs_it} needs to know how many steps the run takes, {_UNKNOWN}: {_REMEDIES}")
    optimizer.set_num_steps(num_steps)
    if trainer is not None and _needs_callback(optimizer, module, trainer):
        raise ValueError(
            f"{name} needs the loss, and with accumulate_grad_batches={_most_accumulation(trainer)} Lightning "
            "shows it only the last micro-batch's: add LearnedOptimizerCallback() to Trainer(callbacks=[...]), or "
            "derive the module from LearnedOptimizerMixin"
        )
    plan = _plans[optimizer] = _Plan(trainer is not None and not is_given, scheduler)
    if trainer is not None and not _count_callbacks(trainer):
        _withdraw(trainer, _PlanKeeper)
        trainer.callbacks = [*trainer.callbacks, _PlanKeeper()]  # type: ignore[attr-defined]
    if scheduler is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plan.build(optimizer), "interval": "step"}}


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


class _PlanKeeper(Callback):
    """Keeps the horizon, and the schedule that :func:`configure_optimizers` made, those of the run as it will be.

    Lightning builds optimizers before its finders change the batch size and before it restores a checkpoint.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plan the run, after the finders and before Lightning restores a checkpoint.

        Raises:
            ValueError: The optimizer needs a horizon and Lightning does not know it.
        """
        optimizer = _only_optimizer(trainer)
        if optimizer is None:
            return
        optimizer.bind_model(trainer.strategy.model or pl_module)
        plan = _plans.setdefault(optimizer, _Plan(is_ours=optimizer.num_steps is None))
        if plan.is_ours:
            optimizer.set_num_steps(_planned_steps(trainer, optimizer))
            if optimizer.num_steps is None and optimizer.needs_horizon:
                raise ValueError(
                    f"{type(optimizer).__name__} needs to know how many steps the run takes, {_UNKNOWN}: {_REMEDIES}"
                )
        if plan.is_outdated(optimizer):
            outdated, scheduler = plan.scheduler, plan.rebuild(optimizer)
            for config in trainer.lr_scheduler_configs:
                if config.scheduler is outdated:
                    config.scheduler = scheduler
        if plan.is_ours:
            optimizer.set_num_steps(None)  # a checkpoint tells its own to an optimizer that has none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the horizon, whatever was restored."""
        optimizer = _only_optimizer(trainer)
        plan = None if optimizer is None else _plans.get(optimizer)
        if optimizer is None or plan is None or not plan.is_ours:
            return
        restored, planned = optimizer.num_steps, _planned_steps(trainer, optimizer)
        if planned is None:
            return
        if restored is not None:
            # The optimizer does not count steps that it skipped, the trainer does.
            skipped = max(0, trainer.global_step - optimizer.iteration)
            if planned <= restored <= planned + skipped:
                planned = restored
            else:
                warnings.warn(
                    f"the checkpoint was written with num_steps={restored}; keeping this optimizer's {planned}, which "
                    "this run will have taken",
                    RuntimeWarning,
                    stacklevel=2,
                )
        optimizer.set_num_steps(planned)
        if isinstance(plan.scheduler, _Decay):
            plan.scheduler.apply()  # the checkpoint has the learning rates of its horizon

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        _withdraw(trainer, _PlanKeeper, _Trials)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        _withdraw(trainer, _PlanKeeper, _Trials)


class LearnedOptimizerCallback(_PlanKeeper):
    """Tells the trainer's learned optimizer, if it has one, the loss of every step, the horizon and the wrapped model.

    The loss is what went into ``backward``, before AMP scaling, summed over the micro-batches of a step. The horizon is
    the number of steps that the optimizer will have taken when the fit ends, unless the optimizer was given one.
    Lightning's finders (``BatchSizeFinder``, ``LearningRateFinder``, ``Tuner``) hear of both in their trials, too.

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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the trials of finders get what the run gets."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and any(isinstance(one, (BatchSizeFinder, LearningRateFinder)) for one in callbacks):
            trainer.callbacks = [_Trials(), *trainer.callbacks]  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bind the model, set the horizon, and switch telemetry on if asked to.

        Raises:
            ValueError: The optimizer needs a horizon and Lightning does not know it; or the trainer has this callback
                more than once.
        """
        _withdraw(trainer, _Trials)
        if (count := _count_callbacks(trainer)) > 1:
            raise ValueError(f"Trainer(callbacks=...) has {count} LearnedOptimizerCallback; each would add the loss")
        optimizer, self._told_step = _only_optimizer(trainer), trainer.global_step
        if optimizer is not None and self._enables:
            optimizer.enable_telemetry(self._per_parameter)
        super().on_fit_start(trainer, pl_module)

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


class _Trials(Callback):
    """Goes before Lightning's finders, whose trials run without callbacks: hears the losses, and tells a horizon."""

    steps = 1000
    """The least horizon of trials: they may be longer than the run, and are of its beginning."""

    def __init__(self) -> None:
        self.attachment: Attachment | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the module's ``backward``."""
        optimizer = _only_optimizer(trainer)
        if optimizer is None:
            return
        optimizer.bind_model(trainer.strategy.model or pl_module)
        if _plans.setdefault(optimizer, _Plan(is_ours=optimizer.num_steps is None)).is_ours:
            optimizer.set_num_steps(max(_planned_steps(trainer, optimizer) or 0, self.steps))
        if isinstance(left_over := pl_module.backward, Attachment):  # by a trial that raised
            left_over.remove()
        self.attachment = attach_to_backward(
            pl_module,
            optimizer,
            None,
            lambda loss: observe_before_backward(optimizer, loss.detach() / _amp_scale(trainer)),
        )


def _withdraw(trainer: Trainer, *kinds: type[Callback]) -> None:
    """Take callbacks of these very classes away, in a new list: Lightning may be running through the old one."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, _Trials) and callback.attachment is not None:
            callback.attachment.remove()
    trainer.callbacks = [one for one in callbacks if type(one) not in kinds]  # type: ignore[attr-defined]


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


def _planned_steps(trainer: Trainer, optimizer: LearnedOptimizer) -> int | None:
    """Steps that ``optimizer`` will have taken when the fit ends, as far as Lightning knows."""
    known = trainer.estimated_stepping_batches  # loads the data
    if not 0 < known < math.inf:  # inf without an end; -1 without an end or a length of the data
        return None
    loop = trainer.fit_loop
    limits = [] if trainer.max_steps < 0 else [trainer.max_steps - trainer.global_step]
    if loop.max_epochs != -1 and trainer.num_training_batches != math.inf:
        epochs: Any = loop.epoch_progress.current
        # A run that goes on within an epoch has started it, and none else has when training begins.
        batches: Any = loop.epoch_loop.batch_progress.current
        done = batches.processed if epochs.started > epochs.processed else 0
        limits.append(_steps_from(trainer, epochs.processed, done))
    return max(1, optimizer.iteration + max(0, min(limits)))  # a fit that has nothing left to do is no error


def _steps_from(trainer: Trainer, epoch: int, batch: int) -> int:
    """Optimizer steps from a batch of an epoch to the last of all epochs."""
    length, steps = int(trainer.num_training_batches), 0
    for number in range(epoch, trainer.max_epochs or 0):
        accumulated = _accumulation(trainer, number)
        steps += math.ceil(length / accumulated) - (batch // accumulated if number == epoch else 0)
    return steps


def _accumulation(trainer: Trainer, epoch: int) -> int:
    """Batches per optimizer step in an epoch."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return int(trainer.accumulate_grad_batches)


def _most_accumulation(trainer: Trainer) -> int:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    scheduled = [one.scheduling.values() for one in callbacks if isinstance(one, GradientAccumulationScheduler)]
    return max([int(trainer.accumulate_grad_batches), *(size for sizes in scheduled for size in sizes)])


def _needs_callback(optimizer: LearnedOptimizer, module: LightningModule, trainer: Trainer) -> bool:
    """Whether a loss would be wrong, not just missing, without the callback."""
    return (
        optimizer.needs_loss
        and module.automatic_optimization
        and _most_accumulation(trainer) > 1
        and not _count_callbacks(trainer)
    )


def _count_callbacks(trainer: Trainer) -> int:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(isinstance(callback, LearnedOptimizerCallback) for callback in callbacks)


class _Decay(LRScheduler):
    """A learning rate that falls to zero at the optimizer's horizon, also when that moves or a checkpoint is loaded."""

    def __init__(self, optimizer: LearnedOptimizer, shape: Callable[[float], float]) -> None:
        self._shape = shape
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        """The base learning rates, times a factor that depends on how much of the run is over."""
        horizon = self.optimizer.num_steps  # type: ignore[attr-defined]
        factor = self._shape(min(1.0, self.last_epoch / horizon))
        return [lr * factor for lr in self.base_lrs]

    def apply(self) -> None:
        """Set the learning rates of now, for another horizon than they were computed for."""
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """As torch's, without functions."""
        return {key: value for key, value in super().state_dict().items() if key != "_shape"}


_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
}


@dataclass
class _Plan:
    """What an optimizer's run was set up for.

    Attributes:
        is_ours: Whether the horizon follows the trainer, as it was not given by the user.
        schedule: As given to :func:`configure_optimizers`.
        scheduler: Made of it.
        num_steps: That it was made for.
    """

    is_ours: bool
    schedule: Schedule | None = None
    scheduler: LRScheduler | None = None
    num_steps: int | None = None

    def build(self, optimizer: LearnedOptimizer) -> LRScheduler:
        """Make the scheduler for the optimizer's horizon."""
        self.num_steps = optimizer.num_steps
        assert self.num_steps is not None and self.schedule is not None
        if callable(self.schedule):
            self.scheduler = self.schedule(optimizer, self.num_steps)
        elif self.schedule in _SHAPES:
            self.scheduler = _Decay(optimizer, _SHAPES[self.schedule])
        else:
            raise ValueError(f"scheduler={self.schedule!r} is unknown; choose one of {[*_SHAPES]} or pass a function")
        return self.scheduler

    def is_outdated(self, optimizer: LearnedOptimizer) -> bool:
        """Whether the horizon or a learning rate was changed after the scheduler was made."""
        return self.scheduler is not None and (self.num_steps != optimizer.num_steps or self._has_new_rates(optimizer))

    def rebuild(self, optimizer: LearnedOptimizer) -> LRScheduler:
        """Make the scheduler again, as if the learning rates of now had been there from the beginning."""
        for group, lr in zip_longest(optimizer.param_groups, self._known_rates()):
            base = group.pop("initial_lr", group["lr"])
            if group["lr"] == lr:  # else somebody, such as a LearningRateFinder, has chosen another
                group["lr"] = base
        return self.build(optimizer)

    def _has_new_rates(self, optimizer: LearnedOptimizer) -> bool:
        return [group["lr"] for group in optimizer.param_groups] != self._known_rates()

    def _known_rates(self) -> list[Any]:
        assert self.scheduler is not None
        return self.scheduler.get_last_lr()


_plans: WeakKeyDictionary[LearnedOptimizer, _Plan] = WeakKeyDictionary()
"""Of the optimizers that :func:`configure_optimizers` made or a callback has seen."""


def _only_optimizer(trainer: Trainer) -> LearnedOptimizer | None:
    return unwrap_optimizer(trainer.optimizers[0]) if len(trainer.optimizers) == 1 else None


def _amp_scale(trainer: Trainer) -> Tensor | float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # get_scale() waits for the device; the method behind it is private, so do without it where it is missing.
    scale: Tensor | float = getattr(scaler, "_get_scale_async", scaler.get_scale)()
    return scale
