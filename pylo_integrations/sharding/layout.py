"""Axis roles of a parameter, and boxes of its elements.

The published rules are written for tensors whose last two axes are (in, out): a dense kernel is (in, out), a
convolution (kh, kw, in, out). A PyTorch parameter is (out, in, *kernel), or (in, out, *kernel) for ``nn.Embedding``,
transformers' ``Conv1D`` and transposed convolutions. Nothing is ever permuted in memory: a layout only says which
torch axis plays which reference role (docs/mathematics.md, "Axes").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

AxisOrder = Literal["out_in", "in_out"]
"""How a parameter stores its first two axes; matters only where axis sizes tie and for last-two-axes statistics."""


def reference_order(ndim: int, axes: AxisOrder = "out_in") -> tuple[int, ...]:
    """Torch axes listed in the order of the reference layout ``(*kernel, in, out)``.

    Args:
        ndim: Rank of the parameter.
        axes: Whether the parameter stores ``(out, in, *kernel)`` or ``(in, out, *kernel)``.
    """
    if ndim < 2:
        return tuple(range(ndim))
    return (*range(2, ndim), *((1, 0) if axes == "out_in" else (0, 1)))


def factored_axes(shape: Sequence[int], order: Sequence[int]) -> tuple[int, int] | None:
    """The torch axes ``(d1, d0)`` of the second-largest and largest extent, or None below rank 2.

    Ties go to the later reference axis. The sort is explicitly stable: numpy's default argsort is not, and gives the
    same tensor different statistics on different processors (docs/mathematics.md, "Axes").
    """
    if len(shape) < 2:
        return None
    ranked = sorted(order, key=lambda axis: shape[axis])
    return ranked[-2], ranked[-1]


@dataclass(frozen=True)
class Box:
    """An axis-aligned piece of a tensor: ``shape[i]`` elements from ``start[i]`` on along every axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements inside."""
        return math.prod(self.shape)

    def slices(self, origin: Sequence[int]) -> tuple[slice, ...]:
        """Index of this box in a tensor whose first element sits at ``origin``."""
        return tuple(slice(s - o, s - o + n) for s, o, n in zip(self.start, origin, self.shape, strict=True))

    def split_rows(self, max_numel: int) -> Iterator[Box]:
        """Cut along the first axis only, into boxes of at most ``max_numel`` elements or of one row."""
        length = max(1, max_numel // max(1, math.prod(self.shape[1:])))
        for offset in range(0, self.shape[0], length):
            rows = min(length, self.shape[0] - offset)
            yield Box((self.start[0] + offset, *self.start[1:]), (rows, *self.shape[1:]))

    def split(self, max_numel: int) -> Iterator[Box]:
        """Cut into boxes of at most ``max_numel`` elements, leading axes first so that pieces stay contiguous."""
        if self.numel <= max_numel:
            if self.numel:
                yield self
            return
        axis = next(i for i, n in enumerate(self.shape) if n > 1)
        length = max(1, max_numel // (self.numel // self.shape[axis]))
        for offset in range(0, self.shape[axis], length):
            start, shape = list(self.start), list(self.shape)
            start[axis] += offset
            shape[axis] = min(length, self.shape[axis] - offset)
            yield from Box(tuple(start), tuple(shape)).split(max_numel)


def run_start(box: Box, shape: Sequence[int]) -> int | None:
    """Where a box begins in a tensor in row-major order, if its elements are neighbours there; else None."""
    rest = [axis for axis, extent in enumerate(box.shape) if extent > 1]
    first = rest[0] if rest else len(shape) - 1
    if any(box.shape[axis] != shape[axis] for axis in range(first + 1, len(shape))):
        return None
    return sum(start * math.prod(shape[axis + 1 :]) for axis, start in enumerate(box.start))


@dataclass(frozen=True)
class TensorLayout:
    """Roles of the axes of a whole (unsharded) parameter; the same on every rank.

    A 0-d parameter is described as shape ``(1,)`` (docs/mathematics.md). What this process holds of it is another
    matter, see :class:`~pylo_integrations.sharding.pieces.Held`.

    Attributes:
        shape: Shape of the whole tensor.
        order: Torch axes in reference order, see :func:`reference_order`.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int], axes: AxisOrder = "out_in") -> TensorLayout:
        """Layout of a tensor by its whole shape."""
        full = tuple(shape) or (1,)
        return cls(full, reference_order(len(full), axes))

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def factored(self) -> tuple[int, int] | None:
        """``(d1, d0)`` of :func:`factored_axes`; None for vectors and scalars."""
        return factored_axes(self.shape, self.order)

    def without(self, axis: int) -> tuple[int, ...]:
        """Shape of the whole tensor with ``axis`` reduced to extent 1."""
        return tuple(1 if i == axis else n for i, n in enumerate(self.shape))
