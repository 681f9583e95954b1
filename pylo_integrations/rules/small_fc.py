r"""small_fc_lopt: a per-parameter MLP over Adafactor-style features (docs/mathematics.md).

Metz et al., "Practical tradeoffs between memory, compute, and performance in learned optimizers", CoLLAs 2022.

With the accumulators of :mod:`~pylo_integrations.rules.accumulators` updated first, 28 features of every parameter,
each divided by its root mean square over the tensor, and 11 time features enter an MLP with outputs ``(d, a)``:

.. math:: p \leftarrow p - d \, e^{a \cdot \mathrm{exp\_mult}} \cdot \mathrm{step\_mult}

The loss and the horizon are unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import Decays, decays_from_offsets
from pylo_integrations.rules.arrays import check_mults
from pylo_integrations.rules.base import Control, StepContext
from pylo_integrations.rules.features import TIME_SCALES, channel_count, time_features, time_rates
from pylo_integrations.rules.kernel_spec import KernelSpec
from pylo_integrations.rules.moments import MomentRule
from pylo_integrations.rules.networks import read_mlp, steps
from pylo_integrations.sharding.blocks import Block, Bucket, Sums


@dataclass(frozen=True, eq=False)
class SmallFCRule(MomentRule):
    """The rule of small_fc_lopt, MuLO and ELO.

    Attributes:
        weights: MLP weights, layer by layer, each (outputs, inputs); 39 inputs, 2 outputs.
        biases: MLP biases, each (outputs,).
        exp_mult: Scale of the magnitude output inside the exponential.
        step_mult: Scale of the whole step.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    exp_mult: float = 1e-3
    step_mult: float = 1e-3

    kind: ClassVar[str] = "SmallFC"
    features: ClassVar[tuple[str, ...]] = (
        "grad",
        "param",
        "momentum",
        "rms",
        "momentum_over_rms",
        "inverse_rms",
        "factored_grad",
        "row",
        "col",
        "inverse_row",
        "inverse_col",
        "factored_momentum",
    )
    initial_decays: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "momentum_decays": (0.9, 0.99, 0.999),
        "rms_decays": (0.999,),
        "adafactor_decays": (0.9, 0.99, 0.999),
    }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, Tensor], *, exp_mult: float = 1e-3, step_mult: float = 1e-3
    ) -> SmallFCRule:
        """Build the rule from theta.

        Args:
            arrays: ``nn/~/w0``, ``nn/~/b0``, ``nn/~/w1``... with weights (inputs, outputs), 39 inputs and 2 outputs,
                any number of layers of any width; and the learned offsets ``momentum_decays`` (3,),
                ``rms_decays`` (1,) and ``adafactor_decays`` (3,), where left out zero.
            exp_mult: Scale of the magnitude output inside the exponential.
            step_mult: Scale of the whole step.

        Raises:
            ValueError: A name is missing or unknown, a shape does not fit, or a scale is not finite; the message says
                which.
        """
        check_mults(exp_mult=exp_mult, step_mult=step_mult)
        inputs = channel_count(cls.features) + len(TIME_SCALES)
        weights, biases = read_mlp(arrays, "small_fc", "nn/~/", inputs, 2, cls.initial_decays)
        decays = {}
        for name, initial in cls.initial_decays.items():
            offsets = arrays[name] if name in arrays else torch.zeros(len(initial), dtype=torch.float32, device="cpu")
            if tuple(offsets.shape) != (len(initial),):
                raise ValueError(f"small_fc theta: {name} is {tuple(offsets.shape)}; expected ({len(initial)},)")
            decays[name] = decays_from_offsets(initial, offsets)
        return cls(
            decays=Decays(decays["momentum_decays"], decays["rms_decays"], decays["adafactor_decays"]),
            weights=weights,
            biases=biases,
            exp_mult=exp_mult,
            step_mult=step_mult,
        )

    @property
    def kernel_spec(self) -> KernelSpec:
        """One network for all tensors."""
        network = self.network_spec([len(bias) for bias in self.biases], self.exp_mult)
        return KernelSpec(network, step_mult=self.step_mult, has_cuda=True)

    @property
    def workspace(self) -> int:
        """Ingredients and features, and the widest two layers of the network."""
        return 2 * self.channels + 2 * max(len(bias) for bias in self.biases) + 16

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """EMA weights, rates of time, and the network, whose first layer is split into feature and time columns."""
        constants = super().constants(device, dtype)
        constants["time_rates"] = time_rates(dtype, device)
        first, *rest = (weight.to(device, dtype) for weight in self.weights)
        constants["w0"], constants["w_time"] = first[:, : self.channels], first[:, self.channels :]
        constants |= {f"w{layer}": weight for layer, weight in enumerate(rest, start=1)}
        return constants | {f"b{layer}": bias.to(device, dtype) for layer, bias in enumerate(self.biases)}

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Fold the time features, equal for all parameters, into the bias of the first layer."""
        weight = ctx.constants["w_time"]
        bias = ctx.constants["b0"] + weight @ time_features(ctx.iteration, ctx.constants["time_rates"])
        return [{"b0": bias.unsqueeze(0)}] * len(buckets)

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """``d * exp(a * exp_mult) * step_mult`` for every parameter."""
        inputs = self.normalised_features(block, prepared, sums, ctx)
        depth = range(len(self.weights))
        biases = [block.rows(control["b0"]), *(ctx.constants[f"b{layer}"] for layer in depth[1:])]
        weights = [ctx.constants[f"w{layer}"] for layer in depth]
        return ctx.local(steps)(inputs, weights, biases, exp_mult=self.exp_mult).mul_(self.step_mult)
