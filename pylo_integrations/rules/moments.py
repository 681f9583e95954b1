"""The stages shared by every rule that feeds Adafactor-style features to a network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import (
    DIAGONAL,
    MOMENTUM,
    RMS,
    Decays,
    accumulator_shapes,
    ema_,
    factored_scales,
)
from pylo_integrations.rules.base import Rule, StepContext, read_gradient
from pylo_integrations.rules.features import Moments, channel_count, compact_features
from pylo_integrations.rules.kernel_spec import NetworkSpec
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums
from pylo_integrations.sharding.layout import TensorLayout


@dataclass(frozen=True, eq=False)
class MomentRule(Rule):
    """Accumulators first, then normalised features of every parameter; subclasses turn features into steps.

    Attributes:
        decays: EMA coefficients.
        features: Names of the network's inputs, in order.
        norm_eps: Added to the mean square of a feature before its inverse root.
        rms_eps: Added to the second moment before its inverse root.
        vector_momentum_eps: Added to the full-size second moment that scales the momentum of vectors.
    """

    decays: Decays

    features: ClassVar[tuple[str, ...]]
    norm_eps: ClassVar[float] = 1e-5
    rms_eps: ClassVar[float] = 1e-6
    vector_momentum_eps: ClassVar[float] = 1e-6

    @property
    def reads(self) -> tuple[str, ...]:
        """Those of :attr:`features` that the network reads."""
        return self.features

    @property
    def kept(self) -> tuple[str, ...]:
        """Parameter-shaped states that the network reads, of momenta and second moment; others would be in vain."""
        return (*MOMENTUM, *RMS)

    @property
    def unread(self) -> tuple[str, ...]:
        """Momenta and second moment that are not :attr:`kept`."""
        return tuple(name for name in (*MOMENTUM, *RMS) if name not in self.kept)

    @property
    def channels(self) -> int:
        """Number of feature channels."""
        return channel_count(self.reads)

    @property
    def gradient_power(self) -> int | None:
        """Two: sums of squares; unless a subclass changes the gradient."""
        return 2 if type(self).gradient is MomentRule.gradient else None

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """Parameter-shaped momenta and second moments; small ``row`` and ``col`` from rank 2 on."""
        shapes = accumulator_shapes(layout, self.decays)
        return {name: shape for name, shape in shapes.items() if name not in self.unread}

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """EMA weights, see :meth:`Decays.weights`."""
        return self.decays.weights(device, dtype)

    def features_of(self, layout: TensorLayout) -> tuple[str, ...]:
        """Those of :attr:`reads` that a tensor has, in order."""
        return self.reads

    def norm_axes(self, layout: TensorLayout) -> Sequence[int]:
        """Axes over which features are normalised."""
        return range(len(layout.shape))

    def gradient(self, block: Block, ctx: StepContext) -> Tensor:
        """The gradient that accumulators and features see, ``(tensors, 1, *box)``."""
        return read_gradient(block, ctx)

    def network_spec(self, widths: Sequence[int], exp_mult: float) -> NetworkSpec:
        """What kernels need to know of a network on these features."""
        return NetworkSpec(
            self.reads,
            self.features_of,
            self.norm_axes,
            tuple(widths),
            exp_mult,
            self.rms_eps,
            self.vector_momentum_eps,
            self.norm_eps,
            self.unread,
        )

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """Sums of squared gradients along the two factored axes."""
        if block.layout.factored is None:
            return {}
        d1, d0 = block.layout.factored
        squared = self.gradient(block, ctx).square()
        return {
            "row": PartialSum.of(squared, (d0,), block.box.shape),
            "col": PartialSum.of(squared, (d1,), block.box.shape),
        }

    def prepare_(self, bucket: Bucket, sums: Sums, ctx: StepContext) -> Sums:
        """Factored EMAs, ``row`` and ``col``, and the inverse roots made of them."""
        if bucket.layout.factored is None:
            return {}
        d1, d0 = bucket.layout.factored
        moments = {}
        for name, axis in (("row", d0), ("col", d1)):
            mean = sums[name] / bucket.layout.shape[axis] + 1e-30
            moments[name] = ema_(bucket.stack(name), mean, ctx.constants["factored_weight"])
            bucket.unstack_(name, moments[name])
        row_scale, col_scale = factored_scales(moments["row"], moments["col"], d1)
        return moments | {"row_scale": row_scale, "col_scale": col_scale}

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update the parameter-shaped accumulators; sum the square of every feature."""
        accumulators = self._load(block)
        weights = [ctx.constants[f"{name}_weight"] for name in ("momentum", "rms", "factored")]
        recipe = self._recipe(block.layout)
        total = ctx.local(accumulate_)(
            self.gradient(block, ctx),
            block.param,
            list(accumulators.values()),
            self._factors(block, prepared),
            weights,
            recipe=recipe,
        )
        for names, value in accumulators.items():
            if kept := self._kept_of(names):
                block.store_(kept, value if kept == names else value[:, [names.index(name) for name in kept]])
        return {"features": PartialSum(total, recipe.axes)}

    def normalised_features(self, block: Block, prepared: Sums, sums: Sums, ctx: StepContext) -> Tensor:
        """Network inputs, ``(tensors, channels, *box)``, each channel divided by its root mean square."""
        recipe = self._recipe(block.layout)
        count = math.prod(block.layout.shape[axis] for axis in recipe.axes)
        return ctx.local(normalised)(
            self.gradient(block, ctx),
            block.param,
            list(self._load(block).values()),
            self._factors(block, prepared),
            (block.narrow(sums["features"]) / count + self.norm_eps).rsqrt(),
            recipe=recipe,
        )

    def _load(self, block: Block) -> dict[tuple[str, ...], Tensor]:
        names: tuple[tuple[str, ...], ...] = (MOMENTUM, RMS) if block.layout.factored else (MOMENTUM, RMS, DIAGONAL)
        return {channels: self._channels(block, channels) for channels in names}

    def _kept_of(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if name not in self.unread)

    def _channels(self, block: Block, names: tuple[str, ...]) -> Tensor:
        """States as channels; zeros for those that are not kept, which no weight reads."""
        if (kept := self._kept_of(names)) == names:
            return block.load(names)
        param = block.param
        value = param.new_zeros(len(param), len(names), *param.shape[2:])
        if kept:
            value[:, [names.index(name) for name in kept]] = block.load(kept)
        return value

    @staticmethod
    def _factors(block: Block, prepared: Sums) -> list[Tensor]:
        names = ("row", "col", "row_scale", "col_scale") if block.layout.factored else ()
        return [block.narrow(prepared[name]) for name in names]

    def _recipe(self, layout: TensorLayout) -> Recipe:
        return Recipe(self.features_of(layout), tuple(self.norm_axes(layout)), self.rms_eps, self.vector_momentum_eps)


@dataclass(frozen=True)
class Recipe:
    """What makes features of moments, besides tensors.

    Attributes:
        features: Names, in order.
        axes: Those over which features are normalised.
        rms_eps: See :class:`MomentRule`.
        vector_momentum_eps: See :class:`MomentRule`.
    """

    features: tuple[str, ...]
    axes: tuple[int, ...]
    rms_eps: float
    vector_momentum_eps: float


def accumulate_(
    grad: Tensor,
    param: Tensor,
    accumulators: Sequence[Tensor],
    factors: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    recipe: Recipe,
) -> Tensor:
    """Move a block's accumulators on, in place; sums of squared features, ``(tensors, channels, *box or ones)``.

    Args:
        grad: ``(tensors, 1, *box)``.
        param: As ``grad``.
        accumulators: Momentum, second moment and, for vectors, the full-size one.
        factors: ``row``, ``col`` and their inverse roots, 3 channels each; none for vectors.
        weights: EMA weights of the accumulators, ``(channels,)`` each.
        recipe: The features.
    """
    squared = grad.square()
    ema_(accumulators[0], grad, weights[0])
    ema_(accumulators[1], squared, weights[1])
    if not factors:
        ema_(accumulators[2], squared + 1e-30, weights[2])
    squares = (feature.square() for feature in _features(grad, param, accumulators, factors, recipe))
    return torch.cat([PartialSum.of(square, recipe.axes, grad.shape[2:]).value for square in squares], dim=1)


def normalised(
    grad: Tensor,
    param: Tensor,
    accumulators: Sequence[Tensor],
    factors: Sequence[Tensor],
    scale: Tensor,
    *,
    recipe: Recipe,
) -> Tensor:
    """Features times ``scale``, ``(tensors, channels, *box)``; arguments as for :func:`accumulate_`."""
    features = _features(grad, param, accumulators, factors, recipe)
    return torch.cat([f.expand(-1, -1, *grad.shape[2:]) for f in features], dim=1).mul_(scale)


def _features(
    grad: Tensor, param: Tensor, accumulators: Sequence[Tensor], factors: Sequence[Tensor], recipe: Recipe
) -> list[Tensor]:
    momentum, rms = accumulators[:2]
    if factors:
        row, col, row_scale, col_scale = factors
        grad_scale = momentum_scale = row_scale * col_scale
    else:
        row = col = diagonal = accumulators[2]
        grad_scale = (diagonal + 1e-9).clamp_min(1e-9).rsqrt()
        momentum_scale = (diagonal + recipe.vector_momentum_eps).rsqrt()
    moments = Moments(grad, param, momentum, rms, row, col, grad_scale, momentum_scale, recipe.rms_eps)
    return compact_features(recipe.features, moments)
