"""Learning rate and weight decay, reduced to the two numbers of ``p <- keep * p - scale * step``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from torch import Tensor

DecayPolicy = Literal["before", "after", "before_independent", "after_independent", "l2"]
"""How decoupled weight decay meets the learned step.

``"before"`` decays the old parameter, as AdamW does; ``"after"`` decays the updated one. Both shrink by ``lr *
weight_decay``; the ``_independent`` forms shrink by ``weight_decay * lr / base_lr``, so that a schedule still anneals
the decay but the choice of learning rate does not change it (Loshchilov & Hutter, "Decoupled Weight Decay
Regularization", ICLR 2019). ``base_lr`` is the group's learning rate when it was added.

``"l2"`` is not decoupled: the rule sees the gradient plus ``weight_decay * p``, and a rule that uses the loss sees it
plus ``weight_decay`` times the sum of all squared parameters, as Google's wrapper of VeLO does (spec §3).
"""


def check_decay_policy(policy: str) -> None:
    """Raise ValueError unless ``policy`` is a :data:`DecayPolicy`."""
    if policy not in get_args(DecayPolicy):
        raise ValueError(f"weight_decay_policy={policy!r} is unknown; choose one of {list(get_args(DecayPolicy))}")


def keep_and_scale(group: Mapping[str, Any], lr_mult: float = 1.0) -> tuple[float | Tensor, float | Tensor]:
    """``(keep, scale)`` of a parameter group: the new parameter is ``keep * p - scale * step``.

    ``lr_mult`` is a rule's factor on the learning rate.
    """
    lr, decay, policy = group["lr"] * lr_mult, group["weight_decay"], group["weight_decay_policy"]
    if policy == "l2":
        return 1.0, lr
    if policy.endswith("_independent"):
        base_lr = group["base_lr"] * lr_mult
        shrink = decay * (lr / base_lr) if base_lr else 0.0
    else:
        shrink = decay * lr
    keep = 1 - shrink
    return keep, (lr * keep if policy.startswith("after") else lr)
