"""What a Trainer's run tells the optimizer, and what of the optimizer it logs: a callback."""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakSet

import transformers

from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer

logger = logging.getLogger(__package__)

horizon_is_ours: WeakSet[LearnedOptimizer] = WeakSet()
"""Optimizers whose horizon follows the Trainer; the others keep the one that the user gave."""

tapped: WeakSet[LearnedOptimizer] = WeakSet()
"""Optimizers in training whose losses only the tap of install() can see."""


class RunCallback(transformers.TrainerCallback):
    """Tells a learned optimizer, if there is one, how long the run is and when a step begins; logs its telemetry."""

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        """Bind the model, and set the horizon."""
        learned = unwrap_optimizer(kwargs["optimizer"])
        if learned is None:
            return
        tapped.add(learned)
        learned.bind_model(kwargs["model"])  # of an optimizer that the user made
        if learned.num_steps is None:
            horizon_is_ours.add(learned)
        if learned in horizon_is_ours and state.max_steps > 0:
            # A second train() goes on with the same optimizer but counts its steps from 0. Skipped steps, which leave
            # the optimizer's count behind, do not move the horizon.
            horizon = state.max_steps + max(0, learned.iteration - state.global_step)
            if state.global_step and learned.num_steps not in (None, horizon):
                logger.warning(
                    "the checkpoint was written in a run of %s steps, this one has %s: the optimizer's horizon changes",
                    learned.num_steps,
                    horizon,
                )
            learned.set_num_steps(horizon)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the losses of a step that was not taken."""
        if (learned := unwrap_optimizer(kwargs["optimizer"])) is not None:
            learned.clear_observed_loss()  # the GradScaler skips steps

    def on_step_end(self, args: Any, state: Any, control: transformers.TrainerControl, **kwargs: Any) -> None:
        """Get ready to save."""
        _consolidate_before_saving(control, kwargs["optimizer"])

    def on_epoch_end(self, args: Any, state: Any, control: transformers.TrainerControl, **kwargs: Any) -> None:
        """Get ready to save."""
        _consolidate_before_saving(control, kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log telemetry with the loss."""
        if not logs or "loss" not in logs or kwargs["optimizer"] is None:
            return  # of an evaluation, or the summary of a run
        if (learned := unwrap_optimizer(kwargs["optimizer"])) is not None:
            numbers = learned.telemetry()
            logs.update(numbers)  # the callbacks after this one report it
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Listen no more."""
        if (learned := unwrap_optimizer(kwargs["optimizer"])) is not None:
            tapped.discard(learned)


def _consolidate_before_saving(control: transformers.TrainerControl, optimizer: Any) -> None:
    """The first process alone writes the optimizer's state, so what is shared out has to come to it before."""
    learned = unwrap_optimizer(optimizer)
    if control.should_save and learned is not None and learned.shard_step:
        learned.consolidate_state_dict()
