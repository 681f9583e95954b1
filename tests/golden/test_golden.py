"""Does every optimizer repeat the trajectories of the original JAX code?

Tolerance of an update: 2e-4 of its largest element plus 3e-7 of the largest parameter. The reference's own float32
noise, against its float64 run, is 1.2e-5 (1.4e-4 with decays out of range), and a parameter rounds its update to 2 ulp.
In float64 there is no such excuse: 1e-9.
"""

from __future__ import annotations

import pytest
import torch
from golden_files import (
    NAMES,
    STEPS,
    TRAJECTORIES,
    Golden,
    expected_state,
    feed,
    initial_params,
    largest,
    replay_float32,
    replay_float64,
    slow_in_chunks,
    to_torch,
)
from golden_optimizers import small_fc
from plans import native_parts
from torch import Tensor

from pylo_integrations.rules.small_fc import SmallFCRule

SMALL_FC = ("small_fc_h4_default", "small_fc_h32_pylo", "small_fc_h32_outofrange_decays")


@pytest.mark.parametrize("case", SMALL_FC)
@slow_in_chunks(16_000)
def test_float32_updates_match(case, trajectory, auto_backend, chunk_bytes):
    golden = Golden(case)
    params = initial_params(trajectory, torch.float32)
    optimizer = small_fc(golden, list(params.values()), chunk_bytes=chunk_bytes)
    replay_float32(golden, trajectory, params, optimizer)
    assert optimizer.iteration == STEPS


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("case", SMALL_FC)
def test_float64_parameters_match(case, trajectory):
    golden = Golden(case)
    params = initial_params(trajectory, torch.float64)
    replay_float64(golden, trajectory, params, small_fc(golden, list(params.values())))


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("case", SMALL_FC[1:])
def test_accumulators_match(case, trajectory):
    golden = Golden(case)
    params = initial_params(trajectory, torch.float32)
    optimizer = small_fc(golden, list(params.values()))
    compared = 0
    for step in range(STEPS):
        feed(params, trajectory, step)
        optimizer.step()
        if step + 1 not in (1, STEPS):
            continue
        prefix = f"f32/{trajectory}/step{step + 1:02}/state"
        assert golden[f"{prefix}/iteration"].item() == optimizer.iteration
        for name, param in params.items():
            for key, want in expected_state(golden, prefix, name, param.shape).items():
                got = optimizer.state[param][key]
                # One ulp of a decay of 0.999 is 6e-5 of its complement, hence the bound.
                assert got.shape == want.shape
                assert largest(got - want) <= 1e-4 * largest(want), (name, key, step)
                compared += 1
    assert compared >= 6 * len(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SMALL_FC[1:])
def test_normalised_features_match(case, dtype, monkeypatch):
    golden, trajectory = Golden(case), "wild"
    params = initial_params(trajectory, dtype)
    by_id = {id(param): name for name, param in params.items()}
    seen: dict[str, Tensor] = {}
    original = SmallFCRule.normalised_features

    def record(rule, block, *args):
        features = original(rule, block, *args)
        for i, param in enumerate(block.bucket.params[block.tensors]):
            seen[by_id[id(param)]] = features[i].clone()
        return features

    monkeypatch.setattr(SmallFCRule, "normalised_features", record)
    optimizer = small_fc(golden, list(params.values()), backend="reference")
    precision, tolerance = ("f32", 3e-4) if dtype == torch.float32 else ("f64", 1e-9)
    compared = 0
    for step in range(STEPS):
        feed(params, trajectory, step)
        optimizer.step()
        for name, want in golden.below(f"{precision}/{trajectory}/step{step + 1:02}/features/norm/"):
            want = to_torch(want, trailing=1).movedim(-1, 0)
            got = seen[name].reshape(want.shape)
            scale = want.flatten(1).abs().amax(1).clamp_min(1e-30).view(-1, *[1] * (want.dim() - 1))
            assert largest((got - want) / scale) <= tolerance, (name, step)
            compared += 1
    assert compared == 10


@pytest.mark.parametrize("case", SMALL_FC)
def test_decays_are_those_of_the_reference(case):
    golden = Golden(case)
    decays = small_fc(golden, [torch.nn.Parameter(torch.zeros(1))]).rule.decays
    names = {"momentum": "momentum_decays", "rms": "rms_decays", "factored": "adafactor_decays"}
    for ours, theirs in names.items():
        want = golden[f"f64/decays_resolved_unclipped/{theirs}"]
        torch.testing.assert_close(getattr(decays, ours), want, rtol=1e-12, atol=0)


def test_either_backend_is_what_runs(auto_backend):
    """As tests/conftest.py promises."""
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = small_fc(Golden("small_fc_h32_pylo"), [param])
    optimizer.step()
    assert bool(native_parts(optimizer)) == (auto_backend == "native")
