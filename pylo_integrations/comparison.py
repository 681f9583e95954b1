"""A training function of your own, run with several optimizers on the same seed: ``pylo try``."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pylo_integrations.catalog import create_optimizer, get_optimizer_info
from pylo_integrations.paths import check_file
from pylo_integrations.schedules import linear, warmed_up
from pylo_integrations.weights import load_theta

LAST = 0.05
"""Part of the run whose mean loss is where a run ended."""

_LEAST_SEEN = 6
"""Losses from which their scatter is estimated, however short a run is."""

OptimizerOf: TypeAlias = Callable[[nn.Module], Optimizer]
"""What a training function calls, once, with its model."""


class TrainingFunction(Protocol):
    """A generator that trains: it makes model, data and, by what it is given, its optimizer, and yields every loss."""

    def __call__(
        self, optimizer_of: OptimizerOf, /
    ) -> Iterable[Tensor | float | tuple[Tensor | float, Tensor | float | None]]:
        """Train without end, or for long enough; one loss for every optimizer step.

        A loss may come with that of validation, as a pair; None stands for steps after which nothing was validated.
        """


class RunFailed(RuntimeError):
    """A user's training function raised, which is the cause; the message says in which run and at which step."""


@dataclass(frozen=True)
class Trial:
    """A run.

    Attributes:
        name: Of the optimizer, with its learning rate if it has one that was chosen.
        losses: One a step; shorter than was asked for if a loss was not finite.
        seconds: Of a step, in the median, so that what is done once does not count; all of it, data and gradients too.
        is_adamw: Whether it is one to compare with.
        validation: The last validation loss; None if there was none.
    """

    name: str
    losses: Sequence[float]
    seconds: float
    is_adamw: bool
    validation: float | None = None

    @property
    def diverged(self) -> bool:
        """Whether a loss was not finite."""
        return not math.isfinite(self.losses[-1])

    @property
    def final(self) -> float:
        """Mean of the last losses; infinite if one was not finite."""
        return math.inf if self.diverged else fmean(self.losses[-self._window :])

    @property
    def uncertainty(self) -> float:
        """Standard error of :attr:`final`, from how much neighbouring losses differ beyond a trend."""
        last = self.losses[-max(_LEAST_SEEN, self._window) :]
        changes = [after - before for before, after in itertools.pairwise(last)]
        return stdev(changes) / (2 * self._window) ** 0.5 if len(changes) > 1 else abs(last[-1])

    def steps_to(self, loss: float) -> int | None:
        """Steps until the mean of as many losses as :attr:`final` has is at most ``loss``; None if it never is."""
        width, sums = self._window, itertools.accumulate(self.losses, initial=0.0)
        ends = list(sums)
        return next((end for end in range(width, len(ends)) if (ends[end] - ends[end - width]) / width <= loss), None)

    @property
    def _window(self) -> int:
        return max(1, round(LAST * len(self.losses)))


class _Refusal(Exception):
    """What the function asked of us, and should not have."""


class _LossTakingAdamW(AdamW):
    """AdamW whose ``step`` takes ``loss=``, as learned optimizers' does, and has no use for it."""

    def step(self, closure: Any = None, loss: Any = None) -> Any:
        """As AdamW's."""
        return super().step(closure)


def find_function(name: str) -> TrainingFunction:
    """A training function by ``module:function`` or ``path/to/file.py:function``; the module is run.

    Raises:
        OSError: The file cannot be read.
        ValueError: The name has no such form, or there is no such module or function; the message says which.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ValueError(f"{name!r} is not MODULE:FUNCTION, such as train.py:train or my.package:train")
    path = Path(place) if place.endswith(".py") else None
    if path is not None:
        check_file(path)
    sys.path.insert(0, "" if path is None else str(path.parent.absolute()))  # as where Python runs a module, or a file
    try:
        if path is not None:
            spec = importlib.util.spec_from_file_location(path.stem, path)
            assert spec is not None and spec.loader is not None, "it is a .py file"
            module = importlib.util.module_from_spec(spec)
            sys.modules[path.stem] = module
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:
        raise ValueError(f"{name}: {place} cannot be run: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"{name}: {place} has no function {attribute!r}")
    return function  # type: ignore[no-any-return]


def compare(
    train: TrainingFunction,
    learned: Sequence[str],
    *,
    steps: int,
    adamw_lrs: Sequence[float] = (1e-3,),
    weight_decay: float = 0.01,
    seed: int = 0,
) -> Iterator[Trial]:
    """Run a training function with AdamW and with learned optimizers, each as it comes; trials as they end.

    Every run starts from the same seed of ``random``, numpy and torch. AdamW's rate warms up over 5 % of the run and
    falls to zero along a cosine; learned optimizers know the number of steps, and one that has no schedule of its own
    falls to zero along a line.

    Args:
        train: The function.
        learned: Catalogue names.
        steps: How many; the function may yield more.
        adamw_lrs: A run for each.
        weight_decay: Of all.
        seed: Of every run.

    Raises:
        ValueError: Unknown name, or the function is not as :class:`TrainingFunction` says.
    """
    for name in learned:
        spec = get_optimizer_info(name)
        if spec.weights is not None:
            load_theta(spec.weights, name)  # not after the other runs
    for lr in adamw_lrs:

        def adamw(model: nn.Module, lr: float = lr) -> tuple[Optimizer, Callable[[float], float]]:
            return _LossTakingAdamW(model.parameters(), lr, weight_decay=weight_decay), warmed_up

        yield _run(f"adamw lr={lr:g}", train, adamw, steps, seed)
    for name in learned:
        spec = get_optimizer_info(name)

        def ours(model: nn.Module, name: str = name, falls: bool = spec.wants_schedule) -> Any:
            optimizer = create_optimizer(model, name, weight_decay=weight_decay, num_steps=steps)
            return optimizer, linear if falls else None

        yield _run(name, train, ours, steps, seed)


def _run(
    name: str, train: TrainingFunction, make: Callable[[nn.Module], tuple[Optimizer, Any]], steps: int, seed: int
) -> Trial:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    made: list[LambdaLR | None] = []
    stepped: list[bool] = []

    def optimizer_of(model: nn.Module) -> Optimizer:
        if not isinstance(model, nn.Module):
            raise _Refusal(f"optimizer_of() takes the model, not {type(model).__name__}")
        if made:
            raise _Refusal("optimizer_of() was called twice; a training function makes one optimizer")
        optimizer, shape = make(model)
        made.append(None if shape is None else LambdaLR(optimizer, lambda step: shape(min(1.0, (step + 0.5) / steps))))
        optimizer.register_step_post_hook(lambda *_: stepped.append(True) if not stepped else None)
        return optimizer

    losses: list[float] = []
    validation: float | None = None
    times: list[float] = []
    for value in itertools.islice(_iterate(train, optimizer_of, name), steps):
        if not made:
            raise ValueError("the function yielded a loss before it called optimizer_of(model)")
        loss, validated = value if isinstance(value, tuple) and len(value) == 2 else (value, None)
        losses.append(_number(loss))
        validation = validation if validated is None else _number(validated)
        times.append(time.perf_counter())
        if not math.isfinite(losses[-1]):
            break
        if made[0] is not None and stepped:
            made[0].step()
    if not losses:
        raise ValueError("the function yielded no loss: it has to yield one for every step")
    if not stepped:
        raise ValueError("the function never stepped the optimizer that optimizer_of(model) returned")
    if len(losses) < steps and math.isfinite(losses[-1]):
        raise ValueError(f"the function ended after {len(losses)} losses, and {steps} steps were asked for")
    seconds = median([after - before for before, after in itertools.pairwise(times)] or [0.0])
    return Trial(name, losses, seconds, name.startswith("adamw "), validation)


def _iterate(train: TrainingFunction, optimizer_of: OptimizerOf, name: str) -> Iterator[Any]:
    """What the function yields; what it raises, but for our own refusals, comes as the cause of :class:`RunFailed`."""
    if not inspect.isgeneratorfunction(train):
        raise ValueError("the training function must be a generator: it has to yield every loss, and not return them")
    try:
        inspect.signature(train).bind(optimizer_of)
    except TypeError as error:
        raise ValueError(f"the training function must take optimizer_of, and nothing else: {error}") from error
    yielded = train(optimizer_of)
    for step in itertools.count():
        try:
            value = next(yielded)
        except StopIteration:
            return
        except _Refusal as error:
            raise ValueError(str(error)) from None
        except Exception as error:
            raise RunFailed(f"in the run of {name}, at step {step}, the training function failed") from error
        yield value


def _number(value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            "the function must yield losses, numbers or 0-d tensors, or pairs of a loss and that of validation, not "
            f"{value!r:.60}"
        ) from error


# -- telling ---------------------------------------------------------------------------------------------------------


def describe(trials: Sequence[Trial]) -> str:
    """A table, and who won, by how much and at what cost, in words."""
    baseline = min((trial for trial in trials if trial.is_adamw), key=lambda trial: trial.final)
    width = max(len(trial.name) for trial in trials)
    validates = any(trial.validation is not None for trial in trials)
    head = f"{'':{width}}  {'final loss':>10}  {'steps to that of AdamW':>22}  {'ms a step':>9}"
    lines = [head + validates * f"  {'validation':>10}"]
    for trial in trials:
        reached = trial.steps_to(baseline.final) if math.isfinite(baseline.final) else None
        final = "diverged" if trial.diverged else f"{trial.final:.4g}"
        told = "never" if reached is None else str(reached)
        validation = "none" if trial.validation is None else f"{trial.validation:.4g}"
        line = f"{trial.name:{width}}  {final:>10}  {told:>22}  {1000 * trial.seconds:>9.1f}"
        lines.append(line + validates * f"  {validation:>10}")
    lines.append(f"training losses: mean of the last {LAST:.0%} of the steps" + validates * "; validation: its last")
    if sum(trial.is_adamw for trial in trials) == 1:
        lines.append("AdamW had one learning rate; several are fairer, such as 3e-4, 1e-3 and 3e-3")
    learned = [trial for trial in trials if not trial.is_adamw]
    lines.append("")
    for trial in learned:
        lines += [_verdict(trial, baseline), *_verdict_of_validation(trial, trials)]
    return "\n".join(lines)


def _verdict_of_validation(trial: Trial, trials: Sequence[Trial]) -> list[str]:
    """Whether it is higher than AdamW's, at the rate that is best for it: then nothing was won."""
    mine, theirs = trial.validation, [each for each in trials if each.is_adamw and each.validation is not None]
    if mine is None or not theirs:
        return []
    best = min(theirs, key=lambda each: _known(each.validation))
    if _known(mine) <= _known(best.validation):
        return []
    return [
        f"Its last validation loss is higher: {mine:.4g} against {best.validation:.4g} of {best.name}. If it rose, "
        "fewer steps or more weight decay may do better."
    ]


def _known(validation: float | None) -> float:
    return math.inf if validation is None or math.isnan(validation) else validation


def _verdict(trial: Trial, baseline: Trial) -> str:
    at = len(trial.losses) - 1
    if trial.diverged and baseline.diverged:
        return f"{trial.name} and AdamW both met a loss that is not finite, at step {at}: look at data and loss."
    if trial.diverged:
        return f"{trial.name} diverged: the loss of step {at} was not finite. Try gradient clipping, or report it."
    if baseline.diverged:
        return f"{trial.name} ended at {trial.final:.4g}; AdamW diverged at every rate: try smaller ones."
    cost = trial.seconds / max(baseline.seconds, 1e-12)
    ended = f"{trial.final:.4g} against {baseline.final:.4g} of {baseline.name}"
    noise = 2 * math.hypot(trial.uncertainty, baseline.uncertainty)
    if abs(trial.final - baseline.final) <= noise:
        return (
            f"{trial.name} ended level: {ended}, where the last losses scatter by {noise:.2g}; a step took {cost:.2f} "
            "times as long. More steps, or other seeds, would tell more."
        )
    reached, steps = trial.steps_to(baseline.final), len(baseline.losses)
    if reached is not None and trial.final < baseline.final:
        own = baseline.steps_to(baseline.final) or steps  # None where sums round to just above its end
        saved = own / reached
        speed = f"{saved / cost:.2f} times as fast in time" if saved > cost else "no faster in time"
        return (
            f"{trial.name} won: {ended}. It was there after {reached} of {steps} steps, AdamW after {own}, and a step "
            f"took {cost:.2f} times as long: {speed}."
        )
    return (
        f"{trial.name} lost: {ended}. A run of more steps, or another learned optimizer (`pylo list`), may do better; "
        "if not, keep AdamW."
    )
