"""Suite 1: thirteen tasks, on which no theta of this package was trained or chosen."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations.evaluation.tasks import base
from pylo_integrations.evaluation.tasks.base import Examples, HeldOutTask, loss_of
from pylo_integrations.metatrain import DataError, data
from pylo_integrations.metatrain.seeds import generator_of, seed_of
from pylo_integrations.metatrain.tasks.networks import Readout, mlp

# -- data ------------------------------------------------------------------------------------------------------------


@functools.cache
def _images(name: str, *, flat: bool = True) -> tuple[Examples, Examples]:
    training, validation = (
        Examples(split.inputs.flatten(1) if flat else split.inputs.unsqueeze(1), split.labels)
        for split in data.images(name)
    )
    return training, validation


def _reconstructed() -> tuple[Examples, Examples]:
    training, validation = (Examples(inputs, inputs) for inputs, _ in _images("fashion_mnist"))
    return training, validation


@functools.cache
def _fashion_classes(first: int, last: int, training_examples: int) -> tuple[Examples, Examples]:
    """Fashion-MNIST of a range of classes only, the first so many of the training examples."""

    def part(examples: Examples) -> Examples:
        index = ((examples.targets >= first) & (examples.targets <= last)).nonzero().squeeze(1)
        return Examples(examples.inputs[index], examples.targets[index] - first)

    training, validation = map(part, _images("fashion_mnist", flat=False))
    return training.rows(torch.arange(min(training_examples, len(training.targets)))), validation


@functools.cache
def _text() -> tuple[Examples, Examples]:
    return base.text_windows(_LENGTH)


@functools.cache
def _friedman() -> tuple[Examples, Examples]:
    """Friedman's first function of points in a cube, with noise ("Multivariate Adaptive Regression Splines", 1991)."""
    generator = generator_of("held out", "friedman")
    x = torch.rand(5000, 10, generator=generator)
    y = 10 * torch.sin(math.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2 + 10 * x[:, 3] + 5 * x[:, 4]
    y += torch.randn(len(y), generator=generator)
    return _split(x, y)


@functools.cache
def _diabetes() -> tuple[Examples, Examples]:
    try:
        from sklearn.datasets import load_diabetes
    except ModuleNotFoundError:
        raise DataError("the diabetes data are scikit-learn's: pip install scikit-learn") from None
    inputs, targets = load_diabetes(return_X_y=True)
    return _split(torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets, dtype=torch.float32))


def _split(inputs: Tensor, targets: Tensor) -> tuple[Examples, Examples]:
    """Standardise both, and keep every fifth example, in random order, for validation."""
    order = torch.randperm(len(inputs), generator=generator_of("held out", "split"))
    inputs, targets = ((array - array.mean(0)) / array.std(0) for array in (inputs[order], targets[order]))
    held_out = torch.arange(len(order)) % data.VALIDATION == 0
    training, validation = (Examples(inputs[part], targets[part].unsqueeze(1)) for part in (~held_out, held_out))
    return training, validation


# -- networks --------------------------------------------------------------------------------------------------------


def _mlp(inputs: int, depth: int, outputs: int, activation: str) -> Callable[[int, float], nn.Module]:
    return lambda width, width_mult: mlp(inputs, width, depth, outputs, activation, width_mult)


def _autoencoder(pixels: int, code: int) -> Callable[[int, float], nn.Module]:
    def network(width: int, width_mult: float) -> nn.Module:
        encoder = mlp(pixels, width, 2, code, "gelu", width_mult)
        return nn.Sequential(*encoder, *mlp(code, width, 2, pixels, "gelu", width_mult))

    return network


def _batch_norm_conv(width: int, width_mult: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.Flatten(),
        Readout(2 * width * 4 * 4, 10, width_mult),
    )


def _plain_conv(classes: int) -> Callable[[int, float], nn.Module]:
    def network(width: int, width_mult: float) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, width, 5, 2, 2),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(width * 4 * 4, 2 * width),
            nn.GELU(),
            Readout(2 * width, classes, width_mult),
        )

    return network


class _Residual(nn.Module):
    """Two convolutions with batch normalisation and a path around them (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.around = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        hidden = F.relu(self.norms[0](self.first(input)))
        return F.relu(self.norms[1](self.second(hidden)) + self.around(input))


def _resnet(width: int, width_mult: float) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        _Residual(width, width, 1),
        _Residual(width, 2 * width, 2),
        _Residual(2 * width, 4 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Readout(4 * width, 10, width_mult),
    )


class _Block(nn.Module):
    """Self-attention with four heads and a perceptron, with normalisation before and a path around each."""

    heads = 4

    def __init__(self, width: int, width_mult: float, is_causal: bool) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.is_causal = is_causal
        self.scale = (width // self.heads * width_mult) ** -0.5  # muP's 1 / head size, equal at the base width

    def forward(self, input: Tensor) -> Tensor:
        batch, length, width = input.shape
        joined = self.query_key_value(self.before_attention(input))
        query, key, value = joined.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal, scale=self.scale)
        hidden = input + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = hidden + self.mlp(self.before_mlp(hidden))
        return result


class _VisionTransformer(nn.Module):
    """The vision transformer of the recipe, smaller: 14 x 14 pixels in 16 patches, averaged at the end."""

    depth = 3

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 4, 4, padding=1)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(_Block(width, width_mult, is_causal=False) for _ in range(self.depth)))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 10, width_mult)
        self.apply(_as_gpt2_initialises)

    def forward(self, input: Tensor) -> Tensor:
        tokens = self.patches(input).flatten(2).mT + self.positions
        result: Tensor = self.readout(self.norm(self.blocks(tokens)).mean(1))
        return result


class _LanguageModel(nn.Module):
    """GPT-2, smaller, over characters, and with an output layer of its own."""

    depth = 3

    def __init__(self, length: int, width: int, width_mult: float) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(data.VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, width_mult, is_causal=True) for _ in range(self.depth)))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, data.VOCABULARY, width_mult)
        self.apply(_as_gpt2_initialises)

    def forward(self, input: Tensor) -> Tensor:
        embedded = self.characters(input) + self.positions.weight
        result: Tensor = self.readout(self.norm(self.blocks(embedded)))
        return result


def _as_gpt2_initialises(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class _LSTM(nn.Module):
    """A long short-term memory over characters."""

    def __init__(self, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(data.VOCABULARY, width), nn.LSTM(width, width, batch_first=True)
        self.readout = Readout(width, data.VOCABULARY, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.readout(self.lstm(self.embedding(input))[0])
        return result


@functools.cache
def _pretrained() -> Mapping[str, Tensor]:
    """The network of the fine-tuning task but for its last layer, trained on the other five classes."""
    (inputs, labels), _ = _fashion_classes(0, 4, 24_000)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("held out", "pretraining"))
        model = _plain_conv(5)(_FINETUNED_WIDTH, 1.0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(base.PRETRAINING_STEPS):
            index = torch.randint(len(labels), (64,))
            optimizer.zero_grad()
            loss_of(model(inputs[index]), labels[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    last = f"{len(model) - 1}."  # type: ignore[arg-type]
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(last)}


_FINETUNED_WIDTH = 24
_LENGTH = 32

TASKS = (
    HeldOutTask(
        "digits_mlp_256",
        "digits, perceptron 256 x 2",
        256,
        32,
        _mlp(64, 2, 10, "relu"),
        lambda: _images("digits"),
    ),
    HeldOutTask(
        "fashion_mlp_32",
        "Fashion-MNIST, perceptron 32 x 3, SiLU",
        32,
        32,
        _mlp(196, 3, 10, "silu"),
        lambda: _images("fashion_mnist"),
    ),
    HeldOutTask(
        "fashion_mlp_128",
        "Fashion-MNIST, perceptron 128 x 2",
        128,
        32,
        _mlp(196, 2, 10, "relu"),
        lambda: _images("fashion_mnist"),
    ),
    HeldOutTask(
        "fashion_mlp_512",
        "Fashion-MNIST, perceptron 512 x 2",
        512,
        32,
        _mlp(196, 2, 10, "relu"),
        lambda: _images("fashion_mnist"),
    ),
    HeldOutTask(
        "fashion_conv_bn",
        "Fashion-MNIST, two convolutions with batch normalisation",
        24,
        32,
        _batch_norm_conv,
        lambda: _images("fashion_mnist", flat=False),
    ),
    HeldOutTask(
        "fashion_resnet",
        "Fashion-MNIST, residual network of 7 convolutions with batch normalisation",
        16,
        32,
        _resnet,
        lambda: _images("fashion_mnist", flat=False),
    ),
    HeldOutTask(
        "fashion_vit",
        "Fashion-MNIST, vision transformer of depth 3 and width 64",
        64,
        16,
        _VisionTransformer,
        lambda: _images("fashion_mnist", flat=False),
    ),
    HeldOutTask(
        "text_gpt",
        "characters, GPT-2 of depth 3 and width 64",
        64,
        8,
        functools.partial(_LanguageModel, _LENGTH),
        _text,
    ),
    HeldOutTask("text_lstm", "characters, LSTM of width 96", 96, 8, _LSTM, _text),
    HeldOutTask(
        "fashion_autoencoder",
        "Fashion-MNIST, autoencoder 96-96-16-96-96",
        96,
        32,
        _autoencoder(196, 16),
        _reconstructed,
    ),
    HeldOutTask(
        "friedman",
        "Friedman's function, perceptron 100 x 3",
        100,
        32,
        _mlp(10, 3, 1, "silu"),
        _friedman,
    ),
    HeldOutTask("diabetes", "diabetes data, perceptron 48 x 2", 48, 32, _mlp(10, 2, 1, "gelu"), _diabetes),
    HeldOutTask(
        "fashion_finetune",
        "2000 examples of five classes of Fashion-MNIST, convolutions pretrained on the other five",
        _FINETUNED_WIDTH,
        32,
        _plain_conv(5),
        lambda: _fashion_classes(5, 9, 2000),
        _pretrained,
    ),
)
