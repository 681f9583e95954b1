"""Ranks that are not there, for a dry run: it asks them what the others would answer.

They stand beside what they stand in for, :class:`Ranks`, :class:`Assembly` and :class:`Agreement`, as they have to know
what those ask.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pylo_integrations.sharding.agreement import Agreement, Answer, Statement
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import Box
from pylo_integrations.sharding.rounds import Ranks


class AbsentRanks(Ranks):
    """Ranks that are not there.

    Attributes:
        assembled: Buckets of whole tensors that ranks put together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.assembled: list[Bucket] = []

    def gather(self, value: Any) -> list[Any]:
        """What :class:`Assembly` asks all ranks for, the boxes that each holds; of those that are not here, computed.

        Raises:
            NotImplementedError: Something else is asked for.
        """
        answers: list[Any] = []
        for rank in range(self.size):
            buckets: list[list[tuple[Box, ...]]] = []
            for bucket in self.assembled:
                # Of parameters that every rank has, the states tell how ranks share their steps.
                divided: list[Any] = [
                    param
                    if hasattr(param, "placements")
                    else next(s for s in state.values() if hasattr(s, "placements"))
                    for param, state in zip(bucket.params, bucket.states, strict=True)
                ]
                buckets.append(
                    [_boxes(tuple(d.shape), tuple(d.device_mesh.shape), d.placements, rank) for d in divided]
                )
            answers.append(buckets)
        if value != answers[0]:
            raise NotImplementedError("a dry run cannot tell what other ranks would answer here")
        return answers


class Unanimous(Agreement):
    """Agreement with ranks that are not there."""

    def ask(
        self,
        contract: bytes,
        state: Callable[[], Statement],
        device: torch.device,
        measured: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        """Take it that the others ask for the same, as they do in their first step."""
        self.contract = contract

    def confirm(self, state: Callable[[], Statement], device: torch.device) -> None:
        """Take it that the others come to the first exchange."""

    def check(self, answer: Answer, state: Callable[[], Statement], asked: bool = False) -> None:
        """Take it that the others do the same."""


@functools.lru_cache(maxsize=4096)
def _boxes(shape: tuple[int, ...], mesh: tuple[int, ...], placements: tuple[Any, ...], rank: int) -> tuple[Box, ...]:
    """What a rank holds of a DTensor on a mesh of all ranks: as torch chunks it, axis of the mesh by axis."""
    start, extents = [0] * len(shape), list(shape)
    for coordinate, count, placement in zip(_unravel(rank, mesh), mesh, placements, strict=True):
        if placement.is_shard():
            axis, extent = placement.dim, extents[placement.dim]
            chunk = math.ceil(extent / count)
            begin = min(coordinate * chunk, extent)
            start[axis] += begin
            extents[axis] = min(chunk, extent - begin)
    return (Box(tuple(start), tuple(extents)),) if math.prod(extents) else ()


def _unravel(rank: int, mesh: Sequence[int]) -> list[int]:
    coordinates = []
    for count in reversed(mesh):
        rank, coordinate = divmod(rank, count)
        coordinates.append(coordinate)
    return coordinates[::-1]
