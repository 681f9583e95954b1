"""The small networks of learned optimizers, evaluated from weights that are data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pylo_integrations.rules.features import MATRIX_FEATURES, channel_counts

STACK = "ff_mod_stack/~/"
"""Prefix of the names of the Celo family's and VeLO's MLPs in theta, as the reference has it."""


def mlp(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """A ReLU multilayer perceptron over the channel axis.

    Args:
        inputs: ``(tensors, channels, elements)``.
        weights: Per layer ``(outputs, inputs)``, or ``(tensors, outputs, inputs)`` for a network per tensor.
        biases: Per layer ``(outputs,)`` or ``(tensors, outputs)``.

    Returns:
        ``(tensors, outputs of the last layer, elements)``.
    """
    hidden = inputs
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = torch.baddbmm(bias.unsqueeze(-1), weight.expand(hidden.shape[0], -1, -1), hidden)
        if layer < len(weights) - 1:
            hidden.relu_()
    return hidden


def steps(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, exp_mult: float) -> Tensor:
    """``d * exp(a * exp_mult)`` of a network's two outputs ``(d, a)``.

    Args:
        inputs: ``(tensors, channels, *box)``.
        weights: As for :func:`mlp`.
        biases: As for :func:`mlp`.
        exp_mult: Scale of the magnitude output inside the exponential.

    Returns:
        ``(tensors, 1, *box)``.
    """
    outputs = mlp(inputs.flatten(2), weights, biases)
    outputs = outputs.view(len(inputs), 2, *inputs.shape[2:])
    direction, magnitude = outputs[:, :1], outputs[:, 1:]
    return (magnitude * exp_mult).exp_() * direction  # not in place: meta-training differentiates it


def read_mlp(
    arrays: Mapping[str, Tensor], owner: str, prefix: str, inputs: int, outputs: int, others: Collection[str] = ()
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases for :func:`mlp` from theta.

    Args:
        arrays: ``{prefix}w0``, ``{prefix}b0``, ``{prefix}w1``... with weights (inputs, outputs).
        owner: Name of the architecture, for messages.
        prefix: Of the names.
        inputs: Of the first layer.
        outputs: Of the last layer; the widths between them are free.
        others: Names in ``arrays`` that are not the network's.

    Raises:
        ValueError: A name is missing or unknown, or a shape does not fit; the message says which.
    """
    depth = sum(name.startswith(f"{prefix}w") for name in arrays)
    layers = [f"{prefix}{kind}{layer}" for layer in range(max(depth, 1)) for kind in "wb"]
    if missing := [name for name in layers if name not in arrays]:
        raise ValueError(
            f"{owner} theta lacks {missing}; it needs {prefix}w0, {prefix}b0, {prefix}w1, ... without a gap"
        )
    if unknown := sorted(set(arrays) - {*layers, *others}):
        raise ValueError(f"{owner} theta has unknown arrays {unknown}; remove them or rename them")
    for layer in range(depth):
        weight, bias = arrays[f"{prefix}w{layer}"], arrays[f"{prefix}b{layer}"]
        width = outputs if layer == depth - 1 else (weight.shape[-1] if weight.dim() else 0)
        if tuple(weight.shape) != (inputs, width) or tuple(bias.shape) != (width,):
            raise ValueError(
                f"{owner} theta: {prefix}w{layer} is {tuple(weight.shape)} and {prefix}b{layer} {tuple(bias.shape)}; "
                f"expected ({inputs}, {width}) and ({width},): weights are (inputs, outputs)"
            )
        inputs = width
    return (
        tuple(arrays[f"{prefix}w{layer}"].t().contiguous() for layer in range(depth)),
        tuple(arrays[f"{prefix}b{layer}"] for layer in range(depth)),
    )


def stack_shapes(width: int, *bank: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name of an MLP under :data:`STACK`, two hidden layers of ``width``; or of a bank of so many."""
    first = {f"{STACK}w0__{i}": (count, width) for i, count in enumerate(channel_counts(MATRIX_FEATURES))}
    rest = {"b0": (width,), "w1": (width, width), "b1": (width,), "w2": (width, 3), "b2": (3,)}
    shapes = first | {f"{STACK}{name}": shape for name, shape in rest.items()}
    return {name: (*bank, *shape) for name, shape in shapes.items()}
