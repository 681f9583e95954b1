r"""Steps by a mixture of small MLPs: what VeLO and Celo share (docs/mathematics.md).

A bank holds K MLPs. A controller decides the coefficients with which their weights, not their outputs, are summed, so
that every tensor is stepped by one MLP of its own, with outputs ``(d, a, unused)``:

.. math:: p \leftarrow p - \mathrm{lr\_mult} \cdot d \, e^{a \cdot \mathrm{exp\_mult}}
    \sqrt{E[p^2] + 10^{-9}} \cdot \mathrm{step\_mult}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import Decays, rounded_to_float32
from pylo_integrations.rules.arrays import check_arrays, extent
from pylo_integrations.rules.base import CLIP, Control, StepContext, read_clipped_gradient
from pylo_integrations.rules.control import LossMemory, loss_telemetry, lstm_shapes, param_squares
from pylo_integrations.rules.features import MATRIX_FEATURES, channel_counts
from pylo_integrations.rules.kernel_spec import KernelSpec
from pylo_integrations.rules.moments import MomentRule
from pylo_integrations.rules.networks import STACK, steps
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums

DECAYS = Decays(*map(rounded_to_float32, ((0.9, 0.99, 0.999), (0.999,), (0.9, 0.99, 0.999))))


@dataclass(frozen=True, eq=False)
class MixtureRule(MomentRule):
    """Everything but the decisions, which subclasses make in ``control``.

    Attributes:
        bank: The K MLPs, each flattened to a row, ``(K, weights of an MLP)``.
        parts: Names and shapes of an MLP's weights in the order of a row: ``w0`` (outputs, inputs), ``b0``, ``w1``...
        controller: Weights of the LSTM and its heads, by the reference's names.
        exp_mult: Scale of the magnitude output inside the exponential.
        step_mult: Scale of the whole step.
    """

    bank: Tensor
    parts: Mapping[str, tuple[int, ...]]
    controller: Mapping[str, Tensor]
    exp_mult: float = 1e-3
    step_mult: float = 1e-3

    needs_loss: ClassVar[bool] = True
    needs_horizon: ClassVar[bool] = True
    steps_by_scale: ClassVar[bool] = True
    vector_momentum_eps: ClassVar[float] = 0.0
    architecture: ClassVar[str]
    controller_inputs: ClassVar[int]
    gain: ClassVar[float]
    """Factor on the mean of the bank weighted by the coefficients."""
    features: ClassVar[tuple[str, ...]] = MATRIX_FEATURES

    @classmethod
    def _fields(cls, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the rule keeps of theta; geometry (H, K, depth and width of the MLPs) is read from shapes.

        Raises:
            ValueError: A name is missing or unknown, or a shape does not fit; the message says which.
        """
        controls = extent(cls.architecture, arrays, "rnn_params/rnn_to_controls/b", 0)
        depth = max(1, sum(name.startswith(f"{STACK}b") for name in arrays))
        hidden = [extent(cls.architecture, arrays, f"{STACK}b{layer}", -1) for layer in range(depth - 1)]
        channels = channel_counts(cls.features)
        widths = [sum(channels), *hidden, 3]
        width = extent(cls.architecture, arrays, "lstm_init_state/hidden", -1)
        controller = lstm_shapes(cls.controller_inputs, width, controls)
        stack: dict[str, tuple[int, ...]] = {
            f"{STACK}w0__{i}": (controls, count, widths[1]) for i, count in enumerate(channels)
        }
        for layer in range(depth):
            if layer:
                stack[f"{STACK}w{layer}"] = (controls, widths[layer], widths[layer + 1])
            stack[f"{STACK}b{layer}"] = (controls, widths[layer + 1])
        check_arrays(cls.architecture, arrays, controller | stack)
        weights = [torch.cat([arrays[f"{STACK}w0__{i}"] for i in range(len(channels))], dim=1)]
        weights += (arrays[f"{STACK}w{layer}"] for layer in range(1, depth))
        mlps: dict[str, Tensor] = {}
        for layer, weight in enumerate(weights):
            used = 2 if layer == depth - 1 else widths[layer + 1]  # the third output is never read
            mlps[f"w{layer}"] = weight[..., :used].mT
            mlps[f"b{layer}"] = arrays[f"{STACK}b{layer}"][..., :used]
        return {
            "decays": DECAYS,
            "bank": torch.cat([part.flatten(1) for part in mlps.values()], dim=1),
            "parts": {name: tuple(part.shape[1:]) for name, part in mlps.items()},
            "controller": {name: arrays[name] for name in controller},
        }

    @property
    def kernel_spec(self) -> KernelSpec:
        """A network for every tensor."""
        network = self.network_spec([shape[0] for name, shape in self.parts.items() if name[0] == "b"], self.exp_mult)
        return KernelSpec(network, CLIP, ("param_squares",), ("param_squares",), self.step_mult, has_cuda=True)

    @property
    def workspace(self) -> int:
        """Ingredients and features, and two layers of the network."""
        return 2 * self.channels + 2 * max(shape[0] for shape in self.parts.values()) + 16

    def initial_memory(self) -> dict[str, Tensor]:
        """No loss seen; a subclass may remember more."""
        return LossMemory.initial()

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """EMA weights, the bank times its gain, and the controller's weights by the reference's names."""
        constants = super().constants(device, dtype)
        constants |= {name: weight.to(device, dtype) for name, weight in self.controller.items()}
        return constants | {"bank": self.bank.to(device, dtype) * (self.gain / len(self.bank))}

    def gradient(self, block: Block, ctx: StepContext) -> Tensor:
        """The gradient, clipped element by element."""
        return read_clipped_gradient(block, ctx)

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """Also the sum of squared parameters, for their scale and an L2 penalty."""
        return super().collect(block, ctx) | {"param_squares": param_squares(block)}

    def mix(self, coefficients: Tensor, ctx: StepContext) -> dict[str, Tensor]:
        """Weights of every tensor's MLP, each ``(tensors, *part)``, from coefficients ``(tensors, K)``."""
        rows = coefficients @ ctx.constants["bank"]
        sizes = [torch.Size(shape).numel() for shape in self.parts.values()]
        pieces = rows.split_with_sizes(sizes, dim=1)
        named = zip(self.parts.items(), pieces, strict=True)
        return {name: piece.reshape(-1, *shape) for (name, shape), piece in named}

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """``lr_mult * d * exp(a * exp_mult) * param_scale * step_mult`` for every parameter."""
        inputs = self.normalised_features(block, prepared, sums, ctx)
        parts = {name: block.rows(control[name]) for name in self.parts}
        depth = range(len(parts) // 2)
        weights, biases = ([parts[f"{kind}{i}"] for i in depth] for kind in "wb")
        scale = block.rows(control["lr_mult"]) * block.rows(control["param_scale"]) * self.step_mult
        unscaled = ctx.local(steps)(inputs, weights, biases, exp_mult=self.exp_mult)
        return unscaled.mul_(scale.view(-1, *(1,) * (inputs.dim() - 1)))

    def telemetry(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The loss features."""
        return loss_telemetry(memory)


def param_scales(buckets: Sequence[Bucket], sums: Sequence[Sums]) -> list[Tensor]:
    """Root mean square of every tensor's parameters, ``(tensors,)`` for each bucket."""
    pairs = zip(buckets, sums, strict=True)
    return [(total["param_squares"].view(-1) / bucket.layout.numel + 1e-9).sqrt() for bucket, total in pairs]
