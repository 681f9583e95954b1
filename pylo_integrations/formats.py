r"""Formats of stored state: in which tensors a state is kept, and what numbers become of them.

Rules see float32 whatever is stored; a format decodes what they load and encodes what they store. Three are there:

* ``float32``: as it is.
* ``bfloat16``: the upper half of every number, rounded stochastically, so that averages do not stand still where what a
  step adds is smaller than half the distance between neighbours.
* ``int8``: a code of 8 bits for every number and a float32 scale for every block, the largest magnitude in it. Codes
  are the upper bits of a float32, less those of 1:

  .. math:: y = 1 + R \, |x| / s

  with 5 bits of its mantissa for a signed state, whose codes are -127 to 127 (:math:`R = 14.75`), and 4 for an average
  of squares, whose codes are 0 to 255 (:math:`R = 63487`). So distances are even near zero and double with every octave
  of :math:`y`, like those of the mu-law of telephones (ITU-T G.711). They are rounded stochastically, too. An average
  of squares that is not zero never becomes zero, as it divides. What is smaller than ``TINY`` everywhere in a block is
  zero.

A block is a run of :data:`BLOCK` elements of a *row*: all that has the same index along the first axis of the whole
tensor, in row-major order; the last of a row may be shorter. So whoever holds whole rows, as FSDP2 and ``shard_step``
have it, holds whole blocks, codes and scales are sharded alike, and nothing depends on how a tensor is divided.

To encode what was decoded, to the nearest, gives it back bit by bit: state may travel as float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pylo_integrations.rounding import round_stochastically

StateDtype: TypeAlias = Literal["float32", "bfloat16", "int8"]
"""How state is stored that is shaped like its parameter.

``"float32"``; ``"bfloat16"``, half as much, rounded stochastically; ``"int8"``, a quarter, in blocks with a scale each
(:mod:`pylo_integrations.formats`). Steps are computed in float32 all the same. Vectors, tensors of fewer than 4,096
elements, row and column statistics and state of float64 parameters stay as they are; with ``"int8"`` also tensors with
rows of fewer than 16 elements; and what ``stacked``, or ``split`` of ``axes="in_out"``, divides within rows is then in
``"bfloat16"``.
"""

BLOCK = 256
"""Elements that share a scale."""

SMALLEST = 4096
"""Elements of the smallest tensor that is not stored in float32."""

SHORTEST = 16
"""Elements of the shortest rows that have scales of their own."""

TINY = 2.0**-90
"""Smallest scale: far enough from the smallest float32 that no decoded number is denormal."""

CODE, SCALE = "_int8", "_scale"
"""What the names of states end in that are stored as codes and scales."""

CODES = (torch.int8, torch.uint8)
"""Types of codes, of signed states and of averages of squares."""

NOISE = {"rms": ("momentum_0", 16), "momentum_2": ("momentum_1", 16)}
"""States that are rounded by the upper half of a hash whose lower half rounds another: hashing takes the most time."""

Shape: TypeAlias = tuple[int, ...]


class Stored(NamedTuple):
    """A tensor that holds a state, or a part of it.

    Attributes:
        shape: Of the whole; None for "shaped, and sharded, like the parameter".
        dtype: Of its elements.
        per_block: Whether it has an element for every block of a parameter-shaped state: its shape is then
            :func:`scale_shape` of what is here of the parameter.
    """

    shape: Shape | None
    dtype: torch.dtype
    per_block: bool = False


@dataclass(frozen=True)
class Format:
    """Numbers as they are, and the face of the other formats."""

    kind: ClassVar[StateDtype] = "float32"
    per_block: ClassVar[bool] = False
    """Whether only whole rows can be encoded."""

    def parts(self, name: str, is_square: bool, dtype: torch.dtype) -> dict[str, Stored]:
        """The tensors in which a parameter-shaped state is stored, by name.

        Args:
            name: Of the state.
            is_square: Whether it is an average of squares.
            dtype: Of arithmetic.
        """
        return {name: Stored(None, dtype)}

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Numbers from what :meth:`encode` made of them, ``(n, rows, ...)``, those of a scale ``(n, rows, blocks)``."""
        return parts[0]

    def encode(self, values: Tensor, is_square: bool, noise: Tensor | None) -> list[Tensor]:
        """What to store of float32 ``values``, ``(n, rows, ...)``, in the order of :meth:`parts`.

        Args:
            values: To be encoded.
            is_square: Whether they are averages of squares.
            noise: Int32 of the same shape, 0 to 2**16 - 1, for stochastic rounding; None for the nearest.
        """
        return [values]


@dataclass(frozen=True)
class BFloat16(Format):
    """The upper half of float32."""

    kind: ClassVar[StateDtype] = "bfloat16"

    def parts(self, name: str, is_square: bool, dtype: torch.dtype) -> dict[str, Stored]:
        """One tensor."""
        return {name: Stored(None, torch.bfloat16)}

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Exactly what is stored."""
        return parts[0].float()

    def encode(self, values: Tensor, is_square: bool, noise: Tensor | None) -> list[Tensor]:
        """One of the two neighbours; a copy into bfloat16 then loses nothing."""
        return [values if noise is None else round_stochastically(values, noise)]


@dataclass(frozen=True)
class Int8(Format):
    """Codes and scales."""

    kind: ClassVar[StateDtype] = "int8"
    per_block: ClassVar[bool] = True

    def parts(self, name: str, is_square: bool, dtype: torch.dtype) -> dict[str, Stored]:
        """Codes, whose name says that they are some, so that nothing takes them for numbers; and scales."""
        code = torch.uint8 if is_square else torch.int8
        return {name + CODE: Stored(None, code), name + SCALE: Stored(None, torch.float32, True)}

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Codes on their curve, times scales; the largest code is exactly its scale."""
        codes, scales = parts
        curve = _SQUARE if codes.dtype == torch.uint8 else _SIGNED
        y = (codes.to(torch.int32).abs_() << curve.shift).add_(_ONE).view(torch.float32)
        numbers = y.sub_(1).mul_(1 / curve.reach)
        blocks = _blocked(numbers if curve is _SQUARE else numbers.copysign_(codes)).mul_(scales.unsqueeze(-1))
        return _unblocked(blocks, codes.shape)

    def encode(self, values: Tensor, is_square: bool, noise: Tensor | None) -> list[Tensor]:
        """Codes, of the two neighbours by chance, and the largest magnitude of every block."""
        blocks = _blocked(values)
        scales = blocks.abs().amax(-1)
        scales = scales.where(~(scales < TINY), 0)
        # A little more than it should be, so that the largest number has the largest code whatever is rounded.
        curve = _SQUARE if is_square else _SIGNED
        unit = curve.reach / scales.where(scales > 0, math.inf) * (1 + 2**-22)
        blocks = blocks * unit.unsqueeze(-1)
        codes = curve.codes(blocks, 1 << 15 if noise is None else _blocked(noise))
        codes = codes.maximum((blocks > 0).to(codes)) if is_square else codes.where(blocks >= 0, -codes)
        return [_unblocked(codes.to(curve.dtype), values.shape), scales]


_ONE = 0x3F800000


class _Curve(NamedTuple):
    """What codes stand for: see the head of this module.

    Attributes:
        dtype: Of codes.
        top: The largest.
        shift: Bits of float32 that are rounded off.
        reach: ``y - 1`` of the largest code. Its product with its inverse is exactly 1.
    """

    dtype: torch.dtype
    top: int
    shift: int
    reach: float

    def codes(self, values: Tensor, noise: Tensor | int) -> Tensor:
        """Of the magnitudes of ``values``, int32, which are at most ``reach``; those that are not finite have any."""
        y = (values.abs() + 1).view(torch.int32)
        bits = (noise << self.shift - 16) + (1 << self.shift - 17)
        return ((y + bits - _ONE) >> self.shift).clamp_(max=self.top)


_SIGNED, _SQUARE = _Curve(torch.int8, 127, 18, 14.75), _Curve(torch.uint8, 255, 19, 63487.0)


def _blocked(values: Tensor) -> Tensor:
    """``(n, rows, ...)`` as ``(n, rows, blocks, BLOCK)``, with zeros behind the ends of rows."""
    rows = values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[2] % BLOCK))
    return rows.view(*rows.shape[:2], -1, BLOCK)


def _unblocked(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    return blocks.flatten(2)[:, :, : math.prod(shape[2:])].reshape(tuple(shape))


FLOAT32, BFLOAT16, INT8 = Format(), BFloat16(), Int8()

FORMATS: dict[StateDtype, Format] = {each.kind: each for each in (FLOAT32, BFLOAT16, INT8)}
"""Formats by their name."""


def wanted_format(group: Mapping[str, Any]) -> StateDtype:
    """The format that a parameter group wants for its state."""
    wanted: StateDtype = group.get("state_dtype", "float32")
    return wanted


def format_of(kind: StateDtype, shape: Shape, dtype: torch.dtype) -> Format:
    """The format of a tensor's state.

    Args:
        kind: What its group wants.
        shape: Of the whole tensor.
        dtype: Of arithmetic.
    """
    numel = math.prod(shape)
    if dtype != torch.float32 or len(shape) < 2 or numel < SMALLEST:
        return FLOAT32
    if kind == "int8" and (shape[0] < 2 or numel // shape[0] < SHORTEST):
        return FLOAT32
    return FORMATS[kind]


def scale_shape(shape: Sequence[int]) -> Shape:
    """Shape of the scales of what is here of a tensor: rows and their blocks."""
    return shape[0], -(-math.prod(shape[1:]) // BLOCK)


def stored_parts(
    shapes: Mapping[str, Shape | None], squares: Collection[str], form: Format, dtype: torch.dtype
) -> dict[str, dict[str, Stored]]:
    """For every state, the tensors that hold it.

    Args:
        shapes: Of whole states by name; None for "shaped like the parameter".
        squares: Names of those that are averages of squares.
        form: Of those that are shaped like the parameter.
        dtype: Of arithmetic, and of all others.
    """
    return {
        name: form.parts(name, name in squares, dtype) if shape is None else {name: Stored(shape, dtype)}
        for name, shape in shapes.items()
    }


def encoded(form: Format, values: Tensor, is_square: bool) -> list[Tensor]:
    """What to store of what is here of a state, a plain float32 tensor ``(rows, ...)``, to the nearest."""
    return [part[0] for part in form.encode(values.unsqueeze(0), is_square, None)]


def decoded(form: Format, parts: Sequence[Tensor]) -> Tensor:
    """A state from what is stored of it here, plain tensors; may alias them."""
    return form.decode([part.unsqueeze(0) for part in parts])[0]
