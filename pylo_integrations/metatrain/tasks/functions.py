"""Families of functions to be learned: points are drawn at random, so examples never run out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, nn

from pylo_integrations.metatrain.tasks.base import Batch, Family, Task, classify, square_error
from pylo_integrations.metatrain.tasks.networks import Adapted, Readout, ResidualBlock, mlp


class Teacher(Family):
    """Classification of Gaussian inputs as a random network of the same kind classifies them."""

    kind = "teacher"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "inputs": (16,),
        "width": (24,),
        "depth": (2,),
        "activation": ("relu", "tanh"),
        "batch": (32,),
    }
    classes = 5

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The student; its teacher has one hidden layer of 32 units."""
        inputs, batch = options["inputs"], options["batch"]
        first = torch.randn(inputs, 32, generator=generator) * (2 / inputs) ** 0.5
        last = torch.randn(32, self.classes, generator=generator)

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            points = torch.randn(count, batch, inputs, generator=generator)
            return points, (torch.tanh(points @ first) @ last).argmax(-1)

        hidden = (options["width"], options["depth"])
        return Task(
            lambda: mlp(inputs, *hidden, self.classes, options["activation"], width_mult),
            classify,
            draw,
        )


class Regression(Family):
    """Regression of random smooth functions, sums of a few waves, of points in a cube."""

    kind = "regression"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "inputs": (6,),
        "width": (32,),
        "depth": (2,),
        "activation": ("relu", "tanh"),
        "batch": (32,),
    }
    waves = 16

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The perceptron; targets are two sums of waves, of variance about 1."""
        inputs, batch = options["inputs"], options["batch"]
        frequency = torch.randn(inputs, self.waves, generator=generator)
        phase = 2 * math.pi * torch.rand(self.waves, generator=generator)
        mix = torch.randn(self.waves, 2, generator=generator) * (2 / self.waves) ** 0.5

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            points = 2 * torch.rand(count, batch, inputs, generator=generator) - 1
            return points, torch.sin(points @ frequency + phase) @ mix

        hidden = (options["width"], options["depth"])
        return Task(lambda: mlp(inputs, *hidden, 2, options["activation"], width_mult), square_error, draw)


class Curve(Family):
    """Regression of a function with fast waves, which is a matter of bias and not of noise."""

    kind = "curve"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "inputs": (1, 2),
        "waves": (3.0, 6.0),
        "width": (64,),
        "depth": (3,),
        "activation": ("gelu", "tanh"),
        "batch": (64,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The perceptron; ``waves`` is the standard deviation of frequencies."""
        inputs, batch = options["inputs"], options["batch"]
        frequency = options["waves"] * torch.randn(inputs, 12, generator=generator)
        phase = 2 * math.pi * torch.rand(12, generator=generator)
        mix = torch.randn(12, 1, generator=generator) * (2 / 12) ** 0.5

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            points = 2 * torch.rand(count, batch, inputs, generator=generator) - 1
            return points, torch.sin(points @ frequency + phase) @ mix

        hidden = (options["width"], options["depth"])
        return Task(lambda: mlp(inputs, *hidden, 1, options["activation"], width_mult), square_error, draw)


class FewExamples(Family):
    """Regression of a noisy function from a few hundred examples, which are soon known by heart."""

    kind = "few_examples"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "examples": (200, 500),
        "noise": (0.3,),
        "inputs": (10,),
        "width": (48,),
        "depth": (2,),
        "activation": ("gelu",),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The perceptron; validation examples are new ones."""
        inputs, batch = options["inputs"], options["batch"]
        first = 2 * torch.randn(inputs, 8, generator=generator) / inputs**0.5
        last = torch.randn(8, 1, generator=generator) / 2

        def examples(generator: Generator, *shape: int) -> Batch:
            points = torch.randn(*shape, inputs, generator=generator)
            noise = options["noise"] * torch.randn(*shape, 1, generator=generator)
            return points, torch.sin(points @ first) @ last + noise

        known = examples(generator, options["examples"])

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            if validation:
                return examples(generator, count, batch)
            index = torch.randint(len(known[0]), (count, batch), generator=generator)
            return known[0][index], known[1][index]

        hidden = (options["width"], options["depth"])
        return Task(lambda: mlp(inputs, *hidden, 1, options["activation"], width_mult), square_error, draw)


class SoftmaxRegression(Family):
    """Linear classification of inputs whose variances fall as a power: convex and ill-conditioned."""

    kind = "softmax_regression"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "inputs": (64,),
        "classes": (10,),
        "power": (0.5, 1.0),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """One layer; labels are drawn from a linear model of the inputs before they are scaled."""
        inputs, classes, batch = options["inputs"], options["classes"], options["batch"]
        scales = torch.arange(1, inputs + 1) ** -float(options["power"])
        scales = scales / scales.square().mean().sqrt()
        truth = 4 * torch.randn(inputs, classes, generator=generator) / inputs**0.5

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            points = torch.randn(count, batch, inputs, generator=generator)
            uniform = torch.rand(count, batch, classes, generator=generator).clamp(1e-6, 1 - 1e-6)
            labels = (points @ truth - (-uniform.log()).log()).argmax(-1)
            return points * scales, labels

        return Task(lambda: Readout(inputs, classes, width_mult), classify, draw)


class Trees(Family):
    """Classification by the votes of small decision trees, as tabular data are, by a residual perceptron."""

    kind = "trees"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "inputs": (20,),
        "width": (32,),
        "depth": (4,),
        "batch": (64,),
    }
    trees, levels, classes = 24, 3, 5

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """Blocks with layer normalisation."""
        inputs, width, batch = options["inputs"], options["width"], options["batch"]
        column = torch.randint(inputs, (self.trees, self.levels), generator=generator)
        threshold = torch.randn(self.trees, self.levels, generator=generator) / 2
        votes = torch.randn(self.trees, 2**self.levels, self.classes, generator=generator)
        digits, each = 2 ** torch.arange(self.levels), torch.arange(self.trees)

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            points = torch.randn(count, batch, inputs, generator=generator)
            leaf = ((points[..., column] > threshold) * digits).sum(-1)
            return points, votes[each, leaf].sum(-2).argmax(-1)

        def model() -> nn.Module:
            blocks = [ResidualBlock(width, 2 * width) for _ in range(options["depth"])]
            ends = nn.LayerNorm(width), Readout(width, self.classes, width_mult)
            return nn.Sequential(nn.Linear(inputs, width), *blocks, *ends)

        return Task(model, classify, draw)


class LowRank(Family):
    """Adaptation of a frozen perceptron by low-rank factors, one of which starts at zero, as LoRA does it."""

    kind = "low_rank"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "inputs": (32,),
        "width": (64,),
        "rank": (2, 4, 8),
        "batch": (32,),
    }
    classes = 5

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """Labels are those of the frozen network after a change of rank 3."""
        inputs, width, batch = options["inputs"], options["width"], options["batch"]
        sizes = ((inputs, width), (width, width), (width, self.classes))
        frozen = [torch.randn(b, a, generator=generator) * (2 / a) ** 0.5 for a, b in sizes]
        changed = [
            weight
            + 0.7
            * torch.randn(len(weight), 3, generator=generator)
            @ torch.randn(3, weight.shape[1], generator=generator)
            / (3 * weight.shape[1]) ** 0.5
            for weight in frozen
        ]

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            points = torch.randn(count, batch, inputs, generator=generator)
            hidden = points
            for weight in changed[:-1]:
                hidden = torch.relu(hidden @ weight.T)
            return points, (hidden @ changed[-1].T).argmax(-1)

        def model() -> nn.Module:
            first, middle, last = (Adapted(weight, options["rank"]) for weight in frozen)
            return nn.Sequential(first, nn.ReLU(), middle, nn.ReLU(), last)

        return Task(model, classify, draw)
