"""How many steps a run takes, as far as Lightning knows."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from pylo_integrations.optimizer import LearnedOptimizer


def planned_steps(trainer: Trainer, optimizer: LearnedOptimizer) -> int | None:
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


def unknown_horizon(who: str) -> ValueError:
    """That ``who`` needs a horizon, and what to do about it."""
    return ValueError(
        f"{who} needs to know how many steps the run takes, which Lightning does not know here: set "
        "Trainer(max_steps=...), or pass num_steps= when creating the optimizer"
    )
