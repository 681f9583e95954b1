"""Whole tensors of what ranks hold in pieces: for checkpoints that do not depend on how training was distributed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pylo_integrations.sharding.layout import Box
from pylo_integrations.sharding.pieces import Held, local_part
from pylo_integrations.sharding.rounds import Ranks

Divided = tuple[tuple[int, ...], Held, Callable[[], Sequence[Tensor]]]
"""Whole shape, what is here, and what makes tensors of one dtype that are all divided alike, when their turn comes."""


def gather_whole(divided: Sequence[Divided], ranks: Ranks, to: int | None = None) -> Iterator[list[Tensor]]:
    """Put tensors together, in one exchange for each entry. All ranks must run through it together.

    Args:
        divided: What is here of tensors that ranks divide among themselves.
        ranks: Who takes part.
        to: The rank that gets the whole tensors; by default all do.

    Yields:
        For each entry its tensors, whole, on their device; nothing for a rank that gets none.
    """
    if not divided:
        return
    receivers = range(ranks.size) if to is None else [to]
    everywhere = ranks.gather([tuple(piece.box for piece in held.pieces) for _, held, _ in divided])
    for i, (shape, held, make) in enumerate(divided):
        tensors = make()
        seen: set[Box] = set()
        sent: list[list[Box]] = []  # by rank; of copies, only the first travels
        for boxes in everywhere:
            sent.append([box for box in boxes[i] if box not in seen])
            seen.update(sent[-1])
        locals_ = [local_part(tensor.detach()) for tensor in tensors]
        mine = [
            piece.view(local).reshape(-1) for local in locals_ for piece in held.pieces if piece.box in sent[ranks.rank]
        ]
        outgoing = [mine if rank in receivers else [] for rank in range(ranks.size)]
        numels = [len(tensors) * sum(box.numel for box in boxes) for boxes in sent]
        incoming = ranks.all_to_all(outgoing, numels if ranks.rank in receivers else [0] * ranks.size, locals_[0])
        if ranks.rank not in receivers:
            yield []
            continue
        wholes = [local.new_empty(shape or (1,)) for local in locals_]
        for boxes, received in zip(sent, incoming, strict=True):
            parts = iter(torch.split(received, [box.numel for _ in wholes for box in boxes]))
            for whole in wholes:
                for box in boxes:
                    whole[box.slices((0,) * len(box.start))] = next(parts).view(box.shape)
        yield [whole.view(shape) for whole in wholes]
