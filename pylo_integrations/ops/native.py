"""The stages of a step on the native kernels: one call per stage for all tensors of all rules.

A table describes what is here of every tensor to the library: its buffers and the roles of its axes. It is built when
tensors are replaced; a step only refreshes what changes (gradients, learning rates). Sums leave one stage and enter the
next as torch tensors, which is where a sharded run completes them. State and results are those of the reference
backend, so backends may change in the middle of a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.fitting import is_aligned
from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops.loader import SLOTS, TENSOR_SUMS, NativeLibrary, RuleStruct
from pylo_integrations.ops.memory import Memory, Written, addresses, formats, read_memory
from pylo_integrations.ops.packing import PackedNetwork, layers_of, norm_axes_of, pack, rule_struct, slots_of, spec_of
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
    same_format,
    strides,
)
from pylo_integrations.rounding import noise_keys
from pylo_integrations.rules.accumulators import DIAGONAL, MOMENTUM
from pylo_integrations.rules.base import Control, Rule, StepContext, l2_penalty
from pylo_integrations.rules.kernel_spec import KernelSpec, NetworkSpec
from pylo_integrations.sharding.blocks import Bucket, Sums, by_tensors
from pylo_integrations.sharding.layout import run_start
from pylo_integrations.sharding.pieces import Piece, local_part
from pylo_integrations.telemetry import StepRecord

ZERO_NONFINITE = 1

TOGETHER = {"cpu": 2**21, "cuda": 2**28}
"""Elements of whole tensors that are stepped together, by type of device. On a CPU many small ones make few calls, and
all of it fits a cache; on a device their steps take 1 GiB, and few models need more than one call."""

STATISTICS = ("row", "col", "inverse_row", "inverse_col")
"""Features that are constant along rows or columns."""

_MEASURED = {
    "param_squares": slice(0, 1),
    "moments": slice(1, 5),
    "moment_squares": slice(5, TENSOR_SUMS),
}
"""Sums over parameters, momenta and second moment before the step, by the names that rules know them by."""


class _Stretch(IntEnum):
    """Who finishes the steps of a bucket, in the order of their records."""

    LEFT = 0
    """Others: kernels cannot round as they should be, or the rule finishes tensors that are not whole here."""
    WHOLE = 1
    """The rule, whole tensors at a time, between two calls."""
    AT_ONCE = 2
    """Nobody: the kernels' step is the step."""


def _stretch_of(rule: Rule, bucket: Bucket) -> _Stretch:
    if bucket.rounds_stochastically:
        return _Stretch.LEFT
    if not rule.finishes:
        return _Stretch.AT_ONCE
    return _Stretch.LEFT if bucket.parts > 1 or spec_of(rule).directions is None else _Stretch.WHOLE


def _measured(spec: KernelSpec, bucket: Bucket) -> tuple[str, ...]:
    """Which of :data:`_MEASURED` a rule asks for."""
    return spec.sums_with_l2 if l2_penalty(bucket.group) else spec.sums


class _PieceTable:
    """The n-th piece of every tensor that has so many, as one table, and the buffers for its sums.

    Records come in the order of the stretches that step them: of what others write, of whole tensors, of all else.

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
    """

    def __init__(
        self,
        table: Table,
        rules: Sequence[Rule],
        buckets: Sequence[Bucket],
        stretches: Sequence[int],
        members: list[list[int]],
        slices: list[int],
    ) -> None:
        self.table = table
        self.members = members
        self.rows = [slice(0)] * len(buckets)
        end = 0
        for index in sorted(range(len(buckets)), key=stretches.__getitem__):
            self.rows[index] = slice(end, end + len(members[index]))
            end += len(members[index])
        others = sum(len(mine) for mine, stretch in zip(members, stretches, strict=True) if stretch != _Stretch.AT_ONCE)
        self.at_once = slice(others, end)
        self.collected = [_empty_sums(*each) for each in zip(rules, buckets, members, strict=True)]
        self.described = [
            torch.zeros(len(mine), count, SLOTS, dtype=torch.float64, device=table.device)
            for mine, count in zip(members, slices, strict=True)
        ]
        self.measured = [
            torch.zeros(len(mine), TENSOR_SUMS, dtype=torch.float64, device=table.device) for mine in members
        ]
        self.owners = np.zeros(end, np.int64)
        self.offsets = np.zeros(end, np.uint64)
        self.grad_offsets = np.zeros(end, np.uint64)

    def apply(self) -> None:
        """Step what is stepped in one call."""
        if self.at_once == slice(0, len(self.owners)):
            self.table.run("apply")
        else:
            self.table.run_some("apply", self.at_once)


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


class NativeStages:
    """Buckets of any rules, stepped by the native kernels.

    One of the :class:`~pylo_integrations.step.stages.Stages`. All rules share one table, so that a stage is one call.

    Args:
        library: The loaded library.
        rules: The mathematics of each bucket.
        buckets: What to step; there must be no :func:`obstacle` or :func:`local_obstacle`.
        isa: Instruction set, by default the best one of this machine.

    Raises:
        NativeError: The library refuses the table.
    """

    recalls = True

    def __init__(
        self, library: NativeLibrary, rules: Sequence[Rule], buckets: Sequence[Bucket], isa: str | None = None
    ) -> None:
        names = library.feature_names()
        self._rules = rules
        self._specs = list(map(spec_of, rules))
        self._networks = [spec.step if isinstance(spec.step, NetworkSpec) else None for spec in self._specs]
        self._buckets = buckets
        distinct = list(dict.fromkeys(rules))
        self._numbers = [distinct.index(rule) for rule in rules]
        self._structs = (RuleStruct * len(distinct))(*(rule_struct(rule, names) for rule in distinct))
        self._stretches = list(map(_stretch_of, rules, buckets))
        self._norm_axes = [norm_axes_of(spec, bucket.layout) for spec, bucket in zip(self._specs, buckets, strict=True)]
        slices = [
            math.prod(norm_shape(bucket.layout, axes)) for bucket, axes in zip(buckets, self._norm_axes, strict=True)
        ]
        self._slots = [
            torch.tensor(
                slots_of(network.features_of(bucket.layout), names) if network else [],
                dtype=torch.int64,
                device=library.device,
            )
            for network, bucket in zip(self._networks, buckets, strict=True)
        ]
        self._statistic_slots = [
            {name: names.index(name) for name in STATISTICS if network and name in network.features}
            for network in self._networks
        ]
        ends = list(itertools.accumulate(map(len, buckets), initial=0))
        self._tensors = [slice(first, end) for first, end in itertools.pairwise(ends)]  # of each bucket, among all
        self._params = [param for bucket in buckets for param in bucket.params]
        # Of every state, the rule's entries: others are not ours. Noted before their addresses are taken down: what
        # another thread replaces meanwhile is then missed by no later look.
        entries = [
            (state, name)
            for rule, bucket in zip(rules, buckets, strict=True)
            for state in bucket.states
            for name in bucket.stored_names(rule.state_shapes(bucket.layout))
        ]
        wrappers = [tensor for bucket in buckets for tensor in bucket.wrappers()]
        self._written = Written(self._params, entries, wrappers)
        self._advances = any(bucket.form is not FLOAT32 for bucket in buckets)
        # Tensors are in one piece, except for slices of FSDP1. Their further pieces have tables of their own.
        self._tables: list[_PieceTable] = []
        for number in itertools.count():
            members = [[i for i in range(len(b)) if len(pieces_of(b, i)) > number] for b in buckets]
            if number and not any(members):
                break
            table = Table(library, self._structs, sum(map(len, members)), isa)
            self._tables.append(_PieceTable(table, rules, buckets, self._stretches, members, slices))
        first = self._tables[0]
        self._scales = [
            {name: sums.new_empty(len(sums), 3, *sums.shape[2:], dtype=torch.float32) for name, sums in c.items()}
            for c in first.collected
        ]
        self._statistics = [torch.zeros_like(described) for described in first.described]
        for number, nth in enumerate(self._tables):
            for index, mine in enumerate(nth.members):
                for row, position in enumerate(mine):
                    self._fill_record(number, index, row, position)
            nth.table.check()
        if not self._written.is_current():
            raise RuntimeError(
                "parameters or their state were replaced while a step was prepared: replace them between steps, in no "
                "other thread"
            )
        self._grads: Sequence[Tensor] = ()
        self._grad_formats: bytes | None = None  # which the kernels read as they are
        self._grad_sizes = np.zeros(len(self._params), np.uint64)
        self._packed: list[PackedNetwork] = []

    def _fill_record(self, number: int, index: int, row: int, position: int) -> None:
        """Describe a piece of a tensor of bucket ``index`` to the library, as the ``row``-th of that bucket."""
        nth, bucket, layout = self._tables[number], self._buckets[index], self._buckets[index].layout
        state, piece = bucket.states[position], pieces_of(bucket, position)[number]
        param = bucket.stepped(position)
        where = nth.rows[index].start + row
        record = nth.table.tensors[where]
        nth.owners[where] = self._tensors[index].start + position
        nth.offsets[where] = piece.offset or 0
        record["rule"], record["param_dtype"], record["numel"] = self._numbers[index], DTYPES[param.dtype], layout.numel
        owned = self._rules[index].state_shapes(layout)
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
            self._fill_stored(nth.table.stored[where], bucket, piece, held)
            record["state_dtype"] = STATE_DTYPES[bucket.form.kind]
        enter_buffers(record, "tensor_sums", [nth.measured[index][row]])
        if self._networks[index] is None:
            record["rank"], record["d0_axis"], record["d1_axis"] = 1, -1, -1
            record["extent"][0] = piece.box.numel
            return
        axes = record_axes(layout, piece_order(piece, param) or (), piece.box, self._norm_axes[index])
        assert axes is not None, "see local_obstacle()"
        record["rank"] = rank = len(axes.extent)
        for name in ("row_offset", "col_offset", "norm_offset", "d0_axis", "d1_axis"):
            record[name] = getattr(axes, name)
        for name in ("extent", "row_stride", "col_stride", "norm_stride"):
            record[name][:rank] = getattr(axes, name)
        record["norm_slices"] = nth.described[index].shape[1]
        enter_buffers(record, "feature_sums", [nth.described[index][row]])
        enter_buffers(record, "stat_squares", [self._statistics[index][position]])
        if layout.factored is None:
            enter_buffers(record, "diagonal", [local_part(state[name]) for name in DIAGONAL], piece)
            return
        d1, d0 = layout.factored
        record["d0_extent"], record["d1_extent"] = layout.shape[d0], layout.shape[d1]
        record["d1_row_stride"] = strides(layout.without(d0), [d0])[d1]
        for name in ("row", "col"):
            sums = nth.collected[index][name][row]
            record[f"{name}_numel"] = sums.numel()
            enter_buffers(record, name, [local_part(state[name])])
            enter_buffers(record, f"{name}_sums", [sums])
            enter_buffers(record, f"{name}_scale", [self._scales[index][name][position]])

    @staticmethod
    def _fill_stored(stored: Any, bucket: Bucket, piece: Piece, held: Mapping[str, Sequence[Tensor]]) -> None:
        """Describe how the states of a piece are stored, by their names each with the tensors that hold it."""
        stored["first"] = run_start(piece.box, bucket.layout.shape) or 0
        stored["row"] = max(1, math.prod(piece.box.shape[1:]) if bucket.form.per_block else piece.box.numel)
        for which, name in enumerate(STORED_STATES):
            if name in held and bucket.form.per_block:
                scales = held[name][1]
                stored["scale"][which], stored["scale_bytes"][which] = scales.data_ptr(), bytes_from(scales)

    def _enter_noise(self, iteration: int) -> None:
        """Keys of the noise by which states are rounded that are not stored in float32."""
        for nth in self._tables:
            for bucket, rows, members in zip(self._buckets, nth.rows, nth.members, strict=True):
                if bucket.form is FLOAT32:
                    continue
                keys = [
                    [noise_keys(iteration, bucket.numbers[position], name) for name in MOMENTUM[:2]]
                    for position in members
                ]
                nth.table.stored["noise"][rows] = np.array(keys, np.uint32).reshape(-1, 2, 2)

    def is_current(self) -> bool:
        """Whether all tensors and their memory are as when the table was built, which other code may replace."""
        return self._written.is_current()

    def recognises(self, grads: Sequence[Tensor]) -> bool:
        """Whether gradients have the formats that those of the last step had; if so, this step reads them.

        Args:
            grads: Plain ones, of all tensors of all buckets.
        """
        if self._grad_formats is None:
            return False
        try:
            memory = read_memory(grads, len(grads))
        except RuntimeError:  # one has no memory, as sparse ones
            return False
        if formats(memory).tobytes() != self._grad_formats or (addresses(memory) % self._grad_sizes).any():
            return False
        self._enter_gradients(grads, memory)
        return True

    def release_gradients(self) -> None:
        """Let go of the last step's gradients, which would outlive ``zero_grad()``."""
        self._grads = ()

    @property
    def grad_squares(self) -> Tensor:
        """Sum of all squared gradients as they are stored, 0-d float64, of the last :meth:`collect`."""
        first, *others = (nth.table.grad_squares for nth in self._tables)
        return torch.cat([first, *others]).sum() if others else first.sum()

    def _run(self, stage: str) -> None:
        for nth in self._tables:
            nth.table.run(stage)

    def collect(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """See :class:`~pylo_integrations.step.stages.Stages`; float64."""
        ctx = contexts[0]
        self._read_gradients()
        self._read_policy(ctx)
        self._run("collect")
        measured = list(map(_measured, self._specs, self._buckets))
        if any(measured):
            self._run("measure")
        first, *others = self._tables
        for nth in others:
            for index, members in enumerate(nth.members):
                for name, share in nth.collected[index].items():
                    first.collected[index][name][members] += share
                first.measured[index][members] += nth.measured[index]
        return [
            first.collected[index]
            | {name: _over_tensors(first.measured[index][:, _MEASURED[name]], bucket) for name in measured[index]}
            for index, bucket in enumerate(self._buckets)
        ]

    def _read_gradients(self) -> None:
        given = list(itertools.chain.from_iterable(bucket.grads for bucket in self._buckets))
        if self._grads or self.recognises(given):
            return
        stepped = [bucket.stepped(position) for bucket in self._buckets for position in range(len(bucket))]
        grads = [_in_format_of(param, grad) for param, grad in zip(stepped, given, strict=True)]
        memory = read_memory(grads, len(grads))
        as_given = all(grad is old for grad, old in zip(grads, given, strict=True))
        self._grad_formats = formats(memory).tobytes() if as_given else None
        self._grad_sizes = np.array([grad.itemsize for grad in grads], np.uint64)
        room = np.array([bytes_from(grad) for grad in grads], np.int64)
        dtypes = np.array([DTYPES[grad.dtype] for grad in grads], np.int32)
        for nth in self._tables:
            nth.table.steps["grad_dtype"] = dtypes[nth.owners]
            nth.grad_offsets = nth.offsets * self._grad_sizes[nth.owners]
            nth.table.steps["grad_bytes"] = room[nth.owners] - nth.grad_offsets.astype(np.int64)
        self._enter_gradients(grads, memory)

    def _enter_gradients(self, grads: Sequence[Tensor], memory: Memory) -> None:
        self._grads = grads
        for nth in self._tables:
            nth.table.steps["grad"] = addresses(memory)[nth.owners] + nth.grad_offsets

    def _read_policy(self, ctx: StepContext) -> None:
        clip_scale = 1.0 if ctx.grad_scale is None else ctx.grad_scale
        for nth in self._tables:
            table = nth.table
            table.enter("flags", slice(0, len(table.steps)), ZERO_NONFINITE if ctx.zero_nonfinite else 0)
            for bucket, rows in zip(self._buckets, nth.rows, strict=True):
                table.enter("grad_scale", rows, -clip_scale if bucket.group["maximize"] else clip_scale)
                table.enter("l2", rows, l2_penalty(bucket.group))

    def prepare_(self, collected: Sequence[Sums], contexts: Sequence[StepContext]) -> None:
        """See :class:`~pylo_integrations.step.stages.Stages`."""
        if contexts[0].grad_scale is not None:  # it may have been found since sums were collected
            self._read_policy(contexts[0])
        # From here on the kernels write, which autograd does not see.
        self._written.raise_versions()
        if not any(self._networks):
            return
        first = self._tables[0]
        for ours, sums in zip(first.collected, collected, strict=True):
            for name, total in ours.items():
                if sums[name] is not total:
                    total.copy_(sums[name])
        first.table.run("prepare")
        for index, statistics in enumerate(self._statistics):
            if statistics.shape[1] > 1 and self._statistic_slots[index]:
                self._normalise_statistics_(index)

    def _normalise_statistics_(self, index: int) -> None:
        """Mean squares of the row and column features of every slice over which a bucket's features are normalised."""
        bucket, axes = self._buckets[index], self._norm_axes[index]
        shape = norm_shape(bucket.layout, axes)
        for name in ("row", "col"):
            value = bucket.stack(name).double()
            for square, feature in ((value.square(), name), ((value + 1e-8).reciprocal(), f"inverse_{name}")):
                if (slot := self._statistic_slots[index].get(feature)) is None:
                    continue
                mean = square.mean([axis + 2 for axis in axes], keepdim=True)
                of_slices = mean.expand(-1, -1, *shape).flatten(2).transpose(1, 2)
                self._statistics[index][:, :, slot : slot + 3] = of_slices

    def describe_(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """See :class:`~pylo_integrations.step.stages.Stages`.

        Sums of squared features, ``(tensors, norm slices, SLOTS)``; state that is shaped like parameters is updated
        with these, later.
        """
        if not any(self._networks):
            return [{}] * len(self._buckets)
        self._run("describe")
        first, *others = self._tables
        for nth in others:
            for total, share, members in zip(first.described, nth.described, nth.members, strict=True):
                total[members] += share
        return [
            {"features": described} if network else {}
            for network, described in zip(self._networks, first.described, strict=True)
        ]

    def step_(
        self,
        controls: Sequence[Control],
        contexts: Sequence[StepContext],
        factors: Sequence[tuple[float | Tensor, float | Tensor]],
        record: StepRecord | None,
        numbers: Sequence[int],
    ) -> list[Iterator[Tensor] | None]:
        """See :class:`~pylo_integrations.step.stages.Stages`.

        Parameters are left to others where kernels cannot round as they should be, or where a rule finishes steps of
        tensors that are not whole here; only the steps of a block's tensors are then held at a time.
        """
        networks = self._read_decisions(controls, contexts)
        for nth in self._tables:
            for rows, (keep, scale) in zip(nth.rows, factors, strict=True):
                nth.table.enter("keep", rows, keep)
                nth.table.enter("scale", rows, scale)
        if self._advances:
            self._enter_noise(contexts[0].iteration)
            self._run("advance")
        before = [
            [] if record is None or stretch == _Stretch.LEFT else [p.clone() for p in bucket.params]
            for bucket, stretch in zip(self._buckets, self._stretches, strict=True)
        ]
        first, *others = self._tables
        if not self._step_whole_(contexts):
            first.apply()
        for nth in others:
            nth.apply()
        if record is not None:
            for number, params, (keep, _), ctx in zip(numbers, before, factors, contexts, strict=True):
                if params:
                    record.add_applied(number, params, keep, ctx)
        return [
            self._propose_bucket_(i, networks) if stretch == _Stretch.LEFT else None
            for i, stretch in enumerate(self._stretches)
        ]

    def _step_whole_(self, contexts: Sequence[StepContext]) -> bool:
        """Propose steps of whole tensors, have their rules finish them, and write parameters; some tensors at a time.

        With the last of them come, in the same call, those tensors that are stepped at once.

        Returns:
            Whether there were any.
        """
        batches = list(self._stacks())
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
            last = self._tables[0].at_once.stop if number == len(batches) else rows.stop
            self._apply_at(slice(rows.start, last), stacks, directions, scales)
        return bool(batches)

    def _stacks(self) -> Iterator[list[_Stack]]:
        """Whole tensors that rules finish, alike ones together, in lists of about :data:`TOGETHER` elements."""
        stacks: list[_Stack] = []
        room = most = TOGETHER[self._tables[0].table.device.type]
        for index, bucket in enumerate(self._buckets):
            if self._stretches[index] != _Stretch.WHOLE:
                continue
            first = self._tables[0].rows[index].start
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
        bucket, spec, count = self._buckets[stack.index], self._specs[stack.index], stack.count
        assert spec.directions is not None, "see _stretch_of()"
        whole = proposed.view(count, 1, *bucket.layout.shape)
        made, scale = spec.directions(whole, bucket.layout, contexts[stack.index])
        if scale[0].numel() > 1 and self._networks[stack.index] is None:  # whose records know no slices
            made, scale = made * scale, scale.new_ones(count, 1)
        directions = made.reshape(proposed.shape)
        if directions.stride() != stack.strides:
            directions = directions.new_empty_strided(proposed.shape, stack.strides).copy_(directions)
        return directions, scale.float().flatten(1).contiguous()

    def _apply_at(
        self, rows: slice, stacks: Sequence[_Stack], directions: Sequence[Tensor], scales: Sequence[Tensor] = ()
    ) -> None:
        """Apply some records; those of stacks of whole tensors refer to their directions, and to scales of these."""
        table = self._tables[0].table
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

    def _propose_bucket_(self, index: int, networks: list[Tensor]) -> Iterator[Tensor]:
        # `networks` is memory that the table refers to: this iterator keeps it alive.
        bucket = self._buckets[index]
        for pieces in by_tensors(bucket.blocks):
            tensors = pieces[0].tensors
            stepped = map(bucket.stepped, range(len(bucket))[tensors])
            steps = [torch.empty_like(param, dtype=torch.float32) for param in stepped]
            where = np.array([step.data_ptr() for step in steps], np.uint64)
            room = np.array([step.nbytes for step in steps], np.uint64)
            for nth in self._tables:
                begin, end = np.searchsorted(nth.members[index], [tensors.start, tensors.stop]).tolist()
                rows = slice(nth.rows[index].start + begin, nth.rows[index].start + end)
                records, mine = nth.table.tensors, np.array(nth.members[index][begin:end], np.int64) - tensors.start
                skipped = nth.offsets[rows] * np.uint64(torch.float32.itemsize)
                try:
                    records["direction"][rows] = where[mine] + skipped
                    records["direction_bytes"][rows] = room[mine] - skipped
                    nth.table.run_some("apply", rows)
                finally:  # whatever interrupts this, the table is again the one that was checked
                    records["direction"][rows] = records["direction_bytes"][rows] = 0
            cuts = [block.cut(steps) for block in reversed(pieces)]
            del steps  # so that they are gone when whoever takes the last cut lets go of it
            while cuts:
                yield cuts.pop()

    def _network(self, number: int, layers: Sequence[tuple[Tensor, Tensor]], slots: Tensor) -> Tensor:
        """The ``number``-th network of a step as the library reads it, where the last step had its own.

        A table that stays the same from step to step need not be copied to a device, and a graph can hold its address.
        """
        if number == len(self._packed):
            self._packed.append(PackedNetwork(layers, pack(layers, slots)))
        network = self._packed[number]
        if network.has_weights_of(layers):
            network.enter_biases(layers)
        else:
            packed = pack(layers, slots)
            if network.packed.shape == packed.shape:
                packed = network.packed.copy_(packed)
            self._packed[number] = PackedNetwork(layers, packed)
        return self._packed[number].packed

    def _read_decisions(self, controls: Sequence[Control], contexts: Sequence[StepContext]) -> list[Tensor]:
        """Enter completed sums and what was decided into the tables; returns memory that they refer to."""
        networks: dict[tuple[int, ...], Tensor] = {}
        for index, (control, ctx) in enumerate(zip(controls, contexts, strict=True)):
            spec = self._specs[index]
            values: dict[str, Any] = dict(spec.step.averages(ctx))
            if self._networks[index] is not None:
                layers = layers_of(ctx.constants, control)
                key = (len(self._slots[index]), *(id(part) for layer in layers for part in layer))
                if key not in networks:
                    networks[key] = self._network(len(networks), layers, self._slots[index])
                network = networks[key]
                values["network"] = network.data_ptr()
                values["network_bytes"] = network.element_size() * network.shape[1]
                if len(network) > 1:
                    values["network"] += values["network_bytes"] * np.arange(len(network), dtype=np.uint64)
            mult: float | Tensor = spec.step_mult
            if spec.factor is not None:
                mult = spec.factor(ctx) * mult
            for factor in ("lr_mult", "param_scale"):  # decided for every tensor, by rules that do
                mult = control[factor] * mult if factor in control else mult
            for nth in self._tables:
                rows, members = nth.rows[index], nth.members[index]
                mine = mult[members] if isinstance(mult, Tensor) and 1 < mult.numel() != len(members) else mult
                nth.table.enter("step_mult", rows, mine)
                for name, value in values.items():
                    nth.table.enter(name, rows, value[members] if isinstance(value, np.ndarray) else value)
        first, *others = self._tables
        for nth in others:
            for share, total, members in zip(nth.described, first.described, nth.members, strict=True):
                share.copy_(total[members])
        return list(networks.values())


def _over_tensors(sums: Tensor, bucket: Bucket) -> Tensor:
    """Sums over whole tensors, ``(tensors, channels)``, with an axis of extent 1 for each of theirs."""
    return sums.view(*sums.shape, *(1,) * len(bucket.layout.shape))


def _empty_sums(rule: Rule, bucket: Bucket, members: Sequence[int]) -> dict[str, Tensor]:
    if bucket.layout.factored is None or "row" not in rule.state_shapes(bucket.layout):
        return {}
    d1, d0 = bucket.layout.factored
    return {
        name: torch.zeros(len(members), 1, *bucket.layout.without(axis), dtype=torch.float64, device=bucket.device)
        for name, axis in (("row", d0), ("col", d1))
    }


def _in_format_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of its parameter and a type that the library reads; a copy if need be."""
    if grad.dtype in DTYPES and same_format(grad, param) and is_aligned(grad):
        return grad
    dtype = grad.dtype if grad.dtype in DTYPES else torch.float32
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(grad)
