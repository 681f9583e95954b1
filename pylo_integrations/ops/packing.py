"""Rules and networks as the library reads them."""

from __future__ import annotations

import itertools
import math
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


class PackedNetwork:
    """Networks as the library reads them, alike but for their numbers.

    Args:
        layers: Weights ``(networks, outputs, inputs)`` and biases ``(networks, outputs)``; of a single network, the
            first axis may be missing.
        slots: Of the inputs of the first layer, int64; inputs beyond them are left out.

    Attributes:
        packed: float32 ``(networks, floats)``; of every layer the weights, a row for an input, and a row of biases.
    """

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> None:
        first, self._slots, self._shapes = layers[0][0], slots, _shapes_of(layers)
        count = len(first) if first.dim() == 3 else 1
        outputs = [bias.shape[-1] for _, bias in layers]
        inputs = [SLOTS, *outputs[:-1]]
        tables = [(fed + 1, made + -made % 4) for fed, made in zip(inputs, outputs, strict=True)]
        self.packed = torch.zeros(count, sum(map(math.prod, tables)), dtype=torch.float32, device=first.device)
        parts = self.packed.split_with_sizes(list(map(math.prod, tables)), dim=1)
        self._places = [
            part.view(count, *table)[..., :made] for part, table, made in zip(parts, tables, outputs, strict=True)
        ]
        self._entered: Sequence[tuple[Tensor | None, Tensor | None]] = ()
        self.enter(layers)

    def fits(self, layers: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> bool:
        """Whether other layers have the same places."""
        return slots is self._slots and _shapes_of(layers) == self._shapes

    def enter(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Overwrite what is another tensor than it was."""
        entered, self._entered = self._entered or [(None, None)] * len(layers), ()
        for place, (weight, bias), (old_weight, old_bias) in zip(self._places, layers, entered, strict=True):
            if weight is not old_weight and place is self._places[0]:
                read = weight.mT[..., : len(self._slots), :].float()
                place.index_copy_(1, self._slots, read.expand(len(place), -1, -1))
            elif weight is not old_weight:
                place[:, :-1] = weight.mT
            if bias is not old_bias:
                place[:, -1] = bias
        self._entered = layers  # last, so that an interrupted call is not taken for a finished one


def _shapes_of(layers: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[int, ...]]:
    return [tensor.shape for layer in layers for tensor in layer]


class PackedNetworks:
    """The networks of a step, each where the last step had its own.

    A table that stays the same from step to step need not be copied to a device, and a graph can hold its address.
    """

    def __init__(self) -> None:
        self._networks: list[PackedNetwork] = []

    def place(self, number: int, layers: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> Tensor:
        """The ``number``-th network of a step as the library reads it; see :class:`PackedNetwork`."""
        if number == len(self._networks):
            self._networks.append(PackedNetwork(layers, slots))
        elif self._networks[number].fits(layers, slots):
            self._networks[number].enter(layers)
        else:
            self._networks[number] = PackedNetwork(layers, slots)
        return self._networks[number].packed


def layers_of(constants: Mapping[str, Tensor], control: Control) -> list[tuple[Tensor, Tensor]]:
    """The network of a bucket's tensors; decisions of this step go before what theta fixes."""
    known = {**constants, **control}
    depth = next(layer for layer in itertools.count() if f"w{layer}" not in known)
    return [(known[f"w{layer}"], known[f"b{layer}"]) for layer in range(depth)]
