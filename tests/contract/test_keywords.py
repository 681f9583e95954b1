"""Is a keyword of an optimizer declared once, and do all who read keywords find the same?"""

from __future__ import annotations

import inspect
import typing

import pytest
import torch
from torch import nn

from pylo_integrations import (
    CELO2,
    ELOCELO2,
    Celo,
    CeloAdam,
    LearnedOptimizer,
    Pace,
    SmallFCLOpt,
    get_optimizer_info,
    list_optimizers,
)
from pylo_integrations.keywords import (
    CeloKeywords,
    Keywords,
    NetworkKeywords,
    Orthogonalising,
    ThetaKeywords,
    WeightsKeywords,
)

pytestmark = pytest.mark.usefixtures("small_thetas")
DECLARATIONS = [Keywords, WeightsKeywords, ThetaKeywords, NetworkKeywords, Orthogonalising, CeloKeywords]
SPECS = [get_optimizer_info(name) for name in list_optimizers()]


def parameters():
    return [nn.Parameter(torch.ones(2, 2))]


def keywords_of(cls: type) -> dict[str, inspect.Parameter]:
    found = inspect.signature(cls).parameters.values()
    return {parameter.name: parameter for parameter in found if parameter.kind is parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("cls", [LearnedOptimizer, *(spec.cls for spec in SPECS)])
def test_signature_and_hints_have_every_declared_keyword(cls):
    own = keywords_of(cls)
    hints = typing.get_type_hints(cls.__init__)
    assert Keywords.__annotations__.keys() <= own.keys()
    for name, parameter in own.items():
        assert hints[name] == parameter.annotation and parameter.default is not parameter.empty
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(cls).parameters.values())


@pytest.mark.parametrize("declaration", DECLARATIONS)
def test_declarations_say_what_each_is_and_its_default_is_of_its_type(declaration):
    ours = declaration.__annotations__.keys() - {
        name for before in DECLARATIONS[: DECLARATIONS.index(declaration)] for name in before.__annotations__
    }
    assert ours
    for name in ours:
        assert f"        {name}: " in (declaration.__doc__ or ""), name
        hint = typing.get_type_hints(declaration, include_extras=True)[name]
        if typing.get_origin(hint) is typing.Annotated:
            kind, default = typing.get_args(hint)
            choices = typing.get_args(kind)
            assert default in choices if choices else isinstance(default, kind)
        else:
            assert type(None) in typing.get_args(hint)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_others_are_refused_by_name(spec):
    assert ("exp_mult" in spec.options) == (spec.cls not in (CeloAdam, Pace))
    assert ("phase" in spec.options) == (spec.cls is Celo)
    assert ("orthogonalise" in spec.options) == (spec.cls in (CELO2, ELOCELO2, Pace))
    for wrong in ({"step_mul": 1.0}, {"exp_mult": 1.0} if spec.cls is CeloAdam else {"usual_lrs": ()}):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
            spec.cls(parameters(), **wrong)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_defaults_are_those_of_the_class_also_of_a_subclass(spec):
    class Mine(spec.cls):
        default_lr = 0.25
        default_weight_decay = 0.125
        default_max_grad_norm = 3.0

    horizon = {"num_steps": 10} if spec.needs_horizon else {}
    mine = Mine(parameters(), **horizon)
    assert (mine.defaults["lr"], mine.defaults["weight_decay"], mine.max_grad_norm) == (0.25, 0.125, 3.0)
    asked = Mine(parameters(), 0.5, weight_decay=0.0, max_grad_norm=float("inf"), **horizon)
    assert (asked.defaults["lr"], asked.defaults["weight_decay"], asked.max_grad_norm) == (0.5, 0.0, None)


def test_params_may_be_a_keyword():
    assert SmallFCLOpt(params=parameters(), lr=0.5).defaults["lr"] == 0.5
