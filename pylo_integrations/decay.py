"""Learning rate and weight decay, reduced to the two numbers of ``p <- keep * p - scale * step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

DecayPolicy = Literal["adamw", "before", "after", "before_independent", "after_independent", "l2"]
"""How weight decay meets the learned step.

``"adamw"`` has the number of an AdamW recipe mean what it means there: the old parameter shrinks by ``weight_decay *
adamw_lr * lr / default_lr``. ``adamw_lr`` is a constant of the optimizer: AdamW's learning rate whose steps are as
large as its own at ``default_lr``. The decay follows the group's ``lr``, so a schedule, and that of ``pace``, but no
other factor that a rule puts on it.

The others are the authors'. ``"before"`` decays the old parameter, ``"after"`` the updated one, both by ``lr *
weight_decay``, factors of the rule included; the ``_independent`` forms shrink by ``weight_decay * lr / base_lr``, so
that a schedule still anneals the decay but the choice of learning rate does not change it (Loshchilov & Hutter,
"Decoupled Weight Decay Regularization", ICLR 2019). ``base_lr`` is the group's learning rate when it was added.

``"l2"`` is not decoupled: the rule sees the gradient plus ``weight_decay * p``, and a rule that uses the loss sees it
plus ``weight_decay`` times the sum of all squared parameters, as Google's wrapper of VeLO does (docs/mathematics.md).
"""

_LARGEST_PENALTY = 1e6
"""The gradient of an L2 penalty this heavy can be squared and summed for parameters up to 1e8."""

_ROUNDING = 1e-6
"""By how much a float32 learning rate may make a decay that takes all look larger."""


def check_decay_policy(policy: str) -> None:
    """Raise ValueError unless ``policy`` is a :data:`DecayPolicy`."""
    if policy not in get_args(DecayPolicy):
        raise ValueError(f"weight_decay_policy={policy!r} is unknown; choose one of {list(get_args(DecayPolicy))}")


def keep_and_scale(
    group: Mapping[str, Any], lr_mult: float = 1.0, adamw_scale: float = 1.0
) -> tuple[float | Tensor, float | Tensor]:
    """``(keep, scale)`` of a parameter group: the new parameter is ``keep * p - scale * step``.

    Args:
        group: With ``lr``, ``weight_decay`` and ``weight_decay_policy``, and ``base_lr`` where the policy reads it.
        lr_mult: A rule's factor on the learning rate.
        adamw_scale: AdamW's learning rate for 1 of the optimizer's, ``adamw_lr / default_lr``.
    """
    lr = _number(group["lr"]) * lr_mult
    keep = 1 - shrinkage(group, lr_mult, adamw_scale)
    return keep, (lr * keep if group["weight_decay_policy"].startswith("after") else lr)


def shrinkage(group: Mapping[str, Any], lr_mult: float = 1.0, adamw_scale: float = 1.0) -> float | Tensor:
    """The part of a parameter that decay takes in a step; for the arguments see :func:`keep_and_scale`."""
    lr, decay, policy = _number(group["lr"]), _number(group["weight_decay"]), group["weight_decay_policy"]
    if policy == "l2":
        return 0.0
    if policy == "adamw":
        return decay * (adamw_scale * lr)
    if policy.endswith("_independent"):
        # No decay by a tiny base_lr would be 0 times infinity, were the rates divided first.
        return decay * lr / group["base_lr"] if group["base_lr"] else 0.0
    return decay * (lr * lr_mult)


def check_decay(group: Mapping[str, Any], lr_mult: float = 1.0, adamw_scale: float = 1.0) -> None:
    """Raise ValueError if a step would take more than all of a parameter, which then swings and soon overflows.

    Args:
        group: As for :func:`keep_and_scale`, with numbers in place of tensors; one that is nan is not known.
        lr_mult: The largest that stands for a tensor of the group.
        adamw_scale: As for :func:`keep_and_scale`.
    """
    decay, policy = group["weight_decay"], group["weight_decay_policy"]
    if policy == "l2":
        if decay > _LARGEST_PENALTY:
            raise ValueError(
                f"weight_decay={decay:g} with weight_decay_policy='l2' adds that many times the parameter to its "
                f"gradient, which may overflow: choose at most {_LARGEST_PENALTY:g}"
            )
        return
    taken = float(shrinkage(group, lr_mult, adamw_scale))
    if taken > 1 + _ROUNDING:
        base = f", base_lr={group['base_lr']:g}" if policy.endswith("_independent") else ""
        raise ValueError(
            f"lr={group['lr']:g}{base} and weight_decay={decay:g} with weight_decay_policy={policy!r} shrink a "
            f"parameter by {taken:.3g} times itself in one step, where 1 leaves nothing of it: choose weight_decay "
            f"{decay / taken:.3g} or less, 0.01 to 0.1 with the policy 'adamw', or a smaller lr"
        )


def _number(value: float | Tensor) -> float | Tensor:
    """A one-element tensor without axes, and in no type in which 1 less a usual decay is 1."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
