"""Learning rate and weight decay, reduced to the two numbers of ``p <- keep * p - scale * step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

DecayPolicy = Literal["adamw", "before", "after", "before_independent", "after_independent", "l2"]
"""How weight decay meets the learned step.

``"adamw"`` has the number of an AdamW recipe mean what it means there: the old parameter shrinks by ``weight_decay *
adamw_lr * lr / default_lr``. ``adamw_lr`` is a constant of the optimizer: AdamW's learning rate whose steps are as
large as its own at ``default_lr``. The decay follows the group's ``lr``, so a schedule, but no factor that a rule puts
on it.

The others are the authors'. ``"before"`` decays the old parameter, ``"after"`` the updated one, both by ``lr *
weight_decay``, factors of the rule included; the ``_independent`` forms shrink by ``weight_decay * lr / base_lr``, so
that a schedule still anneals the decay but the choice of learning rate does not change it (Loshchilov & Hutter,
"Decoupled Weight Decay Regularization", ICLR 2019). ``base_lr`` is the group's learning rate when it was added.

``"l2"`` is not decoupled: the rule sees the gradient plus ``weight_decay * p``, and a rule that uses the loss sees it
plus ``weight_decay`` times the sum of all squared parameters, as Google's wrapper of VeLO does (docs/mathematics.md).
"""


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
    lr = group["lr"] * lr_mult
    keep = 1 - shrinkage(group, lr_mult, adamw_scale)
    return keep, (lr * keep if group["weight_decay_policy"].startswith("after") else lr)


def shrinkage(group: Mapping[str, Any], lr_mult: float = 1.0, adamw_scale: float = 1.0) -> float | Tensor:
    """The part of a parameter that decay takes in a step; for the arguments see :func:`keep_and_scale`."""
    lr, decay, policy = group["lr"], group["weight_decay"], group["weight_decay_policy"]
    if policy == "l2":
        return 0.0
    if policy == "adamw":
        rate = adamw_scale * lr
    elif policy.endswith("_independent"):
        rate = lr / group["base_lr"] if group["base_lr"] else 0.0
    else:
        rate = lr * lr_mult
    shrunk: float | Tensor = decay * rate
    return shrunk
