"""Is whatever someone puts into a parameter group refused before anything moves, or else obeyed?"""

from __future__ import annotations

import math
import warnings
from typing import get_args

import numpy as np
import pytest
import torch
from thetas import create
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from pylo_integrations import CheckpointError, get_optimizer_info, list_optimizers
from pylo_integrations.decay import DecayPolicy
from pylo_integrations.options import OptionCheck

pytestmark = [
    pytest.mark.usefixtures("small_thetas"),
    pytest.mark.filterwarnings("ignore:weight_decay=:RuntimeWarning", "ignore:lr=:RuntimeWarning"),
]

NAMES = list_optimizers()
BAD = [
    ("lr", None),
    ("lr", math.nan),
    ("lr", math.inf),
    ("lr", -1.0),
    ("lr", "0.1"),
    ("lr", 1e39),
    ("lr", 1e13),
    ("lr", 1j),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(math.nan)),
    ("lr", torch.tensor(-1.0)),
    ("lr", torch.tensor(1j)),
    ("lr", np.array([0.1, 0.2])),
    ("lr", torch.ones(1).to_sparse()),
    ("lr", torch.tensor(1.0).to(torch.float8_e4m3fn)),
    ("lr", torch.tensor(True)),
    ("weight_decay", None),
    ("weight_decay", torch.ones(1, 1).to_sparse()),
    ("weight_decay", torch.tensor(0.1).to(torch.float8_e5m2)),
    ("weight_decay", 1e39),
    ("weight_decay", math.nan),
    ("weight_decay", -0.1),
    ("weight_decay", "0.1"),
    ("weight_decay_policy", "sgd"),
    ("weight_decay_policy", None),
    ("maximize", None),
    ("maximize", "false"),
    ("axes", "in"),
    ("axes", None),
    ("rule", "sgd"),
    ("rule", None),
    ("state_dtype", "int4"),
    ("state_dtype", None),
    ("state_dtype", torch.int8),
    ("base_lr", math.nan),
    ("base_lr", "1"),
    ("base_lr", torch.ones(1).to_sparse()),
]


ON_BACKENDS = pytest.mark.parametrize(
    ("name", "backend"), [*((name, "auto") for name in NAMES), ("celo2", "reference")]
)
"""Every optimizer, and one with torch's functions: options are looked at before backends matter."""


def make(name: str, backend: str = "auto", **options):
    params = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))]
    optimizer = create([{"params": params[:1]}, {"params": params[1:]}], name, backend=backend, **options)
    for k in range(2):
        give(params, k)
        optimizer.step(loss=1.0)
    give(params, 2)
    return params, optimizer


def give(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def everything(optimizer, params):
    states = [value for p in params for value in optimizer.state[p].values()]
    return [t.clone() for t in (*params, *states, *optimizer._progress.memory.values())]


def assert_nothing_moved(optimizer, params, before) -> None:
    after = everything(optimizer, params)
    assert len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@ON_BACKENDS
def test_what_is_set_later_is_checked_before_anything_moves(name, backend):
    params, optimizer = make(name, backend)
    before = everything(optimizer, params)
    for option, value in BAD:
        group = optimizer.param_groups[1]
        good = group.get(option, "float32")
        group[option] = value
        with pytest.raises(ValueError, match=rf"parameter group 1: .*{option}"):
            optimizer.step(loss=1.0)
        assert_nothing_moved(optimizer, params, before)
        group[option] = good
    optimizer.step(loss=1.0)
    assert optimizer.iteration == 3


@pytest.mark.parametrize("option", ["lr", "weight_decay", "weight_decay_policy", "maximize", "axes", "rule"])
def test_an_option_that_is_gone_is_named(option):
    params, optimizer = make("celo2")
    before = everything(optimizer, params)
    value = optimizer.param_groups[0].pop(option)
    with pytest.raises(ValueError, match=rf"parameter group 0: the options \['{option}'\] are missing"):
        optimizer.step(loss=1.0)
    assert_nothing_moved(optimizer, params, before)
    optimizer.param_groups[0][option] = value
    optimizer.step(loss=1.0)


@pytest.mark.parametrize(("option", "value"), [case for case in BAD if case[0] != "base_lr"], ids=str)
def test_the_same_is_refused_at_construction(option, value):
    p = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=option):
        create([{"params": [p], option: value}], "small_fc_lopt")


def test_a_tensor_lr_is_checked_as_it_is_now():
    lr = torch.tensor(0.5)
    params, optimizer = make("small_fc_lopt", lr=lr)
    before = everything(optimizer, params)
    lr.fill_(math.nan)
    with pytest.raises(ValueError, match="parameter group 0: lr="):
        optimizer.step()
    assert_nothing_moved(optimizer, params, before)
    lr.fill_(0.25)
    optimizer.step()


@pytest.mark.parametrize("lr", [np.float32(0.5), np.float64(0.5), torch.tensor([[[0.5]]]), torch.tensor(0.5).half()])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_other_numbers_are_obeyed(lr, backend):
    params, optimizer = make("celo", backend)
    twins, plain = make("celo", backend)
    optimizer.param_groups[0]["lr"] = lr
    plain.param_groups[0]["lr"] = 0.5
    optimizer.step(loss=1.0), plain.step(loss=1.0)
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q)


# -- learning rate and decay together --------------------------------------------------------------------------------


POLICIES = get_args(DecayPolicy)


def largest_decay(optimizer, policy: str, lr: float) -> float:
    """The weight decay that leaves nothing of a parameter in one step."""
    rates = {"adamw": lr * optimizer.adamw_lr / optimizer.default_lr, "l2": 1e-6}
    coupled = lr * (20 if type(optimizer).__name__ == "CELO2" else 1)  # Adam's tensors
    return 1 / rates.get(policy, 1.0 if "independent" in policy else coupled)


def numbers_of(value: float) -> list:
    return [value, np.float64(value), torch.tensor(value), torch.tensor([value], dtype=torch.float64)]


@pytest.mark.parametrize("policy", POLICIES)
@ON_BACKENDS
def test_decay_that_would_take_more_than_all_is_refused_before_anything_moves(name, policy, backend):
    params, optimizer = make(name, backend, weight_decay_policy=policy)
    before, group = everything(optimizer, params), optimizer.param_groups[1]
    lr = group["lr"]
    largest = largest_decay(optimizer, policy, lr)
    told = rf"parameter group 1: .*weight_decay=.* with weight_decay_policy='{policy}' .*: choose "
    told += "" if policy == "l2" else rf"weight_decay {largest:.3g} or less".replace("+", r"\+")
    for decay in (value for times in (1.01, 1e30) for value in numbers_of(times * largest)):
        group["weight_decay"] = decay
        with pytest.raises(ValueError, match=told) as caught:
            optimizer.step(loss=1.0)
        assert policy == "l2" or f"lr={lr:g}" in str(caught.value)
        assert_nothing_moved(optimizer, params, before)
    group["weight_decay"] = largest
    for k in range(3):
        give(params, k)
        optimizer.step(loss=1.0)
        assert all(value.isfinite().all() for value in everything(optimizer, params))


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "l2"])
@ON_BACKENDS
def test_a_schedule_of_the_learning_rate_cannot_make_decay_too_large(name, policy, backend):
    lr = get_optimizer_info(name).lr
    for given in (lr, torch.tensor(lr)):
        params, optimizer = make(name, backend, lr=given, weight_decay_policy=policy)
        for group in optimizer.param_groups:
            group["weight_decay"] = 0.5 * largest_decay(optimizer, policy, lr)
        scheduler = LambdaLR(optimizer, lambda step: step)
        for _ in range(3):  # 0, 1, 2 times lr
            optimizer.step(loss=1.0)
            scheduler.step()
        before = everything(optimizer, params)
        with pytest.raises(ValueError, match="parameter group 0: lr=.* shrink a parameter by 1.5 times itself"):
            optimizer.step(loss=1.0)
        assert_nothing_moved(optimizer, params, before)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_it_is_refused_in_new_groups_and_checkpoints_too(name, policy):
    new = {"params": [nn.Parameter(torch.ones(2))], "weight_decay": 1e30, "weight_decay_policy": policy}
    with pytest.raises(ValueError, match="parameter group 0: .*weight_decay=1e\\+30"):
        create([new], name)
    params, optimizer = make(name)
    with pytest.raises(ValueError, match="parameter group 2: .*weight_decay=1e\\+30"):
        optimizer.add_param_group(new)
    assert len(optimizer.param_groups) == 2
    saved = optimizer.state_dict()
    saved["param_groups"][1] |= {"weight_decay": 1e30, "weight_decay_policy": policy}
    before = everything(optimizer, params)
    with pytest.raises(CheckpointError, match="parameter group 1: .*weight_decay=1e\\+30"):
        optimizer.load_state_dict(saved)
    assert_nothing_moved(optimizer, params, before)
    assert optimizer.param_groups[1]["weight_decay"] == optimizer.param_groups[0]["weight_decay"] < 1


def test_no_decay_is_none_whatever_the_learning_rates():
    params, optimizer = make("small_fc_lopt", weight_decay_policy="before_independent")
    optimizer.param_groups[0]["base_lr"] = 1e-320
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    del optimizer.param_groups[0]["base_lr"]
    with pytest.raises(ValueError, match=r"parameter group 0: the options \['base_lr'\] are missing"):
        optimizer.step()


@ON_BACKENDS
def test_a_learning_rate_in_half_precision_does_not_lose_the_decay(name, backend):
    lr = get_optimizer_info(name).lr
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        halved = torch.tensor([[[lr]]], dtype=dtype)
        (params, optimizer), (twins, plain) = (
            make(name, backend, lr=value, weight_decay=0.1) for value in (halved, float(halved))
        )
        for k in range(3, 20):
            give(params, k), give(twins, k)
            optimizer.step(loss=1.0), plain.step(loss=1.0)
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q)


class Elsewhere(torch.Tensor):
    """A number on a device, that counts how often someone waits for it."""

    read = 0

    @property
    def device(self):
        return torch.device("cuda")

    def item(self):
        Elsewhere.read += 1
        return super().item()


def test_what_is_on_a_device_is_read_when_it_is_put_there_and_no_more():
    rule = create([nn.Parameter(torch.ones(2, 2))], "celo2").rule
    check, Elsewhere.read = OptionCheck(rule, 1.0), 0
    group = {"lr": torch.tensor(0.1).as_subclass(Elsewhere), "weight_decay": 0.1, "weight_decay_policy": "adamw"}
    group |= {"maximize": False, "axes": "out_in", "rule": "learned", "base_lr": 0.1}
    for step in range(5):
        group["weight_decay"] = 0.1 / (1 + step)  # as a schedule sets it
        check.check([group])
    assert Elsewhere.read == 1
    group["lr"] = torch.tensor(0.2).as_subclass(Elsewhere)
    check.check([group]), check.check([group])
    assert Elsewhere.read == 2
    group["weight_decay"] = 10.0
    with pytest.raises(ValueError, match="lr=0.2 and weight_decay=10 "):
        check.check([group])
    assert Elsewhere.read == 2


# -- settings of the optimizer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"), [("on_nonfinite", "ignore"), ("max_grad_norm", -1.0), ("max_grad_norm", math.nan)]
)
def test_settings_of_the_whole_optimizer_are_checked_too(setting, value):
    params, optimizer = make("celo")
    before = everything(optimizer, params)
    setattr(optimizer, setting, value)
    with pytest.raises(ValueError, match=setting):
        optimizer.step(loss=1.0)
    assert_nothing_moved(optimizer, params, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["step_mult", "exp_mult"])
def test_scales_that_are_no_numbers_are_refused(name, option):
    if option not in get_optimizer_info(name).options:
        pytest.skip("it has no such option")
    bad = [math.nan, math.inf, -math.inf, "1", torch.tensor(1.0)] + ([-1e-3] if option == "step_mult" else [])
    for value in bad:
        with pytest.raises(ValueError, match=option):
            create([nn.Parameter(torch.ones(2, 2))], name, **{option: value})


@pytest.mark.parametrize(
    "options", [{"max_grad_norm": math.nan}, {"max_grad_norm": "1"}, {"chunk_bytes": 1.5}, {"chunk_bytes": "1"}]
)
def test_numbers_of_the_constructor_are_numbers(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        create([nn.Parameter(torch.ones(2, 2))], "small_fc_lopt", **options)


# -- names of groups that are added ----------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize("name", NAMES)
def test_an_unfrozen_backbone_joins_under_its_own_names(name):
    model = Net()
    model.backbone.requires_grad_(False)
    optimizer = create(model, name)
    model.backbone.requires_grad_(True)
    optimizer.add_param_group({"params": list(model.backbone.parameters()), "lr": 0.1})
    assert optimizer.param_groups[-1]["param_names"] == ["backbone.weight", "backbone.bias"]
    for _ in range(2):
        loss = model(torch.ones(2, 3)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    twin = create(list(model.named_parameters()), name)
    groups = [dict(group) for group in optimizer.param_groups]
    twin = create([{k: v for k, v in g.items() if k in ("params", "param_names")} for g in groups], name)
    twin.load_state_dict(optimizer.state_dict())
    assert [g["param_names"] for g in twin.param_groups] == [g["param_names"] for g in groups]


def test_names_are_made_where_none_are_known():
    p, q, r = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = create([("p", p)], "celo2")
    optimizer.add_param_group({"params": q})
    optimizer.add_param_group({"params": iter([r])})
    assert [g["param_names"] for g in optimizer.param_groups] == [["p"], ["group1.0"], ["group2.0"]]
    optimizer.enable_telemetry(per_parameter=True)
    give([p, q, r], 0)
    optimizer.step()
    assert any("param/group2.0/" in key for key in optimizer.telemetry())


def test_a_named_group_gives_names_to_those_before():
    p, q, r = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = create([p, q], "celo2")
    optimizer.add_param_group({"params": [("r", r)]})
    assert [g["param_names"] for g in optimizer.param_groups] == [["group0.0", "group0.1"], ["r"]]
    give([p, q, r], 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "group",
    [
        {"params": [("q", nn.Parameter(torch.ones(2))), nn.Parameter(torch.ones(2))]},
        {"params": [("q", nn.Parameter(torch.ones(2)))], "lr": -1.0},
        {"params": [("q", nn.Parameter(torch.ones(2, dtype=torch.complex64)))]},
        {"params": [("q", "weight")]},
    ],
)
def test_a_refused_group_leaves_no_trace(group):
    p = nn.Parameter(torch.ones(2))
    optimizer = create([p], "celo2")
    with pytest.raises((TypeError, ValueError)):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1 and "param_names" not in optimizer.param_groups[0]
    give([p], 0)
    optimizer.step()


def test_names_are_those_of_the_model_inside_its_wrappers():
    model = Net()
    compiled = nn.Sequential(torch.compile(model))
    optimizer = create(compiled, "celo2")
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {f"0.{name}" for name, _ in model.named_parameters()}


def test_the_optimizer_tells_its_theta_and_horizon():
    optimizer = create([nn.Parameter(torch.ones(2))], "celo", num_steps=123)
    assert "num_steps: 123" in repr(optimizer) and optimizer.theta.sha256[:12] in repr(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(optimizer).startswith("Celo (")


def test_what_groups_keep_for_checkpoints_is_not_shown_among_their_options():
    optimizer = create([{"params": [nn.Parameter(torch.ones(2))]}, {"params": [nn.Parameter(torch.ones(3))]}], "celo2")
    optimizer.param_groups[0] |= {"tensor_state": b"as under FSDP1", "mine": 3}
    first, *groups = repr(optimizer).split("Parameter Group ")
    shown = [line.split(":")[0].strip() for line in groups[0].splitlines()[1:]]
    assert shown == sorted(optimizer.param_groups[0].keys() - {"params", "progress", "tensor_state"})
    assert "mine: 3" in groups[0] and len(groups) == 2 and "theta: Theta(" in first and "iteration: 0" in first


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_learning_rate_without_a_value_is_refused(backend):
    for name in list_optimizers():
        param = nn.Parameter(torch.ones(4, 3))
        optimizer = create([param], name, backend=backend)
        for _ in range(2):
            param.grad = torch.ones(4, 3)
            optimizer.step(loss=1.0)
        before, lr = param.detach().clone(), optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")
        with pytest.raises(ValueError, match="parameter group 0: lr=.* is on the meta device"):
            optimizer.step(loss=1.0)
        assert torch.equal(param, before), name
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step(loss=1.0)
