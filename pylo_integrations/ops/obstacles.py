"""Why the native kernels cannot step some tensors, in words."""

from __future__ import annotations

from collections.abc import Sequence

from pylo_integrations.fitting import has_memory, is_aligned, is_lazy, memory_span
from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops.loader import MAX_LAYERS, MAX_WIDTH
from pylo_integrations.ops.packing import norm_axes_of, spec_of
from pylo_integrations.ops.records import DTYPES, piece_order, pieces_of, record_axes, same_format
from pylo_integrations.rules.base import Rule
from pylo_integrations.rules.kernel_spec import NetworkSpec
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import run_start
from pylo_integrations.sharding.pieces import local_part


def obstacle(rule: Rule, bucket: Bucket) -> str | None:
    """Why the native kernels cannot step a bucket, on any rank, in words; None if they can."""
    spec = rule.kernel_spec
    if spec is None:
        return f"they do not know the rule {rule.kind}"
    widths = spec.step.widths if isinstance(spec.step, NetworkSpec) else ()
    if widths and (len(widths) > MAX_LAYERS or max(widths) > MAX_WIDTH):
        return f"layers of {list(widths)} units are more or wider than they take"
    if bucket.device.type not in ("cpu", "cuda"):
        return f"its tensors are on {bucket.device}"
    if bucket.device.type == "cuda" and not spec.has_cuda:
        return f"those for CUDA do not know the rule {rule.kind}"
    dtype = bucket.params[0].dtype
    return None if dtype in DTYPES else f"its parameters are {dtype}"


def local_obstacle(rule: Rule, bucket: Bucket) -> str | None:
    """Why they cannot step what this process holds of it, which may lie in memory otherwise than on other ranks."""
    spec = spec_of(rule)
    for position, state in enumerate(bucket.states):
        local = bucket.stepped(position)
        for piece in pieces_of(bucket, position):
            order = piece_order(piece, local)
            is_run = local.is_contiguous() and run_start(piece.box, bucket.layout.shape) is not None
            if bucket.form is not FLOAT32 and piece.box.numel and not is_run:
                return f"state stored in {bucket.form.kind} has to be a run of elements of the whole tensor, in order"
            if order is None and any(bucket.origins[position : position + 1]):
                return "tensors that share a weight stored (in, out) lie scattered in it, unless split=False"
            if order is None:
                return f"a parameter of shape {tuple(local.shape)} has strides {local.stride()}, with gaps or overlaps"
            axes = norm_axes_of(spec, bucket.layout)
            if isinstance(spec.step, NetworkSpec) and record_axes(bucket.layout, order, piece.box, axes) is None:
                return f"its shape {bucket.layout.shape} has too many axes of different roles"
        if not is_aligned(local):
            return f"a parameter is at address {local.data_ptr()}, which is not aligned"
        if is_lazy(local):
            return "a parameter is a lazily negated view: assign param.data = param.data.resolve_neg()"
        for name, shape in rule.state_shapes(bucket.layout).items():
            for part, stored in bucket.parts_of(name, shape).items():
                value = local_part(state[part])
                is_small = stored.shape is not None or stored.per_block
                fits = value.is_contiguous() if is_small else not local.numel() or same_format(value, local)
                if not fits or not is_aligned(value):
                    return f"the state {part} of a parameter of shape {tuple(local.shape)} has another memory format"
    return None


def entangled_buckets(buckets: Sequence[Bucket]) -> set[int]:
    """Indices of those with a parameter that shares memory with another: the kernels step all at once, in any order."""
    spans = []
    for index, bucket in enumerate(buckets):
        for local in map(bucket.stepped, range(len(bucket))):
            if has_memory(local) and local.numel():
                start = local.data_ptr()
                spans.append((str(local.device), start, start + memory_span(local) * local.itemsize, index))
    spans.sort()
    found: set[int] = set()
    furthest = ("", 0, 0, 0)
    for span in spans:
        if span[0] == furthest[0] and span[1] < furthest[2]:
            found |= {span[3], furthest[3]}
        furthest = max(furthest, span, key=lambda each: (each[0], each[2]))
    return found
