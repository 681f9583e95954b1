"""Whole tensors, one rank each: for rules that need a whole matrix at once.

Every sharded tensor gets an owner; owners are spread so that ranks own about equally many elements. One exchange brings
each owner the pieces of its tensors from all ranks, another returns what it made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pylo_integrations.sharding.blocks import Block, Bucket
from pylo_integrations.sharding.layout import Box
from pylo_integrations.sharding.rounds import Ranks


class Assembly:
    """Who owns which tensor, and who holds which piece of it. All ranks must make and use it together.

    Args:
        buckets: Of sharded tensors.
        ranks: Who takes part.
    """

    def __init__(self, buckets: Sequence[Bucket], ranks: Ranks) -> None:
        self._ranks = ranks
        self._shape = self._describe(buckets)
        self._buckets = buckets
        # By rank, then bucket, then tensor: the boxes there.
        self._boxes: list[list[list[tuple[Box, ...]]]] = ranks.gather(
            [[tuple(piece.box for piece in held.pieces) for held in bucket.held] for bucket in buckets]
        )
        self._owners = self._choose_owners(buckets)
        self._sent = self._choose_senders()

    @staticmethod
    def _describe(buckets: Sequence[Bucket]) -> list[tuple[object, ...]]:
        return [(bucket.layout, bucket.parts, len(bucket), bucket.dtype) for bucket in buckets]

    def fits(self, buckets: Sequence[Bucket]) -> bool:
        """Whether this assembly serves these buckets; the same answer on every rank."""
        if self._describe(buckets) != self._shape:
            return False
        self._buckets = buckets
        return True

    def _choose_owners(self, buckets: Sequence[Bucket]) -> list[list[int]]:
        load = [0] * self._ranks.size
        owners = [[0] * len(bucket) for bucket in buckets]
        tensors = [(bucket.layout.numel, b, t) for b, bucket in enumerate(buckets) for t in range(len(bucket))]
        for numel, b, t in sorted(tensors, key=lambda tensor: -tensor[0]):  # largest first, to the least loaded
            owners[b][t] = load.index(min(load))
            load[owners[b][t]] += numel
        return owners

    def _owned(self, owner: int) -> Iterator[tuple[int, int]]:
        """Bucket and tensor of everything a rank owns, in the order in which it travels."""
        return ((b, t) for b, tensors in enumerate(self._owners) for t, rank in enumerate(tensors) if rank == owner)

    def _choose_senders(self) -> list[list[list[tuple[Box, ...]]]]:
        """What each rank contributes to each tensor: of replicas, only the first sends."""
        seen: set[tuple[int, int, Box]] = set()
        sent = []
        for buckets in self._boxes:
            sent.append(
                [
                    [tuple(box for box in boxes if (b, t, box) not in seen) for t, boxes in enumerate(tensors)]
                    for b, tensors in enumerate(buckets)
                ]
            )
            for b, tensors in enumerate(buckets):
                seen.update((b, t, box) for t, boxes in enumerate(tensors) for box in boxes)
        return sent

    def gather(self, blocks: Sequence[Sequence[Block]], values: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Bring whole tensors to their owners.

        Args:
            blocks: Of every bucket.
            values: Of every bucket and block, ``(tensors, 1, *box)``.

        Returns:
            Of every bucket, ``(tensors owned here, 1, *shape)``.
        """
        local = [self._by_tensor(*pair) for pair in zip(blocks, values, strict=True)]
        rank, everyone = self._ranks.rank, range(self._ranks.size)
        like = max((steps[0] for steps in values), key=lambda steps: steps.dtype.itemsize)
        outgoing = [[local[b][t] for b, t in self._owned(to) if self._sent[rank][b][t]] for to in everyone]
        mine = list(self._owned(rank))
        sizes = [sum(box.numel for b, t in mine for box in self._sent[r][b][t]) for r in everyone]
        incoming = self._ranks.all_to_all(outgoing, sizes, like)
        wholes = {(b, t): like.new_empty(self._buckets[b].layout.shape, dtype=self._buckets[b].dtype) for b, t in mine}
        for r, received in zip(everyone, incoming, strict=True):
            boxes = [((b, t), box) for b, t in mine for box in self._sent[r][b][t]]
            for (key, box), part in zip(boxes, torch.split(received, [box.numel for _, box in boxes]), strict=True):
                wholes[key][box.slices((0,) * len(box.start))] = part.view(box.shape).to(wholes[key].dtype)
        return [
            torch.stack(owned).unsqueeze(1)
            if (owned := [wholes[key] for key in mine if key[0] == b])
            else like.new_empty((0, 1, *bucket.layout.shape), dtype=bucket.dtype)
            for b, bucket in enumerate(self._buckets)
        ]

    def scatter(self, blocks: Sequence[Sequence[Block]], wholes: Sequence[Tensor]) -> list[list[Tensor]]:
        """Return whole tensors, as :meth:`gather` gave them, to those who hold pieces of them.

        Returns:
            Of every bucket and block, ``(tensors, 1, *box)``.
        """
        rank, everyone = self._ranks.rank, range(self._ranks.size)
        mine = [*self._owned(rank)]
        positions = {key: i for b in range(len(wholes)) for i, key in enumerate(key for key in mine if key[0] == b)}
        outgoing = [
            [
                wholes[b][positions[b, t], 0][box.slices((0,) * len(box.start))].reshape(-1)
                for b, t in mine
                for box in self._boxes[to][b][t]
            ]
            for to in everyone
        ]
        sizes = [sum(box.numel for b, t in self._owned(r) for box in self._boxes[rank][b][t]) for r in everyone]
        incoming = self._ranks.all_to_all(outgoing, sizes, max(wholes, key=lambda whole: whole.dtype.itemsize))
        local: dict[tuple[int, int], Tensor] = {}
        for r, received in zip(everyone, incoming, strict=True):
            keys = list(self._owned(r))
            numels = [sum(box.numel for box in self._boxes[rank][b][t]) for b, t in keys]
            local |= dict(zip(keys, torch.split(received, numels), strict=True))
        return [self._by_block(b, bucket_blocks, local) for b, bucket_blocks in enumerate(blocks)]

    @staticmethod
    def _by_tensor(blocks: Sequence[Block], values: Sequence[Tensor]) -> dict[int, Tensor]:
        """What is here of each tensor, flat; the boxes of a piece come in the order of its elements."""
        parts: dict[int, list[Tensor]] = {}
        for block, value in zip(blocks, values, strict=True):
            for i, part in enumerate(value):
                parts.setdefault(block.tensors.start + i, []).append(part.reshape(-1))
        return {t: torch.cat(tensors) for t, tensors in parts.items()}

    def _by_block(self, b: int, blocks: Sequence[Block], local: dict[tuple[int, int], Tensor]) -> list[Tensor]:
        """The inverse of :meth:`_by_tensor`."""
        dtype, used, values = self._buckets[b].dtype, dict.fromkeys(local, 0), []
        for block in blocks:
            keys = [(b, t) for t in range(block.tensors.start, block.tensors.stop)]
            parts = [local[key][used[key] : used[key] + block.box.numel] for key in keys]
            used.update((key, used[key] + block.box.numel) for key in keys)
            values.append(torch.stack(parts).to(dtype).view(len(keys), 1, *block.box.shape))
        return values
