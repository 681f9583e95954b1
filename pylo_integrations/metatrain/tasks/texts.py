"""Families of text: the next character."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Generator, nn

from pylo_integrations.metatrain import data
from pylo_integrations.metatrain.tasks.base import Batch, Family, Task, classify
from pylo_integrations.metatrain.tasks.networks import Gated, Positions, Readout, Recurrent, TransformerBlock, mlp


def text_batches(length: int, batch: int, every: bool) -> Callable[[Generator, int, bool], Batch]:
    """Batches of ``length`` characters, and the next character at every position, or after the last only."""
    splits = data.text()

    def draw(generator: Generator, count: int, validation: bool) -> Batch:
        split = splits[validation]
        start = torch.randint(len(split) - length - 1, (count, batch, 1), generator=generator)
        window = split[start + torch.arange(length + 1)]
        return window[..., :-1], (window[..., 1:] if every else window[..., -1])

    return draw


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


class TextGRU(Family):
    """A gated recurrent network that predicts the next character."""

    kind = "text_gru"
    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {"length": (16,), "width": (32,), "batch": (16,)}

    def build(self, generator: Generator, width_mult: float, **options: Any) -> Task:
        """One layer, its gates' matrices stacked as torch stacks them."""
        length, width = options["length"], options["width"]
        return Task(
            lambda: Gated(data.VOCABULARY, width, width_mult),
            classify,
            text_batches(length, options["batch"], every=True),
        )
