"""Parameters that are several tensors: how many, and where, by the types and names of the modules that have them.

A group option ``split`` says into how many equal components, or components of how many outputs each, the outputs of
its parameters are divided; ``stacked`` that their first axis numbers tensors, as of experts. Both together are of
stacks of divided tensors. Components are neighbours: queries, keys and values that take turns head by head, as those of
GPT-NeoX, are not known here. To step every head by itself, divide by their number, ``split=3 * heads``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pylo_integrations.sharding.components import Split, check_split
from pylo_integrations.sharding.layout import AxisOrder

_GATES: Mapping[type[nn.Module], int] = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
_GATED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_JOINT = ("c_attn", "qkv", "Wqkv")
"""Attributes that hold queries, keys and values one after the other; Conv1D of cross attention only the last two."""

_TAKING_TURNS = ("GPTBigCode",)
"""What modules' type names begin with that use such a name otherwise: head by head."""

_GROUPED = ("Phi3", "Phi4")
"""Likewise, of those whose ``qkv_proj`` has fewer keys and values than queries."""


@dataclass(frozen=True)
class Fused:
    """What a parameter is.

    Attributes:
        split: See the module; 1 for one tensor.
        is_stacked: Whether the first axis numbers tensors.
        axes: Which way they are stored, where that is known.
    """

    split: int | tuple[int, ...] = 1
    is_stacked: bool = False
    axes: AxisOrder | None = None


class FusedWeights:
    """Knows which parameters of a model are several tensors.

    Args:
        model: With its modules.
        split: Whether outputs are divided where modules are recognised, see :func:`~pylo_integrations.param_groups`.

    Raises:
        TypeError: ``split`` is neither a bool nor a mapping.
        ValueError: It maps a name to what the group option cannot be.
    """

    def __init__(self, model: nn.Module, split: bool | Mapping[str, Split]) -> None:
        if not isinstance(split, bool | Mapping):
            raise TypeError(f"split={split!r} must be True, False, or a mapping from names to numbers of tensors")
        self._places = {child: (module, name) for module in model.modules() for name, child in module.named_children()}
        self._divides = split is not False
        self._named: Mapping[str, Split] = split if isinstance(split, Mapping) else {}
        for given in self._named.values():
            check_split({"split": given})
        self.unused = set(self._named)

    def of(self, full_name: str, module: nn.Module, name: str, shape: Sequence[int]) -> Fused:
        """What a parameter is.

        Args:
            full_name: In the model.
            module: One that has it.
            name: Which it has there.
            shape: Of the whole.
        """
        is_stacked = type(module).__name__.endswith("Experts") and len(shape) == (2 if name.endswith("bias") else 3)
        axes: AxisOrder | None = None
        if is_stacked:
            axes = "in_out" if _is_transposed(module) else "out_in"
        split: int | tuple[int, ...] = 1
        if self._divides:
            split = _experts_split(module, name) if is_stacked else self._recognise(module, name, shape)
        for key, given in self._named.items():
            if any(f".{place}".endswith(f".{key}") for place in (full_name, full_name.rpartition(".")[0])):
                self.unused.discard(key)
                split = given if isinstance(given, int) else tuple(given)
        return Fused(split, is_stacked, axes)

    def _recognise(self, module: nn.Module, name: str, shape: Sequence[int]) -> int | tuple[int, ...]:
        if isinstance(module, nn.MultiheadAttention):
            return 3 if name in ("in_proj_weight", "in_proj_bias") else 1
        if gates := next((count for kind, count in _GATES.items() if isinstance(module, kind)), 0):
            return gates if name.startswith(_GATED) else 1
        parent, attribute = self._places.get(module, (None, ""))
        weight = getattr(module, "weight", None)
        if parent is None or weight is None or name not in ("weight", "bias"):
            return 1
        family = type(parent).__name__
        if attribute in _JOINT and not family.startswith(_TAKING_TURNS):
            inputs, outputs = _sizes_of(module)
            is_cross = attribute == "c_attn" and type(module).__name__ == "Conv1D"
            return outputs // inputs if inputs and outputs in (3 * inputs, 2 * inputs * is_cross) else 1
        if attribute == "qkv_proj" and family.startswith(_GROUPED):
            config: Any = parent.config
            keys = config.num_key_value_heads * parent.head_dim
            return config.num_attention_heads * parent.head_dim, keys, keys
        return 2 if attribute == "gate_up_proj" and (outputs := _sizes_of(module)[1]) and outputs % 2 == 0 else 1


def _sizes_of(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, also one whose weight a wrapper has in pieces; zeros of another module."""
    names = ("nx", "nf") if type(module).__name__ == "Conv1D" else ("in_features", "out_features")
    inputs, outputs = (int(getattr(module, name, 0)) for name in names)
    return inputs, outputs


def _is_transposed(experts: Any) -> bool:
    """Whether experts are stored (expert, in, out): what transformers says of them, or else their shapes."""
    if isinstance(known := getattr(experts, "is_transposed", None), bool):
        return known
    up: Any = getattr(experts, "gate_up_proj", None)
    down: Any = getattr(experts, "down_proj", None)
    if getattr(up, "ndim", 0) != 3 or getattr(down, "ndim", 0) != 3:
        return False
    straight = up.shape[2] == down.shape[1] and up.shape[1] == 2 * down.shape[2]
    return not straight and bool(up.shape[1] == down.shape[2] and up.shape[2] == 2 * down.shape[1])


def _experts_split(experts: Any, name: str) -> int:
    return 2 if name.startswith("gate_up_proj") and getattr(experts, "is_concatenated", True) else 1
