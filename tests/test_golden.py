"""Does every optimizer repeat the trajectories of the original JAX code?

Tolerance of an update: 2e-4 of its largest element plus 3e-7 of the largest parameter. The reference's own float32
noise, against its float64 run, is 1.2e-5 (1.4e-4 with decays out of range), and a parameter rounds its update to 2 ulp.
In float64 there is no such excuse: 1e-9.
"""

from __future__ import annotations

import pytest
import torch
from golden_files import INPUTS, NAMES, STEPS, TRAJECTORIES, Golden, to_torch
from torch import Tensor

from pylo_integrations import SmallFCLOpt, Theta
from pylo_integrations.rules.small_fc import SmallFC

SMALL_FC = ("small_fc_h4_default", "small_fc_h32_pylo", "small_fc_h32_outofrange_decays")


def small_fc(golden: Golden, params, **options) -> SmallFCLOpt:
    hyper = {key: golden.hyper[key] for key in ("exp_mult", "step_mult")}
    return SmallFCLOpt(params, weights=Theta.from_arrays("small_fc_lopt", golden.theta, hyper), **options)


def initial_params(trajectory: str, dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    return {n: torch.nn.Parameter(to_torch(INPUTS[f"{trajectory}/params0/{n}"]).to(dtype)) for n in NAMES}


def feed(params: dict[str, Tensor], trajectory: str, step: int) -> None:
    for name, param in params.items():
        param.grad = to_torch(INPUTS[f"{trajectory}/grads/{name}"][step]).to(param.dtype)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def assert_update(name: str, step: int, before: Tensor, after: Tensor, ref_before: Tensor, ref: Tensor) -> None:
    got, want = after - before, ref - ref_before
    bound = 2e-4 * largest(want) + 3e-7 * largest(ref)
    assert largest(got - want) <= bound, f"{name} step {step}: off by {largest(got - want)}, allowed {bound}"


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("case", SMALL_FC)
@pytest.mark.parametrize("chunk_bytes", [2**28, 4000], ids=["whole", "chunked"])
def test_float32_updates_match(case, trajectory, chunk_bytes):
    golden = Golden(case)
    params = initial_params(trajectory, torch.float32)
    optimizer = small_fc(golden, list(params.values()), chunk_bytes=chunk_bytes)
    reference = {name: param.detach().clone() for name, param in params.items()}
    for step in range(STEPS):
        before = {name: param.detach().clone() for name, param in params.items()}
        feed(params, trajectory, step)
        optimizer.step()
        for name, param in params.items():
            ref = to_torch(golden[f"f32/{trajectory}/params/{name}"][step])
            assert_update(name, step, before[name], param.detach(), reference[name], ref)
            reference[name] = ref
    assert optimizer.iteration == STEPS


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("case", SMALL_FC)
def test_float64_parameters_match(case, trajectory):
    golden = Golden(case)
    params = initial_params(trajectory, torch.float64)
    start = {name: param.detach().clone() for name, param in params.items()}
    optimizer = small_fc(golden, list(params.values()))
    for step in range(STEPS):
        feed(params, trajectory, step)
        optimizer.step()
        if step + 1 in (1, STEPS):
            for name, param in params.items():
                ref = to_torch(golden[f"f64/{trajectory}/params/{name}"][int(step > 0)])
                bound = 1e-9 * max(largest(ref - start[name]), largest(ref) * 1e-6)
                assert largest(param.detach() - ref) <= bound, (name, step)


def expected_state(golden: Golden, prefix: str, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """The reference's accumulators of one tensor under our names and axes."""
    state = {}
    if f"{prefix}/m/{name}" in golden:
        for i, momentum in enumerate(golden[f"{prefix}/m/{name}"].unbind(-1)):
            state[f"momentum_{i}"] = to_torch(momentum)
        state["rms"] = to_torch(golden[f"{prefix}/rms/{name}"][..., 0])
    if len(shape) < 2:
        for i, second in enumerate(golden[f"{prefix}/v_diag/{name}"].unbind(-1)):
            state[f"diagonal_{i}"] = second.reshape(shape)
        return state
    jax_shape = to_jax_shape(shape)
    ranked = sorted(range(len(jax_shape)), key=lambda axis: jax_shape[axis])
    for key, axis in (("row", ranked[-1]), ("col", ranked[-2])):
        statistic = golden[f"{prefix}/v_{key}/{name}"].movedim(-1, 0).unsqueeze(axis + 1)
        state[key] = to_torch(statistic, leading=1)
    return state


def to_jax_shape(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape) if len(shape) < 2 else (*shape[2:], shape[1], shape[0])


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
    original = SmallFC.normalised_features

    def record(rule, block, *args):
        features = original(rule, block, *args)
        for i, param in enumerate(block.bucket.params[block.tensors]):
            seen[by_id[id(param)]] = features[i].clone()
        return features

    monkeypatch.setattr(SmallFC, "normalised_features", record)
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
        torch.testing.assert_close(torch.tensor(getattr(decays, ours), dtype=torch.float64), want, rtol=1e-12, atol=0)
