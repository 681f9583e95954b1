"""Does stochastic rounding keep the mean, and does its noise depend on step, tensor and element only?"""

from __future__ import annotations

import copy

import pytest
import torch
from native_library import library_or_skip
from thetas import create
from torch import nn

from pylo_integrations.rounding import box_noise, noise_keys, round_stochastically

SHAPES = [(12, 9), (7,), (4, 3, 3, 3), ()]


def noise_of(shape, start, extent, number=3, iteration=5):
    return box_noise(start, extent, shape, [noise_keys(iteration, number)], torch.device("cpu"))[0]


def test_noise_is_uniform_and_of_each_bit():
    noise = noise_of((256, 512), (0, 0), (256, 512)).double()
    count = noise.numel()
    assert abs(noise.mean() / 65535 - 0.5) < 4 / (12 * count) ** 0.5
    for bit in range(16):
        ones = (noise.long() >> bit & 1).double()
        assert abs(ones.mean() - 0.5) < 2.5 / count**0.5, bit
    others = [noise_of((256, 512), (0, 0), (256, 512), **other) for other in ({"number": 4}, {"iteration": 6})]
    for other in [noise.roll(1, 0), noise.roll(1, 1), *others]:
        correlation = torch.corrcoef(torch.stack([noise.flatten(), other.double().flatten()]))[0, 1]
        assert abs(correlation) < 5 / count**0.5


def test_noise_of_a_shard_is_that_of_the_whole():
    whole = noise_of((6, 5, 4), (0, 0, 0), (6, 5, 4))
    assert torch.equal(noise_of((6, 5, 4), (2, 1, 0), (3, 2, 4)), whole[2:5, 1:3])


def test_rounding_is_unbiased_and_leaves_what_bfloat16_holds():
    noise = torch.arange(2**16, dtype=torch.int32)
    for value in (1.001, -3.3e-5, 1e30, -1e-41):  # a subnormal too
        x = torch.tensor(value)
        rounded = round_stochastically(x.expand(2**16).contiguous(), noise)
        assert torch.equal(rounded, rounded.bfloat16().float())
        assert len(rounded.unique()) <= 2
        torch.testing.assert_close(rounded.double().mean(), x.double(), rtol=1e-12, atol=0)
    exact = torch.tensor([0.0, -0.0, 1.5, -256.0, float("inf"), float("-inf"), float("nan")])
    kept = round_stochastically(exact, torch.full((7,), 65535, dtype=torch.int32))
    torch.testing.assert_close(kept, exact, rtol=0, atol=0, equal_nan=True)


def parameters(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step(loss=1.0)


@pytest.mark.parametrize("name", ["small_fc_lopt", "velo", "celo2", "celo_adam"])
def test_backends_draw_the_same_noise(name):
    """Steps of backends differ in the last bits, so a few elements may be rounded to the other neighbour."""
    library_or_skip()
    runs = []
    for backend in ("native", "reference"):
        params = parameters()
        train(create(params, name, backend=backend, stochastic_rounding=True), params, 2)
        runs.append(torch.cat([param.detach().flatten() for param in params]))
    nearest = parameters()
    train(create(nearest, name, backend="native"), nearest, 2)
    differ = (runs[0] != runs[1]).double().mean()
    assert differ < 0.02
    assert (torch.cat([param.detach().flatten() for param in nearest]) != runs[0]).any()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_small_updates_are_not_lost(backend):
    """Without it, updates below half the spacing of bfloat16 leave a parameter where it is."""
    library_or_skip()
    moved = {}
    for stochastic in (False, True):
        param = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        exact = nn.Parameter(torch.ones(64, 64))
        for p, options in ((param, {"stochastic_rounding": stochastic}), (exact, {})):
            optimizer = create([p], "small_fc_lopt", backend=backend, lr=0.05, **options)
            for _ in range(20):
                p.grad = torch.ones_like(p)
                optimizer.step()
        moved[stochastic] = (1 - param.double().mean()) / (1 - exact.double().mean())
    assert moved[False] == 0
    assert 0.8 < moved[True] < 1.2


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_resumed_run_repeats_it(backend):
    library_or_skip()
    params = parameters()
    optimizer = create(params, "small_fc_lopt", backend=backend, stochastic_rounding=True)
    train(optimizer, params, 2)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    resumed = create(twins, "small_fc_lopt", backend=backend, stochastic_rounding=True)
    resumed.load_state_dict(optimizer.state_dict())
    train(optimizer, params, 2, first=2)
    train(resumed, twins, 2, first=2)
    assert all(map(torch.equal, params, twins))


def test_it_does_not_touch_other_types_and_is_kept_by_copies():
    params, twins = parameters(torch.float32), parameters(torch.float32)
    train(create(params, "small_fc_lopt", stochastic_rounding=True), params, 2)
    train(create(twins, "small_fc_lopt"), twins, 2)
    assert all(map(torch.equal, params, twins))
    half = parameters()
    optimizer = create(half, "small_fc_lopt", stochastic_rounding=True)
    twin = copy.deepcopy(optimizer)
    train(optimizer, half, 1)
    train(twin, twin.param_groups[0]["params"], 1)
    assert all(map(torch.equal, half, twin.param_groups[0]["params"]))
