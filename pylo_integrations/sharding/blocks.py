"""Buckets and blocks: how many tensors are stepped as one.

A *bucket* holds tensors that share layout, rule, dtype, device and parameter group. A *block* is one box of some of
them, stacked along a leading tensor axis: many small tensors become one stack, a large tensor becomes many boxes, and
a rule sees the same shape either way: ``(tensors, channels, *box)``. Boxes bound the memory of temporaries, however
large one tensor is; stacks bound the Python overhead, however many tensors there are.

Buckets are the same on every rank, so that their sums can be added up over ranks as they are. Blocks differ: they cover
what this process holds. A bucket of which nothing is here has one block without elements, whose sums are zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pylo_integrations.formats import FLOAT32, NOISE, Format, Stored
from pylo_integrations.rounding import box_noise, noise_keys
from pylo_integrations.sharding.components import Origin
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import Held, Piece, local_part

Sums = Mapping[str, Tensor]
"""Named statistics of shape ``(tensors, channels, *axes)``; an axis has extent 1 where it was summed over."""


@dataclass(frozen=True)
class PartialSum:
    """One block's share of a sum: ``value`` is ``(tensors, channels, *box)`` with extent 1 along the axes ``over``."""

    value: Tensor
    over: tuple[int, ...]

    @classmethod
    def of(cls, values: Tensor, over: Sequence[int], shape: Sequence[int]) -> PartialSum:
        """Sum ``values``, broadcastable to ``(tensors, channels, *shape)``, along its axes ``over``.

        A broadcast axis counts once for each element of the box, without being expanded.
        """
        total = values.sum([axis + 2 for axis in over], keepdim=True)
        # A list: torch.compile cannot follow a generator into math.prod().
        repeats = math.prod([shape[axis] // max(1, values.shape[axis + 2]) for axis in over])
        extents = (1 if axis in over else extent for axis, extent in enumerate(shape))
        return cls((total * repeats).expand(*total.shape[:2], *extents), tuple(over))


@dataclass(eq=False)
class Bucket:
    """Equally laid out parameters of one group, with their gradients and states.

    Attributes:
        layout: Shared by every tensor of the bucket.
        params: Parameters, in torch layout and storage dtype; sharded ones as the framework has them. Of tensors that
            share a parameter, what is here of them, plain views.
        states: ``optimizer.state[p]`` of each parameter.
        group: The parameter group, read afresh every step (lr, weight decay, maximize).
        dtype: Dtype of state and arithmetic: float32, or float64 for float64 parameters.
        parts: Into how many disjoint parts the ranks divide each tensor; 1 if every rank has the whole.
        held: What is here of each parameter.
        grads: This step's gradients of what is here, plain tensors, set by the engine.
        numbers: Of each parameter, its number among all of the optimizer; further tensors that share it have further
            ones, by which the noise of rounding differs.
        origins: Of each tensor, which parameter it shares with others; None where it is a parameter.
        rounds_stochastically: Whether new parameters are rounded so, and not to the nearest.
        stored: The tensors that hold each state, by its name; see :mod:`pylo_integrations.formats`. States that are not
            named there are stored as they are.
        form: Of states that are shaped like their parameter.
        iteration: Steps taken before this one, set by the engine: noise of stored state depends on it.
        blocks: What is here, cut; see :meth:`cut_`.
    """

    layout: TensorLayout
    params: list[Tensor]
    states: list[dict[str, Any]]
    group: Mapping[str, Any]
    dtype: torch.dtype
    parts: int = 1
    held: list[Held] = field(default_factory=list)
    grads: Sequence[Tensor] = ()
    numbers: list[int] = field(default_factory=list)
    origins: list[Origin | None] = field(default_factory=list)
    rounds_stochastically: bool = False
    stored: Mapping[str, Mapping[str, Stored]] = field(default_factory=dict)
    form: Format = FLOAT32
    iteration: int = 0
    blocks: list[Block] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.params)

    def parts_of(self, name: str, shape: Sequence[int] | None) -> Mapping[str, Stored]:
        """The entries of :attr:`states` that hold a state, given the shape that the rule says it has."""
        known = self.stored.get(name)
        return {name: Stored(None if shape is None else tuple(shape), self.dtype)} if known is None else known

    def stored_names(self, names: Iterable[str]) -> list[str]:
        """The entries of :attr:`states` that hold the states of these names."""
        return [part for name in names for part in self.stored.get(name, (name,))]

    @property
    def owners(self) -> list[Tensor]:
        """The parameters that the tensors are, or are in, as the optimizer has them."""
        if not any(self.origins):
            return self.params
        pairs = zip(self.params, self.origins, strict=True)
        return [param if origin is None else origin.param for param, origin in pairs]

    @property
    def device(self) -> torch.device:
        """Device of every tensor in the bucket."""
        return self.params[0].device

    def wrappers(self) -> list[Tensor]:
        """Parameters and states that are written through views of what is inside them, so that autograd counts less."""
        origins = {id(origin.param): origin for origin in self.origins if origin is not None}
        return [tensor for origin in origins.values() for tensor in origin.written if local_part(tensor) is not tensor]

    def stepped(self, position: int) -> Tensor:
        """What of the memory of a parameter is stepped here, a plain tensor."""
        return self.held[position].of(local_part(self.params[position]))

    def stack(self, name: str) -> Tensor:
        """State ``name`` of all tensors, ``(tensors, *state shape)``; a copy."""
        return torch.stack([state[name] for state in self.states])

    def unstack_(self, name: str, value: Tensor) -> None:
        """Write ``value`` of shape ``(tensors, *state shape)`` back into the states."""
        torch._foreach_copy_([state[name] for state in self.states], list(value.unbind()))

    def cut_(self, max_numel: int) -> None:
        """Cut what is here of the bucket into blocks of about ``max_numel`` elements at most; at least one."""
        blocks: list[Block] = []
        for held, run in itertools.groupby(range(len(self)), key=self.held.__getitem__):
            indices = list(run)
            count = max(1, max_numel // max(1, held.numel))
            for start in range(indices[0], indices[-1] + 1, count):
                tensors = slice(start, min(start + count, indices[-1] + 1))
                for piece in held.pieces:
                    split = piece.box.split_rows if self.form.per_block else piece.box.split
                    blocks += [Block(self, tensors, piece, box) for box in split(max_numel)]
        self.blocks = blocks or [self._empty_block()]

    def _empty_block(self) -> Block:
        nothing = Box((0,) * len(self.layout.shape), (0,) * len(self.layout.shape))
        flat = local_part(self.params[0]).dim() != len(self.layout.shape)
        return Block(self, slice(0, 1), Piece(nothing, 0 if flat else None), nothing)


@dataclass(eq=False)
class Block:
    """The same box of ``tensors`` of a bucket; everything it loads has shape ``(tensors, channels, *box)``."""

    bucket: Bucket
    tensors: slice
    piece: Piece
    box: Box
    _index: tuple[slice, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._index = self.box.slices(self.piece.box.start)

    def __len__(self) -> int:
        start, stop = self.tensors.start, self.tensors.stop
        return int(stop - start)

    @property
    def layout(self) -> TensorLayout:
        """Layout of the tensors this block is cut from."""
        return self.bucket.layout

    def _views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self.piece.view(local_part(tensor))[self._index] for tensor in tensors]

    def cut(self, tensors: Sequence[Tensor]) -> Tensor:
        """This box of tensors shaped like its parameters, one for each, ``(tensors, 1, *box)``; may alias them."""
        views = self._views(tensors)
        stacked = views[0].unsqueeze(0) if len(views) == 1 else torch.stack(views)
        return stacked.to(self.bucket.dtype).unsqueeze(1)

    @property
    def param(self) -> Tensor:
        """Parameters in compute dtype, ``(tensors, 1, *box)``; may alias the parameter: do not write to it."""
        return self.cut(self.bucket.params[self.tensors])

    @property
    def raw_grad(self) -> Tensor:
        """Gradients in compute dtype, ``(tensors, 1, *box)``; may alias ``p.grad``: do not write to it."""
        return self.cut(self.bucket.grads[self.tensors])

    def load(self, names: Sequence[str]) -> Tensor:
        """Parameter-shaped states as channels, ``(tensors, len(names), *box)``; always a copy."""
        bucket = self.bucket
        if bucket.form is FLOAT32:
            stacked = torch.stack(self._stored(names))
        else:  # one by one: their parts differ
            stacked = torch.stack([self._decoded(name) for name in names], dim=1)
        return stacked.view(len(self), len(names), *self.box.shape)

    def store_(self, names: Sequence[str], value: Tensor) -> None:
        """Write ``value`` of shape ``(tensors, len(names), *box)`` back into the states."""
        if self.bucket.form is FLOAT32:
            torch._foreach_copy_(self._stored(names), list(value.flatten(0, 1).unbind()))
            return
        for name, values in zip(names, value.unbind(1), strict=True):
            parts = self.bucket.stored[name]
            is_square = any(part.dtype == torch.uint8 for part in parts.values())
            hashed, bit = NOISE.get(name, (name, 0))
            keys = [noise_keys(self.bucket.iteration, number, hashed) for number in self.bucket.numbers[self.tensors]]
            noise = box_noise(self.box.start, self.box.shape, self.layout.shape, keys, values.device, bit)
            encoded = self.bucket.form.encode(values, is_square, noise)
            for (part, stored), new in zip(parts.items(), encoded, strict=True):
                torch._foreach_copy_(self._stored([part], stored.per_block), list(new.unbind()))

    def _decoded(self, name: str) -> Tensor:
        """A state of all tensors, ``(tensors, *box)``."""
        parts = self.bucket.stored[name].items()
        return self.bucket.form.decode([torch.stack(self._stored([part], each.per_block)) for part, each in parts])

    def _stored(self, names: Sequence[str], per_block: bool = False) -> list[Tensor]:
        """What is stored in tensors of these names, of one tensor after the other; views."""
        tensors = [state[name] for state in self.bucket.states[self.tensors] for name in names]
        if per_block:  # whole rows are here, and all of their scales
            return [local_part(tensor)[self._index[0]] for tensor in tensors]
        return self._views(tensors)

    def store_param_(self, value: Tensor) -> None:
        """Write new parameters of shape ``(tensors, 1, *box)``, rounding to their storage dtype."""
        views, values = self._views(self.bucket.params[self.tensors]), list(value.squeeze(1).unbind())
        if not any(map(Tensor.is_neg, views)):
            torch._foreach_copy_(views, values)
            return
        for view, new in zip(views, values, strict=True):  # lazily negated ones are refused in lists
            view.copy_(new)

    def rows(self, per_tensor: Tensor) -> Tensor:
        """This block's entries of a tensor whose leading axis runs over the bucket's tensors (or has extent 1)."""
        return per_tensor if per_tensor.shape[0] == 1 else per_tensor[self.tensors]

    def narrow(self, statistic: Tensor) -> Tensor:
        """This block's part of a ``(tensors, channels, *axes)`` statistic of the whole tensors."""
        extents = statistic.shape[2:]
        box = zip(self.box.start, self.box.shape, extents, strict=True)
        index = (slice(None) if extent == 1 else slice(start, start + n) for start, n, extent in box)
        return self.rows(statistic)[(slice(None), slice(None), *index)]


def by_tensors(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """A bucket's blocks in lists that together cover the same tensors."""
    for _, pieces in itertools.groupby(blocks, lambda block: (block.tensors.start, block.tensors.stop)):
        yield list(pieces)


class Accumulator:
    """Adds the partial sums of a bucket's blocks up to sums over its tensors."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self.sums: dict[str, Tensor] = {}

    def add_(self, block: Block, partial_sums: Mapping[str, PartialSum]) -> None:
        """Add one block's partial sums."""
        shape = self._bucket.layout.shape
        for name, partial in partial_sums.items():
            if name not in self.sums:
                axes = (1 if axis in partial.over else extent for axis, extent in enumerate(shape))
                self.sums[name] = partial.value.new_zeros(len(self._bucket), partial.value.shape[1], *axes)
            if block.box.numel:
                block.narrow(self.sums[name]).add_(partial.value)
