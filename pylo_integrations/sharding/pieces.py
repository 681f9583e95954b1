"""Which elements of a parameter this process holds, and where in its local storage.

Whatever sharded a tensor, what is here of it is a few boxes of the whole tensor:

* an unsharded tensor is one box;
* a ``DTensor`` (FSDP2, tensor parallelism, HSDP, or both together) is one box, possibly empty;
* of a replica whose step the ranks share, it is the box that this rank steps (:mod:`.shares`);
* FSDP1 with ``use_orig_params=True`` holds a run of elements in row-major order, which is at most ``2 * ndim - 1``
  boxes. The parameter itself is then 1-D: its shape and the start of the run are read from the model, once;
* of DeepSpeed's ZeRO it is such a run, too, of a flat partition. The parameter itself is left to the model, and the run
  stands in for it (:func:`stand_in`);
* of Megatron's tensor parallelism it is a run of slices along an axis, or several runs (:class:`AxisSlice`): the local
  tensor is plain, and looks like a whole one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pylo_integrations.sharding.layout import Box

_PLAIN = (Tensor, nn.Parameter)
_WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module", "_forward_module")
_REPLICAS = {"DeepSpeedEngine", "DistributedDataParallel", "Float16Module"}
"""DeepSpeed's and Megatron's, by name, which spares importing them."""

_MELTED = (
    "a parameter is a FlatParameter of FSDP, in which the tensors that a learned optimizer sees one by one are melted "
    "together: wrap the model with FullyShardedDataParallel(..., use_orig_params=True) or fully_shard(); in Accelerate "
    "set fsdp_use_orig_params: true or fsdp_version: 2"
)


class ShardingError(TypeError):
    """A parameter is distributed in a way whose whole tensors cannot be seen; nothing was changed."""


@dataclass(frozen=True)
class Piece:
    """A box of the whole tensor and its place in the local storage.

    Attributes:
        box: In coordinates of the whole tensor.
        offset: Where the box begins in a dense local tensor, as if that were flat; None if the local tensor has the
            shape of the box or of the whole tensor.
    """

    box: Box
    offset: int | None = None

    def view(self, local: Tensor) -> Tensor:
        """The elements of this piece in a local tensor, shaped like the box; shares memory.

        Args:
            local: What is here of the tensor; or the whole of it, of which the box is a share.
        """
        if self.offset is None:
            local = local.reshape(1) if local.dim() == 0 else local
            return local if local.shape == self.box.shape else local[self.box.slices((0,) * local.dim())]
        return local.view(-1).narrow(0, self.offset, self.box.numel).view(self.box.shape)


@dataclass(frozen=True)
class Held:
    """What this process holds of a tensor.

    Attributes:
        pieces: Disjoint; empty ones are left out.
        parts: Into how many disjoint parts the ranks divide the tensor; 1 if every rank has the whole.
        share: Where every rank has the whole parameter, but steps only a share of it and keeps the state of that
            share: the share, which may be empty. None where what is here of the parameter is what is stepped.
    """

    pieces: tuple[Piece, ...]
    parts: int = 1
    share: Box | None = None

    @property
    def numel(self) -> int:
        """Number of elements here."""
        return sum(piece.box.numel for piece in self.pieces)

    def of(self, local: Tensor) -> Tensor:
        """What of a local tensor, shaped like the local parameter, is stepped here; shares memory."""
        return local if self.share is None else local[self.share.slices((0,) * local.dim())]


@dataclass(frozen=True)
class FlatSlice:
    """A parameter of FSDP1 or ZeRO, of which a rank holds a run of elements as a 1-D tensor.

    Attributes:
        name: Its name in the model.
        shape: Of the whole parameter.
        start: Index of the first local element in the flattened parameter.
        parts: Number of ranks that the parameter is divided among.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    parts: int

    def pieces(self, local: Tensor) -> tuple[Piece, ...]:
        """Where the elements of the local tensor, ``(numel,)``, are in the whole one."""
        pieces, offset = [], 0
        for box in span_boxes(self.shape or (1,), self.start, self.start + local.numel()):
            pieces.append(Piece(box, offset))
            offset += box.numel
        return tuple(pieces)

    def __str__(self) -> str:
        return f"{self.shape} in {self.parts} flat slices"


@dataclass(frozen=True)
class AxisSlice:
    """A parameter of Megatron's tensor parallelism, of which a rank holds a slice along an axis.

    Where two tensors are fused, as in gated projections, a rank holds a slice of each, one after the other.

    Attributes:
        name: Its name in the model.
        shape: Of the whole parameter.
        axis: Which one is divided.
        index: Of this rank among those that divide the parameter.
        parts: Number of ranks that the parameter is divided among.
        runs: Slices of a rank; only along the first axis may there be several.
    """

    name: str
    shape: tuple[int, ...]
    axis: int
    index: int
    parts: int
    runs: int = 1

    def pieces(self, local: Tensor) -> tuple[Piece, ...]:
        """Where the elements of the local tensor, a dense one with the axes of the whole, are in the whole one."""
        pieces, extent = [], self.shape[self.axis] // (self.parts * self.runs)
        for run in range(self.runs):
            start, shape = [0] * len(self.shape), list(self.shape)
            start[self.axis], shape[self.axis] = (run * self.parts + self.index) * extent, extent
            pieces.append(Piece(Box(tuple(start), tuple(shape)), None if self.runs == 1 else run * math.prod(shape)))
        return tuple(pieces)

    def __str__(self) -> str:
        return f"{self.shape} in {self.parts} slices along axis {self.axis}, {self.runs} by {self.runs}"


Slice: TypeAlias = FlatSlice | AxisSlice
"""What a plain tensor is of a whole one."""


def stand_in(param: Tensor, master: Tensor, part: Slice | None = None) -> None:
    """Note what an optimizer steps in the place of a model's parameter.

    Args:
        param: Of the model.
        master: What is stepped; the parameter itself, perhaps.
        part: What that is of the whole parameter, if it has some of its elements only.
    """
    master._is_slice = part is not None  # type: ignore[attr-defined]
    param._stand_in = master, part  # type: ignore[attr-defined]


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor behind a ``DTensor``, sharing its memory (call it without gradients); others as they are."""
    if type(tensor) in _PLAIN or not hasattr(tensor, "to_local"):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def local_gradient(param: Tensor) -> Tensor:
    """The gradient of what is here of ``param``; zeros, without memory of their own, if it has none."""
    grad = param.grad
    if grad is None:
        local = local_part(param)
        return local.new_zeros(()).expand(local.shape)
    placements = getattr(param, "placements", None)
    if placements is not None and getattr(grad, "placements", placements) != placements:
        # Sequence parallelism leaves the gradients of norms as pending sums over ranks.
        grad = grad.redistribute(param.device_mesh, placements)  # type: ignore[attr-defined]
    return local_part(grad)


def is_sharded(param: Tensor) -> bool:
    """Whether ``param`` is a ``DTensor`` or a slice, of FSDP1, ZeRO or Megatron."""
    return (
        hasattr(param, "placements") or getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_slice", False)
    )


def span_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Elements ``start`` to ``stop`` of a tensor in row-major order, as at most ``2 * len(shape) - 1`` boxes."""
    if start >= stop:
        return
    inner = math.prod(shape[1:])
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    first, last = start // inner, (stop - 1) // inner
    if start % inner or stop < (first + 1) * inner:  # a part of the first row
        end = min(stop, (first + 1) * inner)
        for box in span_boxes(shape[1:], start - first * inner, end - first * inner):
            yield Box((first, *box.start), (1, *box.shape))
        start, first = end, first + 1
    if rows := (stop - start) // inner:
        yield Box((first, *[0] * (len(shape) - 1)), (rows, *shape[1:]))
        start += rows * inner
    if start < stop:  # a part of the last row
        for box in span_boxes(shape[1:], 0, stop - start):
            yield Box((last, *box.start), (1, *box.shape))


def locate(param: Tensor, flat_slices: Mapping[Tensor, Slice], num_ranks: int) -> tuple[tuple[int, ...], Held]:
    """Shape of the whole of a parameter, and what this process holds of it.

    Args:
        param: As the optimizer has it.
        flat_slices: Those of FSDP1, ZeRO and Megatron, see :func:`read_flat_slices`.
        num_ranks: How many processes train together.

    Raises:
        ShardingError: The whole tensor cannot be seen from here.
    """
    if hasattr(param, "placements"):
        return _locate_dtensor(param, num_ranks)
    if hasattr(param, "_param_infos"):
        raise ShardingError(_MELTED)
    if hasattr(param, "ds_id"):
        raise ShardingError(
            "a parameter is partitioned by stage 3 of DeepSpeed's ZeRO, which hides whole tensors from the optimizer: "
            "use stage 2 with pylo_integrations.deepspeed.attach(), or torch's fully_shard() (FSDP2)"
        )
    if is_sharded(param):
        if param not in flat_slices:
            raise ShardingError(
                f"a parameter is a 1-D slice of {param.numel()} elements made by FSDP, which does not tell its shape: "
                "call optimizer.bind_model(model) with the FSDP-wrapped model before the first step; with Accelerate, "
                "attach() does so if it comes after accelerator.prepare(model)"
            )
        where = flat_slices[param]
        if where.parts == 1:  # NO_SHARD, or a single rank, keeps the shape
            return where.shape, Held(_one_piece((0,) * len(where.shape), where.shape))
        _check_divides(where.parts, num_ranks)
        return where.shape, Held(where.pieces(param), where.parts)
    shape = tuple(param.shape)
    return shape, Held(_one_piece((0,) * len(shape), shape))


def placed_like(local: Tensor, whole: Any, shape: Sequence[int]) -> Tensor:
    """A contiguous DTensor of ``shape``, of which ``local`` is here, divided among ranks as another DTensor is."""
    from torch.distributed.tensor import DTensor

    stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    made: Tensor = DTensor.from_local(
        local, whole.device_mesh, whole.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return made


def _one_piece(start: Sequence[int], shape: Sequence[int]) -> tuple[Piece, ...]:
    box = Box(tuple(start) or (0,), tuple(shape) or (1,))
    return (Piece(box),) if box.numel else ()


def _locate_dtensor(param: Any, num_ranks: int) -> tuple[tuple[int, ...], Held]:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = param.device_mesh, param.placements
    if any(placement.is_partial() for placement in placements):
        raise ShardingError(
            f"a parameter is a DTensor placed {placements}: a pending sum has no elements to step; redistribute it to "
            "Replicate() or Shard(dim)"
        )
    if mesh.get_coordinate() is None:
        raise ShardingError(
            f"a parameter is a DTensor on {mesh}, which this rank is not part of: give each rank's optimizer only the "
            "parameters that it holds, and optimizer.bind_model(model, process_group=...) the ranks that share them"
        )
    _check_divides(mesh.size(), num_ranks)
    sharded = [size for size, placement in zip(mesh.shape, placements, strict=True) if not placement.is_replicate()]
    shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    local = tuple(local_part(param).shape)
    if local != tuple(shape):
        raise ShardingError(
            f"a DTensor of shape {tuple(param.shape)} placed {placements} on {mesh} should be {tuple(shape)} on this "
            f"rank but is {local}: create it with torch.distributed.tensor.distribute_tensor()"
        )
    return tuple(param.shape), Held(_one_piece(offset, shape), math.prod(sharded))


def _check_divides(shards: int, num_ranks: int) -> None:
    if num_ranks % shards:
        raise ShardingError(
            f"a parameter is spread over {shards} ranks, but {num_ranks} ranks train together, which is no multiple: "
            "put all parameters on device meshes of one size, or name the ranks that train together with "
            "optimizer.bind_model(model, process_group=...)"
        )


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Names of a model's parameters, without what FSDP1, DDP, ``torch.compile`` and other wrappers put into them.

    Parameters that are tied have the first of their names.
    """
    names: dict[Tensor, str] = {}
    for path, param in model.named_parameters():
        for tensor in (*getattr(param, "_stand_in", ())[:1], param):
            names[tensor] = name_inside(model, path)
    return names


def name_inside(model: nn.Module, path: str) -> str:
    """The path of a parameter of ``model`` without what wrappers put into it."""
    parts, module = list[str](), model
    for part in path.split("."):
        if part not in _WRAPPERS and not (part == "module" and _is_replica(module)):
            parts.append(part)
        module = getattr(module, part, module)
    return ".".join(parts)


def _is_replica(module: nn.Module) -> bool:
    """Whether a module holds the model as its ``module``."""
    is_torchs = isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel))
    return is_torchs or any(cls.__name__ in _REPLICAS for cls in type(module).__mro__)


def read_flat_slices(model: nn.Module) -> dict[Tensor, Slice]:
    """The slices that FSDP1, ZeRO or Megatron made of parameters of ``model``, with where they come from.

    Raises:
        ShardingError: FSDP1 melted trainable parameters into one, or flattened one in another order than row-major.
    """
    found: dict[Tensor, Slice] = {}
    names = parameter_names(model)
    for param, name in names.items():
        master, part = getattr(param, "_stand_in", (param, None))
        if part is not None:
            found[master] = replace(part, name=name)
    for module in model.modules():
        flat: Any = getattr(getattr(module, "_handle", None), "flat_param", None)  # spares importing FSDP
        if flat is None:
            continue
        handle: Any = module._handle
        if not handle._use_orig_params:
            if flat.requires_grad:
                raise ShardingError(_MELTED)
            continue
        contiguous = getattr(flat, "_contiguities", [True] * len(flat._params))
        for param, shape, shard, in_order in zip(
            flat._params, flat._shapes, flat._shard_param_infos, contiguous, strict=True
        ):
            if not getattr(param, "_fsdp_flattened", False):
                continue
            if not in_order:
                raise ShardingError(
                    f"parameter {names.get(param)} was not contiguous when FSDP flattened it, so its slices are not "
                    "row-major runs: call .contiguous() on it before wrapping the model"
                )
            start = shard.intra_param_start_idx or 0
            parts = handle.process_group.size() if handle.uses_sharded_strategy else 1
            found[param] = FlatSlice(names.get(param, ""), tuple(shape), start, parts)
    return found
