"""Suite 2, generative: a variational autoencoder, diffusion, a flow and an autoregressive network."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, first_images
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.tasks import Readout

_CODE = 8


@functools.cache
def _images_and_noise() -> tuple[Examples, Examples]:
    """Pixels, and the noise of the code behind them; targets are the pixels."""
    images = first_images("fashion_mnist", 15_000)[0].flatten(1)
    noise = torch.randn(len(images), _CODE, generator=generator_of("held out", "code"))
    return divided(torch.cat([images, noise], 1), images)


@functools.cache
def _noised() -> tuple[Examples, Examples]:
    """Digits under eight draws of noise, and the angle of the mixture behind them; targets are the noise."""
    generator = generator_of("held out", "diffusion")

    def noised(images: Tensor) -> Examples:
        images = images.flatten(1).repeat(8, 1)
        angle = math.pi / 2 * torch.rand(len(images), 1, generator=generator)
        noise = torch.randn(images.shape, generator=generator)
        return Examples(torch.cat([angle.cos() * images + angle.sin() * noise, angle], 1), noise)

    training, validation = divided(*first_images("digits", 1795))
    return noised(training.inputs), noised(validation.inputs)


@functools.cache
def _spirals() -> tuple[Examples, Examples]:
    """Points of two spirals with noise, in units that keep negative log likelihoods above zero; no targets."""
    generator = generator_of("held out", "spirals")
    turn = 3 * math.pi * torch.rand(20_000, generator=generator).sqrt()
    sign = torch.randint(2, (20_000,), generator=generator) * 2 - 1
    points = torch.stack([turn * turn.cos(), turn * turn.sin()], 1) * sign.unsqueeze(1)
    points = points + 0.4 * torch.randn(points.shape, generator=generator)
    return divided(points, sign)


@functools.cache
def _binary() -> tuple[Examples, Examples]:
    """Digits in black and white; targets are the inputs."""
    images = (first_images("digits", 1795)[0].flatten(1) > 0).float()
    return divided(images, images)


class _Variational(nn.Module):
    """Encoder and decoder of a normal code (Kingma & Welling, 2014): image, means and log variances."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(196, width), nn.ReLU(), Readout(width, 2 * _CODE, width_mult))
        self.decoder = nn.Sequential(nn.Linear(_CODE, width), nn.ReLU(), Readout(width, 196, width_mult))

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, noise = torch.split(input, [196, _CODE], 1)
        mean, log_variance = self.encoder(images).chunk(2, 1)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance


def _evidence(outputs: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    """Negative lower bound of the evidence, per pixel and without constants."""
    images, mean, log_variance = outputs
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
    return F.mse_loss(images, targets) / 2 + divergence / targets.shape[1]


class _Denoiser(nn.Module):
    """A residual perceptron that is told how much noise there is (Ho et al., 2020)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.first, self.noise = nn.Linear(64, width), nn.Linear(16, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2)
        )
        self.readout = Readout(width, 64, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        images, angle = torch.split(input, [64, 1], 1)
        waves = angle * torch.arange(1, 9, device=input.device)
        hidden = self.first(images) + self.noise(torch.cat([waves.sin(), waves.cos()], 1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.readout(hidden)
        return output


class _Flow(nn.Module):
    """Six affine couplings (Dinh et al., 2017): the normal point behind a point, and the log volume."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(
            nn.Sequential(
                nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), Readout(width, 2, width_mult)
            )
            for _ in range(6)
        )

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        fixed, moved = (input / 6).chunk(2, 1)
        volume = torch.full_like(fixed, -2 * math.log(6))
        for coupling in self.couplings:
            log_scale, shift = coupling(fixed).chunk(2, 1)
            log_scale = 2 * (log_scale / 2).tanh()
            volume = volume + log_scale
            fixed, moved = moved * log_scale.exp() + shift, fixed
        return torch.cat([fixed, moved], 1), volume


def _unlikelihood(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    """Negative log likelihood of a point."""
    points, volume = outputs
    return (points.square().sum(1) / 2 + math.log(2 * math.pi) - volume.squeeze(1)).mean()


class _Masked(nn.Linear):
    """Only from units of smaller degree, or of equal degree if not strict."""

    mask: Tensor

    def __init__(self, inputs: Tensor, outputs: Tensor, strict: bool, scale: float = 1.0) -> None:
        super().__init__(len(inputs), len(outputs))
        seen = outputs.unsqueeze(1) > inputs if strict else outputs.unsqueeze(1) >= inputs
        self.register_buffer("mask", scale * seen.float(), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * self.mask, self.bias)


class _Autoregressive(nn.Module):
    """Each pixel from those before it, by masked layers (Germain et al., 2015)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        pixels, units = torch.arange(64), torch.arange(width) % 63
        self.layers = nn.Sequential(
            _Masked(pixels, units, False),
            nn.ReLU(),
            _Masked(units, units, False),
            nn.ReLU(),
            _Masked(units, pixels, True, 1 / width_mult),
        )

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.layers(input)
        return output


TASKS = (
    HeldOutTask(
        "fashion_variational",
        "Fashion-MNIST, variational autoencoder 256-8-256",
        256,
        32,
        _Variational,
        _images_and_noise,
        loss=_evidence,
    ),
    HeldOutTask("digits_diffusion", "noise in digits, residual perceptron 128 x 4", 128, 128, _Denoiser, _noised),
    HeldOutTask("spirals_flow", "two spirals, six couplings of width 64", 64, 128, _Flow, _spirals, loss=_unlikelihood),
    HeldOutTask(
        "digits_autoregressive",
        "black and white digits, masked perceptron 512 x 2",
        512,
        16,
        _Autoregressive,
        _binary,
        loss=F.binary_cross_entropy_with_logits,
    ),
)
