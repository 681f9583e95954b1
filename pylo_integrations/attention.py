"""Which parameters of a model make queries, keys and values, by the names that modules of attention have for them."""

from __future__ import annotations

from torch import nn

from pylo_integrations.fused import JOINT
from pylo_integrations.sharding.pieces import name_inside

_JOINT = (*JOINT, "qkv_proj", "query_key_value", "to_qkv", "linear_qkv")
"""Names of one module for all three, also where it does not hold them one after the other."""

_APART = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("query", "key_value"),
    ("q", "kv"),
    ("qk", "v"),
    ("to_q", "to_kv"),
    ("q_attn", "c_attn"),
)
"""Those of several. One of them alone means nothing: a network may well estimate a ``value``."""

_BARE = (("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight"))
"""Those of parameters that no module of their own has, as in ``nn.MultiheadAttention``; a bare ``query`` is a table."""

_NAMES = {*_JOINT, *(name for names in _APART for name in names)}


def attention_projections(model: nn.Module) -> set[nn.Parameter]:
    """The weights that make queries, keys and values of what comes in.

    Of modules that go together all have such weights, or none counts. Adapters inside them, as LoRA's, are no such
    weights.

    Args:
        model: With its modules; wrappers around them are seen through.
    """
    found = set[nn.Parameter]()
    for parent in model.modules():
        modules = parent._modules.items()  # in which shared ones appear under all of their names
        weights = {name: _weights_of(module) for name, module in modules if module is not None and name in _NAMES}
        bare = dict(parent.named_parameters("", recurse=False, remove_duplicate=False))
        weights |= {name: {bare[name]} for names in _BARE for name in names if name in bare}
        for names in (*((name,) for name in _JOINT), *_APART, *_BARE):
            if all(weights.get(name) for name in names):
                found.update(*(weights[name] for name in names))
    return found


def _weights_of(module: nn.Module) -> set[nn.Parameter]:
    owned = module.named_parameters(remove_duplicate=False)
    paths = ((name_inside(module, path), param) for path, param in owned)
    return {param for path, param in paths if path.rpartition(".")[2] == "weight" and "lora_" not in path}
