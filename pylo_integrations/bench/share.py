"""How much of a training step the optimizer takes, measured while a model trains."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch.optim import Optimizer

WARMUP = 5
"""The first steps make state, choose kernels and fill caches: they are not measured."""
MEASURED = 20


class OptimizerShare:
    """Times ``step()`` of an optimizer within training steps, each between ``begin()`` and ``end()``.

    A closure that the optimizer calls is the model's time, not the optimizer's. On an accelerator the measured steps,
    and only those, wait for the device four times. Afterwards nothing is left of it in the optimizer.

    Args:
        optimizer: Any optimizer of torch; not a framework's wrapper around one.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        device = optimizer.param_groups[0]["params"][0].device
        self._device = None if device.type == "cpu" else device
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        self._steps, self._inside, self._whole = 0, 0.0, 0.0

    @property
    def value(self) -> float:
        """Of a training step, between 0 and 1; NaN before the first measured one."""
        return self._inside / self._whole if self._whole else math.nan

    def begin(self) -> None:
        """A training step begins."""
        if self._measuring:
            self._began = self._now()

    def end(self) -> None:
        """It is over."""
        if self._measuring:
            self._whole += self._now() - self._began
        self._steps += 1
        if self._steps == WARMUP + MEASURED:
            for hook in self._hooks:
                hook.remove()

    @property
    def _measuring(self) -> bool:
        return WARMUP <= self._steps < WARMUP + MEASURED

    def _now(self) -> float:
        if self._device is not None:
            torch.accelerator.synchronize(self._device)
        return perf_counter()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self._measuring:
            return None
        self._entered = self._now()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0] is the optimizer
        if closure is None:
            return None
        return args[:1], {**kwargs, "closure": self._timed(closure)}

    def _timed(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            result = closure()
            self._entered = self._now()  # what came before is the model's
            return result

        return run

    def _after(self, *_: Any) -> None:
        if self._measuring:
            self._inside += self._now() - self._entered
