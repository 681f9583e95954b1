"""What must be known before a step may change anything: whether numbers are finite, and what other ranks do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pylo_integrations.rules.base import StepContext, clean_gradient
from pylo_integrations.sharding.agreement import header
from pylo_integrations.sharding.rounds import Ranks
from pylo_integrations.step.agreement import Pledge
from pylo_integrations.step.plan import Agreed, Plan

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
"""Types whose norm torch computes in any type that states have."""


@dataclass
class Verdict:
    """Facts, read from the device.

    Attributes:
        norm: Of all gradients.
        grads_finite: Whether all gradients are.
        loss_finite: Whether the loss is, or there is none.
        agreed: On what all ranks agree now.
        header: Of all ranks, added up; without elements if they do not talk.
    """

    norm: float
    grads_finite: bool
    loss_finite: bool
    agreed: Agreed
    header: list[float]

    @property
    def is_finite(self) -> bool:
        """Whether all numbers are."""
        return self.grads_finite and self.loss_finite


@dataclass
class Facts:
    """What ranks must agree on before state may change; each rank's share, until a round completes it.

    Attributes:
        header: See :func:`~pylo_integrations.sharding.agreement.header`; without elements if ranks do not talk.
        squares: Sum of all squared gradients, 0-d. Not finite if a gradient is not, or if it is so large that its
            square overflows: either would poison the state.
        loss: Mean over the ranks, 0-d; None if the rule does not use it.
        present: Per sharded tensor, on how many ranks it has a gradient.
        able: Per sharded tensor, on what part of the ranks nothing is in the native kernels' way.
    """

    header: Tensor
    squares: Tensor
    loss: Tensor | None
    present: Tensor
    able: Tensor

    @classmethod
    def measure(
        cls,
        plan: Plan,
        ctx: StepContext,
        pledge: Pledge | None,
        ranks: Ranks,
        is_collected: bool,
    ) -> Facts:
        """This rank's share.

        Args:
            plan: With the gradients.
            ctx: Of the step, with the loss of this rank, if the rule uses one.
            pledge: What to tell the others; None if there is no exchange.
            ranks: Who trains together.
            is_collected: Whether the plan's stages have collected, and with that summed squared gradients.
        """
        if is_collected:
            first, *others = (stages.grad_squares for _, stages in plan.parts)
            squares = torch.stack([first, *others]).sum() if others else first
        else:
            squares = _grad_squares(plan, ctx, 1 if pledge is None else ranks.size)
        mine = None if ctx.loss is None else ctx.loss.to(squares, copy=True)
        if pledge is None:
            nothing = squares.new_empty(0)
            return cls(nothing, squares, mine, nothing, nothing)
        sent, present = header(pledge.digest), [param.grad is not None for param in plan.sharded]
        numbers = torch.tensor([*sent, *present, *plan.able], dtype=torch.float64, device=squares.device)
        head, having, able = torch.split(numbers, [len(sent), len(present), len(present)])
        return cls(head, squares, mine, having, able)

    def shares(self, ranks: Ranks) -> list[tuple[Tensor, int]]:
        """What a round completes, and how often each number is in the sum."""
        loss = [] if self.loss is None else [(self.loss, ranks.size)]
        return [(self.header, 1), (self.squares, 1), *loss, (self.present, 1), (self.able, ranks.size)]

    def read(self) -> Verdict:
        """The one read of the device in a step."""
        loss = [] if self.loss is None else [self.loss]
        parts = (self.header, self.squares, *loss, self.present, self.able)
        given = [part.view(-1) for part in parts if part.numel()]
        numbers = (torch.cat(given) if len(given) > 1 else given[0]).tolist()
        sent, known = self.header.numel(), self.present.numel()
        head, (squares, *rest) = numbers[:sent], numbers[sent:]
        loss_value = rest.pop(0) if loss else 0.0
        present, able = rest[:known], rest[known:]
        finite = math.isfinite(squares)
        return Verdict(
            math.sqrt(squares) if finite else squares,
            finite,
            math.isfinite(loss_value),
            Agreed(tuple(count > 0 for count in present), tuple(part == 1 for part in able)),
            head,
        )


def _grad_squares(plan: Plan, ctx: StepContext, ranks: int) -> Tensor:
    """This rank's share of the sum of all squared gradients over so many ``ranks``, 0-d."""
    dtype = max((bucket.dtype for bucket in plan.buckets), key=lambda dtype: dtype.itemsize, default=torch.float32)
    squares = torch.zeros((), dtype=dtype, device=plan.device)
    alike: dict[tuple[Any, ...], list[Tensor]] = {}  # a call for each bucket would cost more than small tensors do
    for bucket in plan.buckets:
        # In the round, tensors that several ranks hold must count once.
        copies = max(1, ranks // bucket.parts)
        grads = [clean_gradient(block, ctx) for block in bucket.blocks] if ctx.zero_nonfinite else bucket.grads
        for grad in grads:
            # Gradients may be of another type than their parameters, and are then read as the state is.
            grad = grad if grad.dtype in _NARROW or grad.dtype == bucket.dtype else grad.to(bucket.dtype)
            alike.setdefault((bucket.dtype, copies, grad.dtype, bucket.device), []).append(grad)
    for (wide, copies, *_), tensors in alike.items():
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=wide))
        squares += (norms.square().sum() / copies).to(squares)
    return squares
