"""Are settings that ruin a run told once, with the right one, and is nothing said about those that do not?"""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
from disagreement_cases import LAYOUTS
from hint_cases import SPOILT, STRANGE, hint_case
from scheduler_cases import OFFERED
from thetas import create, slow_unless, theta_for
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from pylo_integrations import (
    Celo,
    NonFiniteError,
    OptimizerSpec,
    Theta,
    get_optimizer_info,
    list_optimizers,
    mup_param_groups,
)
from pylo_integrations.hints import UNTOLD

pytestmark = [pytest.mark.usefixtures("small_thetas"), pytest.mark.timeout(300)]

ENTRIES = [slow_unless(name in ("celo", "celo2"), name) for name in list_optimizers()]
WANT_SCHEDULES = {"celo2", "celo2_base", "elo", "elo_celo2"}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 2))


def take_steps(optimizer, count=1, after=None):
    loss = torch.tensor(1.0) if optimizer.needs_loss else None
    for step in range(count):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        optimizer.step(loss=loss)
        if after is not None:
            after(step)


@pytest.fixture
def told():
    """Texts of all warnings of a test."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def texts():
            found = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
            caught.clear()
            return found

        yield texts


# -- learning rate and decay ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_optimizers())
def test_a_learning_rate_from_another_world_is_told_with_the_natural_one(name, told):
    natural = get_optimizer_info(name).lr
    for lr in (natural / 11, natural * 11, torch.tensor(natural * 11), *([1e-4, 3e-4] if natural == 1 else [0.1, 1.0])):
        optimizer = create([parameter()], name, lr)
        (text,) = told()
        assert f"natural learning rate of {type(optimizer).__name__}, {natural:g}," in text
        assert ("hardly move" in text) == (float(lr) < natural)
        take_steps(optimizer, 2)
        assert told() == []


@pytest.mark.parametrize("name", list_optimizers())
def test_nothing_is_said_about_settings_that_are_meant(name, told):
    natural = get_optimizer_info(name).lr
    for lr in (None, natural / 10, natural * 10, 0.0, torch.tensor(natural)):
        take_steps(create([parameter()], name, lr), 2)
    for decay in (0.0, 0.001, 0.01, 0.1, 1.0):
        take_steps(create([parameter()], name, None, decay))
    for lr in (natural / 10, natural * 10):  # both ends of a recipe's decay at both ends of the rates
        take_steps(create([parameter()], name, lr, 0.01))
        take_steps(create([parameter()], name, lr, 0.1))
    copies = [{"params": [parameter()], "lr": lr} for lr in (natural, natural / 64, natural / 1000, 0.0)]
    take_steps(create(copies, name), 2)
    assert told() == []


@pytest.mark.parametrize("name", list_optimizers())
def test_decay_of_another_world_is_told_with_the_right_one(name, told):
    spec = get_optimizer_info(name)
    create([parameter()], name, weight_decay=2.0)
    (text,) = told()
    assert "as 2 does in AdamW" in text and "choose one between 0.01 and 0.1" in text
    create([parameter()], name, weight_decay=1e-5)
    assert "choose one between 0.01 and 0.1" in told()[0]
    create([parameter()], name, weight_decay=1e-20)
    assert len(told()) == 1
    create([parameter()], name, weight_decay=0.1, weight_decay_policy="before_independent")
    (text,) = told()
    low, high = 0.01 * spec.cls.adamw_lr, 0.1 * spec.cls.adamw_lr
    assert f'choose one between {low:.3g} and {high:.3g}, or pass weight_decay_policy="adamw"' in text
    create([parameter()], name, weight_decay=0.1, weight_decay_policy="before")
    assert len(told()) == (spec.lr == 1)
    create([parameter()], name, weight_decay=0.1, weight_decay_policy="l2")
    assert told() == []


def test_widths_of_mup_are_no_small_learning_rates(told):
    def network(width):
        return nn.Sequential(nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2))

    create(mup_param_groups(network(256), network(2), 0.05), "mulo")
    assert told() == []


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo2"])
def test_weights_and_scales_of_the_users_own_have_learning_rates_of_their_own(name, told):
    natural, adamw_lr = get_optimizer_info(name).lr, get_optimizer_info(name).cls.adamw_lr
    theta = theta_for(name)
    scaled = Theta(theta.architecture, theta.arrays, {**theta.hyper, "step_mult": 100.0})
    recorded = Theta(theta.architecture, theta.arrays, theta.hyper, training={"config": {"lr": 1000 * natural}})
    create([parameter()], name, adamw_lr / 100, weights=scaled)
    create([parameter()], name, natural, weights=scaled)
    create([parameter()], name, adamw_lr / 100, step_mult=100.0)
    create([parameter()], name, 1000 * natural, weights=recorded)
    assert told() == []
    strange = Theta(theta.architecture, theta.arrays, theta.hyper, training={"config": ["?"]})
    create([parameter()], name, natural, weights=strange)
    create([parameter()], name, 1e-6 * adamw_lr, weights=scaled)
    assert "below" in told()[0]


# -- what schedules set --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_optimizers())
def test_a_learning_rate_set_later_is_told_at_the_next_step(name, told):
    natural = get_optimizer_info(name).lr
    optimizer = create([parameter()], name, num_steps=100)
    take_steps(optimizer, 2)
    optimizer.param_groups[0]["lr"] = 30 * natural
    assert told() == []
    take_steps(optimizer)
    (text,) = told()
    assert f"is 30 times the natural learning rate of {type(optimizer).__name__}, {natural:g}," in text
    take_steps(optimizer, 2)
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        again.param_groups[0]["lr"] = 40 * natural
        take_steps(again)
    assert told() == []


LATER = {
    "by hand": lambda optimizer, **options: optimizer.param_groups[0].update(options),
    "as tensors": lambda optimizer, **options: optimizer.param_groups[0].update(
        {key: torch.tensor(value, dtype=torch.float64) for key, value in options.items()}
    ),
    "in a new group": lambda optimizer, **options: optimizer.add_param_group({"params": [parameter()], **options}),
    "from a checkpoint": lambda optimizer, **options: load(optimizer, **options),
}


def load(optimizer, **options):
    saved = optimizer.state_dict()
    saved["param_groups"][0] |= options
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("way", LATER)
@pytest.mark.parametrize("name", list_optimizers())
def test_what_is_too_large_is_told_at_the_next_step_however_it_was_set(name, way, told):
    natural = get_optimizer_info(name).lr
    for taken in (0, 2):
        optimizer = create([parameter()], name, num_steps=100)
        take_steps(optimizer, taken)
        LATER[way](optimizer, weight_decay=2.0)
        assert told() == []
        take_steps(optimizer)
        (text,) = told()
        assert "as 2 does in AdamW" in text and "choose one between 0.01 and 0.1" in text
        LATER[way](optimizer, lr=12 * natural)
        take_steps(optimizer)
        assert "is 12 times the natural learning rate" in told()[0]
        take_steps(optimizer, 2)
        assert told() == []


@pytest.mark.parametrize("way", LATER)
@pytest.mark.parametrize("name", ENTRIES)
def test_what_is_set_too_small_is_told_when_it_has_stayed_for_a_tenth_of_the_run(name, way, told):
    natural = get_optimizer_info(name).lr
    for taken in (0, 3) if way in ("by hand", "as tensors") else (0,):
        optimizer = create([parameter()], name, None, 0.1, num_steps=60)
        take_steps(optimizer, taken)
        LATER[way](optimizer, weight_decay=1e-4)
        take_steps(optimizer, 6)
        assert [text for text in told() if "has not changed" not in text] == []
        take_steps(optimizer, 6)
        (text,) = [text for text in told() if "has not changed" not in text]
        assert "as 0.0001 does in AdamW" in text and "choose one between 0.01 and 0.1" in text
        if way == "in a new group":
            continue  # which may well learn slowly on purpose
        optimizer = create([parameter()], name, num_steps=60)
        take_steps(optimizer, taken)
        LATER[way](optimizer, lr=natural / 3333)
        take_steps(optimizer, 6)
        assert not [text for text in told() if "below" in text]
        take_steps(optimizer, 6)
        (text,) = [text for text in told() if "has not changed" not in text]
        assert f"3,333 times below the natural learning rate of {type(optimizer).__name__}, {natural:g}" in text


def test_a_group_that_joins_is_no_schedule(told):
    optimizer = create([parameter()], "celo2", num_steps=80)
    take_steps(optimizer, 2)
    optimizer.add_param_group({"params": [parameter()], "lr": 1e-6})
    take_steps(optimizer, 20)
    assert "has not changed in 8 of 80 steps" in told()[0] and told() == []


@pytest.mark.parametrize("knows", ["nothing", "num_steps", "a schedule"])
def test_what_anneals_by_itself_says_when_it_was_not_told_the_horizon(told, knows):
    optimizer = create([parameter()], "pace", num_steps=1000 if knows == "num_steps" else None)
    scheduler = lr_scheduler.ConstantLR(optimizer, 1.0, 1000) if knows == "a schedule" else None
    take_steps(optimizer, UNTOLD)
    assert told() == []
    take_steps(optimizer, 2)
    assert [("pass num_steps=" in text) for text in told()] == ([True] if knows == "nothing" else [])
    assert told() == [] and (scheduler is None) == (knows != "a schedule")


def one_cycle(optimizer, natural, times):
    return lr_scheduler.OneCycleLR(optimizer, times * natural, total_steps=20, cycle_momentum=False)


SCHEDULES = {
    "one cycle": one_cycle,
    "cyclic": lambda opt, lr, times: lr_scheduler.CyclicLR(opt, lr, times * lr, 2, cycle_momentum=False),
    "lambda": lambda opt, lr, times: lr_scheduler.LambdaLR(opt, lambda step: times * step / 3),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["celo", "celo2"])
def test_what_schedulers_set_is_looked_at(name, schedule, told):
    natural = get_optimizer_info(name).lr
    for times in (8, 100):
        optimizer = create([parameter()], name, num_steps=20)
        scheduler = SCHEDULES[schedule](optimizer, natural, times)
        take_steps(optimizer, 4, lambda _, scheduler=scheduler: scheduler.step())
        assert ["such steps make the loss climb" in text for text in told()] == [True] * (times == 100)


def but_for_a_second_schedule(texts: list[str]) -> list[str]:
    """What a schedule of any kind over an optimizer that anneals by itself is told, rightly."""
    return [text for text in texts if "a schedule lies over" not in text]


@pytest.mark.parametrize("name", list_optimizers())
def test_small_values_of_schedules_and_sweeps_are_not_told(name, told):
    natural = get_optimizer_info(name).lr
    for schedule in (
        lambda opt: lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=12),
        lambda opt: lr_scheduler.LambdaLR(opt, lambda step: step / 1000),
        lambda opt: lr_scheduler.CosineAnnealingLR(opt, 12),
    ):
        optimizer = create([parameter()], name, num_steps=12)
        scheduler = schedule(optimizer)
        take_steps(optimizer, 12, lambda _, scheduler=scheduler: scheduler.step())
    optimizer = create([parameter()], name, num_steps=100)  # as Lightning's lr_find
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = 1e-8
    for _ in range(10):
        take_steps(optimizer)
        optimizer.param_groups[0]["lr"] = min(optimizer.param_groups[0]["lr"] * 10, 100 * natural)
    assert but_for_a_second_schedule(told()) == []


# -- what is no cause for alarm ------------------------------------------------------------------------------------

STEPS = 40


def warm_up(optimizer, lr):
    parts = [
        lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=STEPS // 4),
        lr_scheduler.CosineAnnealingLR(optimizer, STEPS - STEPS // 4),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, [STEPS // 4])


def chained(optimizer, lr):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, STEPS // 4), lr_scheduler.PolynomialLR(optimizer, STEPS, 2.0)]
    )


USUAL = {
    "LambdaLR": lambda opt, lr: lr_scheduler.LambdaLR(opt, lambda step: min(1, step / 8) * (1 - step / STEPS)),
    "MultiplicativeLR": lambda opt, lr: lr_scheduler.MultiplicativeLR(opt, lambda step: 0.8),
    "StepLR": lambda opt, lr: lr_scheduler.StepLR(opt, STEPS // 4),
    "MultiStepLR": lambda opt, lr: lr_scheduler.MultiStepLR(opt, [STEPS // 2, 3 * STEPS // 4]),
    "ConstantLR": lambda opt, lr: lr_scheduler.ConstantLR(opt, 0.1, STEPS // 4),
    "LinearLR": lambda opt, lr: lr_scheduler.LinearLR(opt, 1.0, 0.0, STEPS),
    "ExponentialLR": lambda opt, lr: lr_scheduler.ExponentialLR(opt, 0.7),
    "SequentialLR": warm_up,
    "PolynomialLR": lambda opt, lr: lr_scheduler.PolynomialLR(opt, STEPS),
    "CosineAnnealingLR": lambda opt, lr: lr_scheduler.CosineAnnealingLR(opt, STEPS // 2, 1e-5 * lr),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda opt, lr: lr_scheduler.ReduceLROnPlateau(opt, patience=8),
    "CyclicLR": lambda opt, lr: lr_scheduler.CyclicLR(opt, lr / 100, lr, STEPS // 8),
    "CosineAnnealingWarmRestarts": lambda opt, lr: lr_scheduler.CosineAnnealingWarmRestarts(opt, STEPS // 4),
    "OneCycleLR": lambda opt, lr: lr_scheduler.OneCycleLR(opt, lr, STEPS),
    "SWALR": lambda opt, lr: SWALR(opt, lr / 20, 5),
}


def drive(optimizer, scheduler):
    measured = [1.0] if "metrics" in inspect.signature(scheduler.step).parameters else []

    def after(step):
        if step + 1 < STEPS:
            scheduler.step(*measured)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter")
        take_steps(optimizer, STEPS, after)


def test_every_scheduler_of_torch_is_here():
    assert USUAL.keys() == OFFERED | {"SWALR"}


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_is_said_about_any_scheduler_of_torch(name, kind, told):
    natural = get_optimizer_info(name).lr
    lr = torch.tensor(natural / 5) if kind in ("LambdaLR", "LinearLR") else natural / 5
    optimizer = create([parameter()], name, lr, 0.1, num_steps=STEPS)
    drive(optimizer, USUAL[kind](optimizer, natural / 5))
    assert [text for text in told() if text.startswith(("lr=", "weight_decay=", "the learning rate of"))] == []


@pytest.mark.parametrize("kind", USUAL)
@pytest.mark.parametrize("name", ENTRIES)
def test_nor_about_the_same_by_hand(name, kind, told):
    """Nothing in the groups says that there is a schedule, and one for the decay is as good as one for the rate."""
    natural = get_optimizer_info(name).lr
    rates = []
    sgd = torch.optim.SGD([parameter()], 1.0, momentum=0.9)
    scheduler = USUAL[kind](sgd, 1.0)
    for _ in range(STEPS):
        rates.append(sgd.param_groups[0]["lr"])
        sgd.step()
        scheduler.step(*([1.0] if kind == "ReduceLROnPlateau" else []))
    optimizer = create([parameter()], name, None, 0.1, num_steps=STEPS)
    for rate in rates:
        optimizer.param_groups[0].update(lr=rate * natural, weight_decay=rate * 0.1)
        take_steps(optimizer)
    assert [text for text in but_for_a_second_schedule(told()) if "has not changed" not in text] == []
    assert len(set(rates)) > 1


@pytest.mark.parametrize("kind", ["LinearLR", "CosineAnnealingLR", "OneCycleLR", "SequentialLR"])
@pytest.mark.parametrize("name", ["pace", "celo2", "celo"])
def test_a_second_schedule_is_told_over_what_falls_by_itself(name, kind, told):
    natural = get_optimizer_info(name).lr
    for num_steps in (STEPS, None) if name == "pace" else (STEPS,):
        optimizer = create([parameter()], name, natural, num_steps=num_steps)
        drive(optimizer, USUAL[kind](optimizer, natural))
        found = [text for text in told() if "a schedule lies over" in text]
        assert len(found) == (name == "pace" and num_steps is not None)


def test_a_learning_rate_that_is_changed_now_and_then_is_no_schedule(told):
    optimizer = create([parameter()], "pace", num_steps=STEPS)
    for lr in (1.0, 0.5, 0.25, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        take_steps(optimizer, 5)
    assert told() == []


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_is_said_about_the_schedules_of_the_trainer(name, told):
    transformers = pytest.importorskip("transformers")
    special = {"warmup_stable_decay": {"num_decay_steps": 10}, "cosine_with_min_lr": {"min_lr_rate": 1e-3}}
    special["cosine_warmup_with_min_lr"] = special["cosine_with_min_lr"]
    for kind in transformers.SchedulerType:
        optimizer = create([parameter()], name, None, 0.1, num_steps=STEPS)
        options = {"scheduler_specific_kwargs": special.get(kind.value, {})}
        if kind.value == "polynomial":
            options["scheduler_specific_kwargs"] = {"lr_end": 1e-3 * get_optimizer_info(name).lr}
        drive(optimizer, transformers.get_scheduler(kind, optimizer, 8, STEPS, **options))
        assert but_for_a_second_schedule(told()) == []


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_is_said_about_epochs_of_a_warm_up_or_a_run_that_is_resumed_at_its_end(name, told):
    natural = get_optimizer_info(name).lr
    optimizer = create([parameter()], name, 0.0, 0.1, num_steps=200)
    for epoch in range(20):
        factor = min(epoch / 5, 1.0) if epoch < 10 else 0.1 ** ((epoch - 5) // 5)
        optimizer.param_groups[0]["lr"] = natural * factor
        take_steps(optimizer, 10)
        if epoch == 17:
            saved = copy.deepcopy(optimizer.state_dict())
    resumed = create([parameter()], name, num_steps=200)
    resumed.load_state_dict(saved)
    resumed.param_groups[0]["weight_decay"] = 1e-4
    take_steps(resumed, 20)
    assert told() == []


# -- no schedule ---------------------------------------------------------------------------------------------------


def hints_of(told) -> list[str]:
    return [text for text in told() if "has not changed" in text]


@pytest.mark.parametrize("name", ENTRIES)
def test_a_constant_learning_rate_is_told_where_a_schedule_is_wanted(name, told):
    spec = get_optimizer_info(name)
    assert spec.wants_schedule == (name in WANT_SCHEDULES)
    for lr in (None, torch.tensor(spec.lr)):
        optimizer = create([parameter()], name, lr, num_steps=80)
        take_steps(optimizer, 8)
        assert told() == []
        take_steps(optimizer, 72)
        found = told()
        assert len(found) == spec.wants_schedule
        if found:
            assert "has not changed in 8 of 80 steps" in found[0] and "LinearLR(optimizer" in found[0]


@pytest.mark.parametrize("name", sorted(WANT_SCHEDULES))
def test_nothing_is_said_where_the_learning_rate_moves_or_the_end_is_unknown(name, told):
    natural = get_optimizer_info(name).lr

    def made(num_steps=20):
        return create([parameter()], name, num_steps=num_steps)

    take_steps(made(None), 20)
    optimizer = made()
    scheduler = lr_scheduler.StepLR(optimizer, step_size=15)
    take_steps(optimizer, 20, lambda _: scheduler.step())
    optimizer = made()

    def by_hand(step):
        optimizer.param_groups[0]["lr"] = natural * min(1.0, 0.25 * (step + 2), 0.1 * (19 - step))

    by_hand(-1)
    take_steps(optimizer, 20, by_hand)
    take_steps(made(4), 4)
    resumed = made()
    resumed.load_state_dict(optimizer.state_dict())
    assert told() == []
    first = made()
    take_steps(first, 5)
    second = made()
    second.load_state_dict(first.state_dict())
    take_steps(second, 3)
    assert told() == []


@pytest.mark.parametrize("phase", [1, 2])
def test_celo_without_its_learned_schedule_wants_one(phase, told):
    optimizer = create([parameter()], "celo", phase=phase, num_steps=80)
    take_steps(optimizer, 20)
    assert len(hints_of(told)) == (phase == 1)
    optimizer = create([parameter()], "celo", phase=phase, num_steps=STEPS)
    drive(optimizer, lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS))
    assert told() == []
    spec = OptimizerSpec("celo_of_a_phase", Celo, "for this test", defaults={"phase": phase})
    assert spec.wants_schedule == (phase == 1) and not get_optimizer_info("celo").wants_schedule


class Wrapper:
    """As optimizers that hold another one, and groups of their own."""

    def __init__(self, optimizer):
        self.optim, self.param_groups = optimizer, [dict(group) for group in optimizer.param_groups]


class LooksLikeAScheduler:
    def get_last_lr(self):
        return []

    @property
    def optimizer(self):
        raise ZeroDivisionError


@pytest.mark.parametrize("name", sorted(WANT_SCHEDULES))
def test_a_scheduler_that_waits_for_a_plateau_is_one(name, told):
    others = LooksLikeAScheduler()
    for wrapped in (False, True):
        optimizer, other = (create([parameter()], name, num_steps=80) for _ in range(2))
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer)
        if wrapped:
            scheduler.optimizer = Wrapper(optimizer)
        take_steps(optimizer, 20)
        assert told() == []
        take_steps(other, 20)
        assert len(hints_of(told)) == 1
        del scheduler
    assert others.get_last_lr() == []


def test_a_horizon_that_comes_later_counts(told):
    optimizer = create([parameter()], "celo2")
    take_steps(optimizer, 3)
    optimizer.set_num_steps(60)
    take_steps(optimizer, 4)
    assert len(hints_of(told)) == 1


def test_a_constant_learning_rate_that_a_search_left_too_small_is_told(told):
    optimizer = create([parameter()], "celo", num_steps=50)
    optimizer.param_groups[0]["lr"] = 1e-3
    take_steps(optimizer, 6)
    (text,) = told()
    assert "1,000 times below" in text


def test_steps_of_compiled_functions_are_looked_at(told):
    optimizer = create([parameter()], "celo2", num_steps=50)
    optimizer.init_state()
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    for _ in range(7):
        optimizer._step_traced(None)
    assert len(hints_of(told)) == 1


# -- warnings as errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.parametrize(("name", "backend"), [("celo2", "auto"), ("celo2", "reference"), ("celo", "auto")])
def test_a_hint_that_is_raised_is_raised_when_the_step_is_over(name, what, backend):
    runs = []
    for action in ("ignore", "error"):
        optimizer, raised = create([parameter()], name, None, 0.01, num_steps=100, backend=backend), 0
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            for step in range(9):
                if step == 5:
                    STRANGE[what](optimizer)
                grad = float(step) if step != 5 else SPOILT.get(what, 1.0)
                optimizer.param_groups[0]["params"][0].grad = torch.full((3, 2), grad)
                before = optimizer.iteration + optimizer.nonfinite_steps
                try:
                    optimizer.step(loss=1.0)
                except RuntimeWarning:
                    raised += 1
                assert optimizer.iteration + optimizer.nonfinite_steps == before + 1
        runs.append([*optimizer.state_dict()["state"][0].values(), optimizer.param_groups[0]["params"][0]])
        assert raised == (action == "error")
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_no_hint_is_lost_when_another_is_raised(told):
    optimizer = create([parameter()], "celo2", num_steps=100)
    optimizer.param_groups[0].update(lr=0.1, weight_decay=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for option in ("lr=0.1 ", "weight_decay=5 "):
            with pytest.raises(RuntimeWarning, match=option):
                take_steps(optimizer)
        take_steps(optimizer)
    optimizer = create([parameter()], "celo2", num_steps=100, on_nonfinite="error")
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.param_groups[0]["params"][0].grad = torch.full((3, 2), math.nan)
    with pytest.raises(NonFiniteError):
        optimizer.step()
    assert told() == []
    take_steps(optimizer)
    assert "lr=1 " in told()[0]


@pytest.mark.parametrize(("what", "everywhere"), [*((what, False) for what in STRANGE), ("lr", True)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.dist
def test_no_rank_waits_for_one_that_raises_a_hint(workers, layout, what, everywhere):
    results = workers.run(2, hint_case, layout=layout, what=what, everywhere=everywhere, timeout=100)
    raised, iterations, digests = zip(*results, strict=True)
    assert raised == ((1, 1) if everywhere else (0, 1))
    assert set(iterations) == {4 - (what in SPOILT)} and len(set(digests)) == 1


# -- adapters ------------------------------------------------------------------------------------------------------


def test_adapters_pass_what_they_are_given(told, tmp_path):
    transformers = pytest.importorskip("transformers")
    from pylo_integrations import hf

    config = transformers.GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1)
    data = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 4

    def train(name, **options):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=7, report_to="none", use_cpu=True, save_strategy="no", disable_tqdm=True, **options
        )
        model = transformers.GPT2LMHeadModel(config)
        hf.Trainer(model, arguments, train_dataset=data, optimizers=name).train()
        return [text for text in told() if "learning rate of" in text or "in AdamW" in text]

    assert train("celo2", weight_decay=0.1) == []
    assert train("celo", weight_decay=0.01) == []
    (text,) = train("celo", learning_rate=1e-4)
    assert "natural learning rate of Celo, 1," in text
    (text,) = train("celo2", learning_rate=0.1)
    assert "natural learning rate of CELO2, 0.0003," in text


@pytest.mark.parametrize("phase", [1, 2])
def test_the_trainers_schedule_is_linear_unless_the_rule_has_its_own(phase, tmp_path):
    transformers = pytest.importorskip("transformers")
    from pylo_integrations import hf

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=4, report_to="none", use_cpu=True, optim_args=f"phase={phase}"
    )
    trainer = hf.Trainer(nn.Linear(2, 2), arguments, optimizers="celo")
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(4):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == ([1.0, 0.75, 0.5, 0.25] if phase == 1 else [1.0] * 4)


def test_lightning_and_its_learning_rate_finder(told, tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.tuner import Tuner

    from pylo_integrations.lightning import LearnedOptimizerCallback, configure_optimizers

    class Regression(lightning.LightningModule):
        def __init__(self, scheduler=None, lr=None):
            super().__init__()
            self.layer, self.lr, self.scheduler = nn.Linear(2, 1), lr, scheduler

        def training_step(self, batch, _):
            return (self.layer(batch) - 1).square().mean()

        def configure_optimizers(self):
            return configure_optimizers(self, "celo2", self.lr, 0.1, scheduler=self.scheduler)

    batches = torch.utils.data.DataLoader(torch.randn(64, 2), batch_size=2)

    def trainer():
        return lightning.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=[LearnedOptimizerCallback()],
        )  # fmt: skip

    def hints():
        return [text for text in told() if "learning rate of" in text]

    trainer().fit(Regression("linear"), batches)
    assert hints() == []
    trainer().fit(Regression(), batches)
    assert len(hints()) == 1
    module, searching = Regression("linear", 3e-4), trainer()
    Tuner(searching).lr_find(module, batches, num_training=20, early_stop_threshold=None, update_attr=False)
    assert hints() == []
    module.lr = 0.3  # what it may suggest
    trainer().fit(module, batches)
    (text,) = hints()
    assert "natural learning rate of CELO2, 0.0003," in text


def test_timm(told):
    pytest.importorskip("timm")
    import timm.optim

    from pylo_integrations.timm import register, unregister

    register()
    try:
        timm.optim.create_optimizer_v2(nn.Linear(2, 2), "celo2", weight_decay=0.05)
        assert told() == []
        timm.optim.create_optimizer_v2(nn.Linear(2, 2), "celo2", lr=0.05)
        assert "natural learning rate of CELO2, 0.0003," in told()[0]
    finally:
        unregister()
