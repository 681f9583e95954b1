r"""CELO2, CELO2-base and ELO-CELO2: a small per-parameter MLP whose output is normalised (docs/mathematics.md).

30 features of every parameter (15 for vectors), each divided by its root mean square, enter an MLP with outputs
``(d, a, unused)``. Of a matrix, the steps ``u = d exp(a exp_mult)`` are then orthogonalised, where the rule does that.
Either way they end with root mean square ``step_mult``:

.. math:: p \leftarrow p - \mathrm{step\_mult} \cdot u / \sqrt{\mathrm{mean}(u^2) + 10^{-9}}

"Matrix" and all means are over the last two reference axes, (in, out): a convolution is one matrix per kernel position.
The loss and the horizon are unused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import MOMENTUM, RMS, Decays, rounded_to_float32
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.arrays import check_mults
from pylo_integrations.rules.base import CLIP, Control, Rule, RuleChoice, StepContext, read_clipped_gradient
from pylo_integrations.rules.features import MATRIX_FEATURES, MOMENTUM_FEATURES, RMS_FEATURES, channel_counts
from pylo_integrations.rules.kernel_spec import KernelSpec
from pylo_integrations.rules.moments import MomentRule
from pylo_integrations.rules.networks import STACK, linear_form, mlp, read_mlp
from pylo_integrations.rules.newton_schulz import check_precision, inverse_rms, orthogonalise
from pylo_integrations.sharding.blocks import Block, Sums
from pylo_integrations.sharding.layout import TensorLayout

Orthogonalise = Literal["auto", "float32", "bfloat16", "never"]
"""A :data:`~pylo_integrations.rules.newton_schulz.Precision` in which steps are orthogonalised, if they are."""


@dataclass(frozen=True, eq=False)
class Celo2Rule(MomentRule):
    """The rule of CELO2, CELO2-base and ELO-CELO2.

    Attributes:
        weights: MLP weights, layer by layer, each (outputs, inputs); an input for each channel of :attr:`reads`,
            3 outputs.
        biases: MLP biases, each (outputs,).
        orthogonalise: Precision of the products that orthogonalise the steps of matrices; or "never".
        adamw: Steps vectors, and the tensors of groups marked ``rule="adamw"``; None if this rule steps everything.
        exp_mult: Scale of the magnitude output inside the exponential.
        step_mult: Root mean square of a step.
        reads: Features that have weight.
        kept: Momenta and second moment of which a channel with weight is made.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    orthogonalise: Orthogonalise = "float32"
    adamw: AdamWRule | None = None
    exp_mult: float = 0.0
    step_mult: float = 1.0
    reads: tuple[str, ...] = MATRIX_FEATURES
    kept: tuple[str, ...] = (*MOMENTUM, *RMS)

    kind: ClassVar[str] = "Celo2"
    features: ClassVar[tuple[str, ...]] = MATRIX_FEATURES
    vector_features: ClassVar[int] = 9
    """How many of :attr:`features` vectors have: those that do not repeat one another without rows and columns."""
    norm_eps: ClassVar[float] = 1e-9
    rms_eps: ClassVar[float] = 1e-8
    finishes: ClassVar[bool] = True

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Tensor],
        *,
        exp_mult: float = 0.0,
        step_mult: float = 1.0,
        orthogonalise: Orthogonalise = "float32",
        adamw: AdamWRule | None = None,
    ) -> Celo2Rule:
        """Build the rule from theta.

        Args:
            arrays: ``ff_mod_stack/~/w0__0`` to ``w0__13``, the first layer's weights (channels, width) for each of
                :attr:`features`; ``b0``, ``w1``, ``b1``... with weights (inputs, outputs), 3 outputs, any number of
                layers of any width.
            exp_mult: Scale of the magnitude output inside the exponential.
            step_mult: Root mean square of a step.
            orthogonalises: Whether the steps of matrices are orthogonalised.
            adamw: Steps vectors, and the tensors of groups marked ``rule="adamw"``.

        Raises:
            ValueError: A name is missing or unknown, a shape does not fit, or a scale is not finite; the message says
                which.
        """
        check_mults(exp_mult=exp_mult, step_mult=step_mult)
        check_precision(orthogonalise, "never")
        rest = dict(arrays)
        first: list[Tensor] = []
        for index, channels in enumerate(channel_counts(cls.features)):
            name = f"{STACK}w0__{index}"
            part = rest.pop(name, None)
            if part is None:
                raise ValueError(f"celo2 theta lacks {name}; it needs {STACK}w0__0 to w0__{len(cls.features) - 1}")
            width = first[0].shape[1] if first else (part.shape[-1] if part.dim() else 0)
            if tuple(part.shape) != (channels, width):
                raise ValueError(f"celo2 theta: {name} is {tuple(part.shape)}; expected ({channels}, {width})")
            first.append(part)
        if f"{STACK}w0" in rest:
            raise ValueError(f"celo2 theta has unknown arrays ['{STACK}w0']; remove them or rename them")
        rest[f"{STACK}w0"] = torch.cat(first)
        weights, biases = read_mlp(rest, "celo2", STACK, sum(channel_counts(cls.features)), 3)
        return cls(
            decays=Decays(
                rounded_to_float32((0.9, 0.99, 0.999)),
                rounded_to_float32((0.95,)),
                rounded_to_float32((0.9, 0.99, 0.999)),
            ),
            weights=weights,
            biases=biases,
            orthogonalise=orthogonalise,
            adamw=adamw,
            exp_mult=exp_mult,
            step_mult=step_mult,
        )

    def reduced(self) -> Celo2Rule:
        """Without outputs, units, features and state that have no weight, and of one layer if the network is linear.

        The latter is that of ``builtin:celo2``, whose ReLUs cancel in pairs. Equal up to rounding.
        """
        weights, biases = list(self.weights), list(self.biases)
        weights[-1], biases[-1] = weights[-1].clone(), biases[-1].clone()
        for unread in range(2 if self.exp_mult else 1, 3):
            weights[-1][unread] = biases[-1][unread] = 0
        if linear := linear_form(weights, biases):
            weights, biases = [linear[0]], [linear[1]]
        parts = weights[0].split_with_sizes(channel_counts(self.reads), dim=1)
        # The gradient stays: a vector, which has not all features, must have one.
        read = {name: part for name, part in zip(self.reads, parts, strict=True) if part.any() or name == "grad"}
        weights[0] = torch.cat(list(read.values()), dim=1)
        momenta = sum(
            (read[name].ne(0).any(0) for name in MOMENTUM_FEATURES if name in read), start=torch.zeros(3, device="cpu")
        )
        kept = [name for name, has_weight in zip(MOMENTUM, momenta.tolist(), strict=True) if has_weight]
        kept += RMS if not read.keys().isdisjoint(RMS_FEATURES) else ()
        return replace(self, weights=tuple(weights), biases=tuple(biases), reads=tuple(read), kept=tuple(kept))

    @property
    def choices(self) -> tuple[RuleChoice, ...]:
        """``"adamw"`` as well, where the rule has one."""
        return ("learned",) if self.adamw is None else ("learned", "adamw")

    def rule_for(self, layout: TensorLayout, group: Mapping[str, Any]) -> Rule:
        """This rule, or :attr:`adamw` for vectors, scalars and groups marked so."""
        if self.adamw is not None and (group["rule"] == "adamw" or len(layout.shape) < 2):
            return self.adamw
        return self

    @property
    def kernel_spec(self) -> KernelSpec:
        """One network for all matrices; what it proposes is finished, and scaled, by :meth:`directions`."""
        network = self.network_spec([len(bias) for bias in self.biases], self.exp_mult)
        return KernelSpec(network, CLIP, directions=self.directions, has_cuda=True)

    @property
    def workspace(self) -> int:
        """Ingredients and features, and the widest two layers of the network."""
        return 4 * self.channels + 4 * max(len(bias) for bias in self.biases) + 16

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """EMA weights and the network."""
        constants = super().constants(device, dtype)
        constants |= {f"w{layer}": weight.to(device, dtype) for layer, weight in enumerate(self.weights)}
        return constants | {f"b{layer}": bias.to(device, dtype) for layer, bias in enumerate(self.biases)}

    def features_of(self, layout: TensorLayout) -> tuple[str, ...]:
        """Those of :attr:`reads` that a tensor has: vectors have the first :attr:`vector_features`."""
        if layout.factored:
            return self.reads
        return tuple(name for name in self.reads if name in self.features[: self.vector_features])

    def norm_axes(self, layout: TensorLayout) -> Sequence[int]:
        """The last two reference axes, (in, out)."""
        return layout.order[-2:]

    def gradient(self, block: Block, ctx: StepContext) -> Tensor:
        """The gradient, clipped element by element."""
        return read_clipped_gradient(block, ctx)

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """``d * exp(a * exp_mult)``, not yet orthogonalised and normalised."""
        inputs = self.normalised_features(block, prepared, sums, ctx)
        weights, biases = ([ctx.constants[f"{kind}{layer}"] for layer in range(len(self.weights))] for kind in "wb")
        weights[0] = weights[0][..., : inputs.shape[1]]  # vectors read the first ones
        return ctx.local(unfinished_steps)(inputs, weights, biases, exp_mult=self.exp_mult)

    def finish(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> Tensor:
        """Orthogonalise matrices, where the rule does, and bring the root mean square to ``step_mult``."""
        directions, scale = self.directions(steps, layout, ctx)
        return directions * scale

    def directions(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Two factors of the finished steps of whole tensors, ``(tensors, 1, *layout.shape)``.

        Returns:
            The orthogonalised steps, of the type that they were computed in, and their scales, which have extent 1
            along the axes of means.
        """
        axes = [axis + 2 for axis in self.norm_axes(layout)]
        if self.orthogonalise != "never" and len(axes) == 2:
            steps = orthogonalise(steps.movedim(axes, (-2, -1)), self.orthogonalise).movedim((-2, -1), axes)
        return steps, inverse_rms(steps, axes, self.norm_eps).mul_(self.step_mult)


def unfinished_steps(inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], *, exp_mult: float) -> Tensor:
    """``d * exp(a * exp_mult)`` of the network's outputs ``(d, a, unused)``, ``(tensors, 1, *box)``.

    Args:
        inputs: ``(tensors, channels, *box)``.
        weights: As for :func:`~pylo_integrations.rules.networks.mlp`.
        biases: As for :func:`~pylo_integrations.rules.networks.mlp`.
        exp_mult: Scale of the magnitude output inside the exponential.
    """
    outputs = mlp(inputs.flatten(2), weights, biases).view(len(inputs), 3, *inputs.shape[2:])
    direction, magnitude = outputs[:, :1], outputs[:, 1:2]
    return direction * (magnitude * exp_mult).exp_() if exp_mult else direction
