"""Learning rates over a run, made again where the run turns out to be another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeAlias
from weakref import WeakKeyDictionary

from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.schedules import cosine, linear

Schedule: TypeAlias = Literal["cosine", "linear"] | Callable[[Optimizer, int], LRScheduler]
"""A decay to zero over the run, or a function of the optimizer and its number of steps that builds a scheduler."""


class Decay(LRScheduler):
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


_SHAPES: Mapping[object, Callable[[float], float]] = {"cosine": cosine, "linear": linear}


@dataclass
class RunSetup:
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
            self.scheduler = Decay(optimizer, _SHAPES[self.schedule])
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


setups: WeakKeyDictionary[LearnedOptimizer, RunSetup] = WeakKeyDictionary()
"""Of the optimizers that :func:`configure_optimizers` made or a callback has seen."""
