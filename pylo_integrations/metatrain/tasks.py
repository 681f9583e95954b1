"""Families of tasks to meta-train on: what a network is, what its loss is, and where its batches come from.

A family of your own is a subclass of :class:`Family` with :attr:`~Family.kind`, :attr:`~Family.choices` and
:meth:`~Family.build`. A config names it as ``kind: path/to/file.py:ClassName``.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pylo_integrations.metatrain import data
from pylo_integrations.paths import check_file

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
        options: Choices that replace those of :attr:`choices`: a list, or one value.

    Raises:
        ValueError: Unknown option, one without a choice, or a choice of another type than the default ones or out of
            range.
    """

    kind: ClassVar[str]
    choices: ClassVar[Mapping[str, tuple[Any, ...]]]
    """Every option with its default choices; ``width``, if it is one, is what muP scales."""

    def __init__(self, name: str = "", **options: Any) -> None:
        if unknown := sorted(options.keys() - self.choices.keys()):
            raise ValueError(f"task family {self.kind} has no option {unknown}; it has {sorted(self.choices)}")
        given = {key: tuple(value) if isinstance(value, (list, tuple)) else (value,) for key, value in options.items()}
        if empty := [key for key, value in given.items() if not value]:
            raise ValueError(f"task family {self.kind}: {empty} without a choice")
        if not isinstance(name, str):
            raise ValueError(f"task family {self.kind}: name must be a string, not {type(name).__name__}")
        for key, values in given.items():
            for value in values:
                self._check_choice(key, value)
        self.name = name or self.kind
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


# -- pieces of networks ----------------------------------------------------------------------------------------------


class Readout(nn.Linear):
    """The last layer; its output is divided by muP's width multiplier."""

    def __init__(self, inputs: int, outputs: int, width_mult: float) -> None:
        super().__init__(inputs, outputs)
        self.scale = 1 / width_mult

    def forward(self, input: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``."""
        return super().forward(input) * self.scale


class Pointwise(nn.Module):
    """An activation by the name that ``torch`` has for it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        functions: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": F.relu,
            "tanh": torch.tanh,
            "gelu": F.gelu,
            "silu": F.silu,
        }
        if name not in functions:
            raise ValueError(f"activation {name!r} is unknown; choose one of {', '.join(functions)}")
        self.function = functions[name]

    def forward(self, input: Tensor) -> Tensor:
        """Element by element."""
        return self.function(input)


def mlp(inputs: int, width: int, depth: int, outputs: int, activation: str, width_mult: float) -> nn.Sequential:
    """``depth`` hidden layers of equal width, and a readout."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), Pointwise(activation)]
        inputs = width
    return nn.Sequential(*layers, Readout(inputs, outputs, width_mult))


def classify(model: Model, batch: Batch) -> Tensor:
    """Mean cross entropy of ``(inputs, labels)``, over all positions if there are several."""
    inputs, labels = batch
    logits = model(inputs)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def square_error(model: Model, batch: Batch) -> Tensor:
    """Mean square error of ``(inputs, targets)``."""
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def image_batches(name: str, batch: int, shape: tuple[int, ...]) -> Callable[[Generator, int, bool], Batch]:
    """Batches of images, each of ``shape``, and labels."""
    splits = data.images(name)

    def draw(generator: Generator, count: int, validation: bool) -> Batch:
        split = splits[validation]
        index = torch.randint(len(split.labels), (count, batch), generator=generator)
        return split.inputs[index].view(count, batch, *shape), split.labels[index]

    return draw


def text_batches(length: int, batch: int, every: bool) -> Callable[[Generator, int, bool], Batch]:
    """Batches of ``length`` characters, and the next character at every position, or after the last only."""
    splits = data.text()

    def draw(generator: Generator, count: int, validation: bool) -> Batch:
        split = splits[validation]
        start = torch.randint(len(split) - length - 1, (count, batch, 1), generator=generator)
        window = split[start + torch.arange(length + 1)]
        return window[..., :-1], (window[..., 1:] if every else window[..., -1])

    return draw


# -- the families ----------------------------------------------------------------------------------------------------


class ImageMLP(Family):
    """Classification of small images by a multilayer perceptron."""

    kind = "image_mlp"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (16,),
        "depth": (1,),
        "activation": ("relu", "tanh"),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The perceptron on flattened images."""
        pixels, hidden = data.images(options["data"])[0].inputs[0].numel(), (options["width"], options["depth"])
        return Task(
            lambda: mlp(pixels, *hidden, 10, options["activation"], width_mult),
            classify,
            image_batches(options["data"], options["batch"], (pixels,)),
        )


class ImageConv(Family):
    """Classification of small images by a convolutional network of two layers of stride 2."""

    kind = "image_conv"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (8,),
        "activation": ("relu",),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The network; ``width`` is the number of channels."""
        side, width = data.images(options["data"])[0].inputs.shape[-1], options["width"]
        last = (side + 3) // 4

        def model() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(1, width, 3, 2, 1),
                Pointwise(options["activation"]),
                nn.Conv2d(width, width, 3, 2, 1),
                Pointwise(options["activation"]),
                nn.Flatten(),
                Readout(width * last * last, 10, width_mult),
            )

        return Task(model, classify, image_batches(options["data"], options["batch"], (1, side, side)))


class ImageAutoencoder(Family):
    """Reconstruction of small images through a code of 8 numbers."""

    kind = "image_autoencoder"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (32,),
        "activation": ("tanh",),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """Encoder and decoder with one hidden layer each."""
        pixels, width = data.images(options["data"])[0].inputs[0].numel(), options["width"]

        def model() -> nn.Module:
            code = mlp(pixels, width, 1, 8, options["activation"], width_mult)
            return nn.Sequential(*code, *mlp(8, width, 1, pixels, options["activation"], width_mult))

        def reconstruct(model: Model, batch: Batch) -> Tensor:
            return F.mse_loss(model(batch[0]), batch[0])

        return Task(model, reconstruct, image_batches(options["data"], options["batch"], (pixels,)))


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


class TextMLP(Family):
    """The next character after a few: embedding, layer normalisation and a perceptron."""

    kind = "text_mlp"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "length": (4,),
        "width": (32,),
        "activation": ("relu", "tanh"),
        "batch": (32,),
    }
    embedding = 8

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The network on the characters' joined embeddings."""
        length, width = options["length"], options["width"]

        def model() -> nn.Module:
            return nn.Sequential(
                nn.Embedding(data.VOCABULARY, self.embedding),
                nn.Flatten(),
                nn.LayerNorm(length * self.embedding),
                *mlp(length * self.embedding, width, 1, data.VOCABULARY, options["activation"], width_mult),
            )

        return Task(model, classify, text_batches(length, options["batch"], every=False))


class TextAttention(Family):
    """A causal transformer that predicts the next character."""

    kind = "text_attention"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "length": (16,),
        "width": (32,),
        "depth": (1,),
        "batch": (8,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The transformer, with two heads and normalisation before each layer."""
        length, width, depth = options["length"], options["width"], options["depth"]
        if width % TransformerBlock.heads:
            raise ValueError(
                f"task family {self.kind}: width={width} is no multiple of its {TransformerBlock.heads} heads"
            )

        def model() -> nn.Module:
            blocks = [TransformerBlock(width, width_mult) for _ in range(depth)]
            ends = nn.LayerNorm(width), Readout(width, data.VOCABULARY, width_mult)
            return nn.Sequential(Positions(data.VOCABULARY, length, width), *blocks, *ends)

        return Task(model, classify, text_batches(length, options["batch"], every=True))


class TextRNN(Family):
    """A recurrent network that predicts the next character."""

    kind = "text_rnn"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"length": (12,), "width": (32,), "batch": (16,)}

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """Elman's network with tanh units."""
        length, width = options["length"], options["width"]
        return Task(
            lambda: Recurrent(data.VOCABULARY, width, width_mult),
            classify,
            text_batches(length, options["batch"], every=True),
        )


class Positions(nn.Module):
    """Embeddings of classes plus those of their positions."""

    def __init__(self, classes: int, length: int, width: int) -> None:
        super().__init__()
        self.classes, self.positions = nn.Embedding(classes, width), nn.Embedding(length, width)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, length, width)``."""
        embedded: Tensor = self.classes(input) + self.positions.weight
        return embedded


class TransformerBlock(nn.Module):
    """Causal self-attention with two heads and a perceptron, with normalisation before and a path around each."""

    heads = 2

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        # muP divides by the size of a head; both agree at the base width.
        self.scale = (width // self.heads * width_mult) ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, length, width)`` to the same."""
        batch, length, width = input.shape
        joined = self.query_key_value(self.before_attention(input))
        query, key, value = joined.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        future = torch.ones(length, length, dtype=torch.bool, device=input.device).triu(1)
        scores = (query @ key.mT * self.scale).masked_fill(future, -math.inf)
        attended = (scores.softmax(-1) @ value).transpose(1, 2).reshape(batch, length, width)
        hidden = input + self.out(attended)
        result: Tensor = hidden + self.mlp(self.before_mlp(hidden))
        return result


class Recurrent(nn.Module):
    """An Elman network over classes."""

    def __init__(self, classes: int, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding, self.recurrent = nn.Embedding(classes, width), nn.Linear(width, width)
        self.readout = Readout(width, classes, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, length, classes)``."""
        embedded = self.embedding(input)
        hidden = torch.zeros_like(embedded[:, 0])
        states = []
        for position in range(input.shape[1]):
            hidden = torch.tanh(embedded[:, position] + self.recurrent(hidden))
            states.append(hidden)
        result: Tensor = self.readout(torch.stack(states, dim=1))
        return result


FAMILIES: Mapping[str, type[Family]] = {
    family.kind: family
    for family in (ImageMLP, ImageConv, ImageAutoencoder, Teacher, Regression, TextMLP, TextAttention, TextRNN)
}
"""The families of this package by kind."""


def find_family(kind: str, folder: Path) -> type[Family]:
    """A family by its kind, or by ``file.py:ClassName``, the file being relative to ``folder``.

    A file is run to find its class, so use only files that you trust.

    Raises:
        ValueError: There is none, or the file cannot be run.
        OSError: The file cannot be read.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    file, _, name = kind.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(
            f"task family {kind!r} is unknown; choose one of {sorted(FAMILIES)}, or name your own as file.py:ClassName"
        )
    path = folder / file
    try:
        check_file(path)
    except FileNotFoundError:
        raise ValueError(f"task family {kind!r}: there is no file {path}") from None
    spec = importlib.util.spec_from_file_location(f"pylo_metatrain_family_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "it is a .py file"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"task family {kind!r}: {path} cannot be run: {type(error).__name__}: {error}") from error
    family = getattr(module, name, None)
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise ValueError(f"task family {kind!r}: {path} has no subclass of Family named {name!r}")
    return family
