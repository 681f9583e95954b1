"""Callbacks that tell a learned optimizer the loss and the horizon, and log its telemetry."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pylo_integrations.attach import Attachment, look_after_backward, observe_before_backward
from pylo_integrations.attach import attach as attach_to_backward
from pylo_integrations.lightning.horizon import planned_steps, unknown_horizon
from pylo_integrations.lightning.schedule import Decay, RunSetup, setups
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.telemetry import TelemetryMode, is_per_parameter


class Informant(Callback):
    """Tells the loss, and keeps the horizon and the schedule those of the run as it will be.

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
        setup = setups.setdefault(optimizer, RunSetup(is_ours=optimizer.num_steps is None))
        if setup.is_ours:
            optimizer.set_num_steps(planned_steps(trainer, optimizer))
            if optimizer.num_steps is None and optimizer.needs_horizon:
                raise unknown_horizon(type(optimizer).__name__)
        if setup.is_outdated(optimizer):
            outdated, scheduler = setup.scheduler, setup.rebuild(optimizer)
            for config in trainer.lr_scheduler_configs:
                if config.scheduler is outdated:
                    config.scheduler = scheduler
        if setup.is_ours:
            optimizer.set_num_steps(None)  # a checkpoint tells its own to an optimizer that has none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the horizon, whatever was restored."""
        optimizer = _only_optimizer(trainer)
        setup = None if optimizer is None else setups.get(optimizer)
        if optimizer is None or setup is None or not setup.is_ours:
            return
        restored, planned = optimizer.num_steps, planned_steps(trainer, optimizer)
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
        if isinstance(setup.scheduler, Decay):
            setup.scheduler.apply()  # the checkpoint has the learning rates of its horizon

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Report the loss of one micro-batch."""
        if (optimizer := self._listener(trainer, pl_module)) is not None:
            observe_before_backward(optimizer, loss.detach() / _amp_scale(trainer))

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See where the gradients went."""
        if (optimizer := self._listener(trainer, pl_module)) is not None:
            look_after_backward(optimizer)

    def on_before_zero_grad(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Forget losses whose gradients are about to be dropped, as after a step that the GradScaler skipped."""
        if (learned := unwrap_optimizer(optimizer)) and self._hears(pl_module):
            learned.clear_observed_loss()

    def _listener(self, trainer: Trainer, module: LightningModule) -> LearnedOptimizer | None:
        """Who is told the loss of the next step."""
        optimizer = _only_optimizer(trainer)
        return optimizer if optimizer is not None and optimizer.reads_loss and self._hears(module) else None

    def _hears(self, module: LightningModule) -> bool:
        """Not in manual optimization, where users may tell the loss by themselves, and nobody has asked for this."""
        return module.automatic_optimization

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        _withdraw(trainer, Informant, _Trials)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer as it was."""
        _withdraw(trainer, Informant, _Trials)


class LearnedOptimizerCallback(Informant):
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
        if (count := count_callbacks(trainer)) > 1:
            raise ValueError(f"Trainer(callbacks=...) has {count} LearnedOptimizerCallback; each would add the loss")
        optimizer, self._told_step = _only_optimizer(trainer), trainer.global_step
        if optimizer is not None and self._enables:
            optimizer.enable_telemetry(self._per_parameter)
        super().on_fit_start(trainer, pl_module)

    def _hears(self, module: LightningModule) -> bool:
        return True

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
        if setups.setdefault(optimizer, RunSetup(is_ours=optimizer.num_steps is None)).is_ours:
            optimizer.set_num_steps(max(planned_steps(trainer, optimizer) or 0, self.steps))
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


def inform(trainer: Trainer) -> None:
    """Have the optimizer told the loss and the horizon, where no :class:`LearnedOptimizerCallback` does so."""
    if not count_callbacks(trainer):
        _withdraw(trainer, Informant)
        trainer.callbacks = [*trainer.callbacks, Informant()]  # type: ignore[attr-defined]


def count_callbacks(trainer: Trainer) -> int:
    """How many :class:`LearnedOptimizerCallback` a trainer has."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(isinstance(callback, LearnedOptimizerCallback) for callback in callbacks)


def _only_optimizer(trainer: Trainer) -> LearnedOptimizer | None:
    return unwrap_optimizer(trainer.optimizers[0]) if len(trainer.optimizers) == 1 else None


def _amp_scale(trainer: Trainer) -> Tensor | float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # get_scale() waits for the device; the method behind it is private, so do without it where it is missing.
    scale: Tensor | float = getattr(scaler, "_get_scale_async", scaler.get_scale)()
    return scale
