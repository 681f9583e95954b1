"""Is the horizon, wherever an adapter sets it, the number of steps that the optimizer will have taken at the end?

And does the schedule that goes with it end there: whatever changes the length of a run after the optimizer was made.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning")
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import (  # noqa: E402
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR, LinearLR  # noqa: E402

from pylo_integrations import create_optimizer, get_optimizer_info  # noqa: E402
from pylo_integrations.lightning import LearnedOptimizerCallback, configure_optimizers  # noqa: E402

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("error:.*horizon"),  # a step beyond it
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]

ROWS = 32


def wave(optimizer, num_steps):
    """A schedule with a beginning, a middle and an end, that forgets nothing of its number of steps."""
    return LambdaLR(optimizer, lambda step: 0.1 + step / num_steps)


SCHEDULES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    wave: lambda done: 0.1 + done,
}


class Net(LightningModule):
    """Notes every optimizer step: its learning rate and the horizon that it was told."""

    def __init__(self, name="celo", make=configure_optimizers, batch_size=4, **options) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        self.chosen = partial(make, name=name, **options)
        self.batch_size, self.lr = batch_size, None
        self.rates: list[float] = []
        self.horizons: list[int] = []

    def training_step(self, batch, index):
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return self.chosen(self, lr=self.lr)

    def optimizer_step(self, epoch, index, optimizer, closure):
        self.rates.append(float(optimizer.param_groups[0]["lr"]))
        self.horizons.append(optimizer.num_steps)
        super().optimizer_step(epoch, index, optimizer, closure)

    def train_dataloader(self):
        x = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=self.batch_size)


def by_hand(module, name, lr, **options):
    """The way without the helper: the callback alone finds the horizon."""
    return create_optimizer(module, name, lr, **options)


def trainer(tmp_path, callbacks=(), **options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saves = any(isinstance(one, ModelCheckpoint) for one in callbacks)
    options = {"max_epochs": 2, "enable_checkpointing": saves, **quiet, **options}
    return Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, callbacks=[*callbacks], **options)


class Watch(Callback):
    """Forgets what trials did, which run without it."""

    def on_train_start(self, trainer, module):
        module.rates.clear()
        module.horizons.clear()


def check(module: Net, run: Trainer, steps: int, schedule=None, lr: float | None = None) -> None:
    optimizer = run.optimizers[0]
    assert (optimizer.iteration, set(module.horizons)) == (steps, {steps})
    assert len(module.rates) == steps
    if schedule is not None:
        lr = get_optimizer_info(module.chosen.keywords["name"]).lr if lr is None else lr
        assert module.rates == pytest.approx([lr * SCHEDULES[schedule](step / steps) for step in range(steps)])


MAKERS = [(configure_optimizers, True), (configure_optimizers, False), (by_hand, True)]
MAKER_IDS = ["helper and callback", "helper", "callback"]

FINDS = [
    ("callback", configure_optimizers, "linear", True),
    ("callback", configure_optimizers, wave, False),
    ("callback", by_hand, None, True),
    ("tuner", configure_optimizers, "cosine", False),
    ("tuner", by_hand, None, True),
]
"""Where the finder comes from, who makes the optimizer, the schedule, and whether the callback is there."""


# -- Lightning's finders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("through", "make", "schedule", "listens"), FINDS)
def test_batch_size_finder(small_thetas, tmp_path, through, make, schedule, listens):
    module = Net(make=make, **({} if make is by_hand else {"scheduler": schedule}))
    listeners = [LearnedOptimizerCallback()] if listens else []
    if through == "callback":
        run = trainer(tmp_path, [BatchSizeFinder(max_trials=3, steps_per_trial=2), Watch(), *listeners])
    else:
        run = trainer(tmp_path, [Watch(), *listeners])
        Tuner(run).scale_batch_size(module, max_trials=3, steps_per_trial=2)
    before = [type(one) for one in run.callbacks]
    run.fit(module)
    assert module.batch_size == 8
    check(module, run, 2 * ROWS // 8, schedule)
    assert [type(one) for one in run.callbacks] == before and "backward" not in vars(module)


@pytest.mark.parametrize(("through", "make", "schedule", "listens"), FINDS)
def test_learning_rate_finder(small_thetas, tmp_path, monkeypatch, through, make, schedule, listens):
    monkeypatch.setattr("lightning.pytorch.tuner.lr_finder._LRFinder.suggestion", lambda self: 0.125)
    module = Net(make=make, **({} if make is by_hand else {"scheduler": schedule}))
    listeners = [LearnedOptimizerCallback()] if listens else []
    if through == "callback":
        run = trainer(tmp_path, [LearningRateFinder(num_training_steps=5, attr_name="lr"), Watch(), *listeners])
    else:
        run = trainer(tmp_path, [Watch(), *listeners])
        Tuner(run).lr_find(module, num_training=5, attr_name="lr")
    run.fit(module)
    assert module.lr == 0.125
    check(module, run, 2 * ROWS // 4, schedule, lr=0.125)


@pytest.mark.parametrize(("name", "precision", "size"), [("celo", 32, 3), ("velo", 16, 1)])
def test_trials_hear_the_loss(small_thetas, tmp_path, name, precision, size):
    """Where Lightning hands over none, or that of one micro-batch."""
    plugins = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0)) if precision == 16 else []
    module = Net(name, by_hand)
    finders = BatchSizeFinder(max_trials=2, steps_per_trial=1), LearningRateFinder(num_training_steps=3, attr_name="lr")
    callbacks = [*finders, Watch(), LearnedOptimizerCallback()]
    run = trainer(tmp_path, callbacks, accumulate_grad_batches=size, plugins=plugins)
    run.fit(module)
    check(module, run, 2 * math.ceil(ROWS / module.batch_size / size))


def test_a_horizon_of_the_user_survives_finders(small_thetas, tmp_path):
    for make in (configure_optimizers, by_hand):
        module = Net(make=make, num_steps=123)
        run = trainer(tmp_path, [BatchSizeFinder(max_trials=2), Watch(), LearnedOptimizerCallback()])
        run.fit(module)
        assert set(module.horizons) == {123} and run.optimizers[0].num_steps == 123


def test_a_finder_that_raises_leaves_the_module_as_it_was(small_thetas, tmp_path):
    class Broken(Net):
        def training_step(self, batch, index):
            raise ArithmeticError

    module = Broken(make=by_hand)
    for _ in range(2):
        run = trainer(tmp_path, [BatchSizeFinder(), LearnedOptimizerCallback()])
        with pytest.raises(ArithmeticError):
            run.fit(module)
        assert "backward" not in vars(module) and len(run.callbacks) == 2


# -- Lightning's plans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "listens"), MAKERS, ids=MAKER_IDS)
@pytest.mark.parametrize("schedule", ["cosine"])
def test_accumulation_that_changes_between_epochs(small_thetas, tmp_path, make, listens, schedule):
    module = Net("celo_adam" if listens else "celo2", make, **({} if make is by_hand else {"scheduler": schedule}))
    callbacks = [GradientAccumulationScheduler({1: 3, 2: 8}), *([LearnedOptimizerCallback()] if listens else [])]
    run = trainer(tmp_path, callbacks, max_epochs=4)
    run.fit(module)
    check(module, run, 8 + 3 + 1 + 1, None if make is by_hand else schedule)


def test_scheduled_accumulation_needs_no_callback(small_thetas, tmp_path):
    def fitted(*listeners):
        torch.manual_seed(0)
        module = Net("celo")
        trainer(tmp_path, [GradientAccumulationScheduler({1: 3}), *listeners], max_epochs=2).fit(module)
        return [param.detach() for param in module.parameters()]

    assert all(map(torch.equal, fitted(), fitted(LearnedOptimizerCallback())))


@pytest.mark.parametrize(
    ("make", "listens", "schedule", "keeps"),
    [
        (configure_optimizers, True, wave, False),
        (configure_optimizers, False, "linear", False),
        (by_hand, True, None, False),
        (by_hand, True, None, True),
    ],
)
def test_a_second_fit(small_thetas, tmp_path, make, listens, schedule, keeps):
    module = Net(make=make, **({} if make is by_hand else {"scheduler": schedule}))
    run = trainer(tmp_path, [LearnedOptimizerCallback()] if listens else [])
    run.fit(module)
    check(module, run, 16, None if make is by_hand else schedule)
    module.rates.clear()
    if keeps:  # as some modules do
        optimizer = run.optimizers[0]
        module.configure_optimizers = lambda: optimizer
    run.fit_loop.max_epochs = 3
    run.fit(module)
    assert (run.optimizers[0].iteration, run.optimizers[0].num_steps) == ((24, 24) if keeps else (8, 8))
    if make is not by_hand:
        assert module.rates == pytest.approx([SCHEDULES[schedule](step / 8) for step in range(8)])


def test_a_fit_with_nothing_left_to_do_is_no_error(small_thetas, tmp_path):
    module, run = Net(), trainer(tmp_path)
    for _ in range(2):
        run.fit(module)
    assert len(module.rates) == 16


@pytest.mark.parametrize(("at", "max_epochs"), [(3, 2), (3, 4), (8, 2), (11, 4)])
def test_resuming_in_and_between_epochs(small_thetas, tmp_path, at, max_epochs):
    save = ModelCheckpoint(tmp_path, "at", every_n_train_steps=at, save_top_k=1, monitor=None)
    trainer(tmp_path, [save, LearnedOptimizerCallback()], max_steps=at, max_epochs=2).fit(Net(num_steps=16))
    module = Net()
    run = trainer(tmp_path, [LearnedOptimizerCallback()], max_epochs=max_epochs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(module, ckpt_path=tmp_path / "at.ckpt")
    said = [str(one.message) for one in caught if "num_steps" in str(one.message)]
    assert len(said) == (max_epochs != 2)
    assert set(module.horizons) == {8 * max_epochs} and run.optimizers[0].iteration == 8 * max_epochs


@pytest.mark.parametrize(("schedule", "listens"), [("cosine", True), ("linear", False)])
def test_resuming_a_longer_run_bends_the_schedule(small_thetas, tmp_path, schedule, listens):
    """A scheduler of torch would go on with the length in the checkpoint, and a cosine rise again."""
    save = ModelCheckpoint(tmp_path, "end", save_on_train_epoch_end=True)
    trainer(tmp_path, [save], max_epochs=1).fit(Net("celo2", scheduler=schedule))
    module = Net("celo2", scheduler=schedule)
    run = trainer(tmp_path, [LearnedOptimizerCallback()] if listens else [], max_epochs=2)
    with pytest.warns(RuntimeWarning, match="num_steps=8; keeping this optimizer's 16"):
        run.fit(module, ckpt_path=tmp_path / "end.ckpt")
    lr = get_optimizer_info("celo2").lr
    assert module.rates == pytest.approx([lr * SCHEDULES[schedule](step / 16) for step in range(8, 16)])


def test_resuming_a_second_fit(small_thetas, tmp_path):
    module, run = Net(), trainer(tmp_path, [LearnedOptimizerCallback()])
    run.fit(module)
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    run.callbacks.append(save)
    run.fit_loop.max_epochs = 4
    run.fit(module)
    assert (run.optimizers[0].iteration, run.optimizers[0].num_steps) == (16, 16)
    resumed, again = Net(), trainer(tmp_path, [LearnedOptimizerCallback()], max_epochs=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*num_steps")
        again.fit(resumed, ckpt_path=tmp_path / "step=24.ckpt")
    assert set(resumed.horizons) == {16} and again.optimizers[0].iteration == 16
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_resuming_after_skipped_steps_changes_nothing(small_thetas, tmp_path):
    class Spiky(Net):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            return loss * math.inf if self.global_step in (1, 2) else loss

    listener = LearnedOptimizerCallback
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
    whole, run = Spiky(scheduler="cosine"), trainer(tmp_path, [listener(), save])
    run.fit(whole)
    resumed, again = Spiky(scheduler="cosine"), trainer(tmp_path, [listener()])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*num_steps")
        again.fit(resumed, ckpt_path=tmp_path / "step=8.ckpt")
    assert set(whole.horizons) == set(resumed.horizons) == {16}
    assert run.optimizers[0].iteration == again.optimizers[0].iteration == 14
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_checkpoint_of_a_run_with_torchs_cosine_loads(small_thetas, tmp_path):
    """The helper of 0.1.0 made torch's scheduler."""
    save = ModelCheckpoint(tmp_path, "old", save_on_train_epoch_end=True)

    def old(module, name, lr):
        optimizer = create_optimizer(module, name, lr, num_steps=16)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    trainer(tmp_path, [save], max_epochs=1).fit(Net("celo2", old))
    module = Net("celo2", scheduler="cosine")
    trainer(tmp_path).fit(module, ckpt_path=tmp_path / "old.ckpt")
    lr = get_optimizer_info("celo2").lr
    assert module.rates == pytest.approx([lr * SCHEDULES["cosine"](step / 16) for step in range(8, 16)])


def test_a_schedule_with_warmup_begins_again_at_its_base(small_thetas, tmp_path):
    def warm(optimizer, num_steps):
        return LinearLR(optimizer, start_factor=0.25, total_iters=num_steps)

    module = Net("celo2", scheduler=warm)
    run = trainer(tmp_path, [BatchSizeFinder(max_trials=3, steps_per_trial=1), Watch()])
    run.fit(module)
    lr = get_optimizer_info("celo2").lr
    assert module.rates == pytest.approx([lr * (0.25 + 0.75 * step / 8) for step in range(8)])
