"""Rules and networks as the library reads them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pylo_integrations.ops.loader import NESTEROV, SLOTS, TENSOR_SUMS, RuleStruct
from pylo_integrations.rules.accumulators import MOMENTUM
from pylo_integrations.rules.base import LARGEST_GRADIENT, Control, Rule
from pylo_integrations.rules.features import MOMENTUM_FEATURES
from pylo_integrations.rules.kernel_spec import AdamSpec, KernelSpec, NesterovSpec, NetworkSpec
from pylo_integrations.sharding.layout import TensorLayout


def spec_of(rule: Rule) -> KernelSpec:
    """How a rule describes itself; there must be no obstacle to it."""
    spec = rule.kernel_spec
    assert spec is not None, "see obstacle()"
    return spec


def norm_axes_of(spec: KernelSpec, layout: TensorLayout) -> list[int]:
    """Axes over which features are normalised; of Adam's step, which has none, all."""
    return list(spec.step.norm_axes(layout) if isinstance(spec.step, NetworkSpec) else range(len(layout.shape)))


def rule_struct(rule: Rule, names: Sequence[str]) -> RuleStruct:
    """A rule as the library reads it; ``names`` are the library's slots."""
    constants, spec = rule.constants(torch.device("cpu"), torch.float32), spec_of(rule)
    struct = RuleStruct(grad_clip=spec.clip, grad_limit=LARGEST_GRADIENT)
    for kind in ("momentum", "factored"):
        weights = constants.get(f"{kind}_weight", torch.empty(0, device="cpu"))
        getattr(struct, f"{kind}_weight")[: len(weights)] = weights.tolist()
        getattr(struct, f"{kind}_keep")[: len(weights)] = (1 - weights).tolist()
    if isinstance(spec.step, NesterovSpec):
        struct.layers = NESTEROV
        return struct
    rms = constants["rms_weight"]
    struct.rms_weight, struct.rms_keep = rms.item(), (1 - rms).item()
    asked = spec.sums or spec.sums_with_l2
    struct.measures = TENSOR_SUMS if len(asked) > 1 else len(asked)
    if isinstance(spec.step, AdamSpec):
        struct.adam_eps, struct.adam_eps_root = spec.step.eps, spec.step.eps_root
        return struct
    network = spec.step
    struct.layers = len(network.widths)
    struct.width[: len(network.widths)] = network.widths
    of_unread = _slots_of_momenta(network.unread, names)
    struct.features = sum(1 << slot for slot in slots_of(network.features, names) if slot not in of_unread)
    for name in ("rms_eps", "vector_momentum_eps", "norm_eps", "exp_mult"):
        setattr(struct, name, getattr(network, name))
    return struct


def slots_of(features: Sequence[str], names: Sequence[str]) -> list[int]:
    """The slot of every input of a network, in the order of its weights."""
    return [slot for feature in features for slot, name in enumerate(names) if name == feature]


def _slots_of_momenta(momenta: Collection[str], names: Sequence[str]) -> set[int]:
    """Slots of what is made of momenta, which the library need not have where none of these is read."""
    by_feature = [slots_of([feature], names) for feature in MOMENTUM_FEATURES]
    return {slots[k] for slots in by_feature for k, name in enumerate(MOMENTUM) if name in momenta}


def pack(layers: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> Tensor:
    """Networks as the library reads them, float32 ``(networks, floats)``.

    Args:
        layers: Weights ``(networks, outputs, inputs)`` and biases ``(networks, outputs)``; of a single network, the
            first axis may be missing.
        slots: Of the inputs of the first layer, int64; inputs beyond them are left out.
    """
    parts = []
    for index, (weight, bias) in enumerate(layers):
        weight, bias = weight if weight.dim() == 3 else weight[None], bias if bias.dim() == 2 else bias[None]
        matrix = weight.float().transpose(1, 2)
        if index == 0:
            spread = matrix.new_zeros(len(matrix), SLOTS, matrix.shape[2])
            matrix = spread.index_copy_(1, slots, matrix[:, : len(slots)])
        rows = torch.cat([matrix, bias.float().unsqueeze(1)], dim=1)
        parts.append(torch.nn.functional.pad(rows, (0, -rows.shape[2] % 4)).flatten(1))
    return torch.cat(parts, dim=1).contiguous()


class PackedNetwork:
    """A packed network, and what it was packed from."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], packed: Tensor) -> None:
        self._layers = layers
        self.packed = packed
        self._biases: list[Tensor] = []
        end = 0
        for index, (weight, _) in enumerate(layers):
            outputs, inputs = weight.shape[-2:]
            start = end + (inputs if index else SLOTS) * (outputs + -outputs % 4)
            end = start + outputs + -outputs % 4
            self._biases.append(packed[:, start : start + outputs])

    def has_weights_of(self, layers: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether other layers differ at most in their biases; then so does the packed network."""
        return all(new is old for (new, _), (old, _) in zip(layers, self._layers, strict=True))

    def enter_biases(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Overwrite the biases, where they are others."""
        for place, (_, bias), (_, old) in zip(self._biases, layers, self._layers, strict=True):
            if bias is not old:
                place.copy_(bias)
        self._layers = layers


class PackedNetworks:
    """The networks of a step, each where the last step had its own.

    A table that stays the same from step to step need not be copied to a device, and a graph can hold its address.
    """

    def __init__(self) -> None:
        self._networks: list[PackedNetwork] = []

    def place(self, number: int, layers: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> Tensor:
        """The ``number``-th network of a step as the library reads it; see :func:`pack`."""
        if number == len(self._networks):
            self._networks.append(PackedNetwork(layers, pack(layers, slots)))
        network = self._networks[number]
        if network.has_weights_of(layers):
            network.enter_biases(layers)
        else:
            packed = pack(layers, slots)
            if network.packed.shape == packed.shape:
                packed = network.packed.copy_(packed)
            self._networks[number] = PackedNetwork(layers, packed)
        return self._networks[number].packed


def layers_of(constants: Mapping[str, Tensor], control: Control) -> list[tuple[Tensor, Tensor]]:
    """The network of a bucket's tensors; decisions of this step go before what theta fixes."""
    known = {**constants, **control}
    depth = next(layer for layer in itertools.count() if f"w{layer}" not in known)
    return [(known[f"w{layer}"], known[f"b{layer}"]) for layer in range(depth)]
