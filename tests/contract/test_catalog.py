"""Do names find optimizers, and do mistakes find help?"""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from pylo_integrations import (
    LearnedOptimizer,
    OptimizerSpec,
    SmallFCLOpt,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
    register_optimizer,
    unregister_optimizer,
)

pytestmark = pytest.mark.usefixtures("small_thetas")


@pytest.fixture
def params():
    return [nn.Parameter(torch.ones(3, 2))]


def test_listing_filters_by_substring_and_wildcard():
    assert "small_fc_lopt" in list_optimizers()
    assert "small_fc_lopt" in list_optimizers("fc") and "small_fc_lopt" in list_optimizers("small*")
    assert list_optimizers("fc*") == [] and list_optimizers("nothing") == []


@pytest.mark.parametrize("name", list_optimizers())
def test_every_entry_is_whole(name, params):
    spec = get_optimizer_info(name)
    assert spec.name == name and spec.description and issubclass(spec.cls, LearnedOptimizer)
    optimizer = create_optimizer(params, name, num_steps=5)
    assert type(optimizer) is spec.cls and optimizer.param_groups[0]["lr"] == spec.lr
    assert (optimizer.needs_loss, optimizer.needs_horizon) == (spec.needs_loss, spec.needs_horizon)
    assert optimizer.num_steps == 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.lr = 2.0
    for parameter in list(inspect.signature(spec.cls).parameters.values())[1:]:
        # Lightning's CLI builds optimizers from parameters and types alone.
        assert parameter.default is not parameter.empty and parameter.annotation is not parameter.empty, parameter


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("small_fc", "did you mean 'small_fc_lopt'"),
        ("smalfclopt", "small_fc_lopt"),
        ("zzz", "available"),
        (3, "available"),
        ("Celo-Adam", r"did you mean 'celo_adam'\?$"),
        ("CELO2", r"did you mean 'celo2'\?$"),
        ("CELO2Base", r"did you mean 'celo2_base'\?$"),
        ("mulp", "did you mean 'mulo'"),
        ("lion", "available"),
    ],
)
def test_unknown_names_list_near_matches(name, hint, params):
    with pytest.raises(ValueError, match=hint):
        create_optimizer(params, name)


@pytest.mark.parametrize(
    "name", ["adamw", "AdamW", "adam", "sgd", "nadam", "muon", "adafactor", "adamw_torch_fused", "paged-adamw_32bit"]
)
def test_optimizers_of_others_are_named_as_such(name, params):
    """No learned optimizer is suggested for how its name is spelt."""
    with pytest.raises(ValueError, match="it is no learned one: use .*learned ones are") as caught:
        create_optimizer(params, name)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "is_learned"), [({"betas": (0.9, 0.99)}, True), ({"eps": 1e-8}, True), ({"fused": True}, False)]
)
def test_unknown_options_are_named_with_the_known_ones(params, option, is_learned):
    [name] = option
    with pytest.raises(TypeError, match=rf"no option \['{name}'\]; it has .*'telemetry', .*'weight_decay'") as caught:
        create_optimizer(params, "small_fc_lopt", **option)
    advice = "betas and eps are part of the learned weights: leave them out"
    assert (advice in str(caught.value)) == is_learned


def test_options_reach_the_optimizer(params):
    optimizer = create_optimizer(
        params, "small_fc_lopt", 0.5, 0.1, num_steps=7, step_mult=0.25, max_grad_norm=2.0, maximize=True
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["maximize"]) == (0.5, 0.1, True)
    assert (optimizer.num_steps, optimizer.rule.step_mult, optimizer.max_grad_norm) == (7, 0.25, 2.0)


def test_registering_and_its_defaults(params):
    spec = OptimizerSpec("mine", SmallFCLOpt, "mine", lr=0.5, defaults={"step_mult": 0.125})
    register_optimizer(spec)
    try:
        with pytest.raises(ValueError, match="already registered"):
            register_optimizer(spec)
        optimizer = create_optimizer(params, "mine")
        assert optimizer.rule.step_mult == 0.125 and optimizer.param_groups[0]["lr"] == 0.5
        assert create_optimizer(params, "mine", step_mult=1.0).rule.step_mult == 1.0
    finally:
        unregister_optimizer("mine")
    with pytest.raises(ValueError, match="'mine'"):
        unregister_optimizer("mine")
