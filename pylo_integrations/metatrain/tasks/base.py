"""What a task is, and what a family of tasks.

A family of your own is a subclass of :class:`Family` with :attr:`~Family.kind`, :attr:`~Family.choices` and
:meth:`~Family.build`. A config names it as ``kind: path/to/file.py:ClassName``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

LARGEST_CHOICE = 2**20
"""Of widths, depths and the like: beyond, no such task can be held in memory."""

Batch: TypeAlias = "tuple[Tensor, ...]"

Model: TypeAlias = "Callable[..., Tensor]"
"""What a loss calls: a network with the parameters of one member."""


@dataclass(frozen=True)
class Task:
    """One task: a network, a loss and data.

    Networks are trained in batches by ``torch.func``, so a model has no buffers that training changes (no batch
    normalisation) and no dropout, and the loss branches on no value.

    Attributes:
        model: Makes a network, initialised from torch's global generator; always of the same shapes.
        loss: ``loss(model, batch)``, 0-d, at least 0; ``model`` is called like the network.
        batches: ``batches(generator, count, validation)``: ``count`` batches, stacked along a leading axis of every
            tensor; drawn from ``generator`` alone. The flag chooses between training and validation examples.
        base: The same network at the width where muP's multipliers are 1; None without muP.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Model, Batch], Tensor]
    batches: Callable[[Generator, int, bool], Batch]
    base: Callable[[], nn.Module] | None = None


class Family(ABC):
    """A set of tasks that differ in options, each of which is drawn from some choices.

    Args:
        name: What logs call it; by default its kind.
        weight: What a difference of its objective counts, beside those of other families.
        options: Choices that replace those of :attr:`choices`: a list, or one value.

    Raises:
        ValueError: Unknown option, one without a choice, or a choice of another type than the default ones or out of
            range.
    """

    kind: ClassVar[str]
    choices: ClassVar[Mapping[str, tuple[Any, ...]]]
    """Every option with its default choices; ``width``, if it is one, is what muP scales."""

    def __init__(self, name: str = "", weight: float = 1.0, **options: Any) -> None:
        if unknown := sorted(options.keys() - self.choices.keys()):
            raise ValueError(f"task family {self.kind} has no option {unknown}; it has {sorted(self.choices)}")
        given = {key: tuple(value) if isinstance(value, (list, tuple)) else (value,) for key, value in options.items()}
        if empty := [key for key, value in given.items() if not value]:
            raise ValueError(f"task family {self.kind}: {empty} without a choice")
        if not isinstance(name, str):
            raise ValueError(f"task family {self.kind}: name must be a string, not {type(name).__name__}")
        if type(weight) not in (int, float) or not 0 < weight < math.inf:
            raise ValueError(f"task family {self.kind}: weight={weight!r:.50} must be a positive number")
        for key, values in given.items():
            for value in values:
                self._check_choice(key, value)
        self.name, self.weight = name or self.kind, float(weight)
        self.options = {**self.choices, **given}

    def _check_choice(self, option: str, value: Any) -> None:
        """Raise ValueError unless a choice is of the type of the default ones, and in range if it is a number."""
        kinds = {type(choice) for choice in self.choices[option]}
        where = f"task family {self.kind}: {option}"
        if type(value) not in kinds | ({int} if float in kinds else set()):
            names = " or ".join(sorted(kind.__name__ for kind in kinds))
            raise ValueError(f"{where} must be of type {names}, not {type(value).__name__}")
        least = 1 if option in ("width", "batch", "length") else 0
        if type(value) is int and not least <= value <= LARGEST_CHOICE:
            raise ValueError(
                f"{where} must be from {least} to {LARGEST_CHOICE}, not {value if abs(value) < 2**63 else 'huge'}"
            )
        if type(value) is float and not math.isfinite(value):
            raise ValueError(f"{where}={value} must be a finite number")

    @abstractmethod
    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """Make a task.

        Args:
            generator: For what belongs to the task itself, such as the function to be learned.
            width_mult: Width over muP's base width, 1 without muP: outputs are divided by it, see
                :class:`Readout`.
            options: The choice for every option.
        """

    def sample(self, generator: Generator, base_width: int | None = None) -> Task:
        """Draw a task.

        Args:
            generator: Where all choices come from.
            base_width: For muP; families without a ``width`` ignore it.
        """
        drawn = {
            key: values[int(torch.randint(len(values), (), generator=generator))]
            for key, values in sorted(self.options.items())
        }
        seed = int(torch.randint(2**62, (), generator=generator))
        if base_width is None or "width" not in drawn:
            return self.build(Generator().manual_seed(seed), 1.0, **drawn)
        task = self.build(Generator().manual_seed(seed), drawn["width"] / base_width, **drawn)
        base = self.build(Generator().manual_seed(seed), 1.0, **{**drawn, "width": base_width})
        return replace(task, base=base.model)

    def overlaps(self, other: Family) -> bool:
        """Whether some task could be drawn from both."""
        return type(self) is type(other) and all(
            set(self.options[key]) & set(other.options[key]) for key in self.choices
        )


def classify(model: Model, batch: Batch) -> Tensor:
    """Mean cross entropy of ``(inputs, labels)``, over all positions if there are several."""
    inputs, labels = batch
    logits = model(inputs)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def square_error(model: Model, batch: Batch) -> Tensor:
    """Mean square error of ``(inputs, targets)``."""
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)
