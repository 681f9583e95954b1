"""A learned optimizer by name in a ``LightningModule``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler

from pylo_integrations.catalog import create_optimizer
from pylo_integrations.lightning.callbacks import LearnedOptimizerCallback, inform
from pylo_integrations.lightning.horizon import planned_steps, unknown_horizon
from pylo_integrations.lightning.schedule import RunSetup, Schedule, setups
from pylo_integrations.sharding.pieces import read_flat_slices


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
        ValueError: Unknown ``name`` or ``scheduler``; ``num_steps`` is needed and Lightning cannot tell.
        TypeError: The optimizer has no such option.
    """
    trainer = _trainer_of(module)
    wrapped = None if trainer is None else trainer.strategy.model
    # FSDPStrategy wraps the whole module, which then knows its parameters as nameless slices.
    model = wrapped if wrapped is not None and read_flat_slices(wrapped) else module
    optimizer = create_optimizer(model, name, lr, weight_decay, **options)
    is_given = num_steps is not None
    if trainer is not None and not is_given:
        num_steps = planned_steps(trainer, optimizer)
    if num_steps is None and (scheduler is not None or optimizer.needs_horizon):
        needs_it = name if optimizer.needs_horizon else f"scheduler={scheduler!r}"
        raise unknown_horizon(needs_it)
    optimizer.set_num_steps(num_steps)
    setup = setups[optimizer] = RunSetup(trainer is not None and not is_given, scheduler)
    if trainer is not None:
        inform(trainer)
    if scheduler is None:
        return {"optimizer": optimizer}
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": setup.build(optimizer), "interval": "step"}}


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


def _trainer_of(module: LightningModule) -> Trainer | None:
    if module.fabric is not None:
        return None
    try:
        return module.trainer
    except RuntimeError:  # Lightning's way to say that there is none
        return None
