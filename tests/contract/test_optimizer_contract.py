"""Does a learned optimizer behave like a mature torch.optim.Optimizer?"""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
import weakref

import pytest
import torch
from thetas import create, distinct_rules
from torch import nn

from pylo_integrations import (
    NonFiniteError,
    SmallFCLOpt,
    create_optimizer,
    get_optimizer_info,
    param_groups,
)
from pylo_integrations.ledger import state_dtype

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = distinct_rules()
SEPARABLE = [name for name in NAMES if not get_optimizer_info(name).needs_loss and name != "pace"]
"""Those that step every tensor by itself; the others decide over all tensors together."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IN_EVERY_DTYPE = pytest.mark.parametrize(
    ("name", "dtype", "auto_backend"),
    [
        (name, dtype, backend)
        for name in NAMES
        # How numbers are read and written is not the rule's.
        for dtype in (DTYPES if name == "small_fc_lopt" else DTYPES[:2])
        for backend in (["reference"] if dtype == torch.float64 else ["native", "reference"])
    ],
    ids=str,
    indirect=["auto_backend"],
)
SHAPES = [(), (1,), (7,), (5, 3), (4, 4), (2, 3, 4), (4, 3, 2, 2), (2, 1, 3, 2, 2), (2, 2, 1, 2, 3, 2)]


# Where only the order of a sum may differ, float64 parameters show that nothing else does.
EXACT = {"rtol": 0, "atol": 1e-12}


def parameter(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def give_gradients(params, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(optimizer, params, steps: int, first: int = 0) -> None:
    for k in range(first, first + steps):
        give_gradients(params, seed=k)
        optimizer.step(loss=2.0 - 0.1 * k)


def snapshot(optimizer) -> list[torch.Tensor]:
    """Every tensor the optimizer may change."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [value for p in params for value in optimizer.state.get(p, {}).values()]
    return [t.detach().clone() for t in (*params, *states)]


def assert_unchanged(optimizer, before) -> None:
    after = snapshot(optimizer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model) -> torch.Tensor:
    x = torch.linspace(-1, 1, 24).view(6, 4)
    return (model(x) - x[:, :2].sin()).square().mean()


# -- parameters: dtypes, shapes, memory ----------------------------------------------------------------------------


@IN_EVERY_DTYPE
def test_steps_every_dtype_and_rank(name, dtype, auto_backend):
    params = [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
    before = [p.detach().clone() for p in params]
    optimizer = create(params, name, lr=10.0)  # large enough to show in bfloat16
    train(optimizer, params, 3)
    for p, old in zip(params, before, strict=True):
        assert p.dtype == dtype and p.isfinite().all()
        assert not torch.equal(p, old), tuple(p.shape)
        assert {value.dtype for value in optimizer.state[p].values()} == {state_dtype(p)}


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_arithmetic_rounded_once(dtype):
    half = parameter(16, 8, dtype=dtype)
    full = nn.Parameter(half.detach().float())
    optimizers = [SmallFCLOpt([half], lr=10.0), SmallFCLOpt([full], lr=10.0)]
    half.grad = torch.randn(16, 8).to(dtype)
    full.grad = half.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(half, full.to(dtype))


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("name", SEPARABLE)
def test_mixed_dtypes_step_as_they_do_apart(name):
    def run(indices):
        params = [parameter(6, 5, dtype=DTYPES[i], seed=i) for i in indices]
        optimizer = create(params, name, max_grad_norm=math.inf)  # the global norm is of all tensors
        for k in range(2):
            for p in params:
                p.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(k)).to(p.dtype)
            optimizer.step()
        return params

    together = run(range(len(DTYPES)))
    assert all(torch.equal(p, run([i])[0]) for i, p in enumerate(together))


def test_the_step_of_a_tensor_does_not_depend_on_the_others():
    shapes = [(6, 5), (6, 5), (3,), (6, 5), (3,)]
    together = [parameter(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
    apart = [nn.Parameter(p.detach().clone()) for p in together]
    optimizers = [SmallFCLOpt(together), *(SmallFCLOpt([p]) for p in apart)]
    for k in range(3):
        give_gradients(together, seed=k)
        for one, other in zip(together, apart, strict=True):
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_memory_layout_of_parameters_and_gradients_is_irrelevant():
    plain = parameter(8, 4, 3, 3, dtype=torch.float64)
    channels_last = nn.Parameter(plain.detach().clone().to(memory_format=torch.channels_last))
    strided = nn.Parameter(torch.empty(8, 4, 3, 6, dtype=torch.float64)[..., ::2].copy_(plain.detach()))
    assert not strided.is_contiguous() and not channels_last.is_contiguous()
    for k in range(2):
        grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(k)).double()
        plain.grad, strided.grad = grad.to(memory_format=torch.channels_last), grad.clone()
        channels_last.grad = grad.clone()
        if k == 0:
            optimizers = [SmallFCLOpt([p]) for p in (plain, channels_last, strided)]
        for optimizer in optimizers:
            optimizer.step()
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last.detach(), plain.detach(), **EXACT)
    torch.testing.assert_close(strided.detach(), plain.detach(), **EXACT)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 100_000])
def test_chunk_size_does_not_change_the_step(chunk_bytes):
    shapes = [(24, 13), (2, 8, 5), (7,), (), (4, 3, 2, 2)]

    def run(**options):
        params = [parameter(*shape, dtype=torch.float64, seed=i) for i, shape in enumerate(shapes)]
        optimizer = SmallFCLOpt(params, **options)
        train(optimizer, params, 1 if chunk_bytes == 1 else 3)
        return params

    for chunked, whole in zip(run(chunk_bytes=chunk_bytes), run(), strict=True):
        torch.testing.assert_close(chunked, whole, **EXACT)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("name", NAMES)
def test_empty_parameters_are_carried_along(name):
    params = [parameter(0), parameter(0, 3), parameter(4, 3)]
    optimizer = create(params, name)
    train(optimizer, params, 2)
    assert optimizer.iteration == 2
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradient_stay_and_join_later(name):
    stepped, idle, frozen = parameter(4, 3), parameter(4, 3), parameter(4, 3).requires_grad_(False)
    optimizer = create([stepped, idle, frozen], name)
    before = [p.detach().clone() for p in (idle, frozen)]
    train(optimizer, [stepped], 2)
    assert torch.equal(idle, before[0]) and torch.equal(frozen, before[1])
    assert idle in optimizer.state and frozen not in optimizer.state
    train(optimizer, [stepped, idle], 1, first=2)
    assert not torch.equal(idle, before[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_without_any_gradient_is_no_step(name):
    params = [parameter(4, 3)]
    optimizer = create(params, name)
    optimizer.step(loss=1.0)
    assert optimizer.iteration == 0


def test_sparse_and_complex_gradients_are_refused_before_anything_changes():
    dense, embedding = parameter(3, 2), nn.Embedding(5, 2, sparse=True)
    optimizer = SmallFCLOpt([("dense", dense), ("table", embedding.weight)])
    train(optimizer, [dense], 1)
    before = snapshot(optimizer)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="parameter 'table' of group 0 is sparse"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    with pytest.raises(TypeError, match="real floating-point"):
        SmallFCLOpt([nn.Parameter(torch.randn(3, dtype=torch.complex64))])


# -- non-finite values ----------------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf, 1e25]  # the last is finite, but its square is not


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("bad", BAD)
def test_skip_changes_nothing_counts_and_warns_once(bad):
    params = [parameter(4, 3), parameter(5)]
    optimizer = SmallFCLOpt(params)
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    give_gradients(params)
    params[0].grad[1, 1] = bad
    with pytest.warns(RuntimeWarning, match="not finite and was skipped"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert_unchanged(optimizer, before)
    assert (optimizer.iteration, optimizer.nonfinite_steps) == (2, 2)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("bad", BAD)
def test_error_changes_nothing(bad):
    params = [parameter(4, 3), parameter(5)]
    optimizer = SmallFCLOpt(params, on_nonfinite="error")
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    give_gradients(params)
    params[1].grad[2] = bad
    with pytest.raises(NonFiniteError, match="gradient of step 2"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
@pytest.mark.parametrize("bad", BAD)
def test_zero_reads_bad_elements_as_zero(bad, max_grad_norm):
    params = [parameter(4, 3), parameter(5)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = SmallFCLOpt(params, on_nonfinite="zero", max_grad_norm=max_grad_norm)
    clean = SmallFCLOpt(twins, max_grad_norm=max_grad_norm)
    give_gradients(params), give_gradients(twins)
    params[0].grad[1, 1], twins[0].grad[1, 1] = bad, 0.0
    optimizer.step(), clean.step()
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin, rtol=0, atol=1e-9)
    assert (optimizer.iteration, optimizer.nonfinite_steps) == (1, 1)
    assert math.isnan(bad) == params[0].grad[1, 1].isnan().item()  # gradients belong to the caller


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_a_bad_loss_skips_the_step_of_a_rule_that_needs_it(policy, toy_loss):
    params = [parameter(4, 3)]
    optimizer = create_optimizer(params, "toy_loss", num_steps=10)
    optimizer.on_nonfinite = policy
    give_gradients(params)
    optimizer.step(loss=1.0)
    before = snapshot(optimizer)
    with pytest.warns(RuntimeWarning):
        optimizer.step(loss=math.nan)
    assert_unchanged(optimizer, before)
    assert optimizer.rule.seen_losses == [1.0]


# -- forms of step ---------------------------------------------------------------------------------------------------


def test_closure_runs_once_with_gradients_and_its_result_comes_back(model, toy_loss):
    optimizer = create_optimizer(model, "toy_loss", num_steps=10)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        returned = optimizer.step(closure)
    assert calls == [True]
    assert returned.item() == optimizer.rule.seen_losses[0]


def test_every_way_to_give_the_loss_arrives_and_they_rank(toy_loss):
    params = [parameter(3, 2)]
    optimizer = create_optimizer(params, "toy_loss", num_steps=10)
    give_gradients(params)
    assert optimizer.step(torch.tensor(1.0)).item() == 1.0
    assert optimizer.step(loss=2.0) == 2.0
    optimizer.observe_loss(torch.tensor(1.25))
    optimizer.observe_loss(torch.tensor([1.75]))
    assert optimizer.step() is None
    assert optimizer.step(lambda: 4.0) == 4.0
    optimizer.observe_loss(5.0)
    assert optimizer.step(lambda: 0.0) == 0.0  # observed beats the closure's
    optimizer.observe_loss(0.0)
    assert optimizer.step(lambda: 0.0, loss=6.0) == 0.0  # explicit beats both
    optimizer.observe_loss(0.0)
    optimizer.clear_observed_loss()
    optimizer.step(loss=7.0)
    assert optimizer.rule.seen_losses == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_an_observed_loss_serves_one_step_only(toy_loss):
    params = [parameter(3, 2)]
    optimizer = create_optimizer(params, "toy_loss", num_steps=10)
    give_gradients(params)
    optimizer.observe_loss(1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"step\(loss=loss\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("loss", "error"),
    [(torch.ones(2), ValueError), ("0.5", TypeError), pytest.param(object(), TypeError, id="object")],
    ids=str,
)
def test_bad_losses_are_refused(loss, error, toy_loss):
    params = [parameter(3, 2)]
    optimizer = create_optimizer(params, "toy_loss", num_steps=10)
    give_gradients(params)
    before = snapshot(optimizer)
    with pytest.raises(error, match="loss"):
        optimizer.step(loss=loss)
    with pytest.raises(error, match="loss"):
        optimizer.observe_loss(loss)
    with pytest.raises(TypeError, match="twice"):
        optimizer.step(1.0, loss=2.0)
    assert_unchanged(optimizer, before)


def test_missing_loss_and_horizon_name_their_remedies(toy_loss):
    params = [parameter(3, 2)]
    optimizer = create_optimizer(params, "toy_loss")
    give_gradients(params)
    with pytest.raises(RuntimeError, match="observe_loss") as missing_loss:
        optimizer.step()
    assert "hf.Trainer" in str(missing_loss.value)
    with pytest.raises(RuntimeError, match=r"set_num_steps\(n\)"):
        optimizer.step(loss=1.0)
    optimizer.set_num_steps(3)
    optimizer.step(loss=1.0)


def test_a_rule_without_need_of_the_loss_takes_whatever_a_closure_returns():
    params = [parameter(3, 2)]
    optimizer = SmallFCLOpt(params)
    give_gradients(params)
    assert optimizer.step(lambda: {"loss": 1}) == {"loss": 1}


@pytest.mark.usefixtures("auto_backend")
def test_autocast_around_the_step_changes_nothing():
    def run(**context):
        params = [parameter(8, 8)]
        optimizer = SmallFCLOpt(params)
        with torch.autocast("cpu", dtype=torch.bfloat16, **context):
            train(optimizer, params, 2)
        return params[0]

    assert torch.equal(run(enabled=True), run(enabled=False))


# -- horizon, lr, decay ------------------------------------------------------------------------------------------


def test_the_horizon_is_settable_and_its_overrun_warns_once():
    params = [parameter(3, 2)]
    optimizer = SmallFCLOpt(params)
    optimizer.set_num_steps(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 2)
    with pytest.warns(RuntimeWarning, match="beyond the horizon num_steps=2"):
        train(optimizer, params, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(optimizer, params, 1)


@pytest.mark.parametrize("name", NAMES)
def test_lr_multiplies_the_whole_update(name):
    updates = {}
    for lr in (0.0, 0.5, torch.tensor(0.5), torch.tensor([0.5]), 1.0):
        p = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        optimizer = create([p], name, lr=lr)
        train(optimizer, [p], 1)
        updates[lr] = p.detach()
    quiet, *halves, full = updates.values()
    assert not quiet.any()
    for half in halves:
        torch.testing.assert_close(half * 2, full, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lr", [1.0, 0.25])
@pytest.mark.parametrize("policy", ["adamw", "before", "after", "before_independent", "after_independent"])
def test_weight_decay_policies(policy, lr):
    def run(weight_decay):
        p = parameter(4, 3, dtype=torch.float64)
        optimizer = SmallFCLOpt([p], lr=0.5, weight_decay=weight_decay, weight_decay_policy=policy)
        optimizer.param_groups[0]["lr"] = lr  # as a schedule does
        old = p.detach().clone()
        train(optimizer, [p], 1)
        return old, p.detach() - old

    old, plain = run(0.0)
    _, decayed = run(0.1)
    shrink = 0.1 * (lr / 0.5 if policy.endswith("independent") else 1e-3 * lr if policy == "adamw" else lr)
    base = old + plain if policy.startswith("after") else old
    torch.testing.assert_close(decayed, plain - shrink * base)


@pytest.mark.usefixtures("auto_backend")
def test_maximize_is_the_step_of_the_negated_gradient():
    up, down = parameter(4, 3), parameter(4, 3)
    ascending, descending = SmallFCLOpt([up], maximize=True), SmallFCLOpt([down])
    for k in range(2):
        give_gradients([up], seed=k)
        down.grad = -up.grad
        ascending.step(), descending.step()
    assert torch.equal(up, down)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("scale", [10.0, 0.01])
def test_max_grad_norm_clips_like_torch(scale):
    ours, theirs = [parameter(4, 3), parameter(5)], [parameter(4, 3), parameter(5)]
    inside, plain = SmallFCLOpt(ours, max_grad_norm=1.0), SmallFCLOpt(theirs)
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.full_like(p, scale)
        q.grad = p.grad.clone()
    nn.utils.clip_grad_norm_(theirs, 1.0)
    inside.step(), plain.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-7)
        assert (p.grad == scale).all()  # gradients belong to the caller


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"weight_decay_policy": "adamax"}, "'adamax' is unknown"),
        ({"on_nonfinite": "ignore"}, "'ignore' is unknown"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"chunk_bytes": 0}, "chunk_bytes=0"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 2.5}, "num_steps=2.5"),
        ({"backend": "gpu"}, "'gpu' is not available"),
    ],
)
def test_nonsense_is_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        SmallFCLOpt([parameter(2, 2)], **options)


# -- state ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_state_is_lazy_and_init_state_idempotent(name):
    params = [parameter(*shape) for shape in SHAPES]
    optimizer = create(params, name)
    assert not optimizer.state
    optimizer.init_state()
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    optimizer.init_state()
    assert_unchanged(optimizer, before)
    assert len(optimizer.state) == len(params)


def test_state_looks_like_its_parameter():
    matrix, conv, vector, scalar = params = [parameter(5, 3), parameter(4, 3, 2, 2), parameter(7), parameter()]
    optimizer = SmallFCLOpt(params)
    optimizer.init_state()
    for p in params:
        for name in ("momentum_0", "momentum_1", "momentum_2", "rms"):
            assert optimizer.state[p][name].shape == p.shape
    assert optimizer.state[matrix]["row"].shape == (3, 1, 3) and optimizer.state[matrix]["col"].shape == (3, 5, 1)
    assert optimizer.state[conv]["row"].numel() == 3 * 3 * 2 * 2
    assert {"diagonal_0", "diagonal_1", "diagonal_2"} < set(optimizer.state[vector])
    assert optimizer.state[scalar]["diagonal_0"].shape == ()


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_the_probe_of_distributed_checkpoint_only_creates_state(lr, toy_loss):
    params = [parameter(4, 3), parameter(3)]
    optimizer = create_optimizer(params, "toy_loss", lr=lr)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)  # no loss, no horizon: neither may be asked for
    assert optimizer.iteration == 0 and len(optimizer.state) == 2 and not optimizer.rule.seen_losses
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    give_gradients(params)  # a warm-up that starts at lr 0 is no probe
    with pytest.raises(RuntimeError, match="loss"):
        optimizer.step()


def test_distributed_checkpoint_state_dict_round_trip(model, toy_loss):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    optimizer = create_optimizer(model, "toy_loss", num_steps=10)
    untouched = [p.detach().clone() for p in model.parameters()]
    fresh = get_optimizer_state_dict(model, optimizer)  # probes
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), untouched, strict=True))
    assert optimizer.iteration == 0 and fresh["state"]
    train(optimizer, list(model.parameters()), 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    twin = copy.deepcopy(model)
    restored = create_optimizer(twin, "toy_loss", num_steps=10)
    set_optimizer_state_dict(twin, restored, saved)
    assert restored.iteration == 3
    for one, other in ((optimizer, model), (restored, twin)):
        train(one, list(other.parameters()), 2, first=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@IN_EVERY_DTYPE
def test_resume_is_bit_equal(name, dtype, auto_backend):
    params = [parameter(*shape, dtype=dtype, seed=i) for i, shape in enumerate(SHAPES)]
    optimizer = create(params, name, lr=3.0, num_steps=9)
    train(optimizer, params, 3)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    train(optimizer, params, 3, first=3)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_params = saved["params"]
    resumed = create_optimizer(resumed_params, name, lr=3.0)
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.iteration, resumed.num_steps) == (3, 9)
    train(resumed, resumed_params, 3, first=3)
    assert all(torch.equal(p, q) for p, q in zip(params, resumed_params, strict=True))
    assert all(value.dtype == state_dtype(p) for p in resumed_params for value in resumed.state[p].values())


@pytest.mark.parametrize("name", NAMES)
def test_load_state_dict_copies_leaves_its_argument_alone_and_repeats(name):
    params = [parameter(4, 3, dtype=torch.bfloat16), parameter(5, dtype=torch.bfloat16)]
    optimizer = create(params, name)
    train(optimizer, params, 2)
    state_dict = optimizer.state_dict()
    untouched = copy.deepcopy(state_dict)
    target = create([nn.Parameter(p.detach().clone()) for p in params], name)
    for _ in range(2):
        target.load_state_dict(state_dict)
        train(target, target.param_groups[0]["params"], 1)
    assert_same_state_dict(state_dict, untouched)


def assert_same_state_dict(one, other):
    assert one["param_groups"] == other["param_groups"]
    assert one["state"].keys() == other["state"].keys()
    for key, state in one["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, value in state.items():
            assert value.dtype == other["state"][key][name].dtype and torch.equal(value, other["state"][key][name])


def test_state_of_another_optimizer_or_model_is_refused_whole():
    params = [parameter(4, 3), parameter(5)]
    optimizer = SmallFCLOpt(params)
    train(optimizer, params, 2)
    adam = torch.optim.AdamW(params)
    adam.step()
    before = snapshot(optimizer)
    wider = [parameter(4, 3), parameter(6)]
    other = SmallFCLOpt(wider)
    other.init_state()
    for state_dict in (adam.state_dict(), other.state_dict()):
        with pytest.raises(ValueError, match="does not fit SmallFCLOpt"):
            optimizer.load_state_dict(state_dict)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(SmallFCLOpt([params[0]]).state_dict())
    assert_unchanged(optimizer, before)
    assert optimizer.iteration == 2
    train(optimizer, params, 1)


def test_state_dict_of_a_fresh_optimizer_loads():
    params = [parameter(4, 3)]
    optimizer = SmallFCLOpt(params, num_steps=7)
    optimizer.load_state_dict(optimizer.state_dict())
    assert (optimizer.iteration, optimizer.num_steps) == (0, 7)
    train(optimizer, params, 1)


def test_a_horizon_or_theta_that_differs_from_the_checkpoint_is_told():
    params = [parameter(4, 3)]
    saved = SmallFCLOpt(params, num_steps=7).state_dict()
    longer = SmallFCLOpt(params, num_steps=9)
    with pytest.warns(RuntimeWarning, match="num_steps=7; keeping this optimizer's 9"):
        longer.load_state_dict(saved)
    assert longer.num_steps == 9
    other_theta = SmallFCLOpt(params, step_mult=None, weights=different_theta())
    with pytest.warns(RuntimeWarning, match="written with other weights"):
        other_theta.load_state_dict(saved)


def different_theta():
    from pylo_integrations.weights import Theta, bootstrap

    theta = bootstrap()
    return Theta.from_arrays("small_fc_lopt", {k: 2 * v for k, v in theta.arrays.items()}, theta.hyper)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_go_on_like_the_original(clone, toy_loss, model):
    optimizer = create_optimizer(model, "toy_loss", num_steps=10, max_grad_norm=1.0)
    train(optimizer, list(model.parameters()), 2)
    twin_model, twin = clone((model, optimizer))
    assert twin.iteration == 2 and twin.max_grad_norm == 1.0 and twin.num_steps == 10
    for one, net in ((optimizer, model), (twin, twin_model)):
        train(one, list(net.parameters()), 2, first=2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin_model.parameters(), strict=True))
    assert optimizer.iteration == twin.iteration == 4


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("name", NAMES)
def test_groups_can_be_added_after_steps(name):
    first, second = parameter(4, 3), parameter(5, 2)
    optimizer = create([first], name)
    train(optimizer, [first], 2)
    optimizer.add_param_group({"params": [second], "lr": 0.5, "weight_decay": 0.1})
    old = second.detach().clone()
    train(optimizer, [first, second], 1, first=2)
    assert not torch.equal(old, second)
    assert len(optimizer.state_dict()["param_groups"]) == 2
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.add_param_group({"params": [parameter(3)], "weight_decay": -1})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", NAMES)
def test_named_parameters(name, model):
    optimizer = create(model.named_parameters(), name)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    train(optimizer, list(model.parameters()), 1)
    optimizer.load_state_dict(optimizer.state_dict())


# -- torch's companions ---------------------------------------------------------------------------------------------


SCHEDULERS = [
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 2.0, total_steps=10, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)),
    lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=2, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 2), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        milestones=[2],
    ),
]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("lr", [1.0, torch.tensor(1.0)], ids=["float", "tensor"])
def test_schedulers_scale_the_update(make, lr):
    p = nn.Parameter(torch.zeros(6, 5))
    optimizer = SmallFCLOpt([p], lr=lr)
    scheduler = make(optimizer)
    for k in range(5):
        before, reference = p.detach().clone(), nn.Parameter(p.detach().clone())
        lr_now = float(optimizer.param_groups[0]["lr"])
        twin = SmallFCLOpt([reference])
        twin.load_state_dict(optimizer.state_dict())
        twin.param_groups[0]["lr"] = 1.0
        give_gradients([p, reference], seed=k)
        reference.grad = p.grad.clone()
        optimizer.step(), twin.step(), scheduler.step()
        torch.testing.assert_close(p - before, (reference - before) * lr_now, rtol=1e-4, atol=1e-7)


def test_reduce_lr_on_plateau():
    optimizer = SmallFCLOpt([parameter(2, 2)])
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_grad_scaler_unscales_skips_and_forwards_the_loss(toy_loss, model):
    optimizer = create_optimizer(model, "toy_loss", num_steps=10)
    plain_model = copy.deepcopy(model)
    plain = create_optimizer(plain_model, "toy_loss", num_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    losses = []
    for k in range(4):
        optimizer.zero_grad(), plain.zero_grad()
        loss, plain_loss = loss_of(model), loss_of(plain_model)
        scaler.scale(loss).backward(), plain_loss.backward()
        if k == 2:
            next(model.parameters()).grad.fill_(math.inf)
        scaler.step(optimizer, loss=loss.detach())
        scaler.update()
        if k != 2:
            plain.step(loss=plain_loss)
            losses.append(plain_loss.item())
    assert optimizer.iteration == 3 and optimizer.nonfinite_steps == 0  # the scaler skipped, not we
    assert optimizer.rule.seen_losses == losses
    for p, q in zip(model.parameters(), plain_model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_averaged_model_follows(model):
    from torch.optim.swa_utils import SWALR, AveragedModel

    optimizer = create_optimizer(model, "small_fc_lopt")
    averaged, schedule = AveragedModel(model), SWALR(optimizer, swa_lr=0.5, anneal_epochs=3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        averaged.update_parameters(model)
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
    assert loss_of(averaged).isfinite()


def test_step_hooks_run_and_may_inject_the_loss(toy_loss):
    params = [parameter(3, 2)]
    optimizer = create_optimizer(params, "toy_loss", num_steps=10)
    give_gradients(params)
    order = []

    def pre(optimizer, args, kwargs):
        order.append("pre")
        return args, {**kwargs, "loss": 4.5}

    optimizer.register_step_pre_hook(pre)
    optimizer.register_step_post_hook(lambda *_: order.append("post"))
    optimizer.step()
    assert order == ["pre", "post"] and optimizer.rule.seen_losses == [4.5]


def test_state_dict_hooks_see_and_change_what_is_saved_and_loaded():
    params = [parameter(3, 2)]
    optimizer = SmallFCLOpt(params)
    train(optimizer, params, 1)
    seen = []
    optimizer.register_state_dict_post_hook(lambda o, sd: seen.append("save") or {**sd, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: seen.append(sd.get("extra")) or unprefixed(sd))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    state_dict = optimizer.state_dict()
    state_dict["state"] = {k: {f"old_{n}": v for n, v in s.items()} for k, s in state_dict["state"].items()}
    optimizer.load_state_dict(state_dict)
    assert seen == ["save", 1, "loaded"]
    assert "momentum_0" in optimizer.state[params[0]]


def unprefixed(state_dict):
    state = {k: {n.removeprefix("old_"): v for n, v in s.items()} for k, s in state_dict["state"].items()}
    return {**state_dict, "state": state}


@pytest.mark.slow
def test_a_compiled_training_step_around_it_matches_eager(model):
    eager = copy.deepcopy(model)
    optimizer, plain = create_optimizer(model, "small_fc_lopt"), create_optimizer(eager, "small_fc_lopt")

    @torch.compile(backend="aot_eager")
    def training_step():
        loss = loss_of(model)
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()

    for _ in range(3):
        training_step()
        loss_of(eager).backward()
        plain.step()
        plain.zero_grad()
    assert optimizer.iteration == 3
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -- does it train? ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_not_kept_alive(name):
    p = parameter(5, 3)
    optimizer = create([p], name)
    train(optimizer, [p], 1)
    alive = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert alive() is None


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("name", NAMES)
def test_it_trains(name, model):
    lr = {"elo_celo2": 3e-3}.get(name)  # its default is for runs longer than this
    optimizer = create(model, name, lr, weight_decay=0.01)
    start = loss_of(model).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(model)
        if loss < 0.2 * start:
            break
        loss.backward()
        optimizer.step(loss=loss)
    assert loss < 0.2 * start


def test_groups_of_a_model_reach_the_optimizer(model):
    optimizer = create_optimizer(model, "small_fc_lopt", weight_decay=0.1)
    decays = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decays == {"0.weight": 0.1, "3.weight": 0.1} | dict.fromkeys(["0.bias", "1.weight", "1.bias", "3.bias"], 0.0)
    assert [len(g["params"]) for g in param_groups(model, 0.1)] == [2, 4]
