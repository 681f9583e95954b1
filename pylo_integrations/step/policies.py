"""What a step does about gradients that are too large, or no numbers at all."""

from __future__ import annotations

from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

NonFinitePolicy = Literal["error", "skip", "zero"]
"""What a step does about non-finite gradients, or a non-finite loss that the rule needs.

``"error"`` raises, ``"skip"`` changes nothing, ``"zero"`` reads the offending gradient elements as zero (and skips if
it is the loss). Whatever the choice, parameters and state stay finite.
"""


class NonFiniteError(RuntimeError):
    """A gradient or loss was not finite and ``on_nonfinite="error"``; nothing was changed."""


class Policies(NamedTuple):
    """Settings of an optimizer that apply to all of its groups.

    Attributes:
        on_nonfinite: What to do about what is not finite.
        max_grad_norm: The global norm that gradients are clipped to; None for no clipping.
    """

    on_nonfinite: NonFinitePolicy = "skip"
    max_grad_norm: float | None = None


def check_policies(on_nonfinite: Any, max_grad_norm: Any) -> Policies:
    """What a user has set, with None for no clipping.

    Raises:
        ValueError: Not in range.
    """
    if on_nonfinite not in get_args(NonFinitePolicy):
        raise ValueError(f"on_nonfinite={on_nonfinite!r} is unknown; choose one of {get_args(NonFinitePolicy)}")
    if max_grad_norm is None:
        return Policies(on_nonfinite)
    if not (isinstance(max_grad_norm, Real) and float(max_grad_norm) > 0):
        raise ValueError(f"max_grad_norm={max_grad_norm!r} must be a positive number, or None for no clipping")
    return Policies(on_nonfinite, float(max_grad_norm))
