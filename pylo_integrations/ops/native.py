"""The stages of a step on the native CPU kernels: one call per stage for all tensors.

A table describes every tensor to the library: its buffers and the roles of its axes. It is built when tensors are
replaced; a step only refreshes what changes (gradients, learning rates). Sums leave one stage and enter the next as
flat torch tensors, which is where a sharded run completes them. State and results are those of the reference backend,
so backends may change in the middle of a run.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.ops.loader import (
    ABI_VERSION,
    ISAS,
    MAX_LAYERS,
    MAX_RANK,
    MAX_WIDTH,
    SLOTS,
    TENSOR_SUMS,
    CallStruct,
    Library,
    RuleStruct,
)
from pylo_integrations.rules.accumulators import DIAGONAL, MOMENTUM
from pylo_integrations.rules.base import CLIP, LARGEST_GRADIENT, Control, Rule, StepContext, l2_penalty
from pylo_integrations.rules.mixture import MixtureRule
from pylo_integrations.rules.small_fc import SmallFC
from pylo_integrations.rules.velo import VeLORule
from pylo_integrations.sharding.blocks import Bucket, Sums
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import is_sharded

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Storage types of parameters and gradients, by their number in the interface; state is float32."""

ZERO_NONFINITE = 1

_TENSOR = np.dtype(
    [
        ("param", "u8"),
        ("momentum", "u8", 3),
        ("rms", "u8"),
        ("diagonal", "u8", 3),
        *((name, "u8") for name in ("row", "col", "row_scale", "col_scale", "row_sums", "col_sums")),
        *((name, "u8") for name in ("feature_sums", "stat_squares", "tensor_sums", "direction")),
        ("extent", "i8", MAX_RANK),
        ("row_stride", "i8", MAX_RANK),
        ("col_stride", "i8", MAX_RANK),
        *((name, "i8") for name in ("row_offset", "col_offset", "row_numel", "col_numel")),
        *((name, "i8") for name in ("d0_extent", "d1_extent", "d1_row_stride", "numel")),
        *((name, "i4") for name in ("rank", "d0_axis", "d1_axis", "param_dtype")),
    ]
)
_STEP = np.dtype(
    [
        ("grad", "u8"),
        ("network", "u8"),
        *((name, "f4") for name in ("keep", "scale", "step_mult", "grad_scale", "l2")),
        *((name, "i4") for name in ("grad_dtype", "flags", "reserved")),
    ]
)


NativeRule = SmallFC | MixtureRule
"""The rules that the kernels know."""

_MEASURED = {"param_squares": slice(0, 1), "moments": slice(1, 5), "moment_squares": slice(5, TENSOR_SUMS)}
"""Sums over parameters, momenta and second moment before the step, by the names under which rules know them."""


def _measured(rule: Rule) -> list[str]:
    """Which of them a rule asks for."""
    if isinstance(rule, VeLORule):
        return list(_MEASURED)
    return ["param_squares"] if isinstance(rule, MixtureRule) else []


def _widths(rule: NativeRule) -> list[int]:
    """Outputs of every layer of the network."""
    if isinstance(rule, MixtureRule):
        return [shape[0] for name, shape in rule.parts.items() if name.startswith("b")]
    return [len(bias) for bias in rule.biases]


def _rule_struct(rule: NativeRule, names: Sequence[str]) -> RuleStruct:
    """A rule as the library reads it; ``names`` are the library's slots."""
    widths = _widths(rule)
    measured = [_MEASURED[name].stop for name in _measured(rule)]
    weights = rule.decays.weights(torch.device("cpu"), torch.float32)
    struct = RuleStruct(
        features=sum(1 << slot for slot in _slots(rule.features, names)),
        layers=len(widths),
        rms_eps=rule.rms_eps,
        vector_momentum_eps=rule.vector_momentum_eps,
        norm_eps=rule.norm_eps,
        exp_mult=rule.exp_mult,
        grad_clip=CLIP if isinstance(rule, MixtureRule) else math.inf,
        grad_limit=LARGEST_GRADIENT,
        measures=max(measured, default=0),
    )
    struct.width[: len(widths)] = widths
    for kind in ("momentum", "factored"):
        weight = weights[f"{kind}_weight"]
        getattr(struct, f"{kind}_weight")[:] = weight.tolist()
        getattr(struct, f"{kind}_keep")[:] = (1 - weight).tolist()
    rms = weights["rms_weight"]
    struct.rms_weight, struct.rms_keep = rms.item(), (1 - rms).item()
    return struct


def _slots(features: Sequence[str], names: Sequence[str]) -> list[int]:
    """The slot of every input of a network, in the order of its weights."""
    return [slot for feature in features for slot, name in enumerate(names) if name == feature]


def _pack(layers: Sequence[tuple[Tensor, Tensor]], slots: Sequence[int]) -> Tensor:
    """Networks as the library reads them, float32 ``(networks, floats)``.

    Args:
        layers: Weights ``(networks or 1, outputs, inputs)`` and biases ``(networks or 1, outputs)``.
        slots: Of the inputs of the first layer.
    """
    parts = []
    for index, (weight, bias) in enumerate(layers):
        matrix = weight.float().transpose(1, 2)
        if index == 0:
            spread = matrix.new_zeros(len(matrix), SLOTS, matrix.shape[2])
            spread[:, slots] = matrix
            matrix = spread
        rows = torch.cat([matrix, bias.float().unsqueeze(1)], dim=1)
        parts.append(torch.nn.functional.pad(rows, (0, -rows.shape[2] % 4)).flatten(1))
    return torch.cat(parts, dim=1).contiguous()


def _layers(constants: Mapping[str, Tensor], control: Control) -> list[tuple[Tensor, Tensor]]:
    """The network of a bucket's tensors; decisions of this step go before what theta fixes."""
    known = {**constants, **control}
    depth = next(layer for layer in itertools.count() if f"w{layer}" not in known)
    pairs = [(known[f"w{layer}"], known[f"b{layer}"]) for layer in range(depth)]
    return [(w if w.dim() == 3 else w.unsqueeze(0), b if b.dim() == 2 else b.unsqueeze(0)) for w, b in pairs]


@dataclass(frozen=True)
class _Axes:
    """A tensor's axes from the slowest to the fastest, neighbours of equal role merged, see ``pylo_tensor``."""

    extent: tuple[int, ...]
    row_stride: tuple[int, ...]
    col_stride: tuple[int, ...]
    row_offset: int = 0
    col_offset: int = 0
    d0_axis: int = -1
    d1_axis: int = -1


def _strides(shape: Sequence[int], missing: int) -> list[int]:
    """Strides of a contiguous tensor of ``shape``, 0 along the axis of extent 1 that it averages over."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    strides[missing] = 0
    return strides


def memory_order(param: Tensor) -> list[int] | None:
    """Axes of extent above 1 from the slowest to the fastest, or None if memory has gaps or overlaps."""
    axes = sorted((a for a, n in enumerate(param.shape) if n > 1), key=param.stride, reverse=True)
    step = 1
    for axis in reversed(axes):
        if param.stride(axis) != step:
            return None
        step *= param.shape[axis]
    return axes


def record_axes(layout: TensorLayout, order: Sequence[int], box: Box | None = None) -> _Axes | None:
    """The axes of a box, or None if they are more than the library takes.

    Args:
        layout: Roles of the axes.
        order: :func:`memory_order` of the parameter.
        box: The piece of the tensor; by default all of it.
    """
    box = Box((0,) * len(layout.shape), layout.shape) if box is None else box
    if layout.factored is None:
        return _Axes((box.numel,), (0,), (0,))
    d1, d0 = layout.factored
    row, col = _strides(layout.without(d0), d0), _strides(layout.without(d1), d1)
    extent: list[int] = []
    row_stride: list[int] = []
    col_stride: list[int] = []
    role: list[int] = []
    for axis in [axis for axis in (d1, d0) if axis not in order] + list(order):
        n = box.shape[axis]
        other = axis not in (d1, d0)
        if other and role and role[-1] == -1 and (row_stride[-1], col_stride[-1]) == (row[axis] * n, col[axis] * n):
            extent[-1] *= n
            row_stride[-1], col_stride[-1] = row[axis], col[axis]
            continue
        extent.append(n)
        row_stride.append(row[axis])
        col_stride.append(col[axis])
        role.append(-1 if other else axis)
    if len(extent) > MAX_RANK:
        return None
    return _Axes(
        tuple(extent),
        tuple(row_stride),
        tuple(col_stride),
        sum(start * stride for start, stride in zip(box.start, row, strict=True)),
        sum(start * stride for start, stride in zip(box.start, col, strict=True)),
        role.index(d0),
        role.index(d1),
    )


def obstacle(rule: Rule, bucket: Bucket) -> str | None:
    """Why the native kernels cannot step a bucket, in words; None if they can."""
    if not isinstance(rule, NativeRule):
        return f"they do not know the rule {type(rule).__name__}"
    widths = _widths(rule)
    if not 2 <= len(widths) <= MAX_LAYERS or max(widths) > MAX_WIDTH:
        return f"layers of {widths} units are more or wider than they take"
    if bucket.parts > 1 or any(map(is_sharded, bucket.params)):
        return "its tensors are sharded"
    if bucket.device.type != "cpu":
        return f"its tensors are on {bucket.device}"
    for param, state in zip(bucket.params, bucket.states, strict=True):
        if param.dtype not in DTYPES:
            return f"its parameters are {param.dtype}"
        order = memory_order(param)
        if order is None:
            return f"a parameter of shape {tuple(param.shape)} has strides {param.stride()}, with gaps or overlaps"
        if record_axes(bucket.layout, order) is None:
            return f"its shape {bucket.layout.shape} has too many axes of different roles"
        for name, value in state.items():
            if name.startswith(("momentum", "rms", "diagonal")):
                fits = _same_format(value, param)
            else:
                fits = value.is_contiguous()
            if not fits:
                return f"the state {name} of a parameter of shape {tuple(param.shape)} has another memory format"
    return None


class NativeStages:
    """Buckets of one rule, stepped by the native kernels.

    The methods are the stages of :class:`~pylo_integrations.rules.base.Rule`, over whole buckets.

    Args:
        library: The loaded library.
        rule: The mathematics.
        buckets: What to step; :func:`obstacle` must be None for each.
        isa: Instruction set, by default the best one of this machine.

    Raises:
        NativeError: The library refuses the table.
    """

    def __init__(self, library: Library, rule: NativeRule, buckets: Sequence[Bucket], isa: str | None = None) -> None:
        self._library = library
        self._buckets = buckets
        self._slots = _slots(rule.features, library.feature_names())
        self._step_mult = rule.step_mult
        self._rule = _rule_struct(rule, library.feature_names())
        self._measures = _measured(rule)
        count = sum(map(len, buckets))
        ends = list(itertools.accumulate(map(len, buckets), initial=0))
        self._rows = [slice(first, end) for first, end in itertools.pairwise(ends)]  # of each bucket in the table
        self._collected = [_empty_sums(bucket) for bucket in buckets]
        self._scales = [
            {name: sums.new_empty(3 * sums.numel(), dtype=torch.float32) for name, sums in c.items()}
            for c in self._collected
        ]
        self._described = torch.zeros(count, SLOTS, dtype=torch.float64)
        self._statistics = torch.zeros(count, SLOTS, dtype=torch.float64)
        self._grad_squares = torch.zeros(count, dtype=torch.float64)
        self._measured = torch.zeros(count, TENSOR_SUMS, dtype=torch.float64)
        self._tensors = np.zeros(count, _TENSOR)
        for index in range(len(buckets)):
            self._fill_records(index)
        self._known_addresses = self._addresses()
        self._steps = np.zeros(count, _STEP)
        self._grads: list[Tensor] = []
        self._call = CallStruct(
            abi_version=ABI_VERSION,
            size=ctypes.sizeof(CallStruct),
            rule=ctypes.pointer(self._rule),
            tensors=self._tensors.ctypes.data,
            steps=self._steps.ctypes.data,
            count=count,
            grad_squares=self._grad_squares.data_ptr(),
            threads=1,
            isa=ISAS[isa] if isa else 0,
        )
        self._call.token, size = library.check(self._call)
        self._workspace = torch.empty(size // 8 + 8, dtype=torch.float64)
        self._call.workspace = -(-self._workspace.data_ptr() // 64) * 64
        self._call.workspace_bytes = size

    def _fill_records(self, index: int) -> None:
        bucket, first = self._buckets[index], self._rows[index].start
        layout, sums, scales = bucket.layout, self._collected[index], self._scales[index]
        for position, (param, state) in enumerate(zip(bucket.params, bucket.states, strict=True)):
            record = self._tensors[first + position]
            box = bucket.held[position].pieces[0].box if bucket.held else None
            axes = record_axes(layout, memory_order(param) or (), box)
            assert axes is not None, "see obstacle()"
            rank = len(axes.extent)
            for name in ("row_offset", "col_offset", "d0_axis", "d1_axis"):
                record[name] = getattr(axes, name)
            for name in ("extent", "row_stride", "col_stride"):
                record[name][:rank] = getattr(axes, name)
            record["rank"], record["numel"], record["param_dtype"] = rank, layout.numel, DTYPES[param.dtype]
            record["param"], record["rms"] = param.data_ptr(), state["rms"].data_ptr()
            record["momentum"] = [state[name].data_ptr() for name in MOMENTUM]
            record["feature_sums"] = self._described[first + position].data_ptr()
            record["tensor_sums"] = self._measured[first + position].data_ptr()
            record["stat_squares"] = self._statistics[first + position].data_ptr()
            if layout.factored is None:
                record["diagonal"] = [state[name].data_ptr() for name in DIAGONAL]
                continue
            d1, d0 = layout.factored
            record["d0_extent"], record["d1_extent"] = layout.shape[d0], layout.shape[d1]
            record["d1_row_stride"] = _strides(layout.without(d0), d0)[d1]
            for name in ("row", "col"):
                numel = sums[name][position].numel()
                record[f"{name}_numel"] = numel
                record[name] = state[name].data_ptr()
                record[f"{name}_sums"] = sums[name][position].data_ptr()
                record[f"{name}_scale"] = scales[name][3 * numel * position :].data_ptr()

    def _addresses(self) -> list[int]:
        return [
            tensor.data_ptr()
            for bucket in self._buckets
            for param, state in zip(bucket.params, bucket.states, strict=True)
            for tensor in (param, *state.values())
        ]

    def is_current(self) -> bool:
        """Whether all memory is where it was when the table was built. Other code may give a parameter new storage."""
        return self._known_addresses == self._addresses()

    def collect(self, ctx: StepContext) -> list[Sums]:
        """The rule's sums before any state may change, for every bucket; float64. Changes nothing else."""
        self._grads = [
            _in_format_of(param, grad)
            for bucket in self._buckets
            for param, grad in zip(bucket.params, bucket.grads, strict=True)
        ]
        self._steps["grad"] = [grad.data_ptr() for grad in self._grads]
        self._steps["grad_dtype"] = [DTYPES[grad.dtype] for grad in self._grads]
        self._read_policy(ctx)
        self._run("collect")
        if self._measures:
            self._run("measure")
        return [
            sums | {name: self._over_tensors(self._measured[rows, _MEASURED[name]], bucket) for name in self._measures}
            for bucket, rows, sums in zip(self._buckets, self._rows, self._collected, strict=True)
        ]

    def _read_policy(self, ctx: StepContext) -> None:
        self._steps["flags"] = ZERO_NONFINITE if ctx.zero_nonfinite else 0
        clip_scale = 1.0 if ctx.grad_scale is None else float(ctx.grad_scale)
        for bucket, rows in zip(self._buckets, self._rows, strict=True):
            group = bucket.group
            self._steps["grad_scale"][rows] = -clip_scale if group["maximize"] else clip_scale
            self._steps["l2"][rows] = l2_penalty(group)

    @staticmethod
    def _over_tensors(sums: Tensor, bucket: Bucket) -> Tensor:
        """Sums over whole tensors, ``(tensors, channels)``, with an axis of extent 1 for each of theirs."""
        return sums.view(*sums.shape, *(1,) * len(bucket.layout.shape))

    def prepare_(self, collected: Sequence[Sums], ctx: StepContext) -> None:
        """Update factored state from the complete sums of :meth:`collect`.

        Args:
            collected: Of every bucket.
            ctx: For the gradients' scale, which may have been found since they were collected.
        """
        self._read_policy(ctx)
        for ours, sums in zip(self._collected, collected, strict=True):
            for name, total in ours.items():
                if sums[name] is not total:
                    total.copy_(sums[name])
        self._run("prepare")

    def describe(self) -> list[Sums]:
        """Sums of squared features for every bucket, float64 ``(tensors, 30, *ones)``. Changes nothing else."""
        self._run("describe")
        return [
            {"features": self._over_tensors(self._described[rows], bucket)}
            for bucket, rows in zip(self._buckets, self._rows, strict=True)
        ]

    def apply_(
        self,
        controls: Sequence[Control],
        constants: Mapping[str, Tensor],
        keep_and_scale: Sequence[tuple[float | Tensor, float | Tensor]],
    ) -> None:
        """Update parameter-shaped state and parameters from the complete sums of :meth:`describe`, in place.

        Args:
            controls: Of every bucket.
            constants: Of the rule.
            keep_and_scale: Of every bucket, see :mod:`pylo_integrations.decay`.
        """
        networks = []
        for rows, control, (keep, scale) in zip(self._rows, controls, keep_and_scale, strict=True):
            network = _pack(_layers(constants, control), self._slots)
            step = network.element_size() * network.shape[1] if len(network) > 1 else 0
            self._steps["network"][rows] = network.data_ptr() + step * np.arange(
                rows.stop - rows.start, dtype=np.uint64
            )
            networks.append(network)  # alive until the call returns
            self._steps["keep"][rows], self._steps["scale"][rows] = float(keep), float(scale)
            step_mult = torch.tensor(self._step_mult)
            for factor in ("lr_mult", "param_scale"):  # decided for every tensor, by rules that do
                step_mult = step_mult * control.get(factor, 1.0)
            self._steps["step_mult"][rows] = step_mult.numpy()
        self._run("apply")
        self._grads = []  # or they would outlive zero_grad()

    def _run(self, stage: str) -> None:
        self._call.threads = torch.get_num_threads()
        self._library.run(stage, self._call)


def _empty_sums(bucket: Bucket) -> dict[str, Tensor]:
    if bucket.layout.factored is None:
        return {}
    d1, d0 = bucket.layout.factored
    return {
        name: torch.zeros(len(bucket), 1, *bucket.layout.without(axis), dtype=torch.float64)
        for name, axis in (("row", d0), ("col", d1))
    }


def _in_format_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of its parameter and a type that the library reads; a copy if need be."""
    if grad.dtype in DTYPES and _same_format(grad, param):
        return grad
    dtype = grad.dtype if grad.dtype in DTYPES else torch.float32
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(grad)


def _same_format(tensor: Tensor, param: Tensor) -> bool:
    """Whether equal offsets are equal elements; strides of axes with one element mean nothing."""
    return tensor.stride() == param.stride() or (tensor.is_contiguous() and param.is_contiguous())
