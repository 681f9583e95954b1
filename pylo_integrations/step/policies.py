"""What a step does about gradients that are too large, or no numbers at all."""

from __future__ import annotations

from typing import Literal, NamedTuple

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
