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
        weight = weight.expand(hidden.shape[0], -1, -1)
        if layer == 0 and hidden.shape[1] > 1:  # halves: what orthogonalisation makes of rounding errors is less then
            half = hidden.shape[1] // 2
            first = torch.baddbmm(bias.unsqueeze(-1), weight[..., :half], hidden[:, :half])
            hidden = first + torch.bmm(weight[..., half:], hidden[:, half:])
        else:
            hidden = torch.baddbmm(bias.unsqueeze(-1), weight, hidden)
        if layer < len(weights) - 1:
            hidden.relu_()
    return hidden


def linear_form(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """The one layer that a network amounts to, where its ReLUs cancel each other; None where they do not.

    Meta-training that begins from a linear map puts it through pairs of units, ``relu(z) - relu(-z) = z``, and keeps
    the others out of the outputs. Exact: numbers that merely are close do not cancel.

    Args:
        weights: As for :func:`mlp`, each (outputs, inputs).
        biases: As for :func:`mlp`, each (outputs,).

    Returns:
        Weights ``(outputs, inputs)`` and biases ``(outputs,)``.
    """
    live = [torch.ones(len(weights[-1]), dtype=torch.bool, device="cpu")]
    for weight in reversed(weights[1:]):  # a unit that no live one reads does not count
        live.insert(0, weight[live[0]].ne(0).any(0))
    # Every live unit as a sum of a linear map, whose last column is the constant, and of ReLUs of such maps.
    maps = torch.eye(weights[0].shape[1] + 1, dtype=torch.float64, device="cpu")
    sums, relus = maps.new_zeros(len(maps), 0), maps.new_empty(0, len(maps))
    read = torch.ones(weights[0].shape[1], dtype=torch.bool, device="cpu")
    for layer, (weight, bias, mine) in enumerate(zip(weights, biases, live, strict=True)):
        kept = weight.double()[mine][:, read]
        maps, sums = kept @ maps[: kept.shape[1]], kept @ sums[: kept.shape[1]]
        maps[:, -1] += bias.double()[mine]
        maps, sums = _cancelled(maps, sums, relus)
        if layer < len(weights) - 1:
            linear = ~sums.ne(0).any(1)
            positive = ~maps[:, :-1].ne(0).any(1) & maps[:, -1].ge(0) & sums.ge(0).all(1)
            if not (linear | positive).all():
                return None
            new = linear & ~positive
            sums = torch.cat([sums, torch.eye(len(maps), dtype=torch.float64, device="cpu")[:, new]], dim=1)
            relus = torch.cat([relus, maps[new]])
            maps[new] = 0
        read = mine
    return None if sums.ne(0).any() else (maps[:, :-1].float(), maps[:, -1].float())


def _cancelled(maps: Tensor, sums: Tensor, relus: Tensor) -> tuple[Tensor, Tensor]:
    """The same functions with ``relu(z) - relu(-z)`` written as ``z``."""
    for i in range(len(relus)):
        for j in range(i):
            if torch.equal(relus[i], -relus[j]):
                pairs = sums[:, i] == -sums[:, j]
                maps = maps + torch.where(pairs, sums[:, i], 0).unsqueeze(1) * relus[i]
                sums = sums.clone()
                sums[pairs, i] = sums[pairs, j] = 0
    return maps, sums


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
