"""What a held-out task is: a network, data, a loss, and how they are put together.

Networks are what people write: the usual initialisation, and batch normalisation where it is usual. For an optimizer
that wants muP (:mod:`pylo_integrations.mup`), the same network is built with the multipliers that muP asks of a model:
outputs divided by the width multiplier, and attention scores scaled by the size of a head.

Whatever is random about an example, such as noise or negatives, is drawn once and is part of its inputs, so that all
optimizers see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.metatrain import data
from pylo_integrations.metatrain.seeds import generator_of, seed_of

SAMPLES = (16, 32)
"""Losses are measured on so many batches' worth of training and of validation examples, if there are so many."""


class Examples(NamedTuple):
    """Inputs and targets, one a row: float32 targets for mean square error, int64 ones for cross entropy."""

    inputs: Tensor
    targets: Tensor

    def rows(self, index: Tensor) -> Examples:
        """Some of the rows."""
        return Examples(self.inputs[index], self.targets[index])


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of integer targets, over all positions; mean square error of others."""
    if targets.is_floating_point():
        return F.mse_loss(outputs, targets)
    return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1))


def accuracy_of(outputs: Tensor, targets: Tensor) -> float | None:
    """Share of integer targets that are right; None for others."""
    return None if targets.is_floating_point() else float((outputs.argmax(-1) == targets).float().mean())


@dataclass(frozen=True)
class HeldOutTask:
    """A network, data, and how they are put together.

    Attributes:
        name: Lower snake case.
        description: A few words.
        width: What muP scales: units of a hidden layer, or channels.
        batch: Examples in a training step.
        network: Makes it from a width and muP's width multiplier, initialised from torch's global generator.
        data: Training and validation examples; raises ``DataError`` if they are not on this machine.
        initial: Weights by name that replace those of a new network.
        loss: Of what the network returns and the targets, 0-d; a mean over examples, so that it may be measured on any
            number of them.
    """

    name: str
    description: str
    width: int
    batch: int
    network: Callable[[int, float], nn.Module]
    data: Callable[[], tuple[Examples, Examples]]
    initial: Callable[[], Mapping[str, Tensor]] | None = None
    loss: Callable[[Any, Tensor], Tensor] = loss_of

    def model(self, seed: int, base_width: int | None = None) -> nn.Module:
        """A new network, of the same weights for the same seed.

        Args:
            seed: Of the run.
            base_width: Where muP's multipliers are 1; None for a network without.
        """
        initial = self.initial() if self.initial else {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("held out", self.name, "weights", seed))
            model = self.network(self.width, 1.0 if base_width is None else self.width / base_width)
        model.load_state_dict({**model.state_dict(), **initial})
        return model

    def base(self, base_width: int) -> nn.Module:
        """The twin of muP's base width, without memory."""
        with torch.device("meta"):
            return self.network(base_width, 1.0)

    def batches(self, seed: int, steps: int) -> Tensor:
        """``(steps, batch)`` rows of the training examples, drawn uniformly; the same for all optimizers."""
        generator = generator_of("held out", self.name, "batches", seed)
        return torch.randint(len(self.data()[0].targets), (steps, self.batch), generator=generator)

    def samples(self) -> tuple[Examples, Examples]:
        """The training and validation examples that losses are measured on."""
        return tuple(  # type: ignore[return-value]
            examples.rows(
                torch.randperm(len(examples.targets), generator=generator_of("sample", self.name))[
                    : batches * self.batch
                ]
            )
            for examples, batches in zip(self.data(), SAMPLES, strict=True)
        )

    def accuracy(self, outputs: Any, targets: Tensor) -> float | None:
        """Share of integer targets that are right; None for others, and for losses of another kind."""
        return accuracy_of(outputs, targets) if self.loss is loss_of else None


# -- data ------------------------------------------------------------------------------------------------------------


def divided(inputs: Tensor, targets: Tensor) -> tuple[Examples, Examples]:
    """Every fifth example for validation, the others for training."""
    held_out = torch.arange(len(inputs)) % data.VALIDATION == 0
    return Examples(inputs[~held_out], targets[~held_out]), Examples(inputs[held_out], targets[held_out])


def text_windows(length: int, *, backwards: bool = False) -> tuple[Examples, Examples]:
    """Windows of text and the next character at every position; those for validation do not overlap."""

    def windows(characters: Tensor, stride: int) -> Examples:
        characters = characters.flip(0) if backwards else characters
        return Examples(characters[:-1].unfold(0, length, stride), characters[1:].unfold(0, length, stride))

    training, validation = data.text()
    return windows(training, 1), windows(validation, length)


def standardised(array: Tensor) -> Tensor:
    """Mean 0 and variance 1, column by column."""
    return (array - array.mean(0)) / array.std(0)


def first_images(name: str, count: int) -> tuple[Tensor, Tensor]:
    """So many images ``(count, side, side)`` and their labels; every fifth is from the validation examples."""
    training, validation = data.images(name)
    each = data.VALIDATION - 1
    part = min(count // data.VALIDATION, len(validation.labels), len(training.labels) // each)
    # A row for each validation example, with the training examples that follow it.
    row = torch.arange(part * each).view(part, each)
    inputs = torch.cat([validation.inputs[:part, None], training.inputs[row]], 1)
    labels = torch.cat([validation.labels[:part, None], training.labels[row]], 1)
    return inputs.flatten(0, 1), labels.flatten()


# -- what is trained before ------------------------------------------------------------------------------------------

PRETRAINING_STEPS = 500
"""Of networks that tasks begin with, or learn from."""


def pretrained(name: str, make: Callable[[], nn.Module], examples: Examples, batch: int = 64) -> nn.Module:
    """A network that AdamW trained on examples; the same for the same name."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("held out", "pretraining", name))
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(PRETRAINING_STEPS):
            inputs, targets = examples.rows(torch.randint(len(examples.targets), (batch,)))
            optimizer.zero_grad()
            loss_of(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model
