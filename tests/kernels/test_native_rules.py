"""Do the native kernels step every entry of the catalogue, as the reference does?

The oracle is the reference backend in float64 on the same float32 numbers, as in test_native_kernels.py, which
looks into the kernels themselves.
"""

from __future__ import annotations

import functools

import pytest
import torch
from native_library import library_or_skip
from plans import is_native
from test_native_kernels import SHAPES, assert_equal_bits, float64_twins, give_gradients, parameters, snapshot
from thetas import create
from torch import nn

from pylo_integrations import list_optimizers
from pylo_integrations.ops import select
from pylo_integrations.rules.moments import MomentRule

pytestmark = pytest.mark.usefixtures("library")

# Slices over which CELO2 normalises: few and many, with kernels smaller and larger than the channels, ties.
CONVOLUTIONS = [
    (33, 20, 3, 3),
    (20, 33, 3, 3),
    (70, 3, 5, 4),
    (7, 5, 2),
    (3, 2, 9),
    (3, 3, 8, 8),
    (2, 17, 1, 9),
    (4, 4, 4, 4),
]
MATRICES = [shape for shape in SHAPES if len(shape) > 1]


@pytest.fixture(scope="module")
def library():
    return library_or_skip()


def train(optimizer, params, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step(loss=1.0 / (1 + step))


def one_step(name: str, shapes, **options):
    """Updates of a step from the state of three reference steps: by the kernels, and by the reference in float64."""
    params = parameters(shapes)
    warm = create(params, name, backend="reference", **options)
    train(warm, params, 3)
    twins = float64_twins(params)
    oracle = create(twins, name, backend="reference", **options)
    if isinstance(oracle.rule, MomentRule):
        weights = oracle.rule.decays.weights(torch.device("cpu"), torch.float32).values()
        decays = (tuple((1 - weight.double()).tolist()) for weight in weights)
        object.__setattr__(oracle.rule, "decays", type(oracle.rule.decays)(*decays))
    oracle.init_state()
    for p, twin in zip(params, twins, strict=True):
        for key, value in warm.state[p].items():
            oracle.state[twin][key].copy_(value)
    fast = create(params, name, backend="native", **options)
    fast.load_state_dict(warm.state_dict())
    oracle._progress.iteration = 3
    oracle._progress.memory.update({key: value.double() for key, value in fast._progress.memory.items()})
    before = [p.detach().double() for p in params]
    train(fast, params, 1, first=3)
    give_gradients(params, 3)  # as float32
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.double()
    oracle.step(loss=0.25)
    assert is_native(fast)
    for p, twin, old in zip(params, twins, before, strict=True):
        yield p, p.detach().double() - old, twin.detach() - old, old, fast.state[p], oracle.state[twin]


# What float32 makes of the LSTM's decisions is not the kernels'. Orthogonalisation multiplies rounding errors by up to
# 485, and the reference's by as much: see tests/golden/test_golden_celo2.py.
BOUNDS = {"velo": 1e-5, "celo": 1e-5, "celo_adam": 1e-5, "celo2": 3e-4, "elo_celo2": 3e-4, "pace": 3e-4}


@pytest.mark.parametrize("name", list_optimizers())
def test_an_update_is_that_of_float64(name):
    bound = BOUNDS.get(name, 1e-6)
    for p, update, want, old, state, reference in one_step(name, SHAPES + CONVOLUTIONS):
        allowed = bound * want.abs().max() + 2**-24 * old.abs().max()
        assert (update - want).abs().max() <= allowed, tuple(p.shape)
        for key, value in state.items():
            if not key.startswith("lstm"):
                error = (value.double() - reference[key]).abs().max()
                # Of elo_celo2 also the rounding of the factor that clips, squared.
                assert error <= 1e-6 * reference[key].abs().max(), (tuple(p.shape), key)


OPTIONS = [
    {"weight_decay": 0.1, "lr": 0.5},
    {"weight_decay": 0.1, "weight_decay_policy": "l2"},
    {"maximize": True},
    {"max_grad_norm": 0.1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("name", ["celo_adam", "celo2_base", "elo_celo2"])
def test_options_of_a_group_mean_the_same(name, options):
    shapes = [(5,), (12, 9), (6, 8, 3, 3)]
    runs = []
    for backend in ("native", "reference"):
        params = parameters(shapes)
        optimizer = create([{"params": params, **options}], name, backend=backend)
        if "max_grad_norm" in options:
            optimizer.max_grad_norm = options["max_grad_norm"]
        train(optimizer, params, 3)
        runs.append(params)
    tolerance = 1e-3 if name == "elo_celo2" else 2e-5  # as above
    for p, twin, start in zip(*runs, parameters(shapes), strict=True):
        moved = (twin - start).abs().max()
        assert moved > 0
        assert (p - twin).abs().max() <= tolerance * moved + 2**-23 * twin.abs().max(), tuple(p.shape)


@pytest.mark.parametrize("name", ["celo2_base", "celo_adam", "velo"])
def test_results_have_the_same_bits_for_any_thread_count_and_vector_width(name, library, monkeypatch):
    outcomes = {}
    threads_before = torch.get_num_threads()
    original = select.NativeStages
    try:
        for isa in [None, *library.isas()]:
            monkeypatch.setattr(select, "NativeStages", functools.partial(original, isa=isa))
            for threads in (1, 3):
                # Finishing and the LSTM are torch's.
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                torch.set_num_threads(1)
                params = parameters(MATRICES + CONVOLUTIONS + [(70000,), (300, 70, 3, 3), (3, 900)])
                optimizer = create(params, name, backend="native")
                train(optimizer, params, 2)
                outcomes[isa, threads] = snapshot(optimizer, params)
    finally:
        torch.set_num_threads(threads_before)
    fused = [isa for isa in (None, "avx2", "avx512") if (isa, 1) in outcomes and library.isa != "baseline"]
    for (isa, threads), outcome in outcomes.items():
        assert_equal_bits(outcome, outcomes[isa, 1])
        if isa in fused:
            assert_equal_bits(outcome, outcomes[fused[0], threads])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["celo_adam", "celo2_base", "elo_celo2"])
def test_half_precision_parameters_are_rounded_once_as_torch_rounds(name, dtype):
    shapes = [(5,), (130,), (12, 9)]
    halves = parameters(shapes, dtype)
    floats = [nn.Parameter(p.detach().float()) for p in halves]
    give_gradients(halves, 0)
    for p, twin in zip(halves, floats, strict=True):
        twin.grad = p.grad.float()
    for params in (halves, floats):
        create(params, name, backend="native").step(loss=1.0)
    for p, twin in zip(halves, floats, strict=True):
        assert torch.equal(p, twin.to(dtype)), tuple(p.shape)


@pytest.mark.parametrize("name", list_optimizers())
def test_auto_is_native_for_every_entry(name):
    model = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Conv2d(3, 4, 3))
    optimizer = create(model, name)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step(loss=1.0)
    assert is_native(optimizer)


@pytest.mark.parametrize("order", [("native", "reference"), ("reference", "native")])
@pytest.mark.parametrize("name", ["celo_adam", "celo2_base", "elo_celo2"])
def test_a_run_may_change_its_backend(name, order):
    shapes = [(7,), (9, 5), (6, 8, 3, 3)]
    params, twins = parameters(shapes), parameters(shapes)
    first = create(params, name, backend=order[0])
    whole = create(twins, name, backend="reference")
    train(whole, twins, 4)
    train(first, params, 2)
    second = create(params, name, backend=order[1])
    second.load_state_dict(first.state_dict())
    train(second, params, 2, first=2)
    tolerance = 1e-3 if name == "elo_celo2" else 2e-5
    for p, twin, start in zip(params, twins, parameters(shapes), strict=True):
        moved = (twin - start).abs().max()
        assert (p - twin).abs().max() <= tolerance * moved + 2**-23 * twin.abs().max(), tuple(p.shape)
