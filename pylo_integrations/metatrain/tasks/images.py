"""Families of small images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pylo_integrations.metatrain import data
from pylo_integrations.metatrain.tasks.base import Batch, Family, Model, Task, classify, square_error
from pylo_integrations.metatrain.tasks.networks import (
    BatchNorm,
    Mean,
    PatchTransformer,
    Pointwise,
    Readout,
    ResidualBlock,
    ResidualConv,
    mlp,
)


def image_batches(name: str, batch: int, shape: tuple[int, ...]) -> Callable[[Generator, int, bool], Batch]:
    """Batches of images, each of ``shape``, and labels."""
    splits = data.images(name)

    def draw(generator: Generator, count: int, validation: bool) -> Batch:
        split = splits[validation]
        index = torch.randint(len(split.labels), (count, batch), generator=generator)
        return split.inputs[index].view(count, batch, *shape), split.labels[index]

    return draw


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
    """Classification of small images by two convolutions of stride 2, with batch normalisation on request."""

    kind = "image_conv"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (8,),
        "activation": ("relu",),
        "norm": ("none",),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The network; ``width`` is the number of channels, ``norm`` is ``none`` or ``batch``."""
        norms: dict[str, Callable[[], nn.Module]] = {"none": nn.Identity, "batch": lambda: BatchNorm(options["width"])}
        if options["norm"] not in norms:
            raise ValueError(f"task family {self.kind}: norm={options['norm']!r} must be one of {sorted(norms)}")
        norm = norms[options["norm"]]
        side, width = data.images(options["data"])[0].inputs.shape[-1], options["width"]
        last = (side + 3) // 4

        def model() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(1, width, 3, 2, 1),
                norm(),
                Pointwise(options["activation"]),
                nn.Conv2d(width, width, 3, 2, 1),
                norm(),
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


class ImagePatches(Family):
    """Classification of small images by a vision transformer."""

    kind = "image_patches"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (32,),
        "depth": (2,),
        "batch": (16,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The transformer on 16 patches, of 4 pixels or as many as there are."""
        side = data.images(options["data"])[0].inputs.shape[-1]
        size = options["width"], options["depth"]
        return Task(
            lambda: PatchTransformer(side, -(-side // 4), *size, width_mult),
            classify,
            image_batches(options["data"], options["batch"], (1, side, side)),
        )


class ImageResidual(Family):
    """Classification of small images by a residual convolutional network with group normalisation."""

    kind = "image_residual"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (8,),
        "depth": (2,),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The network; ``width``, the number of channels, is a multiple of 4."""
        side, width = data.images(options["data"])[0].inputs.shape[-1], options["width"]
        if width % ResidualConv.groups:
            raise ValueError(f"task family {self.kind}: width={width} is no multiple of {ResidualConv.groups}")

        def model() -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(1, width, 3, 2, 1),
                *(ResidualConv(width) for _ in range(options["depth"])),
                nn.GroupNorm(ResidualConv.groups, width),
                nn.ReLU(),
                Mean((-2, -1)),
                Readout(width, 10, width_mult),
            )

        return Task(model, classify, image_batches(options["data"], options["batch"], (1, side, side)))


class ImageDenoiser(Family):
    """Prediction of the noise in small images, at all strengths of noise, as diffusion models are trained."""

    kind = "image_denoiser"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "data": ("digits",),
        "width": (64,),
        "depth": (3,),
        "batch": (32,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """A residual perceptron of the flattened image and the strength."""
        pixels, width = data.images(options["data"])[0].inputs[0].numel(), options["width"]
        images = image_batches(options["data"], options["batch"], (pixels,))

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            clean, _ = images(generator, count, validation)
            strength = torch.rand(*clean.shape[:-1], 1, generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            noisy = (1 - strength).sqrt() * clean + strength.sqrt() * noise
            return torch.cat([noisy, strength], dim=-1), noise

        def model() -> nn.Module:
            blocks = [ResidualBlock(width, width) for _ in range(options["depth"])]
            return nn.Sequential(nn.Linear(pixels + 1, width), *blocks, Readout(width, pixels, width_mult))

        return Task(model, square_error, draw)
