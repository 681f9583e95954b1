"""Does every scheduler of torch drive a learned optimizer, constructed as its documentation shows and with defaults?

The list is read off ``torch.optim.lr_scheduler``: one that torch adds fails here until it is tested.
"""

from __future__ import annotations

import copy

import pytest
import torch
from scheduler_cases import MAKERS, OFFERED, STEPS, start, step
from thetas import create
from torch import nn
from torch.optim import lr_scheduler as schedulers

from pylo_integrations import list_optimizers


def test_every_scheduler_of_torch_is_here():
    assert MAKERS.keys() == OFFERED | {"SWALR"}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["celo2", "celo", "small_fc_lopt"])
def test_learning_rates_are_those_of_sgd(small_thetas, name, kind):
    ours = start(name, MAKERS[kind])
    groups = ours[1].param_groups
    base = [group.get("initial_lr", group["lr"]) for group in groups][0]
    theirs = start(lambda params: torch.optim.SGD(params, float(base), momentum=0.9), MAKERS[kind])
    if kind == "ReduceLROnPlateau":
        theirs = (ours[0], None, None)  # what it does depends on the losses
    for index in range(STEPS):
        rates = step(*ours, index)
        assert len(set(rates)) == 1
        if theirs[1] is not None:
            assert rates[0] == pytest.approx(step(*theirs, index)[0])
            momenta = [{key: g[key] for key in g if "momentum" in key} for g in groups]
            if theirs[2].__class__.__name__ in ("CyclicLR", "OneCycleLR"):
                assert momenta[0]["momentum"] == pytest.approx(theirs[1].param_groups[0]["momentum"])
            else:
                assert not any(momenta)
    assert all(torch.isfinite(param).all() for param in ours[0].parameters())


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["celo2", "celo"])
def test_a_resumed_run_equals_an_uninterrupted_one(small_thetas, name, kind):
    whole = start(name, MAKERS[kind])
    saved = None
    for index in range(STEPS):
        if index == STEPS // 2:
            saved = copy.deepcopy([part.state_dict() for part in whole])
        step(*whole, index)
    resumed = start(name, MAKERS[kind])
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    for index in range(STEPS // 2, STEPS):
        step(*resumed, index)
    for key, value in whole[0].state_dict().items():
        assert torch.equal(value, resumed[0].state_dict()[key])
    strip = lambda groups: [{k: v for k, v in group.items() if k != "params"} for group in groups]  # noqa: E731
    assert strip(whole[1].param_groups) == strip(resumed[1].param_groups)


@pytest.mark.parametrize("name", list_optimizers())
def test_momentum_is_a_default_that_no_group_has_and_nothing_reads(small_thetas, name):
    model, optimizer, _ = start(name, lambda o: None)
    assert optimizer.defaults["momentum"] == 0.0
    optimizer.add_param_group({"params": [("first", nn.Parameter(torch.zeros(2)))]})
    assert not any("momentum" in group for group in optimizer.param_groups)
    optimizer.add_param_group({"params": [("second", nn.Parameter(torch.zeros(3)))], "momentum": 0.7})
    assert optimizer.param_groups[-1]["momentum"] == 0.7
    plain, cycled = (start(name, lambda o: schedulers.LambdaLR(o, lambda step: 1.0)) for _ in range(2))
    for group in cycled[1].param_groups:
        group["momentum"] = 0.95
    for index in range(2):
        step(*plain, index), step(*cycled, index)
    assert all(torch.equal(*pair) for pair in zip(plain[0].parameters(), cycled[0].parameters(), strict=True))


TIMM = {
    "CosineLRScheduler": {"t_initial": STEPS, "warmup_t": 2, "warmup_lr_init": 0.01},
    "MultiStepLRScheduler": {"decay_t": [2, 4], "decay_rate": 0.5},
    "PolyLRScheduler": {"t_initial": STEPS},
    "StepLRScheduler": {"decay_t": 2, "decay_rate": 0.5},
    "TanhLRScheduler": {"t_initial": STEPS},
}


@pytest.mark.parametrize("kind", TIMM)
def test_timms_schedulers_drive_it_as_they_drive_sgd(kind):
    timm = pytest.importorskip("timm.scheduler")

    def make(optimizer):
        return getattr(timm, kind)(optimizer, **TIMM[kind])

    rates = []
    for name in ("celo2", lambda params: torch.optim.SGD(params, 3e-4)):
        model, optimizer, scheduler = start(name, make)
        for group in optimizer.param_groups:
            assert group["initial_lr"] == pytest.approx(3e-4)
        rates.append([])
        for index in range(STEPS):
            scheduler.step(index + 1, 1.0)
            rates[-1].append(optimizer.param_groups[0]["lr"])
            loss = model(torch.ones(2, 4)).square().mean()
            loss.backward()
            optimizer.step()
    assert rates[0] == pytest.approx(rates[1]) and len(set(rates[0])) > 1


@pytest.mark.parametrize("factor", [1 / 3, 0.3, 0.1, 0.7, 0.05])
def test_schedules_to_zero_may_end_a_rounding_error_below_it(factor):
    for steps in (3, 5, 7, 11, 20, 33):
        optimizer = create([nn.Parameter(torch.ones(3, 2))], "small_fc_lopt", 1e-3)
        scheduler = schedulers.LinearLR(optimizer, factor, 0.0, total_iters=steps)
        for _ in range(steps + 1):
            optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
            optimizer.step()
            scheduler.step()
        optimizer.load_state_dict(optimizer.state_dict())
