"""Approximate orthogonalisation of matrices by Newton-Schulz iteration (docs/mathematics.md).

Two forms of the same polynomials. The standard one moves the matrix itself. The *Gram* form moves its small Gram matrix
and in the end multiplies the matrix once with what the iterations amount to (Dao AI Lab, gram-newton-schulz, 2026). On
long matrices that is less work. It loses accuracy, which a *restart* from the multiplied matrix brings back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Precision = Literal["auto", "float32", "bfloat16"]
"""What the products of the iteration are computed in: ``"float32"``, IEEE's, whatever torch's settings allow elsewhere;
``"bfloat16"``, as torch's Muon does; or ``"auto"``: bfloat16 where the device multiplies it several times as fast,
see :func:`computed_in`. Matrices of float64 and float16 are computed in their own type and in float32."""

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic. Its slope at 0 is steep, so small singular values grow fast; they end near 1, not at 1."""

_RESTART = 3
"""Iterations before the restart: until then the smallest singular values have grown enough for what the Gram matrix has
lost of them. Measured on spectra down to 1e-4: the error is that of the standard form."""

_LONG = 2
"""Long side over short from which on the Gram form takes less time."""

_SMALL = 128
"""Short sides below which overheads, not products, take the time: there the standard form in float32 is as fast."""

_BATCHED = 2**17
"""Elements of a matrix from which on a CPU multiplies one by one faster than as a batch."""


def check_precision(precision: str, *others: str) -> None:
    """Raise ValueError unless ``precision`` is a :data:`Precision`, or one of ``others``."""
    if precision not in (known := [*get_args(Precision), *others]):
        raise ValueError(f"orthogonalise={precision!r} is unknown; choose one of {known}")


def orthogonalise(matrices: Tensor, precision: Precision = "float32") -> Tensor:
    """Bring the singular values of matrices near 1, whatever their scale; zero matrices stay zero.

    Args:
        matrices: ``(..., rows, cols)``; leading axes are a batch.
        precision: Of the products.

    Returns:
        ``u @ v.mT`` of the singular value decomposition, roughly, where it was ``u @ s @ v.mT``; in the shape of
        ``matrices``, and in the type that it was computed in.
    """
    dtype = computed_in(matrices, precision)
    x = matrices.reshape(-1, *matrices.shape[-2:])
    scale = torch.linalg.matrix_norm(x, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)) + 1e-8
    x = (x / scale).to(dtype)
    short, long = sorted(matrices.shape[-2:])
    iterate = _gram_form if short >= _SMALL and long >= _LONG * short else _standard_form
    with _ieee_float32():
        x = torch.stack(list(map(iterate, x))) if short * long >= _BATCHED and x.device.type == "cpu" else iterate(x)
    return x.view(matrices.shape)


def inverse_rms(directions: Tensor, axes: Sequence[int], eps: float) -> Tensor:
    """What brings the root mean square over ``axes``, which keep extent 1, to 1; at least in float32."""
    wide = torch.promote_types(directions.dtype, torch.float32)
    count = math.prod(directions.shape[axis] for axis in axes)
    mean_square = torch.linalg.vector_norm(directions, dim=axes, keepdim=True, dtype=wide).square() / count
    inverse: Tensor = (mean_square + eps).rsqrt()
    return inverse


def computed_in(matrices: Tensor, precision: Precision) -> torch.dtype:
    """The type of the products of :func:`orthogonalise`; it depends on nothing but shape, type and device."""
    if matrices.dtype == torch.float64:
        return torch.float64
    if precision == "auto":
        is_large = min(matrices.shape[-2:]) >= _SMALL
        return torch.bfloat16 if is_large and _multiplies_bfloat16(matrices.device) else torch.float32
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


@functools.cache
def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions that multiply bfloat16 at a multiple of the speed of float32."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in asked)


def _standard_form(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = _gram(x)
        even = _sum_of_product(gram, gram, gram, b, c)  # the step is a + even, times the matrix
        x = _sum_of_product(x, even, x, a) if _is_wide(x) else _sum_of_product(x, x, even, a)
    return x


def _gram_form(x: Tensor) -> Tensor:
    a, b, c = COEFFICIENTS
    for iterations in (_RESTART, ITERATIONS - _RESTART):
        gram = _gram(x)
        product = torch.zeros_like(gram)
        product.diagonal(dim1=-2, dim2=-1).fill_(1)
        for left in reversed(range(iterations)):
            even = _sum_of_product(gram, gram, gram, b, c)
            product = _sum_of_product(product, even, product, a)
            if left:  # everything here is a polynomial of one symmetric matrix, and commutes
                half = _sum_of_product(gram, even, gram, a)
                gram = _sum_of_product(half, half, even, a)
        x = product @ x if _is_wide(x) else x @ product
    return x


def _is_wide(x: Tensor) -> bool:
    return x.shape[-2] <= x.shape[-1]


def _gram(x: Tensor) -> Tensor:
    """Inner products along the long side, so that there are few."""
    return x @ x.mT if _is_wide(x) else x.mT @ x


def _sum_of_product(added: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
    """``beta * added + alpha * left @ right``, of matrices or batches of them."""
    function = torch.addmm if added.dim() == 2 else torch.baddbmm
    return function(added, left, right, beta=beta, alpha=alpha)


@contextmanager
def _ieee_float32() -> Iterator[None]:
    """Have products of float32 be exact to rounding: TF32, which scripts may allow, errs by 300 times the bound."""
    read: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
    if read is None:  # before torch 2.9, which cannot mix this with its successor
        matmul = torch.backends.cuda.matmul
        allowed, matmul.allow_tf32 = matmul.allow_tf32, False
        try:
            yield
        finally:
            matmul.allow_tf32 = allowed
        return
    write: Any = torch._C._set_fp32_precision_setter
    before = {backend: read(backend, "matmul") for backend in ("cuda", "mkldnn")}
    loose = {backend: setting for backend, setting in before.items() if setting not in ("ieee", "none")}
    for backend in loose:
        write(backend, "matmul", "ieee")
    try:
        yield
    finally:
        for backend, setting in loose.items():
            write(backend, "matmul", setting)
