"""What this process holds of an optimizer's parameters, whoever divided them among ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pylo_integrations.sharding.pieces import FlatSlice, Held, is_sharded, locate
from pylo_integrations.sharding.rounds import Ranks
from pylo_integrations.sharding.shares import share_of, zero_state


@dataclass
class Holdings:
    """Knows of every parameter what is here.

    Attributes:
        shares_steps: Whether ranks that all have a whole parameter share the work of its step.
        ranks: The processes that train together.
        flat_slices: What is known about FSDP1's 1-D slices; may be filled later.
    """

    shares_steps: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    flat_slices: dict[Tensor, FlatSlice] = field(default_factory=dict)

    def shares(self, param: Tensor) -> bool:
        """Whether ranks share the work of a parameter's step: not of one that is sharded anyway, nor of a scalar."""
        return self.shares_steps and param.dim() > 0 and not is_sharded(param) and self.ranks.size > 1

    def divides(self, param: Tensor) -> bool:
        """Whether ranks may hold different parts of a parameter or its state."""
        return is_sharded(param) or self.shares(param)

    def locate(self, param: Tensor) -> tuple[tuple[int, ...], Held]:
        """Shape of the whole of a parameter, and what this process holds of it.

        Raises:
            ShardingError: The whole tensor cannot be seen from here.
        """
        shape, held = locate(param, self.flat_slices, self.ranks.size)
        return shape, share_of(shape, self.ranks) if self.shares(param) else held

    def zero_state(self, param: Tensor, held: Held, dtype: torch.dtype) -> Tensor:
        """Zeros for a state that is shaped, and sharded, like what is ``held`` of a parameter."""
        if held.share is not None:
            return zero_state(param, held, dtype, self.ranks)
        return torch.zeros_like(param, dtype=dtype, requires_grad=False)
