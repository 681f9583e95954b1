"""Steps that a rule finishes between two calls of the library: proposed for whole tensors, alike ones together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.ops.records import DTYPES
from pylo_integrations.ops.tables import NativeBucket, PieceTable, Stretch
from pylo_integrations.rules.base import StepContext

TOGETHER = {"cpu": 2**21, "cuda": 2**28}
"""Elements of whole tensors that are stepped together, by type of device. On a CPU many small ones make few calls, and
all of it fits a cache; on a device their steps take 1 GiB, and few models need more than one call."""


@dataclass(frozen=True)
class _Stack:
    """Whole tensors of a bucket that lie alike in memory, to be stepped as one.

    Attributes:
        index: Of the bucket.
        rows: Their records.
        shape: Of each.
        strides: Of a stack of their steps.
        device: Where they are.
    """

    index: int
    rows: slice
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    @property
    def count(self) -> int:
        """How many tensors."""
        return int(self.rows.stop) - int(self.rows.start)


class WholeSteps:
    """The tensors of a table whose rules finish them, and with the last of them those that are stepped at once."""

    def __init__(self, natives: Sequence[NativeBucket], table: PieceTable) -> None:
        self._natives, self._first = natives, table

    def apply(self, contexts: Sequence[StepContext]) -> None:
        """Propose steps, have the rules finish them, and write parameters; some tensors at a time."""
        batches = list(self._stacks())
        if not batches:
            self._first.apply()
        for number, stacks in enumerate(batches, start=1):
            proposed = [
                torch.empty_strided(
                    (stack.count, *stack.shape), stack.strides, dtype=torch.float32, device=stack.device
                )
                for stack in stacks
            ]
            rows = slice(stacks[0].rows.start, stacks[-1].rows.stop)
            self._apply_at(rows, stacks, proposed)
            finished = [self._finished(stack, proposed.pop(0), contexts) for stack in stacks]
            directions, scales = zip(*finished, strict=True)
            last = self._first.at_once.stop if number == len(batches) else rows.stop
            self._apply_at(slice(rows.start, last), stacks, directions, scales)

    def _stacks(self) -> Iterator[list[_Stack]]:
        """Whole tensors that rules finish, alike ones together, in lists of about :data:`TOGETHER` elements."""
        stacks: list[_Stack] = []
        room = most = TOGETHER[self._first.table.device.type]
        for index, native in enumerate(self._natives):
            if native.stretch != Stretch.WHOLE:
                continue
            bucket, first = native.bucket, self._first.rows[index].start
            stepped = [bucket.stepped(position) for position in range(len(bucket))]
            for _, run in itertools.groupby(range(len(bucket)), [tensor.stride() for tensor in stepped].__getitem__):
                alike = list(run)
                while alike:
                    like, numel = stepped[alike[0]], bucket.layout.numel
                    if stacks and (room < numel or stacks[-1].rows.stop != first + alike[0]):
                        yield stacks
                        stacks, room = [], most
                    count = min(len(alike), max(1, room // numel))
                    rows = slice(first + alike[0], first + alike[0] + count)
                    stacks.append(_Stack(index, rows, tuple(like.shape), (numel, *like.stride()), like.device))
                    room -= count * numel
                    del alike[:count]
        if stacks:
            yield stacks

    def _finished(self, stack: _Stack, proposed: Tensor, contexts: Sequence[StepContext]) -> tuple[Tensor, Tensor]:
        """What the rule makes of the proposed steps of a stack: directions that lie as these, and their scales."""
        native, count = self._natives[stack.index], stack.count
        layout, directions_of = native.bucket.layout, native.spec.directions
        assert directions_of is not None, "see NativeBucket.stretch"
        whole = proposed.view(count, 1, *layout.shape)
        made, scale = directions_of(whole, layout, contexts[stack.index])
        directions = made.reshape(proposed.shape)
        if directions.stride() != stack.strides:
            directions = directions.new_empty_strided(proposed.shape, stack.strides).copy_(directions)
        return directions, scale.float().flatten(1).contiguous()

    def _apply_at(
        self, rows: slice, stacks: Sequence[_Stack], directions: Sequence[Tensor], scales: Sequence[Tensor] = ()
    ) -> None:
        """Apply some records; those of stacks of whole tensors refer to their directions, and to scales of these."""
        table = self._first.table
        try:
            for name, tensors in (("direction", directions), ("direction_scale", scales)):
                for stack, tensor in zip(stacks, tensors, strict=False):
                    each = tensor.stride(0) * tensor.itemsize
                    where = tensor.data_ptr() + each * np.arange(stack.count, dtype=np.uint64)
                    table.tensors[name][stack.rows], table.tensors[f"{name}_bytes"][stack.rows] = where, each
            for stack, tensor in zip(stacks, directions, strict=True):
                table.tensors["direction_dtype"][stack.rows] = DTYPES[tensor.dtype]
            table.run_some("apply", rows)
        finally:  # whatever interrupts this, the table is again the one that was checked
            for name in ("direction", "direction_scale", "direction_dtype", "direction_bytes", "direction_scale_bytes"):
                table.tensors[name][rows] = 0
