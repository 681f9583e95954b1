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
    def channels(self) -> int:
        """Number of feature channels."""
        return channel_count(self.features)

    @property
    def gradient_power(self) -> int | None:
        """Two: sums of squares; unless a subclass changes the gradient."""
        return 2 if type(self).gradient is MomentRule.gradient else None

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """Parameter-shaped momenta and second moments; small ``row`` and ``col`` from rank 2 on."""
        return accumulator_shapes(layout, self.decays)

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """EMA weights, see :meth:`Decays.weights`."""
        return self.decays.weights(device, dtype)

    def features_of(self, layout: TensorLayout) -> tuple[str, ...]:
        """Those of :attr:`features` that a tensor has, in order."""
        return self.features

    def norm_axes(self, layout: TensorLayout) -> Sequence[int]:
        """Axes over which features are normalised."""
        return range(len(layout.shape))

    def gradient(self, block: Block, ctx: StepContext) -> Tensor:
        """The gradient that accumulators and features see, ``(tensors, 1, *box)``."""
        return read_gradient(block, ctx)

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """Sums of squared gradients along the two factored axes."""
        if block.layout.factored is None:
            return {}
        d1, d0 = block.layout.factored
        squared = self.gradient(block, ctx).square()
        return {"row": PartialSum.of(squared, (d0,), block.box), "col": PartialSum.of(squared, (d1,), block.box)}

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
        grad = self.gradient(block, ctx)
        squared = grad.square()
        updated = {
            MOMENTUM: ema_(block.load(MOMENTUM), grad, ctx.constants["momentum_weight"]),
            RMS: ema_(block.load(RMS), squared, ctx.constants["rms_weight"]),
        }
        if block.layout.factored is None:
            updated[DIAGONAL] = ema_(block.load(DIAGONAL), squared + 1e-30, ctx.constants["factored_weight"])
        for names, value in updated.items():
            block.store_(names, value)
        moments = self._moments(block, prepared, grad, *updated.values())
        axes = self.norm_axes(block.layout)
        features = compact_features(self.features_of(block.layout), moments)
        squares = [PartialSum.of(feature.square(), axes, block.box) for feature in features]
        return {"features": PartialSum(torch.cat([s.value for s in squares], dim=1), tuple(axes))}

    def normalised_features(self, block: Block, prepared: Sums, sums: Sums, ctx: StepContext) -> Tensor:
        """Network inputs, ``(tensors, channels, *box)``, each channel divided by its root mean square."""
        names = (MOMENTUM, RMS) if block.layout.factored else (MOMENTUM, RMS, DIAGONAL)
        moments = self._moments(block, prepared, self.gradient(block, ctx), *map(block.load, names))
        count = math.prod(block.layout.shape[axis] for axis in self.norm_axes(block.layout))
        scale = (block.narrow(sums["features"]) / count + self.norm_eps).rsqrt()
        features = compact_features(self.features_of(block.layout), moments)
        return torch.cat([f.expand(-1, -1, *block.box.shape) for f in features], dim=1).mul_(scale)

    def _moments(
        self, block: Block, prepared: Sums, grad: Tensor, momentum: Tensor, rms: Tensor, diagonal: Tensor | None = None
    ) -> Moments:
        if diagonal is None:
            row, col, row_scale, col_scale = (
                block.narrow(prepared[name]) for name in ("row", "col", "row_scale", "col_scale")
            )
            grad_scale = momentum_scale = row_scale * col_scale
        else:
            row = col = diagonal
            grad_scale = (diagonal + 1e-9).clamp_min(1e-9).rsqrt()
            momentum_scale = (diagonal + self.vector_momentum_eps).rsqrt()
        return Moments(grad, block.param, momentum, rms, row, col, grad_scale, momentum_scale, self.rms_eps)
