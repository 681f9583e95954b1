"""Whether parameter, gradient and state fit each other, asked before a step writes anything.

All three are other people's to change: they cast models, reshape and grow parameters, edit state, and keep gradients of
what a parameter was before. What loses nothing is put right, which is a state of another floating type or one that is
only a lazy view of its numbers; for the rest there is an exception that says what was found where.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylo_integrations.formats import Stored, scale_shape
from pylo_integrations.sharding.pieces import Held, ShardingError, is_sharded, local_gradient, local_part

_GRADIENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class StateError(ValueError):
    """A parameter, its gradient or its state do not fit each other; none of them was changed."""


class Stepped(NamedTuple):
    """A parameter that is to be stepped, and what a rule keeps of it.

    Attributes:
        param: As the optimizer has it.
        held: What is here of it.
        state: ``optimizer.state[p]``; may have entries that are not the rule's.
        stored: The rule's entries by name.
    """

    param: Tensor
    held: Held
    state: dict[str, Any]
    stored: Mapping[str, Stored]


def fit_states(stepped: Sequence[Stepped], groups: Sequence[Mapping[str, Any]]) -> None:
    """Check parameters and states, then cast states of another floating type and give lazy ones memory of their own.

    Args:
        stepped: All parameters of a step.
        groups: The parameter groups, for the names of parameters.

    Raises:
        StateError: One is missing, no dense tensor, on another device or of another shape or kind of type, has too
            little memory, or shares it; nothing was changed.
        ShardingError: A state is of another part of its parameter than this rank steps; nothing was changed.
    """
    fitted: list[tuple[dict[str, Any], str, Tensor]] = []
    for one in stepped:
        subject = f"parameter {name_of(one.param, groups)}"
        local = local_part(one.param)
        if fault := _missing_memory(local) or _write_protection(local):
            raise StateError(f"{subject} {fault}")
        for name, stored in one.stored.items():
            if name not in one.state:
                raise StateError(
                    f"the state of {subject} has no {name!r}, only {sorted(map(str, one.state))}: load a checkpoint "
                    "that has it; if state_dtype or the parameter's type was changed, convert what is there by "
                    "optimizer.load_state_dict(optimizer.state_dict()); or delete optimizer.state[param] to start anew"
                )
            value = one.state[name]
            fit = _fitted(value, f"the state {name!r} of {subject}", stored, one)
            if fit is not value:
                fitted.append((one.state, name, fit))
    _check_disjoint(stepped, groups)
    for state, name, value in fitted:
        state[name] = value


def fit_gradient(param: Tensor, held: Held, dtype: torch.dtype, groups: Sequence[Mapping[str, Any]]) -> Tensor:
    """The gradient of what is stepped here of a parameter, a dense tensor of numbers as they are in memory.

    Args:
        param: As the optimizer has it.
        held: What is here of it.
        dtype: Of arithmetic; a gradient of a wider type is cast.
        groups: The parameter groups, for the names of parameters.

    Raises:
        StateError: It has another shape or device than the parameter, or too little memory.
    """
    grad = local_gradient(param)
    _check_gradient(param, grad, groups)
    if is_lazy(grad):
        grad = grad.clone()
    if grad.dtype not in _GRADIENT_DTYPES or grad.dtype.itemsize > dtype.itemsize:
        grad = grad.to(dtype)
    return held.of(grad)


def _check_gradient(param: Tensor, grad: Tensor, groups: Sequence[Mapping[str, Any]]) -> None:
    local = local_part(param)
    if grad.shape != local.shape or grad.device != local.device:
        raise StateError(
            f"the gradient of parameter {name_of(param, groups)} is {_look(grad)}, expected {_look(local)} as the "
            "parameter: the parameter was changed after backward(); call zero_grad() and compute gradients anew"
        )
    if fault := _missing_memory(grad):
        raise StateError(f"the gradient of parameter {name_of(param, groups)} {fault}")


def check_copies(params: Sequence[Tensor], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise StateError unless parameters, which are to be stepped in copies, can be read and written.

    Args:
        params: With their gradients.
        groups: The parameter groups, for the names of parameters.
    """
    for param in params:
        if fault := _missing_memory(param) or _write_protection(param):
            raise StateError(f"parameter {name_of(param, groups)} {fault}")
        if param.grad is not None:
            _check_gradient(param, param.grad, groups)
    spans = [
        (str(param.device), param.data_ptr(), param.data_ptr() + memory_span(param) * param.itemsize, param)
        for param in params
        if has_memory(param) and param.numel()
    ]
    spans.sort(key=lambda span: span[:3])
    for one, other in itertools.pairwise(spans):
        if one[0] == other[0] and other[1] < one[2]:
            raise StateError(
                f"parameter {name_of(other[3], groups)} shares memory with parameter {name_of(one[3], groups)}, and "
                "offload_state=True steps each in a copy: let them be one nn.Parameter, or give each its own memory"
            )


def check_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise TypeError unless all gradients are dense tensors of real floating-point numbers."""
    for group in groups:
        for param in group["params"]:
            grad = param.grad
            if grad is None or (grad.layout == torch.strided and grad.is_floating_point()):
                continue
            kind = "sparse" if grad.layout != torch.strided else f"of type {grad.dtype}"
            kind = "complex" if grad.is_complex() else kind
            raise TypeError(
                f"the gradient of parameter {name_of(param, groups)} is {kind}; learned optimizers need dense real "
                "gradients (for nn.Embedding, pass sparse=False)"
            )


def is_lazy(tensor: Tensor) -> bool:
    """Whether numbers are not those in memory: of ``torch._neg_view()``, ``.imag`` of a conjugate, or a ZeroTensor."""
    return tensor.is_neg() or tensor._is_zerotensor()


def name_of(param: Tensor, groups: Sequence[Mapping[str, Any]]) -> str:
    """What to call a parameter in a message: its name or number, and its group."""
    for index, group in enumerate(groups):
        for position, other in enumerate(group["params"]):
            if other is param:
                names = group.get("param_names")
                return f"{names[position]!r} of group {index}" if names else f"{position} of group {index}"
    return f"of shape {tuple(param.shape)}"


def memory_span(tensor: Tensor) -> int:
    """Number of elements from the first to the last in memory, gaps included."""
    if tensor.is_contiguous() or not tensor.numel():
        return tensor.numel()
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether elements are neighbours in memory, without gaps or overlaps."""
    return memory_span(tensor) == tensor.numel() and not _overlaps_itself(tensor)


def check_memory(memory: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise StateError unless the memory of a run can be read, and has these shapes."""
    for name, value in memory.items():
        fault = missing_memory(value)
        if fault is None and value.shape != shapes.get(name, value.shape):
            fault = f"has shape {tuple(value.shape)}, expected {shapes[name]}"
        if fault:
            raise StateError(f"the memory of the run, {name!r}, {fault}; load a checkpoint")


def is_aligned(tensor: Tensor) -> bool:
    """Whether its address is one at which its type may be read; those in packed files may not be."""
    return not has_memory(tensor) or tensor.data_ptr() % tensor.itemsize == 0


def has_memory(tensor: Tensor) -> bool:
    """Whether it can be asked where it is: not one of a tracer, nor one that wraps others, nor of the meta device."""
    is_plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__  # subclasses that only add methods are
    return is_plain and tensor.device.type != "meta" and tensor.layout == torch.strided


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory; slices of dense tensors do not."""
    reach = 0
    for step, n in sorted((step, n) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if step <= reach:
            return True
        reach += (n - 1) * step
    return False


def _look(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def missing_memory(local: Tensor) -> str | None:
    """Why a plain tensor cannot be read, as the end of a sentence; None if it can."""
    if not has_memory(local) or not local.numel() or local._is_zerotensor():
        return None
    there, needed = local.untyped_storage().nbytes(), (local.storage_offset() + memory_span(local)) * local.itemsize
    return None if there >= needed else f"has {there} of the {needed} bytes of its storage: it was freed or resized"


def _missing_memory(local: Tensor) -> str | None:
    fault = missing_memory(local)
    return fault and f"{fault}; bring it back before the step"


def _write_protection(local: Tensor) -> str | None:
    """Why a plain tensor cannot be written; None if it can."""
    if local._is_zerotensor():
        return "is a ZeroTensor, which has no memory: assign param.data = param.data.clone()"
    if has_memory(local) and _overlaps_itself(local):
        return f"has elements that share memory (strides {local.stride()}): assign param.data = param.data.clone()"
    if local.is_inference() and not torch.is_inference_mode_enabled():
        return "was made under torch.inference_mode() and cannot be changed outside: make it anew, or step inside"
    return None


def _fitted(value: Any, what: str, stored: Stored, one: Stepped) -> Tensor:
    """A state, or what to put in its place."""
    param, shape = one.held.of(local_part(one.param)), stored.shape
    expected = scale_shape(param.shape) if stored.per_block else tuple(param.shape if shape is None else shape)
    wanted = f"expected {stored.dtype} of shape {expected} on {param.device}"
    if not isinstance(value, Tensor):
        raise StateError(f"{what} is {type(value).__name__}, {wanted}: {_REMEDY}")
    local = local_part(value)
    if tuple(local.shape) != expected and (local.numel() or param.numel()):
        if shape is None and (one.held.parts > 1 or is_sharded(value)):
            raise ShardingError(
                f"{what} has {local.numel()} elements, where this rank steps {one.held.numel} of shape {expected}: it "
                "was created, or loaded, when other ranks trained together. Initialise torch.distributed and call "
                "bind_model() before the first step, and carry state from one number of ranks to another in a "
                "checkpoint"
            )
        raise StateError(f"{what} is {_look(local)}, {wanted}: {_REMEDY}")
    is_kind = local.dtype.is_floating_point if stored.dtype.is_floating_point else local.dtype == stored.dtype
    if local.device != param.device or local.layout != torch.strided or not is_kind:
        layout = "" if local.layout == torch.strided else f"{local.layout} "
        raise StateError(f"{what} is {layout}{_look(local)}, {wanted}: {_REMEDY}")
    if fault := _missing_memory(local):
        raise StateError(f"{what} {fault}")
    if is_lazy(local) or _write_protection(local) or not is_dense(local):  # gaps may be somebody else's
        in_format_of_param = shape is None and local is value and not stored.per_block
        value = torch.empty_like(param, dtype=value.dtype).copy_(value) if in_format_of_param else value.clone()
    fitted: Tensor = value.to(stored.dtype)
    if local.dtype.itemsize < stored.dtype.itemsize and not local_part(fitted).isfinite().all():
        raise StateError(
            f"{what} is {local.dtype} with values that are not finite, of numbers too large for it, most likely: "
            f"{_REMEDY}"
        )
    return fitted


_REMEDY = (
    "change state together with its parameter, or delete optimizer.state[param] to start from a fresh state; "
    "load_state_dict() brings state to the parameter's device"
)


class _Span(NamedTuple):
    """A stretch of memory, from byte to byte, of a state or, without a name, of the parameter itself."""

    start: int
    end: int
    name: str | None
    param: Tensor


def _check_disjoint(stepped: Sequence[Stepped], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise StateError if a state shares memory with another one, or with a parameter. Parameters may share theirs."""
    spans: dict[torch.device, list[_Span]] = {}
    for one in {id(one.param): one for one in stepped}.values():  # a parameter may be given twice
        for name in (None, *one.stored):
            local = local_part(one.param if name is None else one.state[name])
            # A state with gaps gets memory of its own; what lies in those of a parameter counts as its.
            if has_memory(local) and (name is None or is_dense(local)) and (start := local.data_ptr()):
                span = _Span(start, start + memory_span(local) * local.itemsize, name, one.param)
                spans.setdefault(local.device, []).append(span)
    for mine in spans.values():
        mine.sort(key=lambda span: span.start)
        for furthest, span in zip(itertools.accumulate(mine, _further), mine[1:], strict=False):
            if span.start < furthest.end and (span.name, furthest.name) != (None, None):
                first, second = (
                    f"{'' if name is None else f'the state {name!r} of '}parameter {name_of(param, groups)}"
                    for *_, name, param in (span, furthest)
                )
                raise StateError(f"{first} shares memory with {second}: give each a tensor of its own, with clone()")


def _further(one: _Span, other: _Span) -> _Span:
    return max(one, other, key=lambda span: span.end)
