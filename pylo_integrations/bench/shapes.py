"""Parameters of well-known models: their shapes, and what can be counted from those."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from pylo_integrations.catalog import OptimizerSpec
from pylo_integrations.rules.base import RuleChoice
from pylo_integrations.sharding.layout import AxisOrder, TensorLayout


class ParamShape(NamedTuple):
    """Shape of a parameter, which of its axes is the input, and whether it is an embedding."""

    shape: tuple[int, ...]
    axes: AxisOrder = "out_in"
    embeds: bool = False

    def rule_of(self, spec: OptimizerSpec) -> RuleChoice:
        """Who steps it, where the optimizer groups the parameters of a model."""
        return "adamw" if self.embeds and spec.cls.adamw_embeddings else "learned"


def vit_block(width: int) -> list[ParamShape]:
    """Parameters of a transformer's block as in timm."""
    return [
        *_vectors(width, 2),
        *_linear(width, 3 * width),
        *_linear(width, width),
        *_vectors(width, 2),
        *_linear(width, 4 * width),
        *_linear(4 * width, width),
    ]


def vit_shapes(
    width: int, depth: int = 12, *, patch: int = 16, image: int = 224, classes: int = 1000
) -> list[ParamShape]:
    """Parameters of a vision transformer as in timm, class token and learned positions included."""
    tokens = (image // patch) ** 2 + 1
    return [
        ParamShape((1, 1, width)),
        ParamShape((1, tokens, width)),
        ParamShape((width, 3, patch, patch)),
        *_vectors(width, 1),
        *(vit_block(width) * depth),
        *_vectors(width, 2),
        *_linear(width, classes),
    ]


def gpt2_shapes(width: int = 768, depth: int = 12, *, vocabulary: int = 50257, context: int = 1024) -> list[ParamShape]:
    """Parameters of GPT-2 as in transformers: Conv1D stores (in, out), the output layer is the token embedding."""
    block = [
        *_vectors(width, 2),
        *_linear(width, 3 * width, "in_out"),
        *_linear(width, width, "in_out"),
        *_vectors(width, 2),
        *_linear(width, 4 * width, "in_out"),
        *_linear(4 * width, width, "in_out"),
    ]
    embeddings = [ParamShape((vocabulary, width), "in_out", True), ParamShape((context, width), "in_out", True)]
    return [*embeddings, *(block * depth), *_vectors(width, 2)]


def llama_shapes(
    width: int, depth: int, hidden: int, *, vocabulary: int = 32_000, keys: int | None = None
) -> list[ParamShape]:
    """Parameters of LLaMA as in transformers: no biases, and an output layer of its own.

    Args:
        width: Of the residual stream.
        depth: Blocks.
        hidden: Units of the feed-forward layers.
        vocabulary: Tokens.
        keys: Width of keys and values, where heads share them.
    """
    block = [
        *_vectors(width, 1),
        *[ParamShape((width, width))] * 2,
        *[ParamShape((keys or width, width))] * 2,
        *_vectors(width, 1),
        *[ParamShape((hidden, width))] * 2,
        ParamShape((width, hidden)),
    ]
    embedding = ParamShape((vocabulary, width), "in_out", True)
    return [embedding, *(block * depth), *_vectors(width, 1), ParamShape((vocabulary, width))]


def _vectors(width: int, count: int) -> list[ParamShape]:
    return [ParamShape((width,))] * count


def _linear(inputs: int, outputs: int, axes: AxisOrder = "out_in") -> list[ParamShape]:
    weight = (outputs, inputs) if axes == "out_in" else (inputs, outputs)
    return [ParamShape(weight, axes), ParamShape((outputs,))]


SHAPES: Mapping[str, Callable[[], list[ParamShape]]] = {
    "vit_ti": lambda: vit_shapes(192),
    "vit_b16": lambda: vit_shapes(768),
    "gpt2": gpt2_shapes,
    "matrix": lambda: [ParamShape((768, 3072))],
    "vit_block": lambda: vit_block(768),
    "mlp_512": lambda: [*_linear(784, 512), *_linear(512, 512), *_linear(512, 10)],
    "many": lambda: [ParamShape((64,))] * 10_000,
    "tiny": lambda: vit_shapes(16, 1, patch=4, image=8, classes=10),
    "llama_1b": lambda: llama_shapes(2048, 22, 5504),
    "llama_7b": lambda: llama_shapes(4096, 32, 11_008),
    "llama_13b": lambda: llama_shapes(5120, 40, 13_824),
    "llama_70b": lambda: llama_shapes(8192, 80, 28_672, keys=1024),
    "llama_65b": lambda: llama_shapes(8192, 80, 22_016),
}
"""Parameter shapes by the name that ``--shapes`` takes; ``matrix`` is one layer of a transformer, ``many`` are small
vectors, ``tiny`` is for trying things out. Those of LLaMA (Touvron et al., 2023; 1b is ours, 70b that of LLaMA 2) are
there to be simulated."""


def numel(kinds: Iterable[ParamShape]) -> int:
    """Elements of all parameters."""
    return sum(math.prod(kind.shape) for kind in kinds)


def rows_and_columns(kind: ParamShape) -> int:
    """Numbers in the row and column statistics of a tensor, one decay's worth; 0 below rank 2."""
    layout = TensorLayout.whole(kind.shape, kind.axes)
    return sum(math.prod(layout.without(axis)) for axis in layout.factored or ())


def describe_shapes(shapes: str) -> dict[str, Any]:
    """A name in :data:`SHAPES` and what is counted of it, for records."""
    kinds = SHAPES[shapes]()
    return {
        "shapes": shapes,
        "parameters": numel(kinds),
        "tensors": len(kinds),
        "rows_and_columns": sum(map(rows_and_columns, kinds)),
    }
