"""Parameter groups of a model: what decays, and which way weights are stored."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from pylo_integrations.sharding.layout import AxisOrder

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def param_groups(
    model: nn.Module, weight_decay: float = 0.0, *, no_decay: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for a learned optimizer.

    Biases and other parameters below rank 2, all parameters of normalisation layers (by type name) and embeddings get
    no weight decay, nor do the names in ``no_decay`` or in the model's own ``no_weight_decay()`` (timm's convention for
    position embeddings and class tokens). Weights stored (in, out, ...), those of ``nn.Embedding``, transposed
    convolutions and transformers' ``Conv1D``, get ``axes="in_out"``.

    Args:
        model: Parameters it shares between modules appear once; being an embedding anywhere counts.
        weight_decay: Of the groups that decay.
        no_decay: Full names of parameters, or their last components, to exempt as well.

    Returns:
        Groups of ``(name, parameter)`` pairs, without empty ones.

    Raises:
        ValueError: Nothing is trainable.
    """
    exempt = {*no_decay, *getattr(model, "no_weight_decay", set)()}
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(param, []).append((module, name))

    groups: dict[tuple[bool, AxisOrder], dict[str, Any]] = {}
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        modules = [module for module, _ in owners[param]]
        decays = not (
            param.dim() < 2
            or any(isinstance(module, _EMBEDDINGS) or "Norm" in type(module).__name__ for module in modules)
            or name in exempt
            or name.rsplit(".", 1)[-1] in exempt
        )
        axes: AxisOrder = "in_out" if any(_stores_in_out(module, param) for module in modules) else "out_in"
        group = groups.setdefault(
            (decays, axes), {"params": [], "weight_decay": weight_decay if decays else 0.0, "axes": axes}
        )
        group["params"].append((name, param))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True")
    return list(groups.values())


def _stores_in_out(module: nn.Module, param: nn.Parameter) -> bool:
    # transformers' Conv1D is recognised by name, so that transformers need not be installed.
    is_transposed = isinstance(module, (*_EMBEDDINGS, *_TRANSPOSED)) or type(module).__name__ == "Conv1D"
    return is_transposed and param.dim() >= 2
