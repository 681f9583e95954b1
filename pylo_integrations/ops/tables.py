"""What the library is told of every bucket: a table of records, of the n-th piece of every tensor that has so many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops.loader import SLOTS, TENSOR_SUMS, NativeLibrary
from pylo_integrations.ops.packing import norm_axes_of, slots_of, spec_of
from pylo_integrations.ops.records import (
    DTYPES,
    STATE_DTYPES,
    STORED_STATES,
    Table,
    bytes_from,
    enter_buffers,
    norm_shape,
    piece_order,
    pieces_of,
    record_axes,
    strides,
)
from pylo_integrations.rounding import noise_keys
from pylo_integrations.rules.accumulators import DIAGONAL, MOMENTUM
from pylo_integrations.rules.base import Rule, l2_penalty
from pylo_integrations.rules.kernel_spec import NetworkSpec
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import run_start
from pylo_integrations.sharding.pieces import Piece, local_part

_STATISTICS = ("row", "col", "inverse_row", "inverse_col")
"""Features that are constant along rows or columns."""

_MEASURED = {
    "param_squares": slice(0, 1),
    "moments": slice(1, 5),
    "moment_squares": slice(5, TENSOR_SUMS),
}
"""Sums over parameters, momenta and second moment before the step, by the names that rules know them by."""


class Stretch(IntEnum):
    """Who finishes the steps of a bucket, in the order of their records."""

    LEFT = 0
    """Others: kernels cannot round as they should be, or the rule finishes tensors that are not whole here."""
    WHOLE = 1
    """The rule, whole tensors at a time, between two calls."""
    AT_ONCE = 2
    """Nobody: the kernels' step is the step."""


class NativeBucket:
    """A bucket with what the library is told of all its tensors alike.

    Args:
        bucket: What to step.
        rule: Its mathematics.
        number: Of the rule, among those that the library is told of.
        start: Position of its first tensor, among those of all buckets.
        names: The library's slots.
        device: The library's.

    Attributes:
        tensors: The positions of its tensors, among those of all buckets.
        network: The network that proposes steps, if one does.
        norm_axes: Axes over which features are normalised.
        norm_slices: How many slices of a tensor are normalised by themselves.
        slots: Of the network's inputs.
        statistic_slots: By name, of those features that are constant along rows or columns.
        statistics: Sums of squares of these, ``(tensors, norm slices, SLOTS)``.
        scales: Factors on row and column statistics by name, ``(tensors, 3, *axes)``.
    """

    def __init__(
        self, bucket: Bucket, rule: Rule, number: int, start: int, names: Sequence[str], device: torch.device
    ) -> None:
        self.bucket, self.rule, self.number = bucket, rule, number
        self.spec = spec_of(rule)
        self.tensors = slice(start, start + len(bucket))
        self.network = self.spec.step if isinstance(self.spec.step, NetworkSpec) else None
        self.norm_axes = norm_axes_of(self.spec, bucket.layout)
        self.norm_slices = math.prod(norm_shape(bucket.layout, self.norm_axes))
        inputs = slots_of(self.network.features_of(bucket.layout), names) if self.network else []
        self.slots = torch.tensor(inputs, dtype=torch.int64, device=device)
        read = self.network.features if self.network else ()
        self.statistic_slots = {name: names.index(name) for name in _STATISTICS if name in read}
        self.statistics = torch.zeros(len(bucket), self.norm_slices, SLOTS, dtype=torch.float64, device=device)
        self.scales = {
            name: torch.empty(len(bucket), 3, *shape, dtype=torch.float32, device=bucket.device)
            for name, shape in self._statistic_shapes().items()
        }

    @cached_property
    def stretch(self) -> Stretch:
        """Who finishes its steps."""
        if self.bucket.rounds_stochastically:
            return Stretch.LEFT
        if not self.rule.finishes:
            return Stretch.AT_ONCE
        return Stretch.LEFT if self.bucket.parts > 1 or self.spec.directions is None else Stretch.WHOLE

    @property
    def measured(self) -> tuple[str, ...]:
        """Which of the sums that are measured the rule asks for, now."""
        return self.spec.sums_with_l2 if l2_penalty(self.bucket.group) else self.spec.sums

    def sums_of(self, measured: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Some of these by name, over whole tensors, with an axis of extent 1 for each of theirs."""
        axes = (1,) * len(self.bucket.layout.shape)
        by_name = {name: measured[:, _MEASURED[name]] for name in names}
        return {name: sums.view(*sums.shape, *axes) for name, sums in by_name.items()}

    def empty_sums(self, members: Sequence[int]) -> dict[str, Tensor]:
        """Where sums of squared gradients for row and column statistics go, by name, ``(members, 1, *axes)``."""
        return {
            name: torch.zeros(len(members), 1, *shape, dtype=torch.float64, device=self.bucket.device)
            for name, shape in self._statistic_shapes().items()
        }

    def _statistic_shapes(self) -> dict[str, tuple[int, ...]]:
        layout = self.bucket.layout
        if layout.factored is None or "row" not in self.rule.state_shapes(layout):
            return {}
        d1, d0 = layout.factored
        return {"row": layout.without(d0), "col": layout.without(d1)}


class PieceTable:
    """The n-th piece of every tensor that has so many, as one table, and the buffers for its sums.

    Records come in the order of the stretches that step them: of what others write, of whole tensors, of all else.

    Args:
        library: The loaded library.
        structs: Its rules.
        natives: What to describe; there must be no obstacle to any.
        nth: Which pieces.
        isa: Instruction set, by default the best one of this machine.

    Attributes:
        members: For each bucket, the positions of these tensors in it.
        rows: For each bucket, its records in the table.
        at_once: The records that are stepped in one call: of those in no other stretch.
        collected: For each bucket, sums of squared gradients by name, ``(members, 1, *axes)``.
        described: For each bucket, sums of squared features, ``(members, norm slices, SLOTS)``.
        measured: For each bucket, ``(members, TENSOR_SUMS)``.
        owners: Of every record, the position of its tensor among those of all buckets.
        offsets: Of every record, where it begins in the local tensor, in elements.
        grad_offsets: Likewise, in bytes of the gradient's type.

    Raises:
        NativeError: The library refuses the table.
    """

    def __init__(
        self, library: NativeLibrary, structs: Any, natives: Sequence[NativeBucket], nth: int, isa: str | None
    ) -> None:
        self._natives = natives
        self.members = [
            [i for i in range(len(each.bucket)) if len(pieces_of(each.bucket, i)) > nth] for each in natives
        ]
        self.table = Table(library, structs, sum(map(len, self.members)), isa)
        self.rows = [slice(0)] * len(natives)
        end = others = 0
        for index in sorted(range(len(natives)), key=lambda index: natives[index].stretch):
            self.rows[index] = slice(end, end + len(self.members[index]))
            end += len(self.members[index])
            others = end if natives[index].stretch != Stretch.AT_ONCE else others
        self.at_once = slice(others, end)
        self.collected = [each.empty_sums(mine) for each, mine in zip(natives, self.members, strict=True)]
        device = self.table.device
        self.described = [
            torch.zeros(len(mine), each.norm_slices, SLOTS, dtype=torch.float64, device=device)
            for each, mine in zip(natives, self.members, strict=True)
        ]
        self.measured = [
            torch.zeros(len(mine), TENSOR_SUMS, dtype=torch.float64, device=device) for mine in self.members
        ]
        self.owners = np.zeros(end, np.int64)
        self.offsets = np.zeros(end, np.uint64)
        self.grad_offsets = np.zeros(end, np.uint64)
        for index, mine in enumerate(self.members):
            for row, position in enumerate(mine):
                self._fill(index, row, position, pieces_of(natives[index].bucket, position)[nth])
        self.table.check()

    def _fill(self, index: int, row: int, position: int, piece: Piece) -> None:
        """Describe a piece of a tensor of bucket ``index`` to the library, as the ``row``-th of that bucket."""
        native = self._natives[index]
        bucket, layout = native.bucket, native.bucket.layout
        state, param = bucket.states[position], bucket.stepped(position)
        where = self.rows[index].start + row
        record = self.table.tensors[where]
        self.owners[where] = native.tensors.start + position
        self.offsets[where] = piece.offset or 0
        record["rule"], record["param_dtype"], record["numel"] = native.number, DTYPES[param.dtype], layout.numel
        owned = native.rule.state_shapes(layout)
        enter_buffers(record, "param", [param], piece)
        held = {
            name: [local_part(state[part]) for part in bucket.parts_of(name, None)]
            for name in STORED_STATES
            if name in owned
        }
        if "rms" in owned:
            enter_buffers(record, "rms", held["rms"][:1], piece)
        for k, name in enumerate(MOMENTUM):
            if name in owned:
                enter_buffers(record, "momentum", [held[name][0]], piece, k)
        if bucket.form is not FLOAT32:
            _fill_stored(self.table.stored[where], bucket, piece, held)
            record["state_dtype"] = STATE_DTYPES[bucket.form.kind]
        enter_buffers(record, "tensor_sums", [self.measured[index][row]])
        if native.network is None:
            record["rank"], record["d0_axis"], record["d1_axis"] = 1, -1, -1
            record["extent"][0] = piece.box.numel
            return
        axes = record_axes(layout, piece_order(piece, param) or (), piece.box, native.norm_axes)
        assert axes is not None, "see local_obstacle()"
        record["rank"] = rank = len(axes.extent)
        for name in ("row_offset", "col_offset", "norm_offset", "d0_axis", "d1_axis"):
            record[name] = getattr(axes, name)
        for name in ("extent", "row_stride", "col_stride", "norm_stride"):
            record[name][:rank] = getattr(axes, name)
        record["norm_slices"] = native.norm_slices
        enter_buffers(record, "feature_sums", [self.described[index][row]])
        enter_buffers(record, "stat_squares", [native.statistics[position]])
        if layout.factored is None:
            enter_buffers(record, "diagonal", [local_part(state[name]) for name in DIAGONAL], piece)
            return
        d1, d0 = layout.factored
        record["d0_extent"], record["d1_extent"] = layout.shape[d0], layout.shape[d1]
        record["d1_row_stride"] = strides(layout.without(d0), [d0])[d1]
        for name in ("row", "col"):
            sums = self.collected[index][name][row]
            record[f"{name}_numel"] = sums.numel()
            enter_buffers(record, name, [local_part(state[name])])
            enter_buffers(record, f"{name}_sums", [sums])
            enter_buffers(record, f"{name}_scale", [native.scales[name][position]])

    def enter_noise(self, iteration: int) -> None:
        """Enter keys of the noise by which states are rounded that are not stored in float32."""
        for native, rows, members in zip(self._natives, self.rows, self.members, strict=True):
            bucket = native.bucket
            if bucket.form is FLOAT32:
                continue
            keys = [
                [noise_keys(iteration, bucket.numbers[position], name) for name in MOMENTUM[:2]] for position in members
            ]
            self.table.stored["noise"][rows] = np.array(keys, np.uint32).reshape(-1, 2, 2)

    def apply(self) -> None:
        """Step what is stepped in one call."""
        if self.at_once == slice(0, len(self.owners)):
            self.table.run("apply")
        else:
            self.table.run_some("apply", self.at_once)


def _fill_stored(stored: Any, bucket: Bucket, piece: Piece, held: Mapping[str, Sequence[Tensor]]) -> None:
    """Describe how the states of a piece are stored, by their names each with the tensors that hold it."""
    stored["first"] = run_start(piece.box, bucket.layout.shape) or 0
    stored["row"] = max(1, math.prod(piece.box.shape[1:]) if bucket.form.per_block else piece.box.numel)
    for which, name in enumerate(STORED_STATES):
        if name in held and bucket.form.per_block:
            scales = held[name][1]
            stored["scale"][which], stored["scale_bytes"][which] = scales.data_ptr(), bytes_from(scales)
