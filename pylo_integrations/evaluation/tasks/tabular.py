"""Suite 2, tables: gated, residual, attending and mixed perceptrons on numbers without order."""

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
def _cancer() -> tuple[Examples, Examples]:
    """Wisconsin's breast cancers: 569 patients, 30 numbers, 2 classes."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ModuleNotFoundError:
        raise DataError("the breast cancer data are scikit-learn's: pip install scikit-learn") from None
    inputs, labels = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator_of("held out", "cancer"))
    return divided(standardised(torch.tensor(inputs, dtype=torch.float32))[order], torch.tensor(labels).long()[order])


@functools.cache
def _hastie() -> tuple[Examples, Examples]:
    """Ten normal numbers; whether their squares sum to more than the median (Hastie et al., 2009, 10.2)."""
    inputs = torch.randn(12_000, 10, generator=generator_of("held out", "hastie"))
    return divided(inputs, (inputs.square().sum(1) > 9.34).long())


@functools.cache
def _impedance() -> tuple[Examples, Examples]:
    """Friedman's second and third functions: size and phase of the impedance of a circuit, with noise."""
    generator = generator_of("held out", "impedance")
    low, high = torch.tensor([[0.0, 40 * math.pi, 0.0, 1.0], [100.0, 560 * math.pi, 1.0, 11.0]])
    inputs = low + (high - low) * torch.rand(8000, 4, generator=generator)
    reactance = inputs[:, 1] * inputs[:, 2] - 1 / (inputs[:, 1] * inputs[:, 3])
    targets = torch.stack([inputs[:, 0].hypot(reactance), (reactance / inputs[:, 0]).atan()], 1)
    targets = standardised(targets) + 0.1 * torch.randn(targets.shape, generator=generator)
    return divided(standardised(inputs), targets)


@functools.cache
def _blobs() -> tuple[Examples, Examples]:
    """Forty normal clouds in 20 dimensions, four to a class."""
    generator = generator_of("held out", "blobs")
    centres = 1.2 * torch.randn(40, 20, generator=generator)
    cloud = torch.randint(40, (10_000,), generator=generator)
    return divided(centres[cloud] + torch.randn(10_000, 20, generator=generator), cloud % 10)


class _Gated(nn.Module):
    """Two layers whose outputs are multiplied by gates (Dauphin et al., 2017)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(30, 2 * width), nn.Linear(width, 2 * width)])
        self.readout = Readout(width, 2, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        for layer in self.layers:
            input = F.glu(layer(input))
        output: Tensor = self.readout(input)
        return output


class _Residual(nn.Module):
    """A perceptron with normalisation and paths around its blocks (Gorishniy et al., 2021)."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.first = nn.Linear(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 2, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.first(input)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        output: Tensor = self.readout(F.relu(self.norm(hidden)))
        return output


class _Attending(nn.Module):
    """A transformer whose tokens are features (Gorishniy et al., 2021)."""

    heads = 4

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.slopes, self.starts = (nn.Parameter(torch.randn(4, width) / 2) for _ in range(2))
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.readout = Readout(width, 2, width_mult)
        self.scale = (width // self.heads * width_mult) ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        hidden = input.unsqueeze(-1) * self.slopes + self.starts
        joined = self.query_key_value(self.before_attention(hidden))
        query, key, value = joined.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(-2))
        hidden = hidden + self.mlp(self.before_mlp(hidden))
        output: Tensor = self.readout(hidden.mean(1))
        return output


class _Experts(nn.Module):
    """Four perceptrons, mixed by a gate that sees the input (Jacobs et al., 1991)."""

    experts = 4

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.gate, self.first = nn.Linear(20, self.experts), nn.Linear(20, self.experts * width)
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(self.experts))
        self.readout = Readout(width, 10, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.first(input)).chunk(self.experts, -1)
        found = torch.stack([layer(part) for layer, part in zip(self.second, hidden, strict=True)], -1)
        output: Tensor = self.readout(F.relu((found * self.gate(input).softmax(-1).unsqueeze(1)).sum(-1)))
        return output


TASKS = (
    HeldOutTask("cancer_gated", "breast cancers, gated perceptron 64 x 2", 64, 16, _Gated, _cancer),
    HeldOutTask("hastie_residual", "squares of ten numbers, residual perceptron 128 x 2", 128, 128, _Residual, _hastie),
    HeldOutTask("impedance_attention", "Friedman's circuit, features as tokens of 32", 32, 32, _Attending, _impedance),
    HeldOutTask("blobs_experts", "forty clouds, four experts of width 64", 64, 32, _Experts, _blobs),
)
