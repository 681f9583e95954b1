"""Parameter groups of a model: what decays, and which way weights are stored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from torch import nn
from torch.nn.parameter import is_lazy

from pylo_integrations.attention import attention_projections
from pylo_integrations.fused import FusedWeights, Place
from pylo_integrations.rules.base import RuleChoice
from pylo_integrations.sharding.components import Split
from pylo_integrations.sharding.layout import AxisOrder
from pylo_integrations.sharding.pieces import ShardingError, name_inside, parameter_names, read_flat_slices

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

Choose: TypeAlias = Callable[[str, nn.Parameter, nn.Module], bool]
"""Whether a parameter is chosen, from its full name, itself and a module that owns it."""


def param_groups(
    model: nn.Module,
    weight_decay: float = 0.0,
    *,
    no_decay: Collection[str] = (),
    adamw: Collection[str] | Choose | None = None,
    split: bool | Mapping[str, Split] = False,
    attention: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into groups for a learned optimizer.

    Biases and other parameters below rank 2, all parameters of normalisation layers (by type name) and embeddings get
    no weight decay, nor do the names in ``no_decay`` or in the model's own ``no_weight_decay()`` (timm's convention for
    position embeddings and class tokens). Weights stored (in, out, ...), those of ``nn.Embedding``, transposed
    convolutions and transformers' ``Conv1D``, get ``axes="in_out"``. Those of experts, parameters with three axes of
    modules whose type name ends in ``Experts``, get ``stacked=True``: each expert is a tensor.

    Args:
        model: Parameters it shares between modules appear once; being an embedding, fused or stacked anywhere counts.
            FSDP1's slices go by the shapes and names of the parameters they are of; those of lazy modules, which have
            no shape yet, count as matrices but for biases. Names are those of the model inside ``torch.compile`` and
            other wrappers.
        weight_decay: Of the groups that decay.
        no_decay: Full names of parameters, or their last components, to exempt as well.
        adamw: For optimizers that leave some tensors to AdamW, such as ``celo2``, which tensors from rank 2 on those
            are (vectors always are): embeddings and the names given, as in ``no_decay``; or exactly what a function of
            ``(name, parameter, owning module)`` chooses. By default none.
        split: Whether parameters in which several tensors are fused are divided, for statistics and matrices of each:
            the gates of LSTM and GRU, queries, keys and values (``nn.MultiheadAttention``, GPT-2's ``c_attn``,
            ``qkv``, ``Wqkv``, Phi's ``qkv_proj``) and ``gate_up_proj``; or, besides these, what names of parameters or
            modules, or their last components, are divided into, such as ``{"query_key_value": 3}`` or
            ``{"attn.kv.weight": (64, 128)}``; 1 leaves one whole. See :mod:`pylo_integrations.fused`.
        attention: For optimizers that step them in a way of their own, such as ``pace``, whether matrices that make
            queries, keys and values are marked ``rule="attention"``. See :mod:`pylo_integrations.attention`.

    Returns:
        Groups of ``(name, parameter)`` pairs, without empty ones.

    Raises:
        ValueError: Nothing is trainable; ``split`` names nothing, or its values are no such group options; modules that
            share a parameter divide it in different ways.
        TypeError: ``split`` is neither a bool nor a mapping.
        ShardingError: FSDP1 melted parameters together, or wraps ``model``.
    """
    slices = read_flat_slices(model)
    exempt = {*no_decay, *getattr(model, "no_weight_decay", set)()}
    to_adamw = _chooser(adamw)
    owners: dict[nn.Parameter, list[Place]] = {}
    for path, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            place = Place(name_inside(model, f"{path}.{name}" if path else name), module, name)
            owners.setdefault(param, []).append(place)

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    fused = FusedWeights(model, split)
    names = parameter_names(model)
    projections = attention_projections(model) if attention else set()
    for param in model.parameters():
        if not param.requires_grad:
            continue
        name = names[param]
        if getattr(param, "_fsdp_flattened", False) and param not in slices:
            raise ShardingError(
                f"{name} is a slice made by FSDP, whose shape only the FullyShardedDataParallel around it knows: "
                "pass that one in place of the model inside it"
            )
        shape = slices[param].shape if param in slices else () if is_lazy(param) else tuple(param.shape)
        what = fused.of(owners[param], shape)
        rank = (len(shape) if not is_lazy(param) else _rank(name)) - what.is_stacked
        modules = [place.module for place in owners[param]]
        decays = not (
            rank < 2
            or any(_is_embedding(module) or "Norm" in type(module).__name__ for module in modules)
            or _is_named(name, exempt)
        )
        axes: AxisOrder = what.axes or ("in_out" if rank >= 2 and any(map(_stores_in_out, modules)) else "out_in")
        rule: RuleChoice = "attention" if rank >= 2 and param in projections else "learned"
        if any(to_adamw(name, param, module) for module in modules):
            rule = "adamw"
        group = groups.setdefault(
            (decays, axes, rule, what.split, what.is_stacked),
            {"params": [], "weight_decay": weight_decay if decays else 0.0, "axes": axes, "rule": rule},
        )
        group |= {"split": what.split} if what.split != 1 else {}
        group |= {"stacked": True} if what.is_stacked else {}
        group["params"].append((name, param))
    if not groups:
        raise ValueError(f"{type(model).__name__} has no parameter with requires_grad=True")
    if fused.unused:
        raise ValueError(f"split names {sorted(fused.unused)}, which no trainable parameter or module is named")
    return list(groups.values())


def _rank(name: str) -> int:
    """Number of axes that a lazy module will give a parameter, which has no shape yet."""
    return 1 if name.rsplit(".", 1)[-1] == "bias" else 2


def _is_named(name: str, names: Collection[str]) -> bool:
    return name in names or name.rsplit(".", 1)[-1] in names


def _chooser(adamw: Collection[str] | Choose | None) -> Choose:
    if callable(adamw):
        return adamw
    if adamw is None:
        return lambda name, param, module: False
    names = {*adamw}
    return lambda name, param, module: _is_embedding(module) or _is_named(name, names)


def _is_embedding(module: nn.Module) -> bool:
    # Megatron's is recognised by name, as transformers' Conv1D below, so that neither need be installed.
    return isinstance(module, _EMBEDDINGS) or type(module).__name__ == "VocabParallelEmbedding"


def _stores_in_out(module: nn.Module) -> bool:
    return _is_embedding(module) or isinstance(module, _TRANSPOSED) or type(module).__name__ == "Conv1D"
