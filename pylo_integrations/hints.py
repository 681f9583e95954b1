"""Settings that ruin a run without an error: a learning rate or decay from another world, or no schedule.

They are told, not refused, as whoever sets them may know better.
"""

from __future__ import annotations

import gc
import math
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pylo_integrations.decay import shrinkage

Hints: TypeAlias = "dict[str, str]"
"""What there is to say, by subject."""

TOLERANCE = 10.001
"""How many times off a setting has to be; not ten, since 10 * 3e-4 is less than 3e-3."""

ADAMW_DECAYS = (0.01, 0.1)
"""Weight decays in recipes for AdamW."""

_LOWEST_DECAY, _HIGHEST_DECAY = ADAMW_DECAYS[0] / TOLERANCE, ADAMW_DECAYS[1] * TOLERANCE

SWEEP = 1000.0
"""How many times its initial value a learning rate reaches only in a search for the right one."""

UNTOLD = 20
"""Steps after which an optimizer that anneals by itself says that it was not told how many there are."""

FALLS, FALLEN = 5, 0.9
"""How often a learning rate has to have fallen, and to which part of its largest, to be a schedule and no choice."""

DROP = 300.0
"""How many times smaller no schedule makes a setting at once and then leaves it; from 1 to AdamW's 1e-3 is more."""


class Remarks:
    """Warnings of one optimizer, each subject once.

    Whoever turns warnings into exceptions shall find a step taken or not begun, and no rank waiting for the one that
    raises: what is found in the midst of a step is kept until it is over.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._kept: Hints = {}

    def keep(self, hints: Hints) -> None:
        """Have ``hints`` told, but for subjects that were."""
        self._kept |= {subject: message for subject, message in hints.items() if subject not in self._known}
        self._known |= hints.keys()

    def tell(self) -> None:
        """Warn of what was kept; what comes after a warning that raises is kept for the next time."""
        for subject in list(self._kept):
            if (message := self._kept.pop(subject, None)) is not None:  # else another thread has told it
                warn_user(message)


_INSIDE = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, torch.__file__))
"""Whose lines are none of a user's."""


def warn_user(*messages: str) -> None:
    """RuntimeWarnings that show the line of a user, or of a framework, and not one of ours or torch's."""
    if not messages:  # as after most steps
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    for message in messages:
        warnings.warn(message, RuntimeWarning, stacklevel=level)


class FrozenWatch:
    """Looks whether parameters that were left out of an optimizer as frozen are trained after all.

    Args:
        params: By name; they are not kept alive.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._params = [(name, weakref.ref(param)) for name, param in params.items()]

    def look(self, groups: Sequence[Mapping[str, Any]]) -> Hints:
        """Look before a step, at the groups that it steps."""
        there = [(name, param) for name, ref in self._params if (param := ref()) is not None]
        trained = [(name, param) for name, param in there if param.requires_grad and param.grad is not None]
        if not trained:
            return {}
        ours = {param for group in groups for param in group["params"]}
        if not (names := [name for name, param in trained if param not in ours]):
            return {}
        return {
            "frozen": "parameters that were frozen when the optimizer was created now have gradients, but are in no "
            f"parameter group and stay as they are: {names[:5]}{' and others' if len(names) > 5 else ''}. "
            'Call optimizer.add_param_group({"params": [...]}) when you unfreeze them'
        }


class _Course:
    """How a setting came to the value it has: did somebody set it, or does a schedule pass through it?

    Args:
        is_whole: Whether it is seen from the first step of the run on.
    """

    def __init__(self, is_whole: bool) -> None:
        self._is_whole = is_whole
        self._value = self._last = self._largest = 0.0
        self._since = self._falls = 0

    def see(self, value: float, iteration: int) -> None:
        """Note the value of a step."""
        if value != self._value:
            self._largest = max(self._largest, self._value)
            self._last = self._value or self._last
            self._falls += value < self._value
            self._value, self._since = value, iteration

    @property
    def has_fallen(self) -> bool:
        """Whether a schedule lets it fall."""
        return self._falls >= FALLS and self._value < FALLEN * self._largest

    def is_set_below(self, lowest: float, iteration: int, patience: int) -> bool:
        """Whether too small a value has been there for ``patience`` steps, and no schedule leads to it: it was never
        large, or fell at once.
        """
        stays = 0 < self._value < lowest and iteration - self._since == patience
        return stays and ((self._is_whole and self._largest < lowest) or self._last > DROP * self._value)


class SettingsWatch:
    """Looks at an optimizer's parameter groups, at the start and before every step.

    Args:
        name: Of the optimizer.
        lr: Its natural learning rate.
        usual_lrs: Learning rates that can be meant, within :data:`TOLERANCE`.
        adamw_lr: AdamW's learning rate whose steps are as large as the optimizer's at ``lr``.
        wants_schedule: Whether it wants a learning rate that falls to zero.
        anneals: Whether its steps fall by themselves if it knows the horizon.
    """

    def __init__(
        self,
        name: str,
        lr: float,
        usual_lrs: Sequence[float],
        adamw_lr: float,
        wants_schedule: bool,
        anneals: bool,
    ) -> None:
        self._name = name
        self._lr = lr
        self._lowest, self._highest = min(usual_lrs) / TOLERANCE, max(usual_lrs) * TOLERANCE
        self._adamw_lr = adamw_lr
        self._wants_schedule, self._anneals = wants_schedule, anneals
        self._begin(0)

    def _begin(self, iteration: int) -> None:
        """Forget what was seen, as the run goes on elsewhere: it is new, or a checkpoint was loaded."""
        self._first, self._iteration = iteration, iteration - 1  # of the first and the last look
        self._lrs: list[float] = []
        self._decays: list[tuple[float, str]] = []
        self._is_constant = True  # lr, since the first look
        self._is_whole = iteration == 0
        self._course = _Course(self._is_whole)  # of the largest lr
        self._courses: list[_Course] = []  # of the decay of each group, in AdamW's terms

    def look_at_start(self, groups: Sequence[Mapping[str, Any]]) -> Hints:
        """Look at groups as they were given. 0 is where a warm-up starts; of several learning rates the largest counts,
        as muP and layer-wise decay divide it.
        """
        largest = _largest([_number(group["lr"]) for group in groups])
        rate = self._too_small(largest) if 0 < largest < self._lowest else self._too_large(groups)
        return rate | self._decay(groups, lambda times: not _LOWEST_DECAY < times < _HIGHEST_DECAY)

    def look(self, groups: Sequence[Mapping[str, Any]], iteration: int, num_steps: int | None) -> Hints:
        """Look at groups before a step. What is too large is told as soon as it is there; what is too small may be the
        beginning or the end of a schedule, and has to stay for a tenth of the run.

        Args:
            groups: Of the optimizer.
            iteration: Steps taken.
            num_steps: The horizon.
        """
        if iteration not in (self._iteration, self._iteration + 1):
            self._begin(iteration)
        was_skipped, self._iteration = iteration == self._iteration, iteration
        hints: Hints = {}
        lrs = [_number(group["lr"]) for group in groups]
        if lrs != self._lrs:
            self._is_constant &= lrs[: len(self._lrs)] == self._lrs  # a group that joins is no schedule
            self._lrs = lrs
            self._course.see(_largest(lrs), iteration)
            hints |= self._too_large(groups)
            hints |= self._look_for_second(num_steps)
        decays = [(_number(group["weight_decay"]), group["weight_decay_policy"]) for group in groups]
        if decays != self._decays:
            self._decays = decays
            self._courses += [_Course(self._is_whole) for _ in groups[len(self._courses) :]]
            for course, times in zip(self._courses, self._in_adamw(groups), strict=False):
                course.see(times, iteration)
            hints |= self._decay(groups, lambda times: times >= _HIGHEST_DECAY)
        if was_skipped:
            return hints
        if num_steps is None:
            return hints | self._look_for_end(groups, iteration)
        return hints | self._look_for_rest(groups, iteration, num_steps)

    def _look_for_second(self, num_steps: int | None) -> Hints:
        """Whether steps that fall by themselves fall by a schedule as well."""
        if not (self._anneals and num_steps is not None and self._course.has_fallen):
            return {}
        return {
            "schedule": f"a schedule lies over {self._name}, whose steps fall to zero over num_steps={num_steps} by "
            "themselves, so they fall twice, and the loss ends above its best: leave the schedule out, or keep it and "
            "leave num_steps out"
        }

    def _look_for_end(self, groups: Sequence[Mapping[str, Any]], iteration: int) -> Hints:
        """Of a run of unknown length, whether anything lets steps fall."""
        waited = self._anneals and self._is_constant and iteration == UNTOLD and self._first < iteration
        if not waited or _is_scheduled(groups):
            return {}
        return {
            "schedule": f"{self._name} was not told how many steps the run takes, so its steps do not shrink, and the "
            "loss ends far above its best: pass num_steps= when creating it, or call optimizer.set_num_steps(n); or "
            "bring a schedule to zero. Nothing is wrong if yours begins later"
        }

    def _look_for_rest(self, groups: Sequence[Mapping[str, Any]], iteration: int, num_steps: int) -> Hints:
        """What does not move though it should."""
        patience = max(5, num_steps // 10)  # late enough for a warm-up to have begun, early enough to start again
        hints: Hints = {}
        is_small = self._course.is_set_below(self._lowest, iteration, patience)
        is_constant = self._is_constant and self._first < iteration and all(map(math.isfinite, self._lrs))
        lacks_schedule = self._wants_schedule and is_constant and iteration == patience < num_steps
        if (is_small or lacks_schedule) and not _is_scheduled(groups):
            hints |= self._too_small(_largest(self._lrs)) if is_small else {}
            hints |= self._constant(iteration - self._first, num_steps) if lacks_schedule else {}
        if any(course.is_set_below(_LOWEST_DECAY, iteration, patience) for course in self._courses):
            hints |= self._decay(groups, lambda times: times <= _LOWEST_DECAY)
        return hints

    def _too_large(self, groups: Sequence[Mapping[str, Any]]) -> Hints:
        for group in groups:
            lr, initial = _number(group["lr"]), _number(group.get("initial_lr"))
            is_sweep = initial < self._lowest and lr > SWEEP * initial  # as of Lightning's lr_find
            peak = max(lr, _number(group.get("max_lr")))  # which OneCycleLR will come to
            if peak > self._highest and not is_sweep:
                return {
                    "lr": f"lr={peak:.3g} is {peak / self._lr:,.0f} times the natural learning rate of {self._name}, "
                    f"{self._lr:g}, and such steps make the loss climb. {self._advice()}"
                }
        return {}

    def _too_small(self, lr: float) -> Hints:
        return {
            "lr": f"lr={lr:.3g} is {self._lr / lr:,.0f} times below the natural learning rate of {self._name}, "
            f"{self._lr:g}, and such steps hardly move. {self._advice()}"
        }

    def _advice(self) -> str:
        return (
            f"lr is a factor on the learned step, not AdamW's learning rate: leave it out, or choose one between "
            f"{self._lowest:.3g} and {self._highest:.3g}"
        )

    def _in_adamw(self, groups: Sequence[Mapping[str, Any]]) -> list[float]:
        """For each group the weight decay that would decay as fast in AdamW; 0 for none, or if it is not known.

        It is that at the learning rate which the run is about, not at one that a schedule passes through.
        """
        rates = [
            max(_number(group["lr"]), *(_number(group.get(key, 0.0)) for key in ("initial_lr", "max_lr")))
            for group in groups
        ]
        lr = _largest(rates)
        lr = lr if self._lowest <= lr <= self._highest else self._lr
        found = []
        for group in groups:
            plain = {**group, "lr": lr, "base_lr": lr, "weight_decay": _number(group["weight_decay"])}
            times = float(shrinkage(plain, adamw_scale=self._adamw_lr / self._lr)) / self._adamw_lr
            found.append(times if math.isfinite(times) else 0.0)
        return found

    def _decay(self, groups: Sequence[Mapping[str, Any]], is_strange: Callable[[float], bool]) -> Hints:
        for group, times in zip(groups, self._in_adamw(groups), strict=True):
            if not times or not is_strange(times):
                continue
            decay, policy, (low, high) = _number(group["weight_decay"]), group["weight_decay_policy"], ADAMW_DECAYS
            policies = "" if policy == "adamw" else ', or pass weight_decay_policy="adamw" with 0.01 to 0.1'
            return {
                "weight_decay": f"weight_decay={decay:g} with weight_decay_policy={policy!r} shrinks the parameters of "
                f"{self._name} by {times * self._adamw_lr:.3g} a step, as {times:.3g} does in AdamW, where {low:g} to "
                f"{high:g} is usual: choose one between {decay * low / times:.3g} and {decay * high / times:.3g}"
                f"{policies}"
            }
        return {}

    def _constant(self, steps: int, num_steps: int) -> Hints:
        return {
            "schedule": f"the learning rate of {self._name} has not changed in {steps} of {num_steps} steps. It "
            "ends far above its best without a schedule to zero: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, "
            f"0.0, total_iters={num_steps}), stepped after every optimizer.step(); in Lightning "
            'configure_optimizers(..., scheduler="linear"), with the Hugging Face Trainer '
            'lr_scheduler_type="linear". Nothing is wrong if yours begins later'
        }


def _is_scheduled(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is a scheduler for these parameters, though it may not have done anything yet.

    Most leave a key in the groups. Those that wait for a plateau, torch's and transformers', have to be looked for:
    that is slow, and done once a run.
    """
    if any("initial_lr" in group for group in groups):
        return True
    ours = {id(param) for group in groups for param in group["params"]}
    found = gc.get_objects()
    # Other people's objects may do anything when they are asked, so their types are.
    kinds = {kind for kind in set(map(type, found)) if any("get_last_lr" in vars(base) for base in kind.__mro__)}
    return any(not ours.isdisjoint(_scheduled(one)) for one in found if type(one) in kinds)


def _scheduled(scheduler: Any) -> set[int]:
    """The parameters of a scheduler's optimizer, by their ids."""
    try:
        return {id(param) for group in scheduler.optimizer.param_groups for param in group["params"]}
    except Exception:  # it is somebody else's, and no scheduler after all
        return set()


def _largest(lrs: Sequence[float]) -> float:
    """0 if one of them is not known."""
    return max(lrs, default=0.0) if all(map(math.isfinite, lrs)) else 0.0


def _number(value: Any) -> float:
    """What can be read without waiting for a device, else nan."""
    if isinstance(value, (float, int)):
        return value
    if isinstance(value, Tensor):
        return float(value) if value.device.type == "cpu" and value.numel() == 1 else math.nan
    return float(value) if isinstance(value, Real) else math.nan
