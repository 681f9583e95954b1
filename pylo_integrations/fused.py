"""Parameters that are several tensors: how many, and where, by the types and names of the modules that have them.

A group option ``split`` says into how many equal components, or components of how many outputs each, the outputs of
its parameters are divided; ``stacked`` that their first axis numbers tensors, as of experts. Both together are of
stacks of divided tensors. Components are neighbours: queries, keys and values that take turns head by head, as those of
GPT-NeoX, are not known here. To step every head by itself, divide by their number, ``split=3 * heads``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from pylo_integrations.sharding.components import Split, check_split
from pylo_integrations.sharding.layout import AxisOrder

_GATES: Mapping[type[nn.Module], int] = {nn.LSTM: 4, nn.LSTMCell: 4, nn.GRU: 3, nn.GRUCell: 3}
_GATED = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
JOINT = ("c_attn", "qkv", "Wqkv")
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


class Place(NamedTuple):
    """Where a model has a parameter.

    Attributes:
        path: Full name there.
        module: That has it.
        name: Which it has in the module.
    """

    path: str
    module: nn.Module
    name: str


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
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, child in module.named_children():
                self._places.setdefault(child, []).append((module, name))
        self._divides = split is not False
        self._named: Mapping[str, Split] = split if isinstance(split, Mapping) else {}
        for given in self._named.values():
            check_split({"split": given})
        self.unused = set(self._named)

    def of(self, places: Sequence[Place], shape: Sequence[int]) -> Fused:
        """What a parameter is. Of modules that share it, any that knows it to be several tensors counts.

        Args:
            places: Of the parameter.
            shape: Of the whole.

        Raises:
            ValueError: Modules that share it divide it in different ways, and ``split`` does not say which.
        """
        experts = [
            place
            for place in places
            if type(place.module).__name__.endswith("Experts")
            and len(shape) == (2 if place.name.endswith("bias") else 3)
        ]
        axes: AxisOrder | None = None
        if experts:
            axes = "in_out" if _is_transposed(experts[0].module) else "out_in"
        split: int | tuple[int, ...] | None = None
        for key, given in self._named.items():
            names = (name for place in places for name in (place.path, place.path.rpartition(".")[0]))
            if any(f".{name}".endswith(f".{key}") for name in names):
                self.unused.discard(key)
                split = given if isinstance(given, int) else tuple(given)
        if split is None:
            split = self._recognise_all(places, experts) if self._divides else 1
        return Fused(split, bool(experts), axes)

    def _recognise_all(self, places: Sequence[Place], experts: Sequence[Place]) -> int | tuple[int, ...]:
        found: dict[int | tuple[int, ...], str] = {}
        for path, module, name in experts or places:
            known = [_experts_split(module, name)] if experts else self._recognise(module, name)
            found |= dict.fromkeys(known, path)
        found.pop(1, None)
        if len(found) > 1:
            told = ", ".join(f"split={split} as {path}" for split, path in found.items())
            raise ValueError(
                f"modules that share a parameter divide it in different ways, {told}: say which with "
                f"split={{'{places[0].path}': ...}}, where 1 leaves it whole"
            )
        return next(iter(found), 1)

    def _recognise(self, module: nn.Module, name: str) -> Iterator[int | tuple[int, ...]]:
        """What a parameter of a module is divided into; by the names, if any, that other modules have for that one."""
        if isinstance(module, nn.MultiheadAttention) and name in ("in_proj_weight", "in_proj_bias"):
            yield 3
        if gates := next((count for kind, count in _GATES.items() if isinstance(module, kind)), 0):
            yield gates if name.startswith(_GATED) else 1
        if getattr(module, "weight", None) is None or name not in ("weight", "bias"):
            return
        inputs, outputs = _sizes_of(module)
        for parent, attribute in self._places.get(module, ()):
            family = type(parent).__name__
            if attribute in JOINT and not family.startswith(_TAKING_TURNS):
                is_cross = attribute == "c_attn" and type(module).__name__ == "Conv1D"
                if inputs and outputs in (3 * inputs, 2 * inputs * is_cross):
                    yield outputs // inputs
            elif attribute == "qkv_proj" and family.startswith(_GROUPED):
                config: Any = parent.config
                keys = config.num_key_value_heads * parent.head_dim
                yield config.num_attention_heads * parent.head_dim, keys, keys
            elif attribute == "gate_up_proj" and outputs and outputs % 2 == 0:
                yield 2


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
