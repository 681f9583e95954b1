"""Components: tensors that share one parameter, and which elements of it each of them has.

Frameworks fuse weights that are multiplied with the same input, as queries, keys and values, and stack those of
experts. A rule is for each of them by itself: statistics, decisions and orthogonalised matrices are those of a
component. Where its parameter is in pieces, so is a component, so rules, kernels and ranks see one tensor more and
nothing new.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from pylo_integrations.sharding.layout import AxisOrder, Box, TensorLayout, run_start
from pylo_integrations.sharding.pieces import Held, Piece, ShardingError

Split: TypeAlias = int | Sequence[int]
"""Into how many equal components, or components of how many outputs each, the outputs of a parameter are divided."""

Options: TypeAlias = Mapping[str, Any]
"""Of a parameter group."""


def check_split(group: Options) -> None:
    """Raise ValueError if the options ``split`` and ``stacked`` of a parameter group are no such options."""
    split, stacked = group.get("split", 1), group.get("stacked", False)
    sizes = [split] if isinstance(split, int) else split
    is_sized = isinstance(sizes, (list, tuple)) and len(sizes) > 0
    if not (is_sized and all(type(size) is int and size > 0 for size in sizes)):
        raise ValueError(
            f"split={split!r} must be the number of equal components, or a list of how many outputs each of them has"
        )
    if not isinstance(stacked, bool):
        raise ValueError(f"stacked={stacked!r} must be True or False")


@dataclass(frozen=True)
class Component:
    """A tensor that is part of a parameter.

    Attributes:
        box: Where it is in the whole parameter.
        is_stacked: Whether the first axis of the parameter numbers tensors, and is none of theirs.
        layout: Of the component.
    """

    box: Box
    is_stacked: bool
    layout: TensorLayout

    def keeps_rows(self, shape: Sequence[int]) -> bool:
        """Whether rows of a parameter of this shape, which have scales in 8 bits, are rows of the component."""
        return not self.is_stacked and self.box.shape[1:] == tuple(shape[1:])

    def cut(self, held: Held) -> Cut:
        """What is here of the component, where ``held`` is here of its parameter.

        Raises:
            ShardingError: It is no run of elements of one of FSDP1's slices.
        """
        found = [(piece, common) for piece in held.pieces if (common := _common(piece.box, self.box)).numel]
        if not found or found[0][0].offset is None:
            pieces = tuple(Piece(self._inside(common)) for _, common in found)
            return Cut(Held(pieces, held.parts), found[0] if found else None, self.is_stacked)
        runs = []
        for piece, common in found:
            start = tuple(s - o for s, o in zip(common.start, piece.box.start, strict=True))
            first = run_start(Box(start, common.shape), piece.box.shape)
            if first is None:
                raise ShardingError(
                    f"a parameter is a slice made by FSDP1, in which the components of split lie scattered, as its "
                    f"outputs are not its first axis (component of shape {self.layout.shape}): use fully_shard() "
                    "(FSDP2), or a parameter group without split"
                )
            runs.append(((piece.offset or 0) + first, common))
        origin = min(first for first, _ in runs)
        inside = tuple(Piece(self._inside(common), first - origin) for first, common in runs)
        return Cut(Held(inside, held.parts), None, self.is_stacked, (origin, sum(common.numel for _, common in runs)))

    def _inside(self, box: Box) -> Box:
        """A box of the parameter in coordinates of the component."""
        start = tuple(s - o for s, o in zip(box.start, self.box.start, strict=True))
        return Box(start[1:], box.shape[1:]) if self.is_stacked else Box(start, box.shape)


@dataclass(frozen=True)
class Cut:
    """Where a component is in what is here of its parameter.

    Attributes:
        held: What is here of the component, in its own coordinates.
        source: The piece of the parameter, and the box of it; None if nothing is here, or the parameter is flat.
        is_stacked: See :class:`Component`.
        run: Of a flat parameter, the first element and how many.
    """

    held: Held
    source: tuple[Piece, Box] | None
    is_stacked: bool
    run: tuple[int, int] | None = None

    def view(self, local: Tensor) -> Tensor:
        """The component of a local tensor that is shaped like the parameter, or like its share; shares memory."""
        if self.run is not None:
            return local.view(-1).narrow(0, *self.run)
        if self.source is None:
            rank = local.dim() - self.is_stacked
            return local.new_empty((0,) * rank)
        piece, box = self.source
        inner = piece.view(local)[box.slices(piece.box.start)]
        return inner[0] if self.is_stacked else inner

    def rows(self, local: Tensor) -> Tensor:
        """Scales of the component's rows, of those of the parameter's; shares memory."""
        if self.source is None:
            return local[:0]
        piece, box = self.source
        return local.narrow(0, box.start[0] - piece.box.start[0], box.shape[0])


@dataclass(frozen=True, eq=False)
class Origin:
    """Which parameter a component is of.

    Attributes:
        param: As the optimizer has it.
        held: What is here of it.
        cut: Where the component is in it.
        index: Of the component among those of the parameter.
        written: The parameter and its states, of which those of the component are views.
    """

    param: Tensor
    held: Held
    cut: Cut
    index: int
    written: Sequence[Tensor]


def components_of(shape: Sequence[int], group: Options) -> tuple[Component, ...]:
    """The components of a whole parameter; none if it is one tensor.

    Args:
        shape: Of the parameter.
        group: Its options: ``axes``, ``split`` and ``stacked``.

    Raises:
        ValueError: The options do not fit the shape.
    """
    split, is_stacked, axes = group.get("split", 1), group.get("stacked", False), group["axes"]
    if split == 1 and not is_stacked:
        return ()
    each = tuple(shape[1:]) if is_stacked else tuple(shape)
    if not each or 0 in shape:
        raise ValueError(f"stacked={is_stacked} and split={split!r} leave no axis of a parameter of shape {shape}")
    axis = _output_axis(len(each), axes)
    sizes = [each[axis] // split] * split if isinstance(split, int) else list(split)
    if sum(sizes) != each[axis] or 0 in sizes:
        raise ValueError(
            f"split={split!r} does not divide the {each[axis]} outputs of a parameter of shape {tuple(shape)} with "
            f"axes={axes!r}: name the outputs of every component, or leave split out of its group"
        )
    starts = list(itertools.accumulate(sizes[:-1], initial=0))
    found = []
    for number in range(shape[0] if is_stacked else 1):
        for first, size in zip(starts, sizes, strict=True):
            start, extent = [0] * len(each), list(each)
            start[axis], extent[axis] = first, size
            box = Box((number, *start), (1, *extent)) if is_stacked else Box(tuple(start), tuple(extent))
            found.append(Component(box, is_stacked, TensorLayout.whole(extent, axes)))
    return tuple(found)


def _output_axis(rank: int, axes: AxisOrder) -> int:
    return 1 if axes == "in_out" and rank > 1 else 0


def joint_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of a tensor that holds a small state of every component: one after the other, or flat if they differ."""
    if len(set(shapes)) == 1:
        return len(shapes), *shapes[0]
    return (sum(map(math.prod, shapes)),)


def joint_shapes(each: Sequence[Mapping[str, tuple[int, ...] | None]]) -> dict[str, tuple[int, ...] | None]:
    """Shapes of the states of a parameter, where these are those of its components.

    Those shaped like the component become one shaped like the parameter.
    """
    names = list(dict.fromkeys(name for shapes in each for name in shapes))
    joint: dict[str, tuple[int, ...] | None] = {}
    for name in names:
        small = [shape for shapes in each if (shape := shapes.get(name)) is not None]
        joint[name] = joint_shape(small) if small else None
    return joint


def part_of_joint(joint: Tensor, shapes: Sequence[tuple[int, ...]], index: int) -> Tensor:
    """The small state of a component, in a tensor of :func:`joint_shape`; shares memory."""
    if len(set(shapes)) == 1:
        return joint[index]
    start = sum(map(math.prod, shapes[:index]))
    return joint[start : start + math.prod(shapes[index])].view(shapes[index])


def _common(one: Box, other: Box) -> Box:
    """The intersection of two boxes; without elements if there is none."""
    start = tuple(map(max, one.start, other.start))
    ends = (min(s + n, t + m) for s, n, t, m in zip(one.start, one.shape, other.start, other.shape, strict=True))
    return Box(start, tuple(max(0, end - first) for first, end in zip(start, ends, strict=True)))
