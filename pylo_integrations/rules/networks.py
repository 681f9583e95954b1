"""The small networks of learned optimizers, evaluated from weights that are data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
