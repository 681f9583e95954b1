"""Which parameters of a model make queries, keys and values, by the names that modules of attention have for them."""

from __future__ import annotations

from torch import nn

from pylo_integrations.sharding.pieces import name_inside

_JOINT = ("c_attn", "qkv", "Wqkv", "qkv_proj", "query_key_value", "to_qkv", "linear_qkv", "in_proj_weight")
"""Names of one weight for all three."""

_APART = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("linear_q", "linear_k", "linear_v"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ("query", "key_value"),
    ("q", "kv"),
    ("to_q", "to_kv"),
    ("q_attn", "c_attn"),
)
"""Those of several. One of them alone means nothing: a network may well estimate a ``value``."""


def attention_projections(model: nn.Module) -> set[nn.Parameter]:
    """The weights, and biases, that make queries, keys and values of what comes in.

    Adapters inside such a module are not among them.

    Args:
        model: With its modules; wrappers around them are seen through.
    """
    found = set[nn.Parameter]()
    for parent in model.modules():
        parts = dict[str, nn.Module | nn.Parameter](parent.named_children()) | dict(parent.named_parameters("", False))
        names = {name for name in _JOINT if name in parts}
        names |= {name for apart in _APART if parts.keys() >= {*apart} for name in apart}
        for part in map(parts.__getitem__, names):
            if isinstance(part, nn.Parameter):
                found.add(part)
            else:
                owned = part.named_parameters(remove_duplicate=False)
                found |= {param for path, param in owned if name_inside(part, path) in ("weight", "bias")}
    return found
