"""Families of symbols: tables of embeddings, and rules that hold between symbols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from pylo_integrations.metatrain.tasks.base import Batch, Family, Model, Task, classify, square_error
from pylo_integrations.metatrain.tasks.networks import DotProduct, Positions, Readout, TransformerBlock


class Factorisation(Family):
    """Regression of a noisy matrix of rank 4 from its elements, by two tables of embeddings."""

    kind = "factorisation"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"rows": (100, 300), "width": (8,), "batch": (64,)}

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """``width`` is the length of embeddings."""
        rows, batch = options["rows"], options["batch"]
        left, right = torch.randn(2, rows, 4, generator=generator)
        matrix = left @ right.T / 2

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            pairs = torch.randint(rows, (count, batch, 2), generator=generator)
            noise = 0.2 * torch.randn(count, batch, generator=generator)
            return pairs, matrix[pairs[..., 0], pairs[..., 1]] + noise

        return Task(lambda: DotProduct(rows, options["width"]), square_error, draw)


class Modular(Family):
    """The sum of two numbers modulo a third, learned from four fifths of all pairs."""

    kind = "modular"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"modulus": (23, 41), "width": (48,), "batch": (64,)}

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """Embeddings and a perceptron; validation is on the other fifth."""
        modulus, width, batch = options["modulus"], options["width"], options["batch"]
        pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
        pairs = pairs[torch.randperm(len(pairs), generator=generator)]
        splits = pairs[len(pairs) // 5 :], pairs[: len(pairs) // 5]

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            known = splits[validation]
            drawn = known[torch.randint(len(known), (count, batch), generator=generator)]
            return drawn, drawn.sum(-1) % modulus

        def model() -> nn.Module:
            hidden = nn.Linear(2 * width, 2 * width)
            ends = nn.ReLU(), Readout(2 * width, modulus, width_mult)
            return nn.Sequential(nn.Embedding(modulus, width), nn.Flatten(), hidden, *ends)

        return Task(model, classify, draw)


class Recall(Family):
    """A causal transformer that repeats a sequence of symbols."""

    kind = "recall"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "symbols": (12,),
        "length": (8,),
        "width": (32,),
        "depth": (2,),
        "batch": (16,),
    }

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """The loss is that of the second half."""
        symbols, length, width, batch = (options[key] for key in ("symbols", "length", "width", "batch"))
        if width % TransformerBlock.heads:
            raise ValueError(
                f"task family {self.kind}: width={width} is no multiple of its {TransformerBlock.heads} heads"
            )

        def draw(generator: Generator, count: int, validation: bool) -> Batch:
            sequence = torch.randint(symbols, (count, batch, length), generator=generator)
            twice = torch.cat([sequence, sequence], dim=-1)
            return twice[..., :-1], twice[..., 1:]

        def repeat(model: Model, batch: Batch) -> Tensor:
            inputs, following = batch
            logits = model(inputs)[:, length - 1 :]
            return F.cross_entropy(logits.reshape(-1, symbols), following[:, length - 1 :].reshape(-1))

        def model() -> nn.Module:
            blocks = [TransformerBlock(width, width_mult) for _ in range(options["depth"])]
            ends = nn.LayerNorm(width), Readout(width, symbols, width_mult)
            return nn.Sequential(Positions(symbols, 2 * length - 1, width), *blocks, *ends)

        return Task(model, repeat, draw)
