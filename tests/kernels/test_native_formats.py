"""Do the kernels read and write stored state as the reference does, whatever its format?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from plans import is_native, native_parts
from thetas import create
from torch import nn

from pylo_integrations.ops import tables
from pylo_integrations.ops.loader import ISAS, NativeError
from pylo_integrations.sharding.layout import Box, run_start

SHAPES = [(96, 80), (64, 8, 3, 3), (5, 1024), (300, 100), (4096, 2), (7,), (20, 20)]
"""Rows within blocks, of one and a piece, and of several; what stays float32."""

RULES = ["pace", "celo2", "small_fc_lopt", "velo"]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    made = [torch.randn(shape, generator=generator) * 10.0 ** (i % 3 - 1) for i, shape in enumerate(SHAPES)]
    made[2][0] *= 10.0 ** torch.randint(-30, 1, (1024,), generator=generator)  # far below their block's largest
    made[2][1] = 0
    return made


def run(name: str, kind: str, backend: str, steps: int, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(99)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    groups = [
        {"params": params[:3]},
        {"params": params[3:], **({"rule": "adamw"} if name in ("pace", "celo2") else {})},
    ]
    optimizer = create(groups, name, num_steps=100, backend=backend, state_dtype=kind, **options)
    for step in range(steps):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad.to(dtype)
        optimizer.step(loss=1.0)
    return params, optimizer


def states(params, optimizer) -> dict[str, torch.Tensor]:
    return {f"{i}/{name}": value for i, param in enumerate(params) for name, value in optimizer.state[param].items()}


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch) -> str:
    """Every instruction set in the place of this machine's best one."""
    if request.param not in library_or_skip().isas():
        pytest.skip(f"this machine has no {request.param}")
    table = tables.Table
    monkeypatch.setattr(tables, "Table", lambda *args: table(*args[:-1], request.param))
    return request.param


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", RULES)
def test_the_first_step_stores_the_same_bits(name, kind, isa):
    """From zero, a new average is one product, which has no other order; so rounding must be the same."""
    native, reference = (states(*run(name, kind, backend, 1)) for backend in ("native", "reference"))
    assert native.keys() == reference.keys()
    stored = [key for key in native if native[key].dtype != torch.float32 or key.endswith("_scale")]
    assert len(stored) >= 3
    for key in stored:
        assert torch.equal(native[key], reference[key]), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["", "bfloat16"])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", RULES)
def test_steps_agree(name, kind, dtype):
    """But for elements that lie so near to the noise that another rounding of the sum takes the other neighbour."""
    library_or_skip()
    options = {"weight_decay": 0.1, "weight_decay_policy": "l2"} if dtype is torch.float32 else {}
    (native, one), (reference, other) = (run(name, kind, b, 4, dtype, **options) for b in ("native", "reference"))
    assert is_native(one) and not is_native(other)
    for mine, theirs in zip(native, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-3 if dtype is torch.float32 else 2e-2, atol=2e-3)
    mine, theirs = states(native, one), states(reference, other)
    for key in mine:
        if mine[key].dtype != torch.float32:
            assert (mine[key] != theirs[key]).float().mean() < 0.01, key


def test_boxes_are_runs_where_all_later_axes_are_whole():
    assert run_start(Box((2, 0, 0), (3, 4, 5)), (7, 4, 5)) == 40
    assert run_start(Box((2, 1, 0), (1, 2, 5)), (7, 4, 5)) == 45
    assert run_start(Box((2, 1, 3), (1, 1, 2)), (7, 4, 5)) == 48
    assert run_start(Box((0, 0, 0), (7, 2, 5)), (7, 4, 5)) is None
    assert run_start(Box((0, 1, 2), (1, 2, 3)), (7, 4, 5)) is None


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_parameter_that_is_no_run_in_memory_goes_to_the_reference(kind):
    library_or_skip()
    param = nn.Parameter(torch.randn(64, 16, 4, 4).to(memory_format=torch.channels_last))
    param.grad = torch.randn(64, 16, 4, 4)
    plain = nn.Parameter(param.detach().clone(memory_format=torch.contiguous_format))
    plain.grad = param.grad.clone()
    optimizers = [create([p], "pace", num_steps=10, state_dtype=kind) for p in (param, plain)]
    for optimizer in optimizers:
        optimizer.step()
    assert not is_native(optimizers[0]) and is_native(optimizers[1])
    torch.testing.assert_close(param, plain, rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match=r"backend='native' cannot .* run of elements"):
        other = create([param], "pace", num_steps=10, state_dtype=kind, backend="native")
        other.step()


def damage_row(stored):
    stored["row"][0] = 7


def damage_first(stored):
    stored["first"][0] = -1


def damage_scale(stored):
    stored["scale"][0, 0] = 0


def damage_room(stored):
    stored["scale_bytes"][0, 0] -= 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damage_row, "first and row are not those of a run of rows"),
        (damage_first, "first and row are not those of a run of rows"),
        (damage_scale, "scale 0 is null or misaligned"),
        (damage_room, "scale 0 has [0-9]+ bytes, must have"),
    ],
)
def test_a_description_of_codes_that_does_not_fit_is_refused(spoil, message):
    library_or_skip()
    param = nn.Parameter(torch.randn(64, 96))
    param.grad = torch.randn(64, 96)
    optimizer = create([param], "pace", num_steps=10, state_dtype="int8", backend="native")
    optimizer.step()
    (stages,) = native_parts(optimizer)
    before = [value.clone() for value in (param.detach(), *optimizer.state[param].values())]
    spoil(stages._tables[0].table.stored)
    with pytest.raises(NativeError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, (param.detach(), *optimizer.state[param].values())))
