"""Suite 2, transfer: low-rank adapters of a frozen network, a student of a teacher, and coarse weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks import base
from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, divided, first_images, text_windows
from pylo_integrations.metatrain import data
from pylo_integrations.metatrain.tasks.networks import Positions, Readout, mlp

_LENGTH, _RANK = 24, 8
_ADAPTERS = (".down", ".up")


@functools.cache
def _forwards() -> Examples:
    return text_windows(_LENGTH)[0]


@functools.cache
def _backwards() -> tuple[Examples, Examples]:
    """Windows of the text, read from its end."""
    return text_windows(_LENGTH, backwards=True)


def _teacher() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(24, 48, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48 * 4 * 4, 10),
    )


@functools.cache
def _taught() -> tuple[Examples, Examples]:
    """Images, and how probable a convolutional network finds their classes at temperature 2."""
    images, labels = first_images("fashion_mnist", 15_000)
    images = images.unsqueeze(1)
    teacher = base.pretrained("teacher", _teacher, divided(images, labels)[0])
    with torch.no_grad():
        return divided(images.flatten(1), (teacher(images) / 2).softmax(1))


@functools.cache
def _labelled() -> tuple[Examples, Examples]:
    images, labels = first_images("fashion_mnist", 20_000)
    return divided(images.flatten(1), labels)


class _LowRank(nn.Linear):
    """Adds the product of two thin matrices (Hu et al., 2021); the second begins at zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down = nn.Parameter(torch.randn(_RANK, inputs) / inputs**0.5)
        self.up = nn.Parameter(torch.zeros(outputs, _RANK))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


class _Block(nn.Module):
    """Causal attention with four heads and a perceptron, adapted."""

    heads = 4

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query_key_value, self.out = _LowRank(width, 3 * width), _LowRank(width, width)
        self.rise, self.fall = _LowRank(width, 2 * width), _LowRank(2 * width, width)
        self.scale = (width // self.heads * width_mult) ** -0.5

    def forward(self, input: Tensor) -> Tensor:
        joined = self.query_key_value(self.norms[0](input)).unflatten(-1, (3, self.heads, -1))
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind()
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        hidden = input + self.out(seen.transpose(1, 2).flatten(-2))
        result: Tensor = hidden + self.fall(F.gelu(self.rise(self.norms[1](hidden))))
        return result


class _Adapted(nn.Module):
    """A language model of which only the adapters train."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding = Positions(data.VOCABULARY, _LENGTH, width)
        self.blocks = nn.Sequential(*(_Block(width, width_mult) for _ in range(2)))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, data.VOCABULARY, width_mult)
        for name, param in self.named_parameters():
            param.requires_grad_(name.endswith(_ADAPTERS))

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.readout(self.norm(self.blocks(self.embedding(input))))
        return output


@functools.cache
def _frozen() -> Mapping[str, Tensor]:
    """The language model, trained on the text as it is written, without adapters."""

    def make() -> nn.Module:
        model = _Adapted(_WIDTH, 1.0)
        for name, param in model.named_parameters():
            param.requires_grad_(not name.endswith(_ADAPTERS))
        return model

    model = base.pretrained("language model", make, _forwards(), batch=8)
    return {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(_ADAPTERS)}


def _divergence(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of the student's probabilities from the teacher's, both at temperature 2."""
    return F.kl_div((outputs / 2).log_softmax(1), targets, reduction="batchmean")


class _Coarse(nn.Linear):
    """Weights of fifteen values; gradients pass as if they were not rounded (Jacob et al., 2018)."""

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.detach().abs().amax() / 7
        rounded = (self.weight / scale).round() * scale
        return F.linear(input, self.weight + (rounded - self.weight).detach(), self.bias)


def _coarse(width: int, width_mult: float) -> nn.Module:
    return nn.Sequential(
        _Coarse(196, width), nn.ReLU(), _Coarse(width, width), nn.ReLU(), Readout(width, 10, width_mult)
    )


_WIDTH = 64

TASKS = (
    HeldOutTask(
        "text_adapters", "characters backwards, adapters of a GPT 64 x 2", _WIDTH, 8, _Adapted, _backwards, _frozen
    ),
    HeldOutTask(
        "fashion_student",
        "a teacher's probabilities, perceptron 64 x 2",
        64,
        32,
        lambda width, width_mult: mlp(196, width, 2, 10, "gelu", width_mult),
        _taught,
        loss=_divergence,
    ),
    HeldOutTask("fashion_coarse", "Fashion-MNIST, perceptron 192 x 2 of 4 bits", 192, 32, _coarse, _labelled),
)
