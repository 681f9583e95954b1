"""Shares: where every rank has all parameters, each may step a part of them (ZeRO's first stage).

The share of a rank is a run of rows of every tensor, cut as ``Shard`` of a ``DTensor`` cuts: along the first axis that
has more than one element, so that a share is one dense stretch of memory, for kernels and for messages. Ranks keep the
state of their share only, as ``DTensor`` s that distributed checkpoints can reshard. After a step everyone collects
the new rows of all others.

Sums, decisions and whole-tensor owners need nothing new: to them a share is one more kind of piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pylo_integrations.sharding.layout import Box
from pylo_integrations.sharding.pieces import Held, Piece
from pylo_integrations.sharding.rounds import Ranks

_ALIGNMENT = 16  # bytes, of every tensor in a message: enough for any dtype


def share_axis(shape: Sequence[int]) -> int:
    """The axis along which a tensor of one or more axes is shared out."""
    return next((axis for axis, extent in enumerate(shape) if extent > 1), 0)


def share_rows(shape: Sequence[int], num_ranks: int) -> int:
    """Rows of a full share; the last ranks may have fewer or none."""
    return -(-shape[share_axis(shape)] // num_ranks)


def share_of(shape: Sequence[int], ranks: Ranks) -> Held:
    """This rank's share of a tensor of one or more axes."""
    axis, rows = share_axis(shape), share_rows(shape, ranks.size)
    first = min(rows * ranks.rank, shape[axis])
    start, extent = [0] * len(shape), list(shape)
    start[axis], extent[axis] = first, min(rows, shape[axis] - first)
    box = Box(tuple(start), tuple(extent))
    return Held((Piece(box),) if box.numel else (), ranks.size, box)


def zero_state(param: Tensor, held: Held, dtype: torch.dtype, ranks: Ranks) -> Tensor:
    """Zeros for the state of a share, as a ``DTensor`` of the shape of ``param``."""
    local = torch.zeros_like(held.of(param.detach()), dtype=dtype)
    return _shared(local, share_axis(param.shape), param.shape, param.stride(), ranks)


def shared_rows(local: Tensor, shape: Sequence[int], ranks: Ranks) -> Tensor:
    """A contiguous ``DTensor`` whose rows are shared out like those of parameters, of this rank's share."""
    return _shared(local, 0, shape, [math.prod(shape[axis + 1 :]) for axis in range(len(shape))], ranks)


def _shared(local: Tensor, axis: int, shape: Sequence[int], stride: Sequence[int], ranks: Ranks) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard

    mesh = ranks.mesh(local.device.type)
    whole: Tensor = DTensor.from_local(
        local, mesh, [Shard(axis)], run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
    return whole


@dataclass(frozen=True)
class _Segment:
    """Rows ``start`` to ``start + rows`` of every rank's share of one tensor, at ``offset`` bytes of a message."""

    param: Tensor
    start: int
    rows: int
    offset: int
    numel: int

    def read(self, messages: Tensor, numel: int) -> Tensor:
        """Its first ``numel`` elements, ``(ranks, numel)``, in messages ``(ranks, bytes)``; shares memory."""
        size = self.param.itemsize
        return messages[:, self.offset : self.offset + numel * size].view(self.param.dtype)


class Collection:
    """Brings every rank the rows that the others have stepped; all ranks must make and use it together.

    All tensors travel in one message, or, if that has more bytes than temporaries may have, in as few as allow.

    Args:
        params: Whole parameters of one device, of which every rank has stepped its share.
        ranks: Who takes part.
        max_bytes: Bound on a message as it is received, from all ranks; one row of each rank travels in any case.
    """

    def __init__(self, params: Sequence[Tensor], ranks: Ranks, max_bytes: int) -> None:
        self._ranks = ranks
        self._messages: list[list[_Segment]] = [[]]
        limit, offset = max_bytes // ranks.size, 0
        for param in params:
            share = share_rows(param.shape, ranks.size)
            row = param.numel() // param.shape[share_axis(param.shape)]
            start = 0
            while start < share:
                fitting = (limit - offset) // (row * param.itemsize)
                if fitting < 1 and offset:
                    self._messages.append([])
                    offset = 0
                    continue
                rows = min(max(1, fitting), share - start)
                self._messages[-1].append(_Segment(param, start, rows, offset, rows * row))
                offset += _aligned(rows * row * param.itemsize)
                start += rows

    def collect_(self) -> None:
        """Overwrite what is not of this rank's share."""
        for message in self._messages:
            last = message[-1]
            numel = last.offset + _aligned(last.numel * last.param.itemsize)
            sent = torch.empty(numel, dtype=torch.uint8, device=last.param.device)
            for segment in message:
                mine = self._rows(segment, self._ranks.rank)
                segment.read(sent[None], mine.numel()).copy_(mine.reshape(1, -1))
            received = sent.new_empty(self._ranks.size, numel)
            self._ranks.all_gather(received, sent)
            copies = [copy for segment in message for copy in self._copies(segment, received)]
            torch._foreach_copy_([rows for rows, _ in copies], [values for _, values in copies])

    def _rows(self, segment: _Segment, rank: int) -> Tensor:
        """The rows of a segment that ``rank`` has stepped, in the parameter."""
        param, axis = segment.param.detach(), share_axis(segment.param.shape)
        first = rank * share_rows(param.shape, self._ranks.size) + segment.start
        first, end = min(first, param.shape[axis]), min(first + segment.rows, param.shape[axis])
        return param.narrow(axis, first, end - first)

    def _copies(self, segment: _Segment, received: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows in the parameter, and what they become: of all ranks with a full share as one, then of the next one."""
        param, axis = segment.param.detach(), share_axis(segment.param.shape)
        share = share_rows(param.shape, self._ranks.size)
        full = param.shape[axis] // share
        shares = param.narrow(axis, 0, full * share).unflatten(axis, (full, share))  # type: ignore[no-untyped-call]
        rows = shares.narrow(axis + 1, segment.start, segment.rows)
        yield rows, segment.read(received[:full], segment.numel).view(rows.shape)
        if full < self._ranks.size and (rows := self._rows(segment, full)).numel():
            yield rows, segment.read(received[full : full + 1], rows.numel()).view(rows.shape)


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGNMENT) * _ALIGNMENT
