"""Are settings that ruin a run told once, with the right one, and is nothing said about those that do not?"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from native_library import library_or_skip
from thetas import create, theta_for
from torch import nn
from torch.optim import lr_scheduler

from pylo_integrations import Theta, get_optimizer_info, list_optimizers, mup_param_groups

pytestmark = [pytest.mark.usefixtures("small_thetas"), pytest.mark.timeout(60)]

WANT_SCHEDULES = {"celo2", "celo2_base", "elo", "elo_celo2"}


@pytest.fixture(params=["native", "reference"])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


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
def test_nothing_is_said_about_settings_that_are_meant(name, backend, told):
    natural = get_optimizer_info(name).lr
    for lr in (None, natural / 10, natural * 10, 0.0, torch.tensor(natural)):
        take_steps(create([parameter()], name, lr, backend=backend), 2)
    for decay in (0.0, 0.001, 0.01, 0.1, 1.0):
        take_steps(create([parameter()], name, None, decay, backend=backend))
    for lr in (natural / 10, natural * 10):  # both ends of a recipe's decay at both ends of the rates
        take_steps(create([parameter()], name, lr, 0.01, backend=backend))
        take_steps(create([parameter()], name, lr, 0.1, backend=backend))
    copies = [{"params": [parameter()], "lr": lr} for lr in (natural, natural / 64, natural / 1000, 0.0)]
    take_steps(create(copies, name, backend=backend), 2)
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
def test_a_learning_rate_set_later_is_told_at_the_next_step(name, backend, told):
    natural = get_optimizer_info(name).lr
    optimizer = create([parameter()], name, backend=backend, num_steps=100)
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
    assert told() == []


# -- no schedule ---------------------------------------------------------------------------------------------------


def hints_of(told) -> list[str]:
    return [text for text in told() if "has not changed" in text]


@pytest.mark.parametrize("name", list_optimizers())
def test_a_constant_learning_rate_is_told_where_a_schedule_is_wanted(name, backend, told):
    spec = get_optimizer_info(name)
    assert spec.wants_schedule == (name in WANT_SCHEDULES)
    for lr in (None, torch.tensor(spec.lr)):
        optimizer = create([parameter()], name, lr, num_steps=80, backend=backend)
        take_steps(optimizer, 8)
        assert told() == []
        take_steps(optimizer, 72)
        found = told()
        assert len(found) == spec.wants_schedule
        if found:
            assert "has not changed in 8 of 80 steps" in found[0] and "LinearLR(optimizer" in found[0]


@pytest.mark.parametrize("name", sorted(WANT_SCHEDULES))
def test_nothing_is_said_where_the_learning_rate_moves_or_the_end_is_unknown(name, backend, told):
    natural = get_optimizer_info(name).lr

    def made(num_steps=20):
        return create([parameter()], name, num_steps=num_steps, backend=backend)

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
