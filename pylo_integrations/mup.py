"""Maximal-update parametrisation: learning rates that transfer between widths.

Yang et al., "Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer", 2022. In a model
``width_mult`` times as wide as a *base* model, an optimizer whose steps do not grow with the gradient must step hidden
matrices by ``1 / width_mult``, because each of their outputs adds up ``width_mult`` times as many changes. Nothing but
the learning rate is touched: initialisation and multipliers in the forward pass are the model's business.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from pylo_integrations.groups import param_groups
from pylo_integrations.sharding.layout import AxisOrder, reference_order
from pylo_integrations.sharding.pieces import parameter_names, read_flat_slices

Shapes: TypeAlias = "Mapping[str, Sequence[int] | torch.Tensor]"
"""Shapes by parameter name; a state dict will do."""


def mup_param_groups(
    model: nn.Module,
    base: nn.Module | Shapes | None = None,
    weight_decay: float = 0.0,
    *,
    lr: float = 1.0,
    no_decay: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups whose ``lr`` carries the width multipliers of muP.

    An axis is *wide* if its size differs from the base model's. A matrix with wide inputs and wide outputs is hidden
    and gets ``lr / width_mult``, ``width_mult`` being the ratio of its inputs to the base model's; all other parameters
    (input and output weights, embeddings, biases, norms) get ``lr``. Which axis holds the inputs follows the module
    type, as in :func:`~pylo_integrations.param_groups`, so linear layers, convolutions, attention projections and
    transformers' ``Conv1D`` are understood.

    Learned optimizers also want what muP asks of the model: hidden weights initialised with variance 1 / inputs, output
    weights at zero or their product divided by ``width_mult``, and attention scores divided by the head size.

    Args:
        model: The model to train.
        base: The same model at the width where learning rate and theta are known to work, or its shapes by name
            (build it on ``torch.device("meta")`` to spend no memory). None if the ``mup`` package has annotated
            ``model`` (``mup.set_base_shapes``): its ``infshape`` are then used.
        weight_decay: As for :func:`~pylo_integrations.param_groups`. Decay follows the group's ``lr``, as AdamW's does,
            so hidden matrices decay less in wide models; multiply a group's ``weight_decay`` by ``lr / group["lr"]``
            for a decay that does not depend on width.
        lr: Learning rate of parameters without multiplier. Give it here: a group's ``lr`` precedes the optimizer's.
        no_decay: As for :func:`~pylo_integrations.param_groups`.

    Returns:
        Groups for ``create_optimizer(groups, "mulo")`` or any other optimizer.

    Raises:
        ValueError: ``base`` and ``model`` differ in more than the sizes of axes; ``base`` is None and a parameter has
            no ``infshape``; or more than two axes of a parameter are wide.
    """
    shapes = None if base is None else _shapes_of(base)
    if shapes is not None:
        _check_names(model, shapes)
    slices = read_flat_slices(model)
    groups: list[dict[str, Any]] = []
    for group in param_groups(model, weight_decay, no_decay=no_decay):
        by_mult: dict[float, list[tuple[str, nn.Parameter]]] = {}
        for name, param in group["params"]:
            if shapes is None:
                mult = _mult_of_infshape(name, param)
            else:
                shape = slices[param].shape if param in slices else param.shape
                mult = width_mult(name, shape, shapes[name], group["axes"])
            by_mult.setdefault(mult, []).append((name, param))
        groups += [{**group, "params": params, "lr": lr / mult} for mult, params in by_mult.items()]
    return groups


def width_mult(name: str, shape: Sequence[int], base: Sequence[int], axes: AxisOrder) -> float:
    """By how much wider than at ``base`` the inputs of a hidden matrix are; 1 for everything else.

    Args:
        name: Of the parameter, for messages.
        shape: Its shape.
        base: Its shape in the base model.
        axes: How it stores its first two axes.

    Raises:
        ValueError: The ranks differ; more than two axes differ; or which of the two holds the inputs matters but is
            unknown.
    """
    if len(shape) != len(base):
        raise ValueError(f"parameter {name} has shape {tuple(shape)}, but {tuple(base)} in the base model")
    ratios = {axis: n / b for axis, (n, b) in enumerate(zip(shape, base, strict=True)) if n != b}
    if len(ratios) < 2:
        return 1.0
    if len(ratios) > 2:
        raise ValueError(
            f"parameter {name} of shape {tuple(shape)} is {tuple(base)} in the base model: muP scales one or two axes, "
            f"not {len(ratios)}"
        )
    inputs, outputs = reference_order(len(shape), axes)[-2:]
    if set(ratios) == {inputs, outputs}:
        return ratios[inputs]
    if len(set(ratios.values())) == 1:  # e.g. stacked experts (experts, in, out): either axis gives the same
        return next(iter(ratios.values()))
    raise ValueError(
        f"parameter {name} of shape {tuple(shape)} is {tuple(base)} in the base model, and it cannot be told which of "
        f"its axes {sorted(ratios)} holds the inputs; use a base model that scales both alike, or give the group's lr"
    )


def _shapes_of(base: nn.Module | Shapes) -> dict[str, tuple[int, ...]]:
    if isinstance(base, nn.Module):
        return {name: tuple(param.shape) for param, name in parameter_names(base).items()}
    return {name: tuple(getattr(value, "shape", value)) for name, value in base.items()}


def _check_names(model: nn.Module, shapes: Mapping[str, Any]) -> None:
    names = set(parameter_names(model).values())
    if absent := sorted(names - set(shapes)):
        raise ValueError(f"the base model lacks parameters {absent}; build it by the same code, at another width")


def _mult_of_infshape(name: str, param: nn.Parameter) -> float:
    infshape = getattr(param, "infshape", None)
    if infshape is None:
        raise ValueError(
            f"parameter {name} has no `infshape`; pass the base model or its shapes as base=, or call "
            "mup.set_base_shapes first"
        )
    return float(infshape.width_mult()) if infshape.ninf() == 2 else 1.0
