"""Rounds: the points of a step at which partial sums become sums over whole tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def sum_over_ranks_(partial_sums: Iterable[Tensor]) -> None:
    """Complete partial sums in place, all of them in one exchange.

    Parameters are whole on this process (:meth:`~pylo_integrations.sharding.layout.TensorLayout.whole`; the optimizer
    refuses anything else), so their sums are already complete and there is nothing to exchange.
    """
