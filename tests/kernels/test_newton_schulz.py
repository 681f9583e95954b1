"""Are matrices orthogonalised, in every form, precision and shape, whatever torch's settings say?"""

from __future__ import annotations

import pytest
import torch

from pylo_integrations.rules import newton_schulz
from pylo_integrations.rules.newton_schulz import COEFFICIENTS, ITERATIONS, computed_in, orthogonalise

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 8), (8, 5), (64, 64), (150, 130), (130, 420), (420, 130), (300, 500)]

# Of the norm of the result, for spectra down to 1e-4. bfloat16 has 8 bits, and the smallest values grow 500 times.
BOUNDS = {"float32": 1e-4, "bfloat16": 0.4}


def matrix(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A matrix in float64 with singular values from 1 to 1e-4."""
    generator = torch.Generator().manual_seed(seed)
    left, _, right = torch.linalg.svd(
        torch.randn(rows, cols, generator=generator, dtype=torch.float64), full_matrices=False
    )
    return left * torch.logspace(0, -4, min(rows, cols), dtype=torch.float64) @ right


def by_singular_values(x: torch.Tensor) -> torch.Tensor:
    """What the iteration makes of a matrix, from its singular values: an oracle without the iteration's products."""
    a, b, c = COEFFICIENTS
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    values = values / (x.norm() + 1e-8)
    for _ in range(ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    return left * values.unsqueeze(-2) @ right


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_go_where_the_polynomial_takes_them(shape, precision):
    x = matrix(*shape)
    want = by_singular_values(x)
    assert error(orthogonalise(x), want) < 1e-8, "in float64"
    got = orthogonalise(x.float(), precision)
    assert got.shape == x.shape and got.dtype == getattr(torch, precision)
    assert error(got, want) < BOUNDS[precision]


@pytest.mark.parametrize("shape", [(130, 420), (420, 130), (300, 500), (6, 9)], ids=str)
def test_a_batch_is_its_matrices_one_by_one(shape):
    batch = torch.stack([matrix(*shape, seed).float() for seed in range(4)]).view(2, 2, *shape)
    got = orthogonalise(batch)
    for i in range(4):
        assert error(got[i // 2, i % 2], orthogonalise(batch[i // 2, i % 2].double())) < BOUNDS["float32"]


def test_zero_matrices_stay_zero_and_scale_does_not_count():
    x = torch.stack([torch.zeros(4, 6), matrix(4, 6).float(), 1e6 * matrix(4, 6).float()])
    got = orthogonalise(x)
    assert not got[0].any()
    assert torch.allclose(got[1], got[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_settings_of_torch_change_nothing_and_are_not_changed(setting):
    x = matrix(300, 500).float()
    want = orthogonalise(x)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        allowed = torch.backends.cuda.matmul.allow_tf32
        assert torch.equal(orthogonalise(x), want)
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
    finally:
        torch.set_float32_matmul_precision(before)


def test_products_run_in_ieee_float32_while_tf32_is_allowed(monkeypatch):
    """What a CUDA device would read, seen from within: there is none here to multiply with."""
    seen = []
    original = newton_schulz._standard_form

    def look(x):
        seen.append(torch.backends.cuda.matmul.fp32_precision if newer else torch.backends.cuda.matmul.allow_tf32)
        return original(x)

    newer = hasattr(torch._C, "_get_fp32_precision_getter")
    monkeypatch.setattr(newton_schulz, "_standard_form", look)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        orthogonalise(torch.randn(4, 5))
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["ieee" if newer else False]


def test_auto_is_bfloat16_where_that_is_fast_and_matrices_are_large(monkeypatch):
    large, small = torch.empty(300, 200), torch.empty(300, 20)
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(newton_schulz, "_multiplies_bfloat16", lambda device, fast=fast: fast)
        assert computed_in(large, "auto") == expected
        assert computed_in(small, "auto") == torch.float32
        assert computed_in(large.double(), "auto") == torch.float64
        assert computed_in(large, "float32") == torch.float32


@pytest.mark.parametrize("precision", BOUNDS)
def test_the_same_matrix_gives_the_same_bits(precision):
    x = torch.stack([matrix(300, 500).float(), matrix(300, 500, 1).float()])
    assert torch.equal(orthogonalise(x, precision), orthogonalise(x.clone(), precision))
