"""Are whole tensors finished and written by the kernels as torch's functions would, in any type, layout and number?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from plans import native_parts
from thetas import create
from torch import nn

from pylo_integrations.ops import whole

pytestmark = pytest.mark.usefixtures("library")

ENTRIES = ["celo2", "celo2_base", "elo_celo2"]


@pytest.fixture(scope="module")
def library():
    return library_or_skip()


def tensors(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Equal and different shapes and formats, one without a fixed order of memory among them."""
    generator = torch.Generator().manual_seed(0)
    made = [(12, 20), (12, 20), (20, 12), (33, 1), (6, 5, 3, 3), (6, 5, 3, 3), (4, 3, 2, 2, 2), (9,), (1,), ()]
    plain = [torch.randn(shape, generator=generator).to(dtype) for shape in made]
    return [*plain, plain[0].clone().t(), plain[4].clone().to(memory_format=torch.channels_last), plain[1].clone().t()]


def trained(name: str, backend: str, dtype: torch.dtype = torch.float32, **options) -> list[torch.Tensor]:
    params = [nn.Parameter(tensor) for tensor in tensors(dtype)]
    optimizer = create(params, name, backend=backend, weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for p in params:
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ENTRIES)
def test_parameters_are_those_of_torchs_functions(name, dtype):
    for got, want, start in zip(
        trained(name, "native", dtype), trained(name, "reference", dtype), tensors(dtype), strict=True
    ):
        moved = (want - start).abs().max().float()
        rounding = want.abs().max().float() * torch.finfo(dtype).eps
        assert got.stride() == start.stride()
        assert (got - want).abs().max().float() <= 1e-3 * moved + rounding, tuple(start.shape)


@pytest.mark.parametrize("name", ENTRIES)
def test_how_many_are_stepped_together_changes_nothing_that_counts(name, monkeypatch):
    together = trained(name, "native")
    monkeypatch.setitem(whole.TOGETHER, "cpu", 1)
    for one_by_one, got, start in zip(trained(name, "native"), together, tensors(), strict=True):
        rounding = start.abs().max() * torch.finfo(torch.float32).eps
        assert (one_by_one - got).abs().max() <= 2e-5 * (got - start).abs().max() + rounding


@pytest.mark.parametrize("name", ENTRIES)
def test_the_number_of_threads_changes_no_bit_of_the_kernels_part(name, monkeypatch):
    """Torch's products may differ by threads; here each runs on one."""
    original = whole.WholeSteps.apply
    runs = []
    for threads in (1, 3):
        before = torch.get_num_threads()

        def with_threads(self, *args, threads=threads):
            table = self._first.table
            run = table.run_some

            def some(stage, rows):
                torch.set_num_threads(threads)
                run(stage, rows)
                torch.set_num_threads(1)

            monkeypatch.setattr(table, "run_some", some)
            original(self, *args)

        monkeypatch.setattr(whole.WholeSteps, "apply", with_threads)
        torch.set_num_threads(1)
        runs.append(trained(name, "native"))
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_bfloat16_products_end_within_their_rounding_of_float32():
    exact, rounded = (trained("celo2", "native", orthogonalise=how) for how in ("float32", "bfloat16"))
    for got, want, start in zip(rounded, exact, tensors(), strict=True):
        assert (got - want).norm() <= 0.2 * (want - start).norm()
    assert any(not torch.equal(got, want) for got, want in zip(rounded, exact, strict=True))


def test_a_step_that_is_interrupted_between_its_halves_can_be_followed_by_another(monkeypatch):
    params = [nn.Parameter(tensor) for tensor in tensors()]
    optimizer = create(params, "celo2", backend="native")
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    rule = type(optimizer.rule)
    original = rule.directions

    def interrupted(*args):
        raise KeyboardInterrupt

    (stages,) = native_parts(optimizer)
    specs = [native.spec for native in stages._natives if native.spec.directions is not None]
    for spec in specs:
        object.__setattr__(spec, "directions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    for spec in specs:
        object.__setattr__(spec, "directions", lambda steps, layout, ctx: original(optimizer.rule, steps, layout, ctx))
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(params, before, strict=True))
