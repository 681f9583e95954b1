"""Does offload_state keep state on the host, step as on the host, and change nothing else of an optimizer's life?

Parameters are on a device that is none, see far_device; or on the CPU, which then counts as away.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from far_device import DEVICE, Far, far_parameters
from plans import is_native
from thetas import create, distinct_rules
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from pylo_integrations import LearnedOptimizer, NonFiniteError
from pylo_integrations.fitting import StateError
from pylo_integrations.sharding import holdings
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import FlatSlice, ShardingError
from pylo_integrations.state import from_canonical, to_canonical

SHAPES = [(96, 80), (40,), (16, 8, 3, 3)]


def near_parameters(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(near: list[nn.Parameter], far: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for one, other in zip(near, far, strict=True):
        one.grad = torch.randn(one.shape, generator=generator)
        other.grad = Far(one.grad.clone())


def step_both(
    near: list[nn.Parameter], mine: LearnedOptimizer, far: list[nn.Parameter], other: LearnedOptimizer, steps: range
) -> None:
    for step in steps:
        give_gradients(near, far, step)
        mine.step(loss=1 / (step + 1))
        other.step(loss=1 / (step + 1))


def assert_alike(near: list[nn.Parameter], mine: LearnedOptimizer, far: list[nn.Parameter], other: LearnedOptimizer):
    for one, its in zip(near, far, strict=True):
        assert its.device.type == DEVICE.split(":")[0] and torch.equal(one, its.data.near)
        assert mine.state[one].keys() == other.state[its].keys()
        for name, value in mine.state[one].items():
            assert type(other.state[its][name]) is Tensor and torch.equal(value, other.state[its][name])


def pair(name: str, **options):
    near = near_parameters()
    far = far_parameters(near)
    return near, create(near, name, **options), far, create(far, name, offload_state=True, **options)


KINDS = ["float32", "bfloat16", "int8"]


@pytest.mark.parametrize(("number", "name"), list(enumerate(distinct_rules())))
def test_steps_are_those_of_the_host_and_state_stays_there(number, name):
    run = pair(name, state_dtype=KINDS[number % 3], max_grad_norm=3.0)
    step_both(*run, range(3))
    assert_alike(*run)
    assert is_native(run[3]) == is_native(run[1])


def test_gradients_and_parameters_come_and_parameters_go():
    run = pair("celo2", weight_decay=0.1)
    step_both(*run, range(2))
    Far.traffic.update(come=0, gone=0)
    run[3].step()
    numel = sum(p.numel() for p in run[0])
    assert Far.traffic == {"come": 2 * numel, "gone": numel}
    run[2][0].grad = None
    Far.traffic.update(come=0, gone=0)
    run[3].step()
    assert Far.traffic["gone"] == numel - run[2][0].numel()


def test_a_step_like_the_last_one_takes_its_plan():
    near, mine, far, other = pair("celo2")
    step_both(near, mine, far, other, range(1))
    plan = other._engine._plan
    step_both(near, mine, far, other, range(1, 3))
    assert other._engine._plan is plan
    far[0].data = Far(far[0].data.near.clone())  # as frameworks give parameters new storage
    near[0].data = near[0].data.clone()
    step_both(near, mine, far, other, range(3, 4))
    assert_alike(near, mine, far, other)


def test_steps_may_be_inside_and_outside_of_inference_mode(cpu_is_away):
    params = near_parameters()
    optimizer = create(params, "celo2", offload_state=True)
    for inside in (True, False, True, False):
        for p in params:
            p.grad = torch.ones_like(p)
        with torch.inference_mode(inside):
            optimizer.step()
    assert optimizer.iteration == 4


def test_groups_and_their_options_hold():
    near = near_parameters()
    far = far_parameters(near)
    made = []
    for params in (near, far):
        groups = [
            {"params": params[:1], "lr": 1e-3, "state_dtype": "bfloat16", "weight_decay": 0.1},
            {"params": params[1:2], "maximize": True},
        ]
        made.append(create(groups, "celo2", offload_state=params is far))
    step_both(near[:2], made[0], far[:2], made[1], range(2))
    for params, optimizer in zip((near, far), made, strict=True):
        optimizer.add_param_group({"params": params[2:], "lr": 1e-3})
        optimizer.param_groups[0]["lr"] = 1e-4
    made[1].param_groups[1]["lr"] = Far(torch.tensor(made[0].param_groups[1]["lr"]))
    step_both(near, made[0], far, made[1], range(2, 5))
    assert_alike(near, made[0], far, made[1])


def test_telemetry_tells_the_same():
    run = pair("celo2")
    for optimizer in run[1::2]:
        optimizer.enable_telemetry(per_parameter=True)
    step_both(*run, range(2))
    assert run[1].telemetry() == run[3].telemetry() and len(run[1].telemetry()) > 9


@pytest.mark.parametrize("stochastic", [False, True])
def test_parameters_and_gradients_of_other_types_and_formats(stochastic):
    near = [nn.Parameter(torch.randn(64, 80).bfloat16()), nn.Parameter(torch.randn(8, 8, 3, 3))]
    near[1].data = near[1].data.contiguous(memory_format=torch.channels_last)
    near.append(nn.Parameter(torch.randn(5, 5, dtype=torch.float64)))
    far = far_parameters(near)
    mine = create(near, "celo2", stochastic_rounding=stochastic)
    other = create(far, "celo2", stochastic_rounding=stochastic, offload_state=True)
    for step in range(3):
        torch.manual_seed(step)
        for one, its in zip(near, far, strict=True):
            one.grad = torch.randn_like(one)
            its.grad = Far(one.grad.clone())
        mine.step()
        other.step()
    assert_alike(near, mine, far, other)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_runs_go_on_from_checkpoints_with_and_without(kind):
    near, mine, far, other = pair("celo2", state_dtype=kind)
    step_both(near, mine, far, other, range(2))
    for source, there in ((mine, near), (other, far)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        again = far_parameters([p.data if there is near else p.data.near for p in there])
        resumed = create(again, "celo2", state_dtype=kind, offload_state=True)
        resumed.load_state_dict(torch.load(file))
        fresh = [nn.Parameter(p.detach().clone()) for p in near]
        plain = create(fresh, "celo2", state_dtype=kind)
        file.seek(0)
        plain.load_state_dict(torch.load(file))
        step_both(fresh, plain, again, resumed, range(2, 4))
        assert_alike(fresh, plain, again, resumed)


def test_state_that_a_framework_moved_to_the_device_comes_back():
    """Lightning moves all state to the device of its parameters when it resumes."""
    run = pair("celo2")
    step_both(*run, range(2))
    for own in run[3].state.values():
        own.update({name: Far(value) for name, value in own.items()})
    step_both(*run, range(2, 3))
    assert_alike(*run)


@pytest.fixture
def cpu_is_away(monkeypatch):
    monkeypatch.setattr(holdings, "AT_HOME", ("meta",))


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 8))


def train(model: nn.Module, optimizer: LearnedOptimizer, steps: range, scaler: torch.amp.GradScaler | None = None):
    for step in steps:
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step(loss=loss)
            continue
        scaler.scale(loss).backward()
        if step == 1:
            model[0].weight.grad[0, 0] = torch.inf
        optimizer.observe_loss(loss)
        scaler.step(optimizer)
        scaler.update()


def assert_same(one: nn.Module, mine: LearnedOptimizer, two: nn.Module, other: LearnedOptimizer) -> None:
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(value, other.state[b][name]) for name, value in mine.state[a].items())


def test_scaled_gradients_and_steps_that_a_scaler_skips(cpu_is_away):
    runs = []
    for offloads in (False, True):
        model = small_model()
        optimizer = create(model.parameters(), "velo", num_steps=10, offload_state=offloads)
        train(model, optimizer, range(4), torch.amp.GradScaler("cpu", init_scale=1024.0))
        runs += [model, optimizer]
    assert runs[1].iteration == runs[3].iteration == 3
    assert_same(*runs)


@pytest.mark.parametrize("way", ["dcp", "canonical", "pickle", "copy"])
def test_an_offloaded_run_goes_on_whichever_way_it_travels(cpu_is_away, way):
    plain, model = small_model(), small_model()
    mine = create(plain.named_parameters(), "velo", num_steps=10)
    other = create(model.named_parameters(), "velo", num_steps=10, offload_state=True)
    train(plain, mine, range(3))
    train(model, other, range(3))
    if way in ("pickle", "copy"):
        both = (model, other)
        model, other = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
        assert other.offload_state
    else:
        again = copy.deepcopy(model)
        fresh = create(again.named_parameters(), "velo", num_steps=10, offload_state=True)
        if way == "dcp":
            set_optimizer_state_dict(again, fresh, get_optimizer_state_dict(model, other))
        else:
            from_canonical(fresh, again, to_canonical(other, model))
        model, other = again, fresh
    train(plain, mine, range(3, 6))
    train(model, other, range(3, 6))
    assert_same(plain, mine, model, other)


# -- refusals ----------------------------------------------------------------------------------------------------------


def unchanged(far: list[nn.Parameter], other: LearnedOptimizer, act) -> None:
    before = [p.data.near.clone() for p in far]
    states = [{name: value.clone() for name, value in other.state[p].items()} for p in far]
    act()
    assert all(torch.equal(p.data.near, old) for p, old in zip(far, before, strict=True))
    for p, old in zip(far, states, strict=True):
        assert all(torch.equal(other.state[p][name], value) for name, value in old.items())


def test_gradients_that_are_not_finite_change_nothing():
    near, mine, far, other = pair("celo2")
    step_both(near, mine, far, other, range(2))
    far[1].grad.near[3] = torch.nan
    unchanged(far, other, other.step)
    assert other.iteration == 2 and other.nonfinite_steps == 1
    other.on_nonfinite = "error"

    def raises():
        with pytest.raises(NonFiniteError):
            other.step()

    unchanged(far, other, raises)


@pytest.mark.parametrize("fault", ["overlaps", "sparse", "grown"])
def test_parameters_that_cannot_be_copied_are_refused_before_anything_changes(cpu_is_away, fault):
    params = near_parameters()
    optimizer = create(params, "celo2", offload_state=True)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    error, said = StateError, "share memory"
    if fault == "overlaps":
        params[1].data = torch.zeros(1).expand(40)
    elif fault == "sparse":
        error, said = TypeError, "sparse"
        params[1].grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (40,))
    else:
        said = "changed after backward"
        params[1].data = torch.zeros(41)
    before = [p.detach().clone() for p in params]
    states = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    with pytest.raises(error, match=said):
        optimizer.step()
    for p, old, own in zip(params, before, states, strict=True):
        assert torch.equal(p, old) and all(torch.equal(optimizer.state[p][name], own[name]) for name in own)


def test_a_state_without_numbers_is_refused_as_any_other_that_does_not_fit():
    run = pair("celo2")
    step_both(*run, range(1))
    run[3].state[run[2][0]]["rms"] = torch.zeros(96, 80, device="meta")
    with pytest.raises(StateError, match="rms.*on meta"):
        run[3].step()


def test_parameters_that_share_memory_are_refused(cpu_is_away):
    whole = torch.randn(8, 8)
    params = [nn.Parameter(whole[:5]), nn.Parameter(whole[4:])]
    optimizer = create(params, "celo2", offload_state=True)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(StateError, match="shares memory with parameter 0 of group 0.*offload_state"):
        optimizer.step()


def test_an_option_that_is_neither_is_refused():
    with pytest.raises(TypeError, match="offload_state='yes' must be True or False"):
        create(near_parameters(), "celo2", offload_state="yes")


def test_parameters_that_ranks_divide_are_refused_with_the_remedy():
    param = far_parameters([torch.zeros(100)])[0]
    sliced = Holdings(flat_slices={param: FlatSlice("w", (10, 20), 0, 2)}, offloads=True)
    param._fsdp_flattened = True
    with pytest.raises(ShardingError, match=r"sharded: .*CPUOffloadPolicy"):
        sliced.check_home(param)
    sliced.check_home(nn.Parameter(torch.zeros(3)))  # which is at home


@pytest.mark.parametrize("shares", [False, True])
def test_ranks_that_cannot_meet_on_the_host_are_refused_with_the_remedy(monkeypatch, shares):
    own = Holdings(shares, offloads=True)
    monkeypatch.setattr(type(own.ranks), "size", 2)
    monkeypatch.setattr(type(own.ranks), "meets_on", lambda ranks, kind: False)
    remedy = "leave out one of the two" if shares else "cpu:gloo,cuda:nccl"
    with pytest.raises(ShardingError, match=remedy):
        own.check_home(far_parameters([torch.zeros(4, 4)])[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_on_cuda_are_stepped_on_the_host(kind):
    near = near_parameters()
    there = [nn.Parameter(p.detach().cuda()) for p in near]
    mine, other = create(near, "celo2", state_dtype=kind), create(there, "celo2", state_dtype=kind, offload_state=True)
    for step in range(3):
        torch.manual_seed(step)
        for one, its in zip(near, there, strict=True):
            one.grad = torch.randn_like(one)
            its.grad = one.grad.cuda()
        mine.step()
        other.step()
    for one, its in zip(near, there, strict=True):
        assert torch.equal(one, its.cpu())
        assert all(value.device.type == "cpu" for value in other.state[its].values())
