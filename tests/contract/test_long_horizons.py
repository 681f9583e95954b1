"""Do steps stay finite, and right, where float32 cannot tell a half-life, a horizon or a count from its neighbour?"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch
from native_library import library_or_skip
from thetas import create, distinct_rules
from torch import nn

from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.control import LossMemory, loss_decays

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = distinct_rules()
HORIZONS = [1, 10**6, 4 * 10**7, 2**31, 2**40]
ITERATIONS = [0, 1, 2**24 + 1, 2**31, 2**53]


@pytest.fixture(params=[pytest.param("reference", marks=pytest.mark.slow), "native"])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


def steps(name: str, count: int, *, iteration: int = 0, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), ())]
    optimizer = create(params, name, **options)
    optimizer._progress.iteration = iteration
    for k in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(loss=1.0 + 0.5 * math.cos(k))
    assert optimizer.iteration == iteration + count
    kept = [value for p in params for value in optimizer.state[p].values()]
    kept += [value for value in optimizer._progress.memory.values()]
    assert all(value.isfinite().all() for value in kept)
    return [p.detach() for p in params]


@pytest.mark.filterwarnings("ignore:step .* is beyond the horizon")
@pytest.mark.parametrize("name", NAMES)
def test_any_horizon_and_any_iteration_leave_everything_finite(name, backend):
    for num_steps in HORIZONS:
        assert all(p.isfinite().all() for p in steps(name, 4, num_steps=num_steps, backend=backend)), num_steps
    for iteration in ITERATIONS:
        for num_steps in (100, 2**53):
            after = steps(name, 4, iteration=iteration, num_steps=num_steps, backend=backend)
            assert all(p.isfinite().all() for p in after), (iteration, num_steps)


@pytest.mark.parametrize("name", NAMES)
def test_beyond_some_length_the_horizon_makes_no_difference_to_the_first_steps(name, backend):
    long, longer = (steps(name, 5, num_steps=n, backend=backend) for n in (2**38, 2**40))
    for p, q in zip(long, longer, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


@pytest.mark.parametrize("longest", [300_001, 4 * 10**7, 2**40, 2**53])
def test_averages_of_the_loss_are_those_of_exact_arithmetic(longest):
    losses = [Decimal(2 + math.cos(2 * k)) for k in range(12)]
    coefficients = loss_decays(longest, torch.zeros(()))
    memory = LossMemory.recall({}, coefficients)
    with localcontext() as context:
        context.prec = 60
        decays = [Decimal(decay) for decay in coefficients.tolist()]
        half_lives = [float(-1 / decay.ln()) for decay in decays]
        means = [Decimal(0)] * len(decays)
        for seen, loss in enumerate(losses):
            memory = memory.observe(torch.tensor(float(loss), dtype=torch.float64), coefficients, seen)
            if seen:
                loss = min(loss, 2 * max(m / (1 - d ** (seen + 1)) for m, d in zip(means, decays, strict=True)))
            means = [d * m + (1 - d) * loss for m, d in zip(means, decays, strict=True)]
        corrected = [float(m / (1 - d**12)) for m, d in zip(means, decays, strict=True)]
    assert half_lives[-1] == pytest.approx(min(longest, 2**50), rel=0.1 if longest > 2**40 else 2e-4)
    torch.testing.assert_close(memory.means, torch.tensor([float(m) for m in means]).double(), rtol=1e-6, atol=0)
    got = memory.means / -torch.expm1(12 * coefficients.log())
    torch.testing.assert_close(got, torch.tensor(corrected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["velo", "celo", "celo_adam"])
def test_a_horizon_may_cross_the_length_from_which_arithmetic_is_wider(name):
    params = [nn.Parameter(torch.ones(4, 3))]
    optimizer = create(params, name, num_steps=1000)
    for num_steps in (1000, 10**9, 1000):
        optimizer.set_num_steps(num_steps)
        for k in range(3):
            params[0].grad = torch.full((4, 3), 1.0 + k)
            optimizer.step(loss=2.0 - k / 9)
    assert params[0].isfinite().all() and optimizer.iteration == 9


@pytest.mark.parametrize("count", [1, 2**24, 2**53])
def test_corrections_of_adam_are_positive_and_end_at_one(count):
    first, second = AdamWRule((0.9, 0.999)).corrections(count)
    assert 0 < first <= second * 101 and 0 < second <= 1
    assert count < 2**20 or first == second == 1


@pytest.mark.parametrize("bad", [0, -1, 2**53 + 1, 10**400, 1.5, math.nan, "7", True, [3]])
def test_a_horizon_that_is_none_is_refused(bad):
    optimizer = create([nn.Parameter(torch.ones(2))], "celo", num_steps=5)
    with pytest.raises(ValueError, match=r"num_steps=.* must be a positive integer"):
        optimizer.set_num_steps(bad)
    assert optimizer.num_steps == 5


def test_integers_of_other_libraries_are_horizons():
    import numpy as np

    optimizer = create([nn.Parameter(torch.ones(2))], "celo", num_steps=np.int64(7))
    assert optimizer.num_steps == 7 and type(optimizer.num_steps) is int
    optimizer.load_state_dict(optimizer.state_dict())
