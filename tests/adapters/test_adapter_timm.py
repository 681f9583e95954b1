"""Does timm build learned optimizers by name, without losing anything of its own?"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")
from timm.optim._optim_factory import default_registry  # noqa: E402

from pylo_integrations import (  # noqa: E402
    OptimizerSpec,
    SmallFCLOpt,
    list_optimizers,
    param_groups,
    register_optimizer,
    unregister_optimizer,
)
from pylo_integrations.timm import register, unregister  # noqa: E402

pytestmark = pytest.mark.timeout(60)


def contents() -> tuple:
    return dict(default_registry._optimizers), dict(vars(default_registry))


@pytest.fixture(autouse=True)
def _restored():
    before = contents()
    yield
    unregister()
    assert contents() == before


@pytest.fixture
def registered():
    register()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.token = nn.Parameter(torch.zeros(1, 1, 4))

    def no_weight_decay(self):
        return {"token"}

    def forward(self, index):
        return self.head(self.norm(self.embed(index) + self.token))


@pytest.fixture
def entry():
    """Adds to the catalogue for the duration of a test."""
    names = []

    def add(name: str, **options) -> None:
        register_optimizer(OptimizerSpec(name, SmallFCLOpt, "for a test", **options))
        names.append(name)

    yield add
    for name in names:
        unregister_optimizer(name)


def test_every_catalogue_name_is_built(registered, small_thetas):
    for name in list_optimizers():
        assert name in timm.optim.list_optimizers() and timm.optim.list_optimizers(name) == [name]
        optimizer = timm.optim.create_optimizer_v2(Net(), name)
        assert isinstance(optimizer, timm.optim.get_optimizer_info(name).opt_class)
    assert ("small_fc_lopt", timm.optim.get_optimizer_info("small_fc_lopt").description) in timm.optim.list_optimizers(
        "small*", with_description=True
    )


def test_nothing_happens_before_register():
    assert "small_fc_lopt" not in timm.optim.list_optimizers()
    with pytest.raises(ValueError, match="not found"):
        timm.optim.create_optimizer_v2(Net(), "small_fc_lopt")


def test_options_reach_the_optimizer(registered):
    optimizer = timm.optim.create_optimizer_v2(
        Net(), "Small_FC_LOpt", lr=0.25, weight_decay=0.1, num_steps=7, max_grad_norm=1.0, weight_decay_policy="after"
    )
    assert type(optimizer) is SmallFCLOpt and (optimizer.num_steps, optimizer.max_grad_norm) == (7, 1.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    assert {group["weight_decay_policy"] for group in optimizer.param_groups} == {"after"}


def test_an_unknown_option_is_an_error(registered):
    with pytest.raises(TypeError, match="nesterov"):
        timm.optim.create_optimizer_v2(Net(), "small_fc_lopt", nesterov=True)


def test_defaults_are_those_of_the_catalogue_entry(entry):
    entry("test_entry", lr=0.125, defaults={"max_grad_norm": 3.0})
    register()
    optimizer = timm.optim.create_optimizer_v2(Net(), "test_entry", lr=None)
    assert optimizer.param_groups[0]["lr"] == 0.125 and optimizer.max_grad_norm == 3.0
    assert timm.optim.create_optimizer_v2(Net(), "test_entry", max_grad_norm=1.0).max_grad_norm == 1.0
    bound = timm.optim.get_optimizer_class("test_entry")(Net().parameters())
    assert bound.param_groups[0]["lr"] == 0.125


def test_training_script_arguments_are_understood(registered):
    # The namespace of timm's train.py: momentum, eps and betas come along whatever the optimizer is.
    from types import SimpleNamespace

    arguments = SimpleNamespace(
        opt="small_fc_lopt", lr=0.5, weight_decay=0.05, momentum=0.9, opt_eps=1e-8, opt_betas=[0.9, 0.99], opt_args={}
    )
    optimizer = timm.optim.create_optimizer_v2(Net(), **timm.optim.optimizer_kwargs(arguments))
    assert optimizer.param_groups[0]["lr"] == 0.5


def by_name(model: nn.Module, optimizer, key: str) -> dict:
    names = {param: name for name, param in model.named_parameters()}
    return {names[param]: group[key] for group in optimizer.param_groups for param in group["params"]}


def test_weight_decay_groups_are_timms_or_ours(registered):
    model = Net()
    theirs = timm.optim.create_optimizer_v2(model, "small_fc_lopt", weight_decay=0.1)
    assert by_name(model, theirs, "weight_decay") == {
        "embed.weight": 0.1, "head.weight": 0.1, "head.bias": 0.0, "norm.weight": 0.0, "norm.bias": 0.0, "token": 0.0,
    }  # fmt: skip
    ours = timm.optim.create_optimizer_v2(
        model, "small_fc_lopt", weight_decay=0.1, param_group_fn=partial(param_groups, weight_decay=0.1)
    )
    decay = by_name(model, ours, "weight_decay")
    assert decay.pop("head.weight") == 0.1 and set(decay.values()) == {0.0}
    assert by_name(model, ours, "axes")["embed.weight"] == "in_out"


def test_layer_decay_and_bare_parameters(registered):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=12, depth=2, num_heads=2)
    optimizer = timm.optim.create_optimizer_v2(model, "small_fc_lopt", weight_decay=0.1, layer_decay=0.5)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) == 4
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert optimizer.iteration == 1
    bare = timm.optim.create_optimizer_v2(model.parameters(), "small_fc_lopt", weight_decay=0.1)
    assert len(bare.param_groups) == 1 and bare.param_groups[0]["weight_decay"] == 0.1


def test_lookahead_wraps_the_optimizer(registered):
    model = Net()
    optimizer = timm.optim.create_optimizer_v2(model, "lookahead_small_fc_lopt", lr=0.5)
    assert type(optimizer).__name__ == "Lookahead" and type(optimizer._base_optimizer) is SmallFCLOpt
    before = model.head.weight.clone()
    model(torch.arange(5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.head.weight)


@pytest.mark.parametrize("name", ["adamw", "lookahead_adam", "nesterov"])
def test_timms_own_optimizers_are_as_before(name):
    before = timm.optim.create_optimizer_v2(Net(), name, lr=0.1, weight_decay=0.1)
    register()
    after = timm.optim.create_optimizer_v2(Net(), name, lr=0.1, weight_decay=0.1)
    assert type(after) is type(before) and repr(after) == repr(before)


def test_an_unknown_name_is_timms_error(registered):
    with pytest.raises(ValueError, match="not found"):
        timm.optim.create_optimizer_v2(Net(), "small_fc_lop")


def test_names_with_one_ending_stay_apart(entry):
    # timm by itself would read both as "ending".
    entry("ending", lr=0.1)
    entry("other_ending", lr=0.2)
    register()
    rates = [timm.optim.create_optimizer_v2(Net(), name).param_groups[0]["lr"] for name in ("ending", "other_ending")]
    assert rates == [0.1, 0.2]


def test_register_twice_adds_what_is_new(entry, caplog):
    register()
    once = contents()
    register()
    assert contents() == once and not caplog.records, "timm warns when a name is overwritten"
    entry("test_entry")
    register()
    assert "test_entry" in timm.optim.list_optimizers()


def test_unregister_twice(registered):
    unregister()
    unregister()
    assert "small_fc_lopt" not in timm.optim.list_optimizers()
    assert "create_optimizer" not in vars(default_registry)


def test_a_name_of_timms_is_not_taken_over(entry):
    before = contents()
    entry("adamw")
    with pytest.raises(ValueError, match=r"\['adamw'\]"):
        register()
    assert contents() == before
