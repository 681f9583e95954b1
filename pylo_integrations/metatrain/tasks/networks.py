"""Networks and pieces of them, without buffers, so that ``torch.func`` can train many at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
    """Self-attention with two heads and a perceptron, with normalisation before and a path around each."""

    heads = 2

    def __init__(self, width: int, width_mult: float, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
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
        scores = query @ key.mT * self.scale
        if self.causal:
            future = torch.ones(length, length, dtype=torch.bool, device=input.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
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


class Gated(nn.Module):
    """A gated recurrent unit over classes."""

    def __init__(self, classes: int, width: int, width_mult: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.inputs, self.recurrent = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.readout = Readout(width, classes, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, length, classes)``."""
        embedded = self.embedding(input)
        hidden = torch.zeros_like(embedded[:, 0])
        states = []
        for position in self.inputs(embedded).unbind(1):
            update, reset, new = position.chunk(3, -1)
            update_before, reset_before, new_before = self.recurrent(hidden).chunk(3, -1)
            keep = torch.sigmoid(update + update_before)
            candidate = torch.tanh(new + torch.sigmoid(reset + reset_before) * new_before)
            hidden = keep * hidden + (1 - keep) * candidate
            states.append(hidden)
        result: Tensor = self.readout(torch.stack(states, dim=1))
        return result


class ResidualBlock(nn.Module):
    """A perceptron with normalisation before it and a path around it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., width)`` to the same."""
        result: Tensor = input + self.down(F.gelu(self.up(self.norm(input))))
        return result


class BatchNorm(nn.Module):
    """Batch normalisation of feature maps by the statistics of the batch, in training and after: it has no buffers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, width, side, side)`` to the same."""
        return F.batch_norm(input, None, None, self.weight, self.bias, training=True)


class ResidualConv(nn.Module):
    """Two convolutions with group normalisation before each and a path around them."""

    groups = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(self.groups, width), nn.Conv2d(width, width, 3, 1, 1)
        self.next_norm, self.next_conv = nn.GroupNorm(self.groups, width), nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, width, side, side)`` to the same."""
        result: Tensor = input + self.next_conv(F.relu(self.next_norm(self.conv(F.relu(self.norm(input))))))
        return result


class Mean(nn.Module):
    """The mean over axes."""

    def __init__(self, axes: tuple[int, ...]) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, input: Tensor) -> Tensor:
        """All axes but those."""
        return input.mean(self.axes)


class PatchTransformer(nn.Module):
    """A vision transformer: square patches, positions, blocks, and the mean over patches."""

    def __init__(self, side: int, patch: int, width: int, depth: int, width_mult: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, width_mult, causal=False) for _ in range(depth)))
        self.norm, self.readout = nn.LayerNorm(width), Readout(width, 10, width_mult)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, 1, side, side)`` to ``(batch, 10)``."""
        hidden = self.blocks(self.patches(input).flatten(2).mT + self.positions)
        result: Tensor = self.readout(self.norm(hidden).mean(1))
        return result


class DotProduct(nn.Module):
    """Two tables of embeddings, whose dot product and bias are the output."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.left, self.right, self.bias = nn.Embedding(rows, width), nn.Embedding(rows, width), nn.Embedding(rows, 1)
        for table in (self.left, self.right, self.bias):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, input: Tensor) -> Tensor:
        """``(batch, 2)`` indices to ``(batch,)``."""
        left, right = input.unbind(-1)
        result: Tensor = (self.left(left) * self.right(right)).sum(-1) + self.bias(right).squeeze(-1)
        return result


class Adapted(nn.Module):
    """A frozen linear layer, and low-rank factors that are trained; the second starts at zero."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.frozen = weight
        outputs, inputs = weight.shape
        self.down, self.up = nn.Parameter(torch.empty(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, input: Tensor) -> Tensor:
        """``(..., inputs)`` to ``(..., outputs)``; twice the product of the factors counts."""
        return input @ (self.frozen + 2 * self.up @ self.down).T
