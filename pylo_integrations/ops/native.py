"""The stages of a step on the native kernels: one call per stage for all tensors of all rules.

A table describes what is here of every tensor to the library: its buffers and the roles of its axes. It is built when
tensors are replaced; a step only refreshes what changes (gradients, learning rates). Sums leave one stage and enter the
next as torch tensors, which is where a sharded run completes them. State and results are those of the reference
backend, so backends may change in the middle of a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.fitting import is_aligned
from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops.loader import NativeLibrary, RuleStruct
from pylo_integrations.ops.memory import Memory, Written, addresses, formats, read_memory
from pylo_integrations.ops.packing import PackedNetworks, layers_of, rule_struct
from pylo_integrations.ops.records import DTYPES, bytes_from, norm_shape, pieces_of, same_format
from pylo_integrations.ops.tables import NativeBucket, PieceTable, Stretch
from pylo_integrations.ops.whole import WholeSteps
from pylo_integrations.rules.base import Control, Rule, StepContext, l2_penalty
from pylo_integrations.sharding.blocks import Bucket, Sums, by_tensors
from pylo_integrations.telemetry import StepRecord

ZERO_NONFINITE = 1


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
        names, distinct = library.feature_names(), list(dict.fromkeys(rules))
        ends = itertools.accumulate(map(len, buckets), initial=0)
        self._natives = [
            NativeBucket(bucket, rule, distinct.index(rule), start, names, library.device)
            for bucket, rule, start in zip(buckets, rules, ends, strict=False)
        ]
        # Of every state, the rule's entries: others are not ours. Noted before their addresses are taken down: what
        # another thread replaces meanwhile is then missed by no later look.
        entries = [
            (state, name)
            for rule, bucket in zip(rules, buckets, strict=True)
            for state in bucket.states
            for name in bucket.stored_names(rule.state_shapes(bucket.layout))
        ]
        params = [param for bucket in buckets for param in bucket.params]
        wrappers = [tensor for bucket in buckets for tensor in bucket.wrappers()]
        self._written = Written(params, entries, wrappers)
        structs = (RuleStruct * len(distinct))(*(rule_struct(rule, names) for rule in distinct))
        # Tensors are in one piece, except for slices of FSDP1. Their further pieces have tables of their own.
        pieces = max((len(pieces_of(bucket, i)) for bucket in buckets for i in range(len(bucket))), default=1)
        self._tables = [PieceTable(library, structs, self._natives, nth, isa) for nth in range(pieces)]
        self._whole = WholeSteps(self._natives, self._tables[0])
        if not self._written.is_current():
            raise RuntimeError(
                "parameters or their state were replaced while a step was prepared: replace them between steps, in no "
                "other thread"
            )
        self._advances = any(bucket.form is not FLOAT32 for bucket in buckets)
        self._has_networks = any(native.network for native in self._natives)
        self._networks = PackedNetworks()
        self._grads: Sequence[Tensor] = ()
        self._grad_formats: bytes | None = None  # which the kernels read as they are
        self._grad_sizes = np.zeros(len(params), np.uint64)

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
        if formats(memory).tobytes() != self._grad_formats or np.count_nonzero(addresses(memory) % self._grad_sizes):
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
        measured = [native.measured for native in self._natives]
        if any(measured):
            self._run("measure")
        first, *others = self._tables
        for nth in others:
            for index, members in enumerate(nth.members):
                for name, share in nth.collected[index].items():
                    first.collected[index][name][members] += share
                first.measured[index][members] += nth.measured[index]
        return [
            collected | native.sums_of(sums, names) if names else collected
            for native, collected, sums, names in zip(
                self._natives, first.collected, first.measured, measured, strict=True
            )
        ]

    def _read_gradients(self) -> None:
        buckets = [native.bucket for native in self._natives]
        given = list(itertools.chain.from_iterable(bucket.grads for bucket in buckets))
        if self._grads or self.recognises(given):
            return
        stepped = [bucket.stepped(position) for bucket in buckets for position in range(len(bucket))]
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
            for native, rows in zip(self._natives, nth.rows, strict=True):
                group = native.bucket.group
                table.enter("grad_scale", rows, -clip_scale if group["maximize"] else clip_scale)
                table.enter("l2", rows, l2_penalty(group))

    def prepare_(self, collected: Sequence[Sums], contexts: Sequence[StepContext]) -> None:
        """See :class:`~pylo_integrations.step.stages.Stages`."""
        if contexts[0].grad_scale is not None:  # it may have been found since sums were collected
            self._read_policy(contexts[0])
        # From here on the kernels write, which autograd does not see.
        self._written.raise_versions()
        if not self._has_networks:
            return
        first = self._tables[0]
        for ours, sums in zip(first.collected, collected, strict=True):
            for name, total in ours.items():
                if sums[name] is not total:
                    total.copy_(sums[name])
        first.table.run("prepare")
        for native in self._natives:
            if native.norm_slices > 1 and native.statistic_slots:
                _normalise_statistics_(native)

    def describe_(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """See :class:`~pylo_integrations.step.stages.Stages`.

        Sums of squared features, ``(tensors, norm slices, SLOTS)``; state that is shaped like parameters is updated
        with these, later.
        """
        if not self._has_networks:
            return [{}] * len(self._natives)
        self._run("describe")
        first, *others = self._tables
        for nth in others:
            for total, share, members in zip(first.described, nth.described, nth.members, strict=True):
                total[members] += share
        return [
            {"features": described} if native.network else {}
            for native, described in zip(self._natives, first.described, strict=True)
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
            for nth in self._tables:
                nth.enter_noise(contexts[0].iteration)
            self._run("advance")
        before = [
            [] if record is None or native.stretch == Stretch.LEFT else [p.clone() for p in native.bucket.params]
            for native in self._natives
        ]
        self._whole.apply(contexts)
        for nth in self._tables[1:]:
            nth.apply()
        if record is not None:
            for number, params, (keep, _), ctx in zip(numbers, before, factors, contexts, strict=True):
                if params:
                    record.add_applied(number, params, keep, ctx)
        return [
            self._propose_bucket_(index, networks) if native.stretch == Stretch.LEFT else None
            for index, native in enumerate(self._natives)
        ]

    def _propose_bucket_(self, index: int, networks: list[Tensor]) -> Iterator[Tensor]:
        # `networks` is memory that the table refers to: this iterator keeps it alive.
        bucket = self._natives[index].bucket
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

    def _read_decisions(self, controls: Sequence[Control], contexts: Sequence[StepContext]) -> list[Tensor]:
        """Enter completed sums and what was decided into the tables; returns memory that they refer to."""
        networks: dict[tuple[int, ...], Tensor] = {}
        for index, (native, control, ctx) in enumerate(zip(self._natives, controls, contexts, strict=True)):
            spec = native.spec
            values: dict[str, Any] = dict(spec.step.averages(ctx))
            if native.network is not None:
                layers = layers_of(ctx.constants, control)
                key = (len(native.slots), *(id(part) for layer in layers for part in layer))
                if key not in networks:
                    networks[key] = self._networks.place(len(networks), layers, native.slots)
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


def _normalise_statistics_(native: NativeBucket) -> None:
    """Mean squares of the row and column features of every slice over which a bucket's features are normalised."""
    bucket, axes = native.bucket, native.norm_axes
    shape = norm_shape(bucket.layout, axes)
    for name in ("row", "col"):
        value = bucket.stack(name).double()
        for square, feature in ((value.square(), name), ((value + 1e-8).reciprocal(), f"inverse_{name}")):
            if (slot := native.statistic_slots.get(feature)) is None:
                continue
            mean = square.mean([axis + 2 for axis in axes], keepdim=True)
            of_slices = mean.expand(-1, -1, *shape).flatten(2).transpose(1, 2)
            native.statistics[:, :, slot : slot + 3] = of_slices


def _in_format_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of its parameter and a type that the library reads; a copy if need be."""
    if grad.dtype in DTYPES and same_format(grad, param) and is_aligned(grad):
        return grad
    dtype = grad.dtype if grad.dtype in DTYPES else torch.float32
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(grad)
