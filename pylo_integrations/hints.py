"""Settings that ruin a run without an error: a learning rate or decay from another world, or no schedule.

They are told, not refused, as whoever sets them may know better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from pylo_integrations.decay import shrinkage

Hints: TypeAlias = "dict[str, str]"
"""What there is to say, by subject."""

TOLERANCE = 10.001
"""How many times off a setting has to be; not ten, since 10 * 3e-4 is less than 3e-3."""

ADAMW_DECAYS = (0.01, 0.1)
"""Weight decays in recipes for AdamW."""

SWEEP = 1000.0
"""How many times its initial value a learning rate reaches only in a search for the right one."""


class SettingsWatch:
    """Looks at an optimizer's parameter groups, at the start and before every step.

    Args:
        name: Of the optimizer.
        lr: Its natural learning rate.
        usual_lrs: Learning rates that can be meant, within :data:`TOLERANCE`.
        adamw_lr: AdamW's learning rate whose steps are as large as the optimizer's at ``lr``.
        wants_schedule: Whether it wants a learning rate that falls to zero.
    """

    def __init__(self, name: str, lr: float, usual_lrs: Sequence[float], adamw_lr: float, wants_schedule: bool) -> None:
        self._name = name
        self._lr = lr
        self._lowest, self._highest = min(usual_lrs) / TOLERANCE, max(usual_lrs) * TOLERANCE
        self._adamw_lr = adamw_lr
        self._wants_schedule = wants_schedule
        self._lrs: list[float] = []  # of the last look
        self._is_constant = True  # since the first look

    def look_at_start(self, groups: Sequence[Mapping[str, Any]]) -> Hints:
        """Look at groups as they were given. 0 is where a warm-up starts; of several learning rates the largest counts,
        as muP and layer-wise decay divide it.
        """
        largest = max((_number(group["lr"]) for group in groups), default=0.0)
        if 0 < largest < self._lowest:
            return self._too_small(largest)
        return self._too_large(groups) or (self._decay(groups, largest) if largest > 0 else {})

    def look(self, groups: Sequence[Mapping[str, Any]], iteration: int, num_steps: int | None) -> Hints:
        """Look at groups before a step.

        Args:
            groups: Of the optimizer.
            iteration: Steps taken.
            num_steps: The horizon.
        """
        lrs = [_number(group["lr"]) for group in groups]
        if lrs != self._lrs:
            self._is_constant = not self._lrs
            self._lrs = lrs
            return self._too_large(groups)
        # Late enough for a warm-up to have begun, early enough to start again.
        if num_steps is not None and iteration == max(5, num_steps // 10) and self._is_constant:
            return self._constant(groups, iteration, num_steps)
        return {}

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

    def _decay(self, groups: Sequence[Mapping[str, Any]], lr: float) -> Hints:
        decaying = [group for group in groups if group["weight_decay"] and group["weight_decay_policy"] != "l2"]
        for group in decaying:
            decay, policy = float(group["weight_decay"]), group["weight_decay_policy"]
            as_largest = {**group, "lr": lr, "base_lr": lr}
            shrink = float(shrinkage(as_largest, adamw_scale=self._adamw_lr / self._lr))
            times = shrink / self._adamw_lr  # the number that would decay as fast in AdamW
            low, high = ADAMW_DECAYS
            if not times or low / TOLERANCE < times < high * TOLERANCE:
                continue
            policies = "" if policy == "adamw" else ', or pass weight_decay_policy="adamw" with 0.01 to 0.1'
            return {
                "weight_decay": f"weight_decay={decay:g} with weight_decay_policy={policy!r} shrinks the parameters of "
                f"{self._name} by {shrink:.3g} a step, as {times:.3g} does in AdamW, where {low:g} to {high:g} is "
                f"usual: choose one between {decay * low / times:.3g} and {decay * high / times:.3g}{policies}"
            }
        return {}

    def _constant(self, groups: Sequence[Mapping[str, Any]], iteration: int, num_steps: int) -> Hints:
        if any("initial_lr" in group for group in groups) or not all(math.isfinite(lr) for lr in self._lrs):
            return {}  # torch's schedulers leave that key; what is on a device is not read
        largest = max(self._lrs)
        hints = self._too_small(largest) if 0 < largest < self._lowest else {}
        if self._wants_schedule:
            hints["schedule"] = (
                f"the learning rate of {self._name} has not changed in {iteration} of {num_steps} steps. It ends far "
                "above its best without a schedule to zero: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, "
                f"total_iters={num_steps}), stepped after every optimizer.step(); in Lightning "
                'configure_optimizers(..., scheduler="linear"), with the Hugging Face Trainer '
                'lr_scheduler_type="linear". Nothing is wrong if yours begins later'
            )
        return hints


def _number(value: Any) -> float:
    """What can be read without waiting for a device, else nan."""
    if isinstance(value, (float, int)):
        return value
    return float(value) if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1 else math.nan
