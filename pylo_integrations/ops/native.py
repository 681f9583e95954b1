"""The stages of a step on the native CPU kernels: one call per stage for all tensors.

A table describes every tensor to the library: its buffers and the roles of its axes. It is built when tensors are
replaced; a step only refreshes what changes (gradients, learning rates). Sums leave one stage and enter the next as
flat torch tensors, which is where a sharded run completes them. State and results are those of the reference backend,
so backends may change in the middle of a run.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pylo_integrations.ops.loader import (
    ABI_VERSION,
    ISAS,
    MAX_RANK,
    MAX_WIDTH,
    SLOTS,
    CallStruct,
    Library,
    RuleStruct,
)
from pylo_integrations.rules.accumulators import DIAGONAL, MOMENTUM
from pylo_integrations.rules.base import LARGEST_GRADIENT
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import TensorLayout

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


@dataclass(frozen=True)
class NetworkSpec:
    """A rule in the terms of the library.

    Attributes:
        features: Names of the network's inputs, in the order of its weights.
        widths: Outputs of each layer.
        decays: ``momentum_weight`` (3,), ``rms_weight`` (1,), ``factored_weight`` (3,): the new value's share in each EMA.
        rms_eps, vector_momentum_eps, norm_eps, exp_mult: As in the rule.
        grad_clip: Bound on gradient elements.
    """

    features: tuple[str, ...]
    widths: tuple[int, ...]
    decays: Mapping[str, Tensor]
    rms_eps: float = 1e-6
    vector_momentum_eps: float = 1e-6
    norm_eps: float = 1e-5
    exp_mult: float = 1e-3
    grad_clip: float = math.inf

    def struct(self, names: Sequence[str]) -> RuleStruct:
        """As the library reads it; ``names`` are its slots."""
        rule = RuleStruct(
            features=sum(1 << slot for slot in self.slots(names)),
            layers=len(self.widths),
            rms_eps=self.rms_eps,
            vector_momentum_eps=self.vector_momentum_eps,
            norm_eps=self.norm_eps,
            exp_mult=self.exp_mult,
            grad_clip=self.grad_clip,
            grad_limit=LARGEST_GRADIENT,
        )
        rule.width[: len(self.widths)] = self.widths
        for name in ("momentum", "factored"):
            weight = self.decays[f"{name}_weight"].float()
            getattr(rule, f"{name}_weight")[:] = weight.tolist()
            getattr(rule, f"{name}_keep")[:] = (1 - weight).tolist()
        rms = self.decays["rms_weight"].float()
        rule.rms_weight, rule.rms_keep = rms.item(), (1 - rms).item()
        return rule

    def slots(self, names: Sequence[str]) -> list[int]:
        """The slot of every input of the network, in the order of its weights."""
        return [slot for feature in self.features for slot, name in enumerate(names) if name == feature]

    def pack(self, names: Sequence[str], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """Networks as the library reads them.

        Args:
            names: The library's slots.
            weights: Per layer ``(..., outputs, inputs)``; leading axes run over networks.
            biases: Per layer ``(..., outputs)``.

        Returns:
            Float32 ``(..., floats)``.
        """
        parts = []
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            matrix = weight.float().transpose(-1, -2)
            if layer == 0:
                spread = matrix.new_zeros(*matrix.shape[:-2], SLOTS, matrix.shape[-1])
                spread[..., self.slots(names), :] = matrix
                matrix = spread
            padding = -matrix.shape[-1] % 4
            layer_parts = torch.cat([matrix, bias.float().unsqueeze(-2)], dim=-2)
            parts.append(torch.nn.functional.pad(layer_parts, (0, padding)).flatten(-2))
        return torch.cat(parts, dim=-1).contiguous()


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


def record_axes(layout: TensorLayout, order: Sequence[int]) -> _Axes | None:
    """The axes of a box, or None if they are more than the library takes.

    Args:
        layout: Roles of the axes and the box.
        order: :func:`memory_order` of the parameter.
    """
    box = layout.local
    if layout.factored is None:
        return _Axes((box.numel,), (0,), (0,))
    d1, d0 = layout.factored
    row, col = _strides(layout.without(d0), d0), _strides(layout.without(d1), d1)
    extent, row_stride, col_stride, role = [], [], [], []
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


def obstacle(bucket: Bucket) -> str | None:
    """Why the native kernels cannot step a bucket, in words; None if they can."""
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
                fits = value.stride() == param.stride() or (value.is_contiguous() and param.is_contiguous())
            else:
                fits = value.is_contiguous()
            if not fits:
                return f"the state {name} of a parameter of shape {tuple(param.shape)} has another memory format"
    return None


class NativeTable:
    """Buckets of one rule as one table.

    Args:
        library: The loaded library.
        spec: The rule.
        buckets: What to step; :func:`obstacle` must be None for each.
        isa: Instruction set, by default the best one of this machine.

    Raises:
        NativeError: The library refuses the table.

    Attributes:
        collected: Float64, flat: sums of squared gradients along the factored axes. To be completed over ranks between
            :meth:`collect` and :meth:`prepare_`.
        described: Float64 ``(tensors, 30)``: sums of squared features. To be completed between :meth:`describe` and
            :meth:`apply_`.
    """

    def __init__(
        self,
        library: Library,
        spec: NetworkSpec,
        buckets: Sequence[Bucket],
        *,
        isa: str | None = None,
    ) -> None:
        self._library = library
        self._buckets = buckets
        self._names = library.feature_names()
        self._spec = spec
        self._rule = spec.struct(self._names)
        count = sum(map(len, buckets))
        sizes = [_statistic_sizes(bucket.layout) for bucket in buckets for _ in bucket.params]
        entries = sum(row + col for row, col in sizes)
        self.collected = torch.zeros(entries, dtype=torch.float64)
        self.described = torch.zeros(count, SLOTS, dtype=torch.float64)
        self._grad_squares = torch.zeros(count, dtype=torch.float64)
        self._scales = torch.empty(3 * entries, dtype=torch.float32)
        self._stat_squares = torch.zeros(count, SLOTS, dtype=torch.float64)
        self._tensors = self._describe_tensors(sizes)
        self._steps: NDArray[np.void] = np.zeros(count, _STEP)
        self._grads: list[Tensor] = []
        self._networks = torch.empty(0)
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

    def _describe_tensors(self, sizes: Sequence[tuple[int, int]]) -> NDArray[np.void]:
        table = np.zeros(len(sizes), _TENSOR)
        sums, scales = self.collected.data_ptr(), self._scales.data_ptr()
        index = 0
        for bucket in self._buckets:
            layout = bucket.layout
            axes_of: dict[tuple[int, ...], _Axes] = {}
            for param, state in zip(bucket.params, bucket.states, strict=True):
                order = tuple(memory_order(param) or ())
                if order not in axes_of:
                    axes = record_axes(layout, order)
                    assert axes is not None, "obstacle() says so"
                    axes_of[order] = axes
                axes = axes_of[order]
                record = table[index]
                rank = len(axes.extent)
                for name in ("row_offset", "col_offset", "d0_axis", "d1_axis"):
                    record[name] = getattr(axes, name)
                for name in ("extent", "row_stride", "col_stride"):
                    record[name][:rank] = getattr(axes, name)
                record["rank"], record["numel"], record["param_dtype"] = rank, layout.numel, DTYPES[param.dtype]
                record["param"], record["rms"] = param.data_ptr(), state["rms"].data_ptr()
                record["momentum"] = [state[name].data_ptr() for name in MOMENTUM]
                record["feature_sums"] = self.described[index].data_ptr()
                record["stat_squares"] = self._stat_squares[index].data_ptr()
                row, col = sizes[index]
                if layout.factored is None:
                    record["diagonal"] = [state[name].data_ptr() for name in DIAGONAL]
                else:
                    d1, d0 = layout.factored
                    record["d0_extent"], record["d1_extent"] = layout.shape[d0], layout.shape[d1]
                    record["d1_row_stride"] = _strides(layout.without(d0), d0)[d1]
                    record["row_numel"], record["col_numel"] = row, col
                    record["row"], record["col"] = state["row"].data_ptr(), state["col"].data_ptr()
                    record["row_sums"], record["col_sums"] = sums, sums + 8 * row
                    record["row_scale"], record["col_scale"] = scales, scales + 12 * row
                    sums += 8 * (row + col)
                    scales += 12 * (row + col)
                index += 1
        return table

    @property
    def names(self) -> tuple[str, ...]:
        """The library's feature slots."""
        return self._names

    def set_step(
        self, name: str, values: float | NDArray[np.float32] | Sequence[float], bucket: int | None = None
    ) -> None:
        """Set ``keep``, ``scale``, ``step_mult``, ``grad_scale``, ``l2`` or ``flags`` of one bucket's or all tensors."""
        column = self._steps[name]
        if bucket is None:
            column[:] = values
        else:
            first = sum(map(len, self._buckets[:bucket]))
            column[first : first + len(self._buckets[bucket])] = values

    def set_networks(self, networks: Tensor) -> None:
        """Set the network of all tensors, ``(floats,)``, or of each, ``(tensors, floats)``; see NetworkSpec.pack."""
        self._networks = networks
        step = networks.stride(0) * networks.element_size() if networks.dim() == 2 else 0
        self._steps["network"] = networks.data_ptr() + step * np.arange(len(self._steps), dtype=np.uint64)

    def refresh(self) -> None:
        """Take over the gradients of the buckets."""
        self._grads = [
            _in_format_of(param, grad)
            for bucket in self._buckets
            for param, grad in zip(bucket.params, bucket.grads, strict=True)
        ]
        self._steps["grad"] = [grad.data_ptr() for grad in self._grads]
        self._steps["grad_dtype"] = [DTYPES[grad.dtype] for grad in self._grads]

    def collect(self) -> None:
        """Fill :attr:`collected`; changes nothing else."""
        self._run("collect")

    def prepare_(self) -> None:
        """Update factored state from :attr:`collected`."""
        self._run("prepare")

    def describe(self) -> None:
        """Fill :attr:`described`; changes nothing else."""
        self._run("describe")

    def apply_(self) -> None:
        """Update parameter-shaped state and parameters from :attr:`described`."""
        self._run("apply")

    @property
    def grad_squares(self) -> Tensor:
        """Float64 ``(tensors,)``: sums of squares of the gradients as they are stored, by :meth:`collect`."""
        return self._grad_squares

    def _run(self, stage: str) -> None:
        self._call.threads = torch.get_num_threads()
        self._library.run(stage, self._call)


def _statistic_sizes(layout: TensorLayout) -> tuple[int, int]:
    if layout.factored is None:
        return 0, 0
    d1, d0 = layout.factored
    return math.prod(layout.without(d0)), math.prod(layout.without(d1))


def _in_format_of(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the memory format of its parameter and a type that the library reads; a copy if need be."""
    if grad.dtype in DTYPES and (
        grad.stride() == param.stride() or (grad.is_contiguous() and param.is_contiguous())
    ):
        return grad
    dtype = grad.dtype if grad.dtype in DTYPES else torch.float32
    return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(grad)


__all__ = ["DTYPES", "MAX_WIDTH", "NativeTable", "NetworkSpec", "obstacle", "record_axes"]
