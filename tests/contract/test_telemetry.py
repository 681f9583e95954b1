"""Does telemetry tell what a step did, and change nothing?

The oracle knows nothing of the engine: it compares copies of the parameters from before and after a step.
"""

from __future__ import annotations

import copy
import math
import pickle
import types

import pytest
import torch
from native_library import library_or_skip
from thetas import create, distinct_rules
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pylo_integrations import LearnedOptimizer, SmallFCLOpt, create_optimizer
from pylo_integrations import engine as engine_module
from pylo_integrations.decay import keep_and_scale
from pylo_integrations.rules.base import Rule, read_gradient

SHAPES = [(), (1,), (7,), (7,), (5, 3), (4, 4), (40, 30), (4, 3, 2, 2)]


def parameters(dtype=torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def give_gradients(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def in_groups(params, **options) -> list[dict]:
    return [
        {"params": [(f"first.{i}", p) for i, p in enumerate(params[:3])], "lr": 0.5, "weight_decay": 0.1, **options},
        {"params": [(f"second.{i}", p) for i, p in enumerate(params[3:])], "lr": 2.0, "weight_decay": 0.0, **options},
    ]


class DecidingRule(Rule):
    """Decides a multiplier for each tensor, one for all, and things that are not one number a tensor."""

    def state_shapes(self, layout):
        return {}

    def control(self, buckets, sums, ctx):
        ctx.memory["steps_seen"] = ctx.memory.get("steps_seen", torch.zeros(())) + 1
        return [
            {
                "lr_mult": torch.arange(1.0, len(bucket) + 1).view(-1, *[1] * (1 + len(bucket.layout.shape))),
                "shared": torch.full((1, 1), 0.25),
                "mixture": torch.ones(len(bucket), 16),
                "theta": torch.ones(1, 3, 3),
            }
            for bucket in buckets
        ]

    def propose(self, block, prepared, sums, control, ctx):
        return read_gradient(block, ctx) * block.rows(control["lr_mult"]) * control["shared"].to(block.bucket.dtype)

    def telemetry(self, memory):
        return {"memory_of_steps": memory["steps_seen"]} if memory else {}


class DecidingOpt(LearnedOptimizer):
    rule_type = DecidingRule

    def __init__(self, params, lr=1.0, **options):
        super().__init__(params, DecidingRule(), lr=lr, **options)


# -- are the numbers right? --------------------------------------------------------------------------------------------


def expected(updates, before, gradients) -> dict[str, float]:
    """From one flat vector of everything that is described together."""
    update, old, grad = (torch.cat([t.reshape(-1) for t in tensors]) for tensors in (updates, before, gradients))
    return {
        "update_rms": update.square().mean().sqrt().item(),
        "update_ratio": (update.norm() / old.norm()).item(),
        "cosine": torch.cosine_similarity(update, -grad, dim=0, eps=0).item(),
    }


@pytest.mark.parametrize("chunk_bytes", [2**28, 20_000], ids=["stacks", "boxes"])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_numbers_are_those_of_snapshots(chunk_bytes, maximize, max_grad_norm):
    params = parameters()
    optimizer = SmallFCLOpt(
        in_groups(params), num_steps=8, chunk_bytes=chunk_bytes, maximize=maximize, max_grad_norm=max_grad_norm
    )
    optimizer.enable_telemetry(per_parameter=True)
    for seed in range(3):
        give_gradients(params, seed)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        keeps = [
            keep_and_scale(group, adamw_scale=SmallFCLOpt.adamw_lr)[0]
            for group in optimizer.param_groups
            for _ in group["params"]
        ]
        updates = [p.detach() - keep * old for p, old, keep in zip(params, before, keeps, strict=True)]
        gradients = [-p.grad if maximize else p.grad for p in params]
        wanted = {"nonfinite_steps": 0, "horizon_fraction": (seed + 1) / 8}
        for index, members in enumerate((slice(0, 3), slice(3, None))):
            numbers = expected(updates[members], before[members], gradients[members])
            wanted |= {f"group{index}/{name}": value for name, value in numbers.items()}
        names = [name for group in optimizer.param_groups for name in group["param_names"]]
        for name, *tensors in zip(names, updates, before, gradients, strict=True):
            numbers = expected(*([tensor] for tensor in tensors))
            wanted |= {f"param/{name}/{key}": value for key, value in numbers.items()}
        told = optimizer.telemetry()
        assert all(type(value) is float for value in told.values())
        assert told == pytest.approx({f"optim/SmallFCLOpt/{name}": value for name, value in wanted.items()}, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_parameters_have_the_numbers_of_the_update_before_rounding(dtype):
    params = parameters(dtype)
    reference = [nn.Parameter(p.detach().double()) for p in params]
    told = []
    for members in (params, reference):
        optimizer = SmallFCLOpt(members, backend="reference")
        optimizer.enable_telemetry()
        give_gradients(params, seed=0)
        for p, q in zip(params, members, strict=True):
            q.grad = p.grad.to(q.dtype)
        optimizer.step()
        told.append(optimizer.telemetry())
    assert told[0] == pytest.approx(told[1], rel=1e-4)


def test_native_kernels_tell_of_the_update_that_arrived():
    library_or_skip()
    params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0))) for shape in ((5, 3), (7,))]
    numbers = {}
    for backend in ("native", "reference"):
        copies = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = SmallFCLOpt(copies, weight_decay=0.1, backend=backend)
        optimizer.enable_telemetry(per_parameter=True)
        give_gradients(copies, seed=0)
        optimizer.step()
        numbers[backend] = optimizer.telemetry()
    # The kernels' update is a difference of float32 parameters, a thousand times as large as it.
    assert numbers["native"] == pytest.approx(numbers["reference"], rel=1e-3)


def test_what_the_rule_decides_and_remembers_is_told():
    params = [nn.Parameter(torch.ones(3, 2)) for _ in range(3)] + [nn.Parameter(torch.ones(4))]
    optimizer = DecidingOpt(params, lr=0.5)
    optimizer.enable_telemetry(per_parameter=True)
    assert optimizer.telemetry() == {"optim/DecidingOpt/nonfinite_steps": 0}
    for _ in range(2):
        give_gradients(params, seed=0)
        optimizer.step()
    told = {key.removeprefix("optim/DecidingOpt/"): value for key, value in optimizer.telemetry().items()}
    assert told["memory_of_steps"] == 2
    assert [told[f"param/0.{index}/lr_mult"] for index in range(4)] == [1, 2, 3, 1]
    assert [told[f"param/0.{index}/shared"] for index in range(4)] == [0.25] * 4
    assert (told["group0/lr_mult"], told["group0/shared"]) == (7 / 4, 0.25)
    for index, factor in enumerate([1, 2, 3, 1]):
        rms = params[index].grad.square().mean().sqrt().item()
        assert told[f"param/0.{index}/update_rms"] == pytest.approx(0.5 * 0.25 * factor * rms)
        assert told[f"param/0.{index}/cosine"] == pytest.approx(1)
    assert not [key for key in told if "mixture" in key or "theta" in key]


def test_nothing_to_compare_with_is_nan():
    params = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))]
    params[0].grad, params[1].grad = torch.ones(3), torch.zeros(3)
    optimizer = DecidingOpt([{"params": [p]} for p in params])
    optimizer.enable_telemetry()
    optimizer.step()
    told = optimizer.telemetry()
    assert math.isnan(told["optim/DecidingOpt/group0/update_ratio"])
    assert told["optim/DecidingOpt/group0/cosine"] == pytest.approx(1)
    assert math.isnan(told["optim/DecidingOpt/group1/cosine"])
    assert told["optim/DecidingOpt/group1/update_rms"] == told["optim/DecidingOpt/group1/update_ratio"] == 0


def test_a_skipped_step_is_counted_and_leaves_the_numbers_of_the_step_before():
    params = parameters()
    optimizer = SmallFCLOpt(params)
    optimizer.enable_telemetry()
    give_gradients(params, seed=0)
    optimizer.step()
    before = optimizer.telemetry()
    params[4].grad[0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="was skipped"):
        optimizer.step()
    assert optimizer.telemetry() == {**before, "optim/SmallFCLOpt/nonfinite_steps": 1}


def test_gradients_read_as_zero_are_zero_in_the_cosine():
    params = [nn.Parameter(torch.ones(4, dtype=torch.float64))]
    optimizer = DecidingOpt(params, on_nonfinite="zero")
    optimizer.enable_telemetry()
    params[0].grad = torch.tensor([1.0, math.inf, math.nan, 2.0], dtype=torch.float64)
    optimizer.step()
    told = optimizer.telemetry()
    assert told["optim/DecidingOpt/group0/cosine"] == pytest.approx(1)
    assert told["optim/DecidingOpt/group0/update_rms"] == pytest.approx(0.25 * math.sqrt(5 / 4))


def test_parameters_without_a_gradient_have_no_numbers():
    params = parameters()
    optimizer = SmallFCLOpt([{"params": params[:2]}, {"params": params[2:]}])
    optimizer.enable_telemetry(per_parameter=True)
    give_gradients(params, seed=0)
    params[0].grad = params[1].grad = params[2].grad = None
    optimizer.step()
    owners = {key.removeprefix("optim/SmallFCLOpt/").rpartition("/")[0] for key in optimizer.telemetry()}
    assert owners == {"", "group1", *(f"param/1.{position}" for position in range(1, 6))}


# -- does it change or cost anything? ----------------------------------------------------------------------------------


def run(name, switch, dtype=torch.float32):
    """Parameters, state and state dict after some steps, with telemetry switched by ``switch``."""
    params = parameters(dtype)
    optimizer = create(params, name, num_steps=4, weight_decay=0.1, max_grad_norm=1.0)
    for seed in range(4):
        switch(optimizer, seed)
        give_gradients(params, seed)
        optimizer.step(loss=1.0 / (seed + 1))
        optimizer.telemetry()
    states = [tensor for p in params for tensor in optimizer.state[p].values()]
    return [*params, *states], optimizer.state_dict()


SWITCHES = {
    "off": lambda optimizer, step: None,
    "on": lambda optimizer, step: optimizer.enable_telemetry(per_parameter=True) if step == 0 else None,
    "off and on": lambda o, step: o.enable_telemetry() if step % 2 else o.disable_telemetry(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*distinct_rules(), "toy_loss"])
def test_trajectory_and_state_are_the_same_bit_for_bit(toy_loss, name, dtype):
    results = [run(name, switch, dtype) for switch in SWITCHES.values()]
    tensors, state_dict = results[0]
    for others, other_dict in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))
        assert other_dict["param_groups"] == state_dict["param_groups"]
        assert other_dict["state"].keys() == state_dict["state"].keys()


class Ops(TorchDispatchMode):
    """Every operation that runs, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def ops_of_a_step(switch) -> list[str]:
    params = parameters(torch.float32)
    optimizer = SmallFCLOpt(params)
    switch(optimizer)
    give_gradients(params, seed=0)
    optimizer.step()
    with Ops() as ops:
        optimizer.step()
    return ops.names


def test_off_means_no_further_operation(monkeypatch):
    def switch_off(optimizer):
        optimizer.enable_telemetry()
        optimizer.disable_telemetry()

    monkeypatch.setattr(engine_module, "StepRecord", None)  # whoever makes one fails
    assert ops_of_a_step(lambda optimizer: None) == ops_of_a_step(switch_off)
    monkeypatch.undo()
    assert len(ops_of_a_step(lambda optimizer: optimizer.enable_telemetry())) > len(ops_of_a_step(switch_off))


def test_on_reads_the_device_no_more_often_than_off():
    def reads(switch):
        return [name for name in ops_of_a_step(switch) if "local_scalar" in name or "_to_copy" in name]

    assert reads(lambda optimizer: optimizer.enable_telemetry(True)) == reads(lambda optimizer: None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nothing_waits_until_it_is_read():
    import warnings

    def waits(act) -> int:
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                act()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return len(caught)

    params = [nn.Parameter(p.detach().cuda()) for p in parameters(torch.float32)]
    optimizer = SmallFCLOpt(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    off = waits(optimizer.step)
    optimizer.enable_telemetry(per_parameter=True)
    assert waits(optimizer.step) == off
    assert waits(optimizer.telemetry) > 0


# -- is it a setting of the object only? -------------------------------------------------------------------------------


def test_off_tells_nothing_and_copies_are_off():
    params = parameters()
    optimizer = SmallFCLOpt(params)
    assert optimizer.telemetry() == {}
    optimizer.enable_telemetry()
    give_gradients(params, seed=0)
    optimizer.step()
    assert optimizer.telemetry()
    assert copy.deepcopy(optimizer).telemetry() == pickle.loads(pickle.dumps(optimizer)).telemetry() == {}
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.telemetry()
    optimizer.disable_telemetry()
    assert optimizer.telemetry() == {}


def test_names_are_those_of_the_optimizer_also_inside_a_wrapper():
    params = parameters()
    optimizer = SmallFCLOpt(params)
    wrapper = types.new_class("LightningSmallFCLOpt", (SmallFCLOpt,))
    proxy = object.__new__(wrapper)  # as Lightning and Fabric make theirs
    proxy.__dict__.update({**vars(optimizer), "_optimizer": optimizer})
    proxy.enable_telemetry()
    optimizer.load_state_dict(optimizer.state_dict())  # as on resuming
    give_gradients(params, seed=0)
    optimizer.step()
    assert proxy.telemetry() == optimizer.telemetry()
    assert all(name.startswith("optim/SmallFCLOpt/") for name in optimizer.telemetry())


@pytest.mark.parametrize(("mode", "owners"), [(False, 0), (True, 2), ("per_parameter", 4)])
def test_create_optimizer_switches_it_on(mode, owners):
    model = nn.Linear(3, 2)  # of which the bias is a group of its own
    optimizer = create_optimizer(model, "small_fc_lopt", telemetry=mode)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert sum(name.endswith("update_rms") for name in optimizer.telemetry()) == owners


def test_create_optimizer_refuses_an_unknown_mode():
    with pytest.raises(ValueError, match=r"telemetry='all' is unknown.*'per_parameter'"):
        create_optimizer(nn.Linear(3, 2), "small_fc_lopt", telemetry="all")
