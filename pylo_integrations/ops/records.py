"""Pieces of tensors as records of the library's table: where they are in memory, and which axis plays which role."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.ops.loader import ABI_VERSION, ISAS, MAX_RANK, CallStruct, NativeLibrary, RuleStruct
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import Piece

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Storage types of parameters and gradients, by their number in the interface."""

STATE_DTYPES = {"float32": 0, "bfloat16": 2, "int8": 3}
"""Formats of state, likewise."""

STORED_STATES = ("momentum_0", "momentum_1", "momentum_2", "rms")
"""States that may be stored otherwise than in float32, in the order of ``pylo_stored``."""

_BUFFERS: dict[str, tuple[int, ...]] = {
    **{"param": (), "momentum": (3,), "rms": (), "diagonal": (3,)},
    **dict.fromkeys(("row", "col", "row_scale", "col_scale", "row_sums", "col_sums"), ()),
    **dict.fromkeys(("feature_sums", "stat_squares", "tensor_sums", "direction", "direction_scale"), ()),
}

TENSOR = np.dtype(
    [
        *((name, "u8", *count) for name, count in _BUFFERS.items()),
        ("extent", "i8", MAX_RANK),
        ("row_stride", "i8", MAX_RANK),
        ("col_stride", "i8", MAX_RANK),
        *((name, "i8") for name in ("row_offset", "col_offset", "row_numel", "col_numel")),
        *((name, "i8") for name in ("d0_extent", "d1_extent", "d1_row_stride", "numel")),
        ("norm_stride", "i8", MAX_RANK),
        *((name, "i8") for name in ("norm_offset", "norm_slices")),
        *((name, "i4") for name in ("rank", "d0_axis", "d1_axis", "param_dtype", "direction_dtype", "state_dtype")),
        *((name, "i4") for name in ("rule", "reserved")),
        *((f"{name}_bytes", "i8", *count) for name, count in _BUFFERS.items()),
    ]
)
"""``pylo_tensor``."""

STORED = np.dtype(
    [("scale", "u8", 4), ("scale_bytes", "i8", 4), ("first", "i8"), ("row", "i8"), ("noise", "u4", (2, 2))]
)
"""``pylo_stored``."""

STEP = np.dtype(
    [
        ("grad", "u8"),
        ("network", "u8"),
        *((name, "i8") for name in ("grad_bytes", "network_bytes")),
        *((name, "f4") for name in ("keep", "scale", "step_mult", "grad_scale", "l2")),
        *((name, "f4") for name in ("momentum_correction", "rms_correction", "momentum_weight")),
        *((name, "i4") for name in ("grad_dtype", "flags")),
    ]
)
"""``pylo_step``."""


# -- axes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """A box's axes from the slowest to the fastest, neighbours of equal role merged, see ``pylo_tensor``."""

    extent: tuple[int, ...]
    row_stride: tuple[int, ...]
    col_stride: tuple[int, ...]
    norm_stride: tuple[int, ...]
    row_offset: int = 0
    col_offset: int = 0
    norm_offset: int = 0
    d0_axis: int = -1
    d1_axis: int = -1


def strides(shape: Sequence[int], missing: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor of ``shape``, 0 along the axes of extent 1 that it averages over."""
    return [0 if axis in missing else math.prod(shape[axis + 1 :]) for axis in range(len(shape))]


def norm_shape(layout: TensorLayout, norm_axes: Sequence[int]) -> tuple[int, ...]:
    """Shape of whole tensors with extent 1 along the axes over which features are normalised."""
    return tuple(1 if axis in norm_axes else extent for axis, extent in enumerate(layout.shape))


def memory_order(param: Tensor) -> list[int] | None:
    """Axes of extent above 1 from the slowest to the fastest, or None if memory has gaps or overlaps."""
    axes = sorted((a for a, n in enumerate(param.shape) if n > 1), key=param.stride, reverse=True)
    step = 1
    for axis in reversed(axes):
        if param.stride(axis) != step:
            return None
        step *= param.shape[axis]
    return axes


def same_format(tensor: Tensor, param: Tensor) -> bool:
    """Whether equal offsets are equal elements; strides of axes with one element mean nothing."""
    return tensor.shape == param.shape and (
        tensor.stride() == param.stride() or (tensor.is_contiguous() and param.is_contiguous())
    )


def record_axes(
    layout: TensorLayout, order: Sequence[int], box: Box | None = None, norm_axes: Sequence[int] | None = None
) -> Axes | None:
    """The axes of a box, or None if they are more than the library takes.

    Args:
        layout: Roles of the axes.
        order: :func:`memory_order` of the box.
        box: The piece of the tensor; by default all of it.
        norm_axes: Those over which features are normalised; by default all.
    """
    box = Box((0,) * len(layout.shape), layout.shape) if box is None else box
    if layout.factored is None:
        return Axes((box.numel,), (0,), (0,), (0,))
    d1, d0 = layout.factored
    row, col = strides(layout.without(d0), [d0]), strides(layout.without(d1), [d1])
    norm_axes = range(len(layout.shape)) if norm_axes is None else norm_axes
    norm = strides(norm_shape(layout, norm_axes), norm_axes)
    extent: list[int] = []
    steps: list[tuple[int, int, int]] = []  # in row, col and norm slices
    role: list[int] = []
    for axis in [axis for axis in (d1, d0) if axis not in order] + list(order):
        n, step = box.shape[axis], (row[axis], col[axis], norm[axis])
        other = axis not in (d1, d0)
        if other and role and role[-1] == -1 and steps[-1] == tuple(n * s for s in step):
            extent[-1] *= n
            steps[-1] = step
            continue
        extent.append(n)
        steps.append(step)
        role.append(-1 if other else axis)
    if len(extent) > MAX_RANK:
        return None
    row_steps, col_steps, norm_steps = zip(*steps, strict=True)
    row_offset, col_offset, norm_offset = (
        sum(start * stride for start, stride in zip(box.start, whole, strict=True)) for whole in (row, col, norm)
    )
    return Axes(
        tuple(extent),
        row_steps,
        col_steps,
        norm_steps,
        row_offset,
        col_offset,
        norm_offset,
        role.index(d0),
        role.index(d1),
    )


def pieces_of(bucket: Bucket, position: int) -> tuple[Piece, ...]:
    """What is here of a tensor; one piece without elements if that is nothing."""
    rank = len(bucket.layout.shape)
    return bucket.held[position].pieces or (Piece(Box((0,) * rank, (0,) * rank), 0),)


def piece_order(piece: Piece, local: Tensor) -> list[int] | None:
    """:func:`memory_order` of a piece of a local tensor; None also if the local tensor has gaps."""
    if piece.box.numel == 0:
        return []
    return memory_order(piece.view(local)) if piece.offset is None or local.is_contiguous() else None


def enter_buffers(
    record: Any, name: str, tensors: Sequence[Tensor], piece: Piece | None = None, first: int = 0
) -> None:
    """Enter into a ``TENSOR`` record where local tensors are, and how many bytes each of them has.

    Args:
        record: To be changed.
        name: Of one buffer, or of three, which may be less.
        tensors: One for each.
        piece: That of them which the record describes; by default all.
        first: Of three buffers, the place of the first of these.
    """
    start = (piece and piece.offset) or 0
    found = [(tensor.data_ptr() + start * tensor.itemsize, bytes_from(tensor, start)) for tensor in tensors]
    for field, values in zip((name, f"{name}_bytes"), zip(*found, strict=True), strict=True):
        if record.dtype[field].shape:
            record[field][first : first + len(values)] = values
        else:
            (record[field],) = values


def bytes_from(tensor: Tensor, start: int = 0) -> int:
    """Bytes of a dense tensor from its element ``start`` on, as far as its storage goes."""
    behind = tensor.untyped_storage().nbytes() - (tensor.storage_offset() + start) * tensor.itemsize
    return max(0, min((tensor.numel() - start) * tensor.itemsize, int(behind)))


# -- tables ------------------------------------------------------------------------------------------------------------


class Table:
    """Records of boxes, at most one of any tensor, and the calls over them.

    Attributes:
        tensors: What is fixed, ``TENSOR`` records; :meth:`check` again after a change.
        steps: What changes from step to step, ``STEP`` records; see :meth:`enter`.
        stored: How state is stored that is not in float32, ``STORED`` records.
        grad_squares: Of every record, the sum of squares of its gradient as stored, float64; ``collect`` makes it.
        device: Where the tensors are.

    Args:
        library: The loaded library.
        rules: Those of the records, which name them by their number.
        count: Number of records.
        isa: Instruction set, by default the best one of this machine.
    """

    def __init__(
        self, library: NativeLibrary, rules: ctypes.Array[RuleStruct], count: int, isa: str | None = None
    ) -> None:
        self._library = library
        self.device = library.device
        self.rules = rules  # which the call points to
        self.tensors = np.zeros(count, TENSOR)
        self.steps = np.zeros(count, STEP)
        self.stored = np.zeros(count, STORED)
        self.grad_squares = torch.zeros(count, dtype=torch.float64, device=library.device)
        self._workspace = torch.empty(0, dtype=torch.float64, device="cpu")
        self.call = CallStruct(
            abi_version=ABI_VERSION,
            size=ctypes.sizeof(CallStruct),
            rules=rules,
            rule_count=len(rules),
            tensors=self.tensors.ctypes.data,
            steps=self.steps.ctypes.data,
            stored=self.stored.ctypes.data,
            count=count,
            grad_squares=self.grad_squares.data_ptr(),
            threads=1,
            isa=ISAS[isa] if isa else 0,
        )
        self._entered: dict[tuple[str, int, int], float] = {}
        self._on_device: dict[tuple[str, int, int], Tensor] = {}
        self._checked: dict[tuple[str, int, int, bool], tuple[bytes, CallStruct]] = {}
        self.call.on_device = self._on_device

    def enter(self, field: str, rows: slice, value: float | np.ndarray[Any, Any] | Tensor) -> None:
        """Enter numbers into a field of the steps; those that a device computed stay there, and nobody waits for them.

        Args:
            field: Of ``STEP``.
            rows: Always the same ranges of the same field.
            value: One for all rows, or one for each.
        """
        key = field, rows.start, rows.stop
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = value.item() if value.numel() == 1 else value.detach().float().numpy()
        number = value if isinstance(value, (int, float)) else None
        if number is not None and self._entered.get(key) == number:
            return
        self._entered.pop(key, None)
        self._on_device.pop(key, None)
        if isinstance(value, Tensor):
            self._on_device[key] = value
            return
        self.steps[field][rows] = value
        if number is not None:  # last, so that an interrupted call is not taken for a finished one
            self._entered[key] = number

    def check(self) -> None:
        """Have the library look at all records.

        Raises:
            NativeError: It refuses them.
        """
        self.call.token, size = self._library.check(self.call)
        self._workspace = torch.empty(size // 8 + 8, dtype=torch.float64, device="cpu")
        self.call.workspace = -(-self._workspace.data_ptr() // 64) * 64
        self.call.workspace_bytes = size

    def run(self, stage: str) -> None:
        """Run a stage over all records."""
        self.call.threads = torch.get_num_threads()
        self._library.run(stage, self.call)

    def run_some(self, stage: str, rows: slice) -> None:
        """Run a stage that needs no workspace over some records, which are checked if they have been changed."""
        if rows.start == rows.stop:
            return
        is_complete = bool(self.tensors["direction_scale"][rows.start])  # other records than those that leave steps
        key, records = (stage, rows.start, rows.stop, is_complete), self.tensors[rows].tobytes()
        known, call = self._checked.get(key, (b"", self.call))
        if known != records:
            call = CallStruct.from_buffer_copy(self.call)
            call.tensors = self.tensors[rows].ctypes.data
            call.steps = self.steps[rows].ctypes.data
            call.stored = self.stored[rows].ctypes.data
            call.count = rows.stop - rows.start
            call.token, _ = self._library.check(call)
            self._checked[key] = records, call
        call.threads = torch.get_num_threads()
        call.on_device = dict(_within(rows, self._on_device))
        self._library.run(stage, call)


def _within(
    rows: slice, on_device: Mapping[tuple[str, int, int], Tensor]
) -> Iterator[tuple[tuple[str, int, int], Tensor]]:
    """What a device computed for some records, counted from the first of them."""
    for (field, first, end), value in on_device.items():
        start, stop = max(first, rows.start), min(end, rows.stop)
        if start < stop:
            mine = value[start - first : stop - first] if value.numel() > 1 else value
            yield (field, start - rows.start, stop - rows.start), mine
