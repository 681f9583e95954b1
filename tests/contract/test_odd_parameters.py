"""Are odd parameters, gradients, losses and defaults taken as torch's optimizers do, by both backends alike?"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from native_library import library_or_skip
from thetas import create, distinct_rules
from torch import nn

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = distinct_rules()
BACKENDS = ["reference", "auto"]


def step(optimizer, params, count: int = 3) -> None:
    for k in range(count):
        generator = torch.Generator().manual_seed(k)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step(loss=1.0 + k)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_frozen_parameters_of_any_type_are_left_alone(name):
    frozen = [
        nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        for dtype in (torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn)
    ]
    p, q = nn.Parameter(weights(4, 3)), nn.Parameter(weights(4, 3))
    optimizer, plain = create([frozen[0], p, *frozen[1:]], name), create([q], name)
    step(optimizer, [p]), step(plain, [q])
    assert torch.equal(p, q)
    assert all((f.float() == 1).all() if not f.is_complex() else (f == 1).all() for f in frozen)
    assert len(optimizer.param_groups[0]["params"]) == 6
    twin = create([frozen[0], p, *frozen[1:]], name)
    twin.load_state_dict(optimizer.state_dict())
    step(twin, [p], 1)


@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters_that_train_are_refused(name):
    with pytest.raises(TypeError, match="view_as_real"):
        create([nn.Parameter(torch.ones(2, dtype=torch.complex64))], name)
    thawed = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    p = nn.Parameter(weights(4, 3))
    optimizer = create([thawed, p], name)
    thawed.requires_grad_(True)
    thawed.grad = torch.ones_like(thawed)
    before = p.detach().clone()
    with pytest.raises(TypeError, match="complex"):
        step(optimizer, [p], 1)
    assert torch.equal(p, before) and (thawed == 1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("whole", [True, False], ids=["model", "parameters"])
def test_lazy_modules_train_once_they_are_made(name, whole):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(5), nn.LazyBatchNorm1d())
    optimizer = create(model if whole else model.parameters(), name)
    model[0](torch.ones(2, 3)).sum().backward()
    optimizer.step(loss=1.0)  # nothing of them is there yet
    optimizer.load_state_dict(optimizer.state_dict())
    model(weights(6, 3))
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(weights(6, 3)).square().mean() + model[1].weight.square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    changed = [not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)]
    assert changed[2] and all(p in optimizer.state for p in model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_given_twice_is_stepped_once(name):
    results = []
    for backend in BACKENDS:
        for twice in (False, True):
            p, q = nn.Parameter(weights(4, 3)), nn.Parameter(weights(5))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, that this will be an error one day
                optimizer = create([p, q, p] if twice else [p, q], name, backend=backend, max_grad_norm=0.5)
            step(optimizer, [p, q])
            optimizer.load_state_dict(optimizer.state_dict())
            step(optimizer, [p, q], 1)
            results.append((backend, p.detach(), q.detach()))
    for backend, p, q in results:
        _, p0, q0 = next(result for result in results if result[0] == backend)
        assert torch.equal(p, p0) and torch.equal(q, q0)
        torch.testing.assert_close(p, results[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alias", ["view", "same", "interleaved"])
def test_parameters_that_share_memory_are_stepped_as_the_reference_does(name, alias):
    results = []
    for backend in BACKENDS:
        base = weights(6, 4)
        views = {"view": (base, base[:2]), "same": (base, base), "interleaved": (base[:, ::2], base[:, 1::2])}
        params = [nn.Parameter(view) for view in views[alias]] + [nn.Parameter(weights(3, 3))]
        optimizer = create(params, name, backend=backend)
        step(optimizer, params)
        results.append([p.detach().clone() for p in params])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_kernels_that_are_insisted_on_say_why_not():
    library_or_skip()
    base = weights(6, 4)
    params = [nn.Parameter(base), nn.Parameter(base[:2])]
    optimizer = create(params, "small_fc_lopt", backend="native")
    with pytest.raises(RuntimeError, match="shares memory with another parameter"):
        step(optimizer, params, 1)
    assert torch.equal(base, weights(6, 4))


# -- gradients and losses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_another_type_are_cast(name, backend, dtype):
    def run(cast):
        p = nn.Parameter(weights(4, 3))
        optimizer = create([p], name, backend=backend, max_grad_norm=1.0)
        for k in range(3):
            p.grad = weights(4, 3, seed=k).to(dtype).float()
            if cast:
                p.grad.data = p.grad.data.to(dtype)
            optimizer.step(loss=1.0)
        return p.detach()

    torch.testing.assert_close(run(True), run(False), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_gradient_beyond_float32_is_not_finite(backend):
    p = nn.Parameter(weights(4, 3))
    optimizer = create([p], "celo", backend=backend)
    p.grad = torch.ones(4, 3)
    p.grad.data = torch.full((4, 3), 1e200, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="was skipped"):
        optimizer.step(loss=1.0)
    assert torch.equal(p, weights(4, 3))


@pytest.mark.parametrize("loss", [np.float32(1.5), np.float64(1.5), np.int64(1), 1, True, torch.tensor([1.5]).double()])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_all_kinds_are_losses(name, loss):
    p, q = nn.Parameter(weights(4, 3)), nn.Parameter(weights(4, 3))
    one, other = create([p], name), create([q], name)
    p.grad = q.grad = torch.ones(4, 3)
    one.step(loss=loss), other.step(loss=float(loss))
    one.step(loss), other.step(float(loss))
    one.observe_loss(loss), other.observe_loss(float(loss))
    one.step(), other.step()
    assert torch.equal(p, q) and one.iteration == 3


@pytest.mark.parametrize("loss", [1j, np.complex64(1), torch.tensor(1j), "1", [1.0], torch.ones(2)], ids=repr)
def test_what_is_no_loss_is_refused(loss):
    p = nn.Parameter(weights(4, 3))
    optimizer = create([p], "celo")
    p.grad = torch.ones(4, 3)
    with pytest.raises((TypeError, ValueError), match="loss"):
        optimizer.step(loss=loss)
    with pytest.raises((TypeError, ValueError), match="loss"):
        optimizer.observe_loss(loss)
    assert torch.equal(p, weights(4, 3)) and optimizer.iteration == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_gradients_asks_for_nothing_and_is_no_step(name, backend):
    p = nn.Parameter(weights(4, 3))
    optimizer = create([p], name, backend=backend)
    assert optimizer.step() is None
    assert optimizer.step(lambda: None) is None
    step(optimizer, [p], 2)
    after = p.detach().clone()
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.step(lambda: None)
    optimizer.step(loss=1.0)
    assert torch.equal(p, after) and optimizer.iteration == 2
    step(optimizer, [p], 1)
    assert optimizer.iteration == 3


@pytest.mark.parametrize("name", ["velo", "celo", "celo_adam"])
def test_with_a_gradient_the_loss_is_asked_for(name):
    p = nn.Parameter(weights(4, 3))
    optimizer = create([p], name)
    p.grad = torch.ones(4, 3)
    with pytest.raises(RuntimeError, match="needs the training loss"):
        optimizer.step(lambda: None)


# -- defaults of torch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_defaults_of_torch_are_not_ours(name, backend):
    def run():
        params = [nn.Parameter(weights(4, 3)), nn.Parameter(weights(5))]
        generator = torch.Generator().manual_seed(0)
        grads = [torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32) for p in params]
        return params, grads

    def train(params, grads):
        optimizer = create(params, name, backend=backend)
        optimizer.enable_telemetry(per_parameter=True)
        for k in range(4):
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step(loss=1.0 + k)
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.telemetry()
        kept = [value for p in params for value in optimizer.state[p].values()]
        return [*params, *kept, *optimizer._progress.memory.values()]

    plain = train(*run())
    params, grads = run()
    torch.set_default_device("meta")
    try:
        on_meta = train(params, grads)
    finally:
        torch.set_default_device(None)
    params, grads = run()
    torch.set_default_dtype(torch.float64)
    try:
        in_double = train(params, grads)
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, one, other in zip(plain, on_meta, in_double, strict=True):
        assert mine.dtype == one.dtype == other.dtype and torch.equal(mine, one) and torch.equal(mine, other)


@pytest.mark.parametrize("weights", ["builtin:small_fc_bootstrap", "builtin:mulo", "builtin:celo", "builtin:celo2"])
def test_a_default_device_does_not_reach_the_weights(weights):
    from pylo_integrations.weights.sources import load_theta

    plain = load_theta(weights, "")
    with torch.device("meta"):
        on_meta = load_theta(weights, "")
    assert on_meta == plain and all(array.device.type == "cpu" for array in on_meta.arrays.values())


@pytest.mark.parametrize("name", ["celo2", "celo"])
def test_parameters_that_are_unfrozen_without_a_word_are_warned_of_once(name):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    optimizer = create(model, name, num_steps=100)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(40):
            model[0].requires_grad_(step >= 15)
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step(loss=loss.detach())
    (warning,) = [w for w in told if "frozen" in str(w.message)]
    assert "['0.weight', '0.bias']" in str(warning.message) and "add_param_group" in str(warning.message)
    assert warning.filename == __file__  # and not one of ours
    optimizer = create(model, name, num_steps=100)
    model[0].requires_grad_(False)
    assert optimizer._advice._frozen is None
