r"""AdamW, for the tensors that a learned rule leaves to it.

.. math:: p \leftarrow p - \hat m / (\sqrt{\hat v + \mathrm{eps\_root}} + \mathrm{eps})

Decoupled weight decay is the engine's, as for every rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pylo_integrations.rules.accumulators import RMS, ema_, rounded_to_float32
from pylo_integrations.rules.base import CLIP, Control, Rule, StepContext, read_clipped_gradient, read_gradient
from pylo_integrations.rules.kernel_spec import AdamSpec, KernelSpec
from pylo_integrations.sharding.blocks import Block, PartialSum, Sums
from pylo_integrations.sharding.layout import TensorLayout

_MOMENTUM = ("momentum_0",)


@dataclass(frozen=True, eq=False)
class AdamWRule(Rule):
    """The rule of Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, and its variants.

    Attributes:
        betas: EMA coefficients of gradient and squared gradient, rounded to float32 as the reference's are.
        eps: Added to the root of the second moment.
        eps_root: Added to the second moment under the root.
        bias_correction: Whether averages are divided by ``1 - beta ** t``, ``t`` being 1 in the first step.
        clips: Whether the gradient is clipped element by element, as that of the learned rule is.
        lr_mult: Factor on the group's learning rate.
    """

    kind: ClassVar[str] = "AdamW"

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    eps_root: float = 0.0
    bias_correction: bool = True
    clips: bool = False
    lr_mult: float = 1.0

    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """Both averages, shaped like the parameter."""
        return dict.fromkeys((*_MOMENTUM, *RMS))

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weight ``1 - beta`` of the new value in both averages, shape (1,)."""
        weights = 1 - torch.tensor(rounded_to_float32(self.betas), dtype=dtype, device=device)
        return {"momentum_weight": weights[:1], "rms_weight": weights[1:]}

    def corrections(self, iteration: int) -> tuple[float, float]:
        """Divisors of both averages after ``iteration`` earlier steps."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1 - self.betas[0] ** (iteration + 1), 1 - self.betas[1] ** (iteration + 1)

    @property
    def kernel_spec(self) -> KernelSpec:
        """Adam's step."""
        step = AdamSpec(self.eps, self.eps_root, self.corrections)
        return KernelSpec(step, CLIP if self.clips else math.inf, has_cuda=True)

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update both averages."""
        grad = read_clipped_gradient(block, ctx) if self.clips else read_gradient(block, ctx)
        block.store_(_MOMENTUM, ema_(block.load(_MOMENTUM), grad, ctx.constants["momentum_weight"]))
        block.store_(RMS, ema_(block.load(RMS), grad.square(), ctx.constants["rms_weight"]))
        return {}

    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """The momentum over the root of the second moment."""
        momentum, rms = block.load(_MOMENTUM), block.load(RMS)
        if self.bias_correction:
            for average, correction in zip((momentum, rms), self.corrections(ctx.iteration), strict=True):
                average.div_(correction)
        return momentum.div_(rms.add_(self.eps_root).sqrt_().add_(self.eps))
