"""What native kernels need to know of a rule: they have its stages, and this fills in the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pylo_integrations.sharding.layout import TensorLayout


@dataclass(frozen=True)
class AdamSpec:
    """Of a rule that takes Adam's step: ``m / correction / (sqrt(v / correction + eps_root) + eps)``.

    Attributes:
        eps: Added to the root of the second moment.
        eps_root: Added to the second moment under the root.
        corrections: Divisors of both averages, by the number of steps taken before.
    """

    eps: float
    eps_root: float
    corrections: Callable[[int], tuple[float, float]]

    def averages(self, ctx: Any) -> dict[str, float]:
        """What kernels ask about averages, by their names for it.

        Args:
            ctx: The :class:`~pylo_integrations.rules.base.StepContext` of a step.
        """
        momentum, rms = self.corrections(ctx.iteration)
        return {"momentum_correction": momentum, "rms_correction": rms}


@dataclass(frozen=True)
class NesterovSpec:
    """Of a rule whose step is Nesterov's momentum, ``m + weight * (g - m)`` of the new ``m``.

    Attributes:
        weight: That of the gradient ``g`` in the momentum too, in (0, 1], by the steps of the run, None if they are not
            known.
    """

    weight: Callable[[int | None], float]

    def averages(self, ctx: Any) -> dict[str, float]:
        """See :class:`AdamSpec`."""
        return {"momentum_weight": self.weight(ctx.num_steps)}


@dataclass(frozen=True)
class NetworkSpec:
    """Of a rule that feeds Adafactor-style features of every parameter to a network with outputs ``(d, a, ...)``.

    Attributes:
        features: Names of its inputs, in the order of its weights.
        features_of: Those of them that a tensor of a layout has.
        norm_axes: Axes over which a tensor's features are normalised, by layout.
        widths: Outputs of every layer.
        exp_mult: Scale of the magnitude output inside the exponential.
        rms_eps: See :class:`~pylo_integrations.rules.moments.MomentRule`.
        vector_momentum_eps: See there.
        norm_eps: See there.
        unread: States that are not kept, since no weight reads a channel that is made of them.
    """

    features: tuple[str, ...]
    features_of: Callable[[TensorLayout], tuple[str, ...]]
    norm_axes: Callable[[TensorLayout], Sequence[int]]
    widths: tuple[int, ...]
    exp_mult: float
    rms_eps: float
    vector_momentum_eps: float
    norm_eps: float
    unread: tuple[str, ...] = ()

    def averages(self, ctx: Any) -> dict[str, float]:
        """See :class:`AdamSpec`; none changes from step to step."""
        return {}


@dataclass(frozen=True)
class KernelSpec:
    """A rule, for kernels.

    Attributes:
        step: What makes steps.
        clip: Gradient elements are clipped to plus and minus this.
        sums: Sums that ``control`` reads besides those of squared gradients: ``"param_squares"``, ``"moments"`` and
            ``"moment_squares"``, in that order, all or the first; none of :class:`NesterovSpec`.
        sums_with_l2: The same, in a group with an L2 penalty.
        step_mult: Scale of the whole step, which decisions multiply.
        factor: Makes another factor on it, one number, of a step's
            :class:`~pylo_integrations.rules.base.StepContext`; None for 1.
        directions: What makes the step of what kernels propose for whole tensors, ``(tensors, 1, *layout.shape)``, as
            two factors: tensors of this shape, of any type, and scales with extent 1 along the axes over which features
            are normalised, of a step that no network makes along all; the last argument is the step's context. None if
            what kernels propose is the step.
        has_cuda: Whether the kernels for CUDA have it.
    """

    step: AdamSpec | NesterovSpec | NetworkSpec
    clip: float = math.inf
    sums: tuple[str, ...] = ()
    sums_with_l2: tuple[str, ...] = ()
    step_mult: float = 1.0
    factor: Callable[[Any], Tensor] | None = None
    directions: Callable[[Tensor, TensorLayout, Any], tuple[Tensor, Tensor]] | None = None
    has_cuda: bool = False
