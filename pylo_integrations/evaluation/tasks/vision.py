"""Suite 2, images: separable convolutions, a mixer, denoising with skips, and a metric of similarity."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, first_images
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.tasks import Readout


@functools.cache
def _images() -> tuple[Examples, Examples]:
    inputs, labels = first_images("fashion_mnist", 20_000)
    return divided(inputs.unsqueeze(1), labels)


@functools.cache
def _noisy() -> tuple[Examples, Examples]:
    """Images under noise of standard deviation 1; targets are without."""
    inputs, _ = first_images("fashion_mnist", 15_000)
    inputs = inputs.unsqueeze(1)
    return divided(inputs + torch.randn(inputs.shape, generator=generator_of("held out", "noise")), inputs)


@functools.cache
def _triplets() -> tuple[Examples, Examples]:
    """An image, one of its class, and one of another: ``(examples, 3, pixels)``; targets are unused."""
    inputs, labels = first_images("fashion_mnist", 15_000)
    generator = generator_of("held out", "triplets")
    parts = []
    for part in divided(inputs.flatten(1), labels):
        by_class = [(part.targets == label).nonzero().squeeze(1) for label in range(10)]

        def one_of(label: int, by_class: list[Tensor] = by_class) -> Tensor:
            rows = by_class[label % 10]
            return rows[torch.randint(len(rows), (), generator=generator)]

        shifts = torch.randint(1, 10, part.targets.shape, generator=generator)
        same = torch.stack([one_of(int(label)) for label in part.targets])
        other = torch.stack([one_of(int(label)) for label in part.targets + shifts])
        parts.append(Examples(torch.stack([part.inputs, part.inputs[same], part.inputs[other]], 1), part.targets))
    return parts[0], parts[1]


class _Channels(nn.LayerNorm):
    """Normalises channels of ``(batch, channels, height, width)``."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


class _ConvNeXt(nn.Module):
    """Depthwise convolutions and perceptrons of pixels (Liu et al., 2022), in 7 x 7 pixels."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 2, 2), _Channels(width))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 5, padding=2, groups=width),
                _Channels(width),
                nn.Conv2d(width, 2 * width, 1),
                nn.GELU(),
                nn.Conv2d(2 * width, width, 1),
            )
            for _ in range(2)
        )
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 10, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.stem(input)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.readout(self.norm(hidden.mean((-2, -1))))
        return output


class _Mixer(nn.Module):
    """Perceptrons along patches and along channels, in turn (Tolstikhin et al., 2021); 16 patches."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4, padding=1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.along_patches = nn.ModuleList(_two_layers(16, 32) for _ in range(2))
        self.along_channels = nn.ModuleList(_two_layers(width, 2 * width) for _ in range(2))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 10, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.patches(input).flatten(2).mT
        for number, (patches, channels) in enumerate(zip(self.along_patches, self.along_channels, strict=True)):
            hidden = hidden + patches(self.norms[2 * number](hidden).mT).mT
            hidden = hidden + channels(self.norms[2 * number + 1](hidden))
        output: Tensor = self.readout(self.norm(hidden).mean(1))
        return output


def _two_layers(ends: int, middle: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(ends, middle), nn.GELU(), nn.Linear(middle, ends))


class _UNet(nn.Module):
    """Down to 7 x 7 pixels and up again, with a path across (Ronneberger et al., 2015)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        half = width // 2
        self.down = nn.Sequential(nn.Conv2d(1, half, 3, padding=1), nn.GroupNorm(4, half), nn.SiLU())
        self.middle = nn.Sequential(
            nn.Conv2d(half, width, 3, 2, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.SiLU(),
            nn.ConvTranspose2d(width, half, 2, 2),
        )
        self.up = nn.Sequential(nn.Conv2d(2 * half, half, 3, padding=1), nn.SiLU())
        self.last, self.scale = nn.Conv2d(half, 1, 1), 1 / width_mult

    def forward(self, input: Tensor) -> Tensor:
        fine = self.down(input)
        output: Tensor = self.last(self.up(torch.cat([fine, self.middle(fine)], 1))) * self.scale
        return output


class _Metric(nn.Module):
    """Squared distances of an image to one of its class and to another, after a perceptron."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(
            nn.Linear(196, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), Readout(width, 16, width_mult)
        )

    def forward(self, input: Tensor) -> Tensor:
        anchor, same, other = self.embed(input).unbind(1)
        return torch.stack([(anchor - same).square().sum(-1), (anchor - other).square().sum(-1)], -1)


def _contrast(distances: Tensor, targets: Tensor) -> Tensor:
    """Soft triplet loss: which of two distances is the smaller."""
    return F.softplus(distances[:, 0] - distances[:, 1]).mean()


TASKS = (
    HeldOutTask("fashion_convnext", "Fashion-MNIST, two ConvNeXt blocks of width 64", 64, 8, _ConvNeXt, _images),
    HeldOutTask("fashion_mixer", "Fashion-MNIST, perceptron mixer of width 64", 64, 16, _Mixer, _images),
    HeldOutTask("fashion_denoising", "Fashion-MNIST under noise, U-Net of width 32", 32, 8, _UNet, _noisy),
    HeldOutTask(
        "fashion_triplets",
        "Fashion-MNIST, distances after a perceptron 256 x 2",
        256,
        32,
        _Metric,
        _triplets,
        loss=_contrast,
    ),
)
