"""Suite 2, fields: networks of coordinates that stand for a picture, a body, or the solution of an equation."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, standardised
from pylo_integrations.metatrain import DataError
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.tasks import Readout


@functools.cache
def _photo() -> tuple[Examples, Examples]:
    """scikit-learn's photo of a temple, averaged down to 106 x 160 pixels: coordinates in [-1, 1] and colours."""
    try:
        from sklearn.datasets import load_sample_image

        photo = torch.tensor(load_sample_image("china.jpg"), dtype=torch.float32).permute(2, 0, 1)
    except ImportError:
        raise DataError("scikit-learn reads its photo with Pillow: pip install scikit-learn pillow") from None
    colours = F.avg_pool2d(photo, 4).flatten(1).T
    rows, columns = (torch.linspace(-1, 1, size // 4) for size in photo.shape[1:])
    order = torch.randperm(len(colours), generator=generator_of("held out", "photo"))
    return divided(torch.cartesian_prod(rows, columns)[order], standardised(colours)[order])


@functools.cache
def _body() -> tuple[Examples, Examples]:
    """Points in a cube and their distance to the surface of a union of eight spheres, negative inside."""
    generator = generator_of("held out", "body")
    centres, radii = 1.2 * torch.rand(8, 3, generator=generator) - 0.6, 0.15 + 0.2 * torch.rand(8, generator=generator)
    points = 2 * torch.rand(20_000, 3, generator=generator) - 1
    distances = (torch.cdist(points, centres) - radii).amin(1, keepdim=True)
    return divided(points, standardised(distances))


@functools.cache
def _charges() -> tuple[Examples, Examples]:
    """Points in a square, and the right hand side of Poisson's equation there: a few waves."""
    generator = generator_of("held out", "charges")
    points = torch.rand(10_000, 2, generator=generator)
    waves = torch.arange(1, 5) * math.pi
    heights = torch.randn(4, 4, generator=generator)
    density = torch.einsum("nk,kl,nl->n", (points[:, :1] * waves).sin(), heights, (points[:, 1:] * waves).sin())
    return divided(points, standardised(density).unsqueeze(1))


class _Sine(nn.Module):
    """Sines of layers, the first of high frequency (Sitzmann et al., 2020)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        layers = [nn.Linear(inputs, width) for inputs in (2, width, width)]
        for number, layer in enumerate(layers):
            bound = 1 / 2 if number == 0 else math.sqrt(6 / width) / 30
            nn.init.uniform_(layer.weight, -bound, bound)
        self.layers = nn.ModuleList(layers)
        self.readout = Readout(width, 3, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = (30 * layer(input)).sin()
        output: Tensor = self.readout(input)
        return output


class _Waves(nn.Module):
    """A perceptron of sines and cosines of coordinates, as of radiance fields (Mildenhall et al., 2020)."""

    frequencies = 4

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6 * self.frequencies, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            Readout(width, 1, width_mult),
        )

    def forward(self, input: Tensor) -> Tensor:
        waves = (input.unsqueeze(-1) * math.pi * 2.0 ** torch.arange(self.frequencies, device=input.device)).flatten(1)
        output: Tensor = self.layers(torch.cat([waves.sin(), waves.cos()], 1))
        return output


class _Poisson(nn.Module):
    """The Laplacian of a network that vanishes on the border (Raissi et al., 2019).

    Values travel with their first and second derivatives along both axes, from layer to layer.
    """

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs, width) for inputs in (2, width, width))
        self.last, self.scale = nn.Linear(width, 1), 1 / width_mult

    def forward(self, input: Tensor) -> Tensor:
        value = 2 * input - 1
        slope = 2 * torch.eye(2).to(input).unsqueeze(1).expand(2, len(input), 2)  # (axis, points, units)
        bend = torch.zeros_like(slope)
        for layer in self.layers:
            value = layer(value).tanh()
            slope, bend = (each @ layer.get_parameter("weight").T for each in (slope, bend))
            steepness = 1 - value.square()
            bend = steepness * (bend - 2 * value * slope.square())
            slope = steepness * slope
        value = self.last(value) * self.scale
        slope, bend = (each @ self.last.weight.T * self.scale for each in (slope, bend))
        # Times the product of x (1 - x) over both axes, whose derivatives are these.
        x = input.T.unsqueeze(-1)  # (axis, points, 1)
        own, other = x * (1 - x), (x * (1 - x)).flip(0)
        parts: Tensor = other * (own * bend + 2 * (1 - 2 * x) * slope - 2 * value)
        return -parts.sum(0)


TASKS = (
    HeldOutTask("photo_sines", "a photo, sines 128 x 3", 128, 128, _Sine, _photo),
    HeldOutTask("body_waves", "distances to a body, perceptron of waves 256 x 3", 256, 128, _Waves, _body),
    HeldOutTask("poisson_network", "Poisson's equation, perceptron 64 x 3", 64, 128, _Poisson, _charges),
)
