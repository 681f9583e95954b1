"""Does Lightning deliver the exact loss and horizon, resume bit for bit, and find learned optimizers from its CLI?

The oracle is what the training step itself computed: every module here writes down its micro-batch losses.
"""

from __future__ import annotations

import csv
import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

lightning = pytest.importorskip("lightning")
from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins import MixedPrecision as FabricMixedPrecision  # noqa: E402
from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningCLI  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from pylo_integrations import SmallFCLOpt, create_optimizer, unwrap_optimizer  # noqa: E402
from pylo_integrations.lightning import (  # noqa: E402
    LearnedOptimizerCallback,
    LearnedOptimizerMixin,
    attach,
    configure_optimizers,
)

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*when using `ckpt_path`, callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),  # of jsonargparse, for its version 5
]

BATCHES = 10


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * 4, 3, generator=generator)
    y = x.sum(1, keepdim=True) + torch.randn(BATCHES * 4, 1, generator=generator)
    return list(zip(x.split(4), y.split(4), strict=True))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def mse(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return ((model(batch[0]) - batch[1]) ** 2).mean()


class Overflow:
    """Makes the gradient, not the loss, of chosen micro-batches infinite."""

    def __init__(self, param: nn.Parameter, at: tuple[int, ...]) -> None:
        self.at, self.count = at, -1
        param.register_hook(self)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return grad * math.inf if self.count in self.at else grad


class Regression(LightningModule):
    def __init__(self, optimizer: str = "toy_loss", **options) -> None:
        super().__init__()
        self.net = net()
        self.chosen = (optimizer, options)
        self.micro: list[float] = []

    def loss(self, batch) -> torch.Tensor:
        loss = mse(self.net, batch)
        self.micro.append(loss.item())
        return loss

    def training_step(self, batch, index):
        return self.loss(batch)

    def configure_optimizers(self):
        name, options = self.chosen
        return configure_optimizers(self, name, **options)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), batch_size=4)


def trainer(callbacks=(), **options) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 1, **quiet, **options}, callbacks=[*callbacks])


def fit(module: LightningModule, callbacks=None, ckpt_path=None, **options) -> Trainer:
    callbacks = [LearnedOptimizerCallback()] if callbacks is None else callbacks
    run = trainer(callbacks, **options)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def seen(run: Trainer) -> list[float]:
    return run.optimizers[0].rule.seen_losses


def windows(losses: list[float], size: int) -> list[float]:
    """What Lightning differentiates: losses divided by the size of a full window, in float32."""
    parts = (torch.tensor(losses) / size).split(size)
    return [sum(part[1:], part[0]).item() for part in parts]


def plain_loop(micro_batches=1, epochs=1, clip=None, dtype=torch.float32) -> nn.Module:
    """The same training with nothing but torch."""
    model = net().to(dtype)
    steps = math.ceil(BATCHES / micro_batches) * epochs
    optimizer = create_optimizer(model, "toy_loss", num_steps=steps)
    for _ in range(epochs):
        for start in range(0, BATCHES, micro_batches):
            total = torch.zeros(())
            for batch in batches()[start : start + micro_batches]:
                loss = mse(model, batch) / micro_batches
                loss.backward()
                total = total + loss.detach()
            if clip:
                # In the optimizer's order, as Lightning: the norm is a sum, and rounds differently in the model's.
                params = [param for group in optimizer.param_groups for param in group["params"]]
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step(loss=total)
            optimizer.zero_grad()
    return model


def assert_equal_parameters(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# -- loss: automatic optimization --------------------------------------------------------------------------------------


@pytest.mark.parametrize("callbacks", [[], [LearnedOptimizerCallback]], ids=["without callback", "with callback"])
def test_automatic_optimization_delivers_every_loss(toy_loss, callbacks):
    module = Regression()
    run = fit(module, [callback() for callback in callbacks])
    assert seen(run) == module.micro and len(module.micro) == BATCHES
    assert_equal_parameters(module.net, plain_loop())


@pytest.mark.parametrize("size", [2, 4])
def test_accumulation_delivers_the_loss_whose_gradient_is_used(toy_loss, size):
    module = Regression()
    run = fit(module, accumulate_grad_batches=size, max_epochs=2)
    steps = math.ceil(BATCHES / size)  # of size 4 the last window has 2 micro-batches, still divided by 4
    assert seen(run) == windows(module.micro[:BATCHES], size) + windows(module.micro[BATCHES:], size)
    assert run.optimizers[0].iteration == run.optimizers[0].num_steps == 2 * steps
    assert_equal_parameters(module.net, plain_loop(size, epochs=2))


def test_gradient_clipping_is_lightnings(toy_loss):
    module = Regression()
    fit(module, gradient_clip_val=0.1)
    assert_equal_parameters(module.net, plain_loop(clip=0.1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_delivers_every_loss(toy_loss, precision, size):
    module = Regression()
    run = fit(module, precision=precision, accumulate_grad_batches=size)
    assert seen(run) == windows(module.micro, size)  # halving is exact in bfloat16 too
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {param.dtype for param in module.net.parameters()} == {dtype}


def float16(**options) -> MixedPrecision:
    """Lightning's ``16-mixed`` plugin on a CPU.

    ``Trainer(precision="16-mixed", accelerator="cpu")`` quietly becomes bf16-mixed; given as a plugin, the very class
    that a GPU uses runs here: float16 autocast, and ``scaler.step(optimizer)`` without a closure.
    """
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("size", [1, 2])
def test_float16_delivers_unscaled_losses(toy_loss, size):
    module = Regression()
    plugin = float16(init_scale=16.0, growth_interval=2)  # the scale changes while we watch
    run = fit(module, plugins=plugin, accumulate_grad_batches=size)
    assert seen(run) == windows(module.micro, size)
    assert plugin.scaler.get_scale() > 16.0


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("size", [1, 2])
def test_float16_overflow_drops_the_losses_of_the_skipped_step(toy_loss, size, set_to_none):
    class Module(Regression):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            optimizer.zero_grad(set_to_none=set_to_none)

    module = Module()
    Overflow(module.net[0].weight, at=(2, 3))
    run = fit(module, plugins=float16(init_scale=1024.0), accumulate_grad_batches=size)
    every = windows(module.micro, size)
    skipped = {2 // size, 3 // size}
    assert seen(run) == [loss for step, loss in enumerate(every) if step not in skipped]
    assert run.optimizers[0].iteration == len(every) - len(skipped)


def test_disabled_scaler_does_not_scale(toy_loss):
    module = Regression()
    run = fit(module, plugins=float16(enabled=False))
    assert seen(run) == module.micro


def test_a_training_step_that_returns_a_dict(toy_loss):
    class Module(Regression):
        def training_step(self, batch, index):
            return {"loss": self.loss(batch), "other": 3.0}

    module = Module()
    assert seen(fit(module, accumulate_grad_batches=5)) == windows(module.micro, 5)


# -- loss: manual optimization -----------------------------------------------------------------------------------------


class Manual(Regression):
    def __init__(self, every: int = 1, **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch, index):
        self.manual_backward(self.loss(batch) / self.every)
        if (index + 1) % self.every == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


@pytest.mark.parametrize("plugin", [None, float16], ids=["32", "16-mixed"])
@pytest.mark.parametrize("every", [1, 2])
def test_manual_optimization_delivers_what_went_into_backward(toy_loss, plugin, every):
    module = Manual(every, num_steps=BATCHES // every)
    run = fit(module, plugins=plugin and plugin(init_scale=1024.0))
    assert seen(run) == windows(module.micro, every)


@pytest.mark.parametrize("zero", ["optimizer", "module"])
def test_manual_overflow_drops_the_losses_of_the_skipped_step(toy_loss, zero):
    class Module(Manual):
        def training_step(self, batch, index):
            (self.optimizers() if zero == "optimizer" else self).zero_grad()
            self.manual_backward(self.loss(batch))
            self.optimizers().step()

    module = Module()
    Overflow(module.net[0].weight, at=(4,))
    run = fit(module, plugins=float16(init_scale=1024.0))
    assert seen(run) == module.micro[:4] + module.micro[5:]


def test_a_backward_whose_gradient_is_dropped_does_not_count(toy_loss):
    class TwoPass(Manual):  # as in sharpness-aware minimisation
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(10 * self.loss(batch))
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    module = TwoPass()
    assert seen(fit(module)) == module.micro[1::2]


def test_manual_closure_and_explicit_loss(toy_loss):
    class Module(Manual):
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            if index % 2:
                optimizer.step(closure=lambda: self.manual_backward(self.loss(batch)))
            else:
                loss = self.loss(batch)
                self.manual_backward(loss)
                optimizer.step(loss=loss)

    module = Module()
    assert seen(fit(module)) == module.micro


def test_lightnings_wrapper_reaches_the_optimizer(toy_loss):
    class Module(Manual):  # without the callback
        def training_step(self, batch, index):
            optimizer = self.optimizers()
            assert "_optimizer" in vars(optimizer) and unwrap_optimizer(optimizer) is self.trainer.optimizers[0]
            optimizer.set_num_steps(BATCHES)
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.observe_loss(loss)
            optimizer.step()

    module = Module(num_steps=3)
    run = fit(module, callbacks=[])
    assert seen(run) == module.micro and run.optimizers[0].num_steps == BATCHES


class Adversaries(LightningModule):
    """Two optimizers, both backward passes before both steps: no hook could tell the losses apart."""

    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.explicit = explicit
        self.generator, self.critic = net(), net()
        self.micro: list[tuple[float, float]] = []

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        losses = mse(self.generator, batch), 3 * mse(self.critic, batch)
        self.micro.append(tuple(loss.item() for loss in losses))
        for loss in losses:
            self.manual_backward(loss)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.step(**({"loss": loss} if self.explicit else {}))
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [create_optimizer(model, "toy_loss", num_steps=BATCHES) for model in (self.generator, self.critic)]

    train_dataloader = Regression.train_dataloader


def test_several_optimizers_get_their_own_loss_explicitly(toy_loss):
    module = Adversaries(explicit=True)
    run = fit(module)
    for index, optimizer in enumerate(run.optimizers):
        assert optimizer.rule.seen_losses == [losses[index] for losses in module.micro]


def test_several_optimizers_never_get_a_guessed_loss(toy_loss):
    with pytest.raises(RuntimeError, match=r"needs the training loss.*step\(loss=loss\)"):
        fit(Adversaries(explicit=False))


# -- horizon -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_epochs": 3}, 30),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, 6),
        ({"max_epochs": 3, "max_steps": 7}, 7),
        ({"max_epochs": -1, "max_steps": 5}, 5),
    ],
)
def test_horizon_is_the_number_of_optimizer_steps(toy_loss, options, expected):
    class Plain(Regression):
        def configure_optimizers(self):  # without the helper: the callback finds the horizon
            return toy_loss.cls(self.parameters())

    for module in (Regression(), Plain()):
        optimizer = fit(module, **options).optimizers[0]
        assert optimizer.num_steps == optimizer.iteration == expected


def test_horizon_given_by_the_user_is_kept(toy_loss):
    assert fit(Regression(num_steps=123)).optimizers[0].num_steps == 123


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(*map(torch.cat, zip(*batches(), strict=True)), strict=True)


@pytest.mark.parametrize("helper", [True, False])
@pytest.mark.parametrize("data", ["stream", "endless"])
def test_unknown_horizon_is_an_error_before_training(toy_loss, helper, data):
    class Module(Regression):
        def configure_optimizers(self):
            return super().configure_optimizers() if helper else toy_loss.cls(self.parameters())

        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=4) if data == "stream" else super().train_dataloader()

    module = Module()
    with pytest.raises(ValueError, match=r"how many steps.*Trainer\(max_steps=...\).*num_steps="):
        fit(module, max_epochs=2 if data == "stream" else -1)
    assert not module.micro


def test_unknown_horizon_does_not_matter_without_need():
    class Module(Regression):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=4)

    optimizer = fit(Module("small_fc_lopt")).optimizers[0]
    assert optimizer.num_steps is None and optimizer.iteration == BATCHES


def test_helper_without_a_trainer():
    assert configure_optimizers(Regression(), "small_fc_lopt")["optimizer"].num_steps is None
    with pytest.raises(ValueError, match="scheduler='cosine' needs to know how many steps"):
        configure_optimizers(Regression(), "small_fc_lopt", scheduler="cosine")


# -- schedules, options, errors ----------------------------------------------------------------------------------------


class LearningRates(Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (None, lambda step: 0.5),
        ("linear", lambda step: 0.5 * (1 - step / 20)),
        ("cosine", lambda step: 0.25 * (1 + math.cos(math.pi * step / 20))),
        (lambda opt, n: torch.optim.lr_scheduler.LambdaLR(opt, lambda i: 1 / (n + i)), lambda step: 0.5 / (20 + step)),
    ],
    ids=["constant", "linear", "cosine", "function"],
)
def test_scheduler_steps_with_the_optimizer_over_the_whole_run(scheduler, expected):
    rates = LearningRates()
    fit(Regression("small_fc_lopt", lr=0.5, scheduler=scheduler), [rates], max_epochs=2)
    assert rates.seen == pytest.approx([expected(step) for step in range(20)])


def test_options_reach_the_optimizer():
    module = Regression("small_fc_lopt", lr=0.3, weight_decay=0.1, max_grad_norm=2.0)
    optimizer = fit(module).optimizers[0]
    assert isinstance(optimizer, SmallFCLOpt) and optimizer.max_grad_norm == 2.0
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.3, 0.1), (0.3, 0.0)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "small_fc_lop"}, ValueError, "did you mean 'small_fc_lopt'"),
        ({"optimizer": "small_fc_lopt", "momentum": 0.9}, TypeError, "no option"),
        ({"optimizer": "small_fc_lopt", "scheduler": "cosin"}, ValueError, r"'cosin' is unknown.*'cosine', 'linear'"),
        ({"optimizer": "small_fc_lopt", "num_steps": 0}, ValueError, "num_steps=0"),
    ],
)
def test_errors_name_the_culprit(options, error, message):
    with pytest.raises(error, match=message):
        fit(Regression(**options))


def test_helper_tells_the_loss_of_accumulated_batches_without_the_callback(toy_loss):
    """Lightning itself shows the optimizer that of the last batch, divided."""
    module = Regression()
    run = fit(module, callbacks=[], accumulate_grad_batches=2)
    assert seen(run) == windows(module.micro, 2)
    assert not any(type(callback).__module__.startswith("pylo_integrations") for callback in run.callbacks)


def test_two_callbacks_would_add_the_loss_twice(toy_loss):
    with pytest.raises(ValueError, match="has 2 LearnedOptimizerCallback"):
        fit(Regression(), [LearnedOptimizerCallback(), LearnedOptimizerCallback()])


def test_callback_leaves_other_optimizers_alone():
    class Module(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Module()
    fit(module, accumulate_grad_batches=2)
    assert len(module.micro) == BATCHES


# -- mixin -------------------------------------------------------------------------------------------------------------


class Task(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.micro: list[float] = []

    loss, training_step, train_dataloader = Regression.loss, Regression.training_step, Regression.train_dataloader

    def configure_callbacks(self):
        return LearningRates()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Learned(LearnedOptimizerMixin, Task):
    def __init__(self, **hparams) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_mixin_builds_what_hparams_name_and_listens(toy_loss):
    module = Learned(
        optimizer="toy_loss", lr=0.5, weight_decay=0.25, scheduler="linear", optimizer_options={"max_grad_norm": 3.0}
    )
    run = fit(module, [], accumulate_grad_batches=2)
    optimizer = run.optimizers[0]
    assert seen(run) == windows(module.micro, 2)
    assert optimizer.num_steps == 5 and optimizer.max_grad_norm == 3.0
    assert optimizer.param_groups[0]["weight_decay"] == 0.25 and optimizer.param_groups[0]["initial_lr"] == 0.5
    rates = [callback for callback in run.callbacks if isinstance(callback, LearningRates)]
    assert len(rates) == 1 and rates[0].seen[-1] == pytest.approx(0.1), "callbacks of the next class are kept"


def test_mixin_replaces_the_trainers_own_callback(toy_loss):
    module = Learned(optimizer="toy_loss")
    assert seen(fit(module, [LearnedOptimizerCallback()])) == module.micro


def test_mixin_without_a_name_leaves_the_choice_to_the_next_class():
    assert isinstance(fit(Learned(lr=0.5), []).optimizers[0], torch.optim.SGD)


# -- resume ------------------------------------------------------------------------------------------------------------


class StopAfter(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.current_epoch == self.epoch


@pytest.mark.parametrize("name", ["toy_loss", "velo", "celo2"])
@pytest.mark.parametrize("plugin", [None, float16], ids=["32", "16-mixed"])
def test_resumed_run_equals_an_uninterrupted_one(toy_loss, small_thetas, tmp_path, name, plugin):
    def run(callbacks=(), **options):
        module = Regression(name, lr=0.5, weight_decay=0.1, scheduler="cosine")
        plugins = plugin and plugin(init_scale=256.0, growth_interval=3)
        callbacks = [LearnedOptimizerCallback(), *callbacks]
        options = {"max_epochs": 4, "accumulate_grad_batches": 2, "plugins": plugins, **options}
        return module, fit(module, callbacks, **options)

    whole, _ = run()
    checkpoint = ModelCheckpoint(tmp_path, filename="half", save_on_train_epoch_end=True)
    half, _ = run([StopAfter(1), checkpoint], enable_checkpointing=True)
    assert not torch.equal(half.net[0].weight, whole.net[0].weight)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*num_steps")
        resumed, trainer = run(ckpt_path=tmp_path / "half.ckpt")
    assert_equal_parameters(resumed.net, whole.net)
    assert trainer.optimizers[0].iteration == trainer.optimizers[0].num_steps == 20
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["optimizer_states"]


def test_resuming_with_another_horizon_says_so(toy_loss, tmp_path):
    fit(Regression(), callbacks=[LearnedOptimizerCallback(), ModelCheckpoint(tmp_path, "a")], enable_checkpointing=True)
    with pytest.warns(RuntimeWarning, match="num_steps=10; keeping this optimizer's 20"):
        run = fit(Regression(), max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    assert run.optimizers[0].iteration == 20


# -- command line ------------------------------------------------------------------------------------------------------

QUIET = ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"]


class CommandLineTask(Task):
    def __init__(self, width: int = 8) -> None:
        super().__init__()

    configure_optimizers = LightningModule.configure_optimizers


@pytest.fixture
def command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])  # LightningCLI warns if pytest's own arguments are there too
    return run_command_line


def run_command_line(*args: str) -> LightningCLI:
    quiet = [f"--trainer.{option}=false" for option in QUIET]
    arguments = ["fit", "--trainer.accelerator=cpu", "--trainer.max_epochs=1", *quiet, *args]
    return LightningCLI(CommandLineTask, args=arguments, save_config_callback=None, seed_everything_default=False)


def test_cli_takes_a_class_path(command_line):
    cli = command_line("--optimizer=pylo_integrations.SmallFCLOpt", "--optimizer.lr=0.5", "--optimizer.max_grad_norm=1")
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is SmallFCLOpt and optimizer.iteration == BATCHES
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.max_grad_norm == 1.0


def test_cli_prints_a_config_that_it_reads_back(command_line, capsys, tmp_path):
    flags = ["--optimizer=pylo_integrations.SmallFCLOpt", "--optimizer.weights=builtin:small_fc_bootstrap"]
    flags += ["--lr_scheduler=torch.optim.lr_scheduler.CosineAnnealingLR", "--lr_scheduler.T_max=10"]
    flags += ["--trainer.callbacks+=pylo_integrations.lightning.LearnedOptimizerCallback"]
    with pytest.raises(SystemExit) as stop:
        command_line(*flags, "--optimizer.weight_decay=0.25", "--print_config")
    assert not stop.value.code
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    cli = command_line("--config", str(tmp_path / "config.yaml"), "--optimizer.init_args.weight_decay=0.5")
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is SmallFCLOpt and optimizer.num_steps == optimizer.iteration == BATCHES
    assert optimizer.param_groups[0]["weight_decay"] == 0.5


def test_cli_refuses_what_the_constructor_does_not_take(command_line, capsys):
    with pytest.raises(SystemExit):
        command_line("--optimizer=pylo_integrations.SmallFCLOpt", "--optimizer.on_nonfinite=perhaps")
    assert "on_nonfinite" in capsys.readouterr().err


def test_cli_trains_a_loss_driven_optimizer(command_line, toy_loss):
    cli = command_line(
        "--optimizer=toy_loss_rule.ToyLossOpt",
        "--trainer.callbacks+=pylo_integrations.lightning.LearnedOptimizerCallback",
        "--trainer.accumulate_grad_batches=2",
    )
    assert seen(cli.trainer) == windows(cli.model.micro, 2)


# -- Fabric ------------------------------------------------------------------------------------------------------------


def fabric_run(fabric: Fabric, order: str, micro_batches: int = 1, set_up=None, overflow=()) -> tuple:
    model = net()
    Overflow(model[0].weight, overflow)
    raw = create_optimizer(model, "toy_loss")
    if order == "attach first":
        handle = attach(fabric, raw, num_steps=BATCHES)
    model, optimizer = fabric.setup(model, raw)
    if order == "setup first":
        handle = attach(fabric, optimizer, num_steps=BATCHES)
    micro = []
    for index, batch in enumerate(batches()):
        loss = mse(model, batch)
        micro.append(loss.item())
        fabric.backward(loss / micro_batches)
        if (index + 1) % micro_batches == 0:
            optimizer.step()
            optimizer.zero_grad()
    return handle, raw, micro, model


@pytest.mark.parametrize("order", ["attach first", "setup first"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_fabric_delivers_the_loss(toy_loss, order, micro_batches):
    fabric = Fabric(accelerator="cpu", devices=1)
    _, optimizer, micro, _ = fabric_run(fabric, order, micro_batches)
    assert optimizer.rule.seen_losses == windows(micro, micro_batches)
    assert optimizer.num_steps == BATCHES


def test_fabric_float16_drops_skipped_steps(toy_loss):
    plugin = FabricMixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1024.0))
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    _, optimizer, micro, _ = fabric_run(fabric, "setup first", overflow=(3,))
    assert optimizer.rule.seen_losses == micro[:3] + micro[4:]


def test_fabric_trains_a_lightning_module_by_hand(toy_loss):
    fabric = Fabric(accelerator="cpu", devices=1)
    module = Regression(num_steps=BATCHES)
    optimizer = module.configure_optimizers()["optimizer"]
    model, wrapped = fabric.setup(module, optimizer)
    assert configure_optimizers(module, "small_fc_lopt")["optimizer"].num_steps is None, "there is no trainer to ask"
    with attach(fabric, wrapped):
        for index, batch in enumerate(batches()):
            fabric.backward(model.training_step(batch, index))
            wrapped.step()
            wrapped.zero_grad()
    assert optimizer.rule.seen_losses == module.micro


def test_fabric_attachment_is_one_and_removable(toy_loss):
    fabric, other = Fabric(accelerator="cpu", devices=1), Fabric(accelerator="cpu", devices=1)
    handle, optimizer, micro, model = fabric_run(fabric, "setup first")
    assert attach(fabric, optimizer, num_steps=50) is handle and optimizer.num_steps == 50
    assert "backward" not in vars(other), "only this instance is changed"
    with pytest.raises(ValueError, match="already reports its losses to another optimizer"):
        attach(fabric, create_optimizer(net(), "toy_loss"))

    plain = fabric.backward
    fabric.backward = lambda *args: plain(*args)  # somebody else's wrapper, around ours
    handle.remove()
    fabric.backward(mse(model, batches()[0]))
    with pytest.raises(RuntimeError, match="needs the training loss"):
        optimizer.step()
    fabric.backward = plain
    handle.remove()
    assert "backward" not in vars(fabric)

    with attach(fabric, optimizer) as handle:
        assert vars(fabric)["backward"] is handle
    assert "backward" not in vars(fabric)


def test_fabric_refuses_other_optimizers():
    with pytest.raises(TypeError, match="learned optimizer, not SGD"):
        attach(Fabric(accelerator="cpu", devices=1), torch.optim.SGD(net().parameters(), 0.1))


# -- is telemetry logged? ----------------------------------------------------------------------------------------------


def rows(folder) -> list[dict[str, str]]:
    [file] = folder.rglob("metrics.csv")
    with file.open() as lines:
        return list(csv.DictReader(lines))


def fit_with_log(module: LightningModule, folder, callbacks, **options) -> tuple[Trainer, list[dict[str, str]]]:
    run = fit(module, callbacks, logger=CSVLogger(folder), log_every_n_steps=2, **options)
    return run, rows(folder)


@pytest.mark.parametrize("name", ["toy_loss", "small_fc_lopt"])
@pytest.mark.parametrize("size", [1, 2])
def test_telemetry_is_logged_at_lightnings_steps(toy_loss, tmp_path, name, size):
    module = Regression(name)
    run, logged = fit_with_log(
        module, tmp_path, [LearnedOptimizerCallback(telemetry=True)], accumulate_grad_batches=size, max_epochs=2
    )
    optimizer = unwrap_optimizer(run.optimizers[0])
    steps = 2 * BATCHES // size
    label = f"optim/{type(optimizer).__name__}"
    told = [float(row[f"{label}/horizon_fraction"]) for row in logged]
    assert told == pytest.approx([step / steps for step in range(2, steps + 1, 2)])
    numbers = optimizer.telemetry()
    assert {key: float(value) for key, value in logged[-1].items() if key in numbers} == pytest.approx(numbers)
    assert run.logged_metrics[f"{label}/group0/update_rms"] == pytest.approx(numbers[f"{label}/group0/update_rms"])


def test_telemetry_that_is_on_anyway_is_logged(tmp_path):
    module = Regression("small_fc_lopt", telemetry="per_parameter")
    run, logged = fit_with_log(module, tmp_path, [LearnedOptimizerCallback()])
    numbers = run.optimizers[0].telemetry()
    assert "optim/SmallFCLOpt/param/net.0.weight/update_ratio" in numbers
    assert set(numbers) <= set(logged[0]) and len(logged) == BATCHES // 2


def test_telemetry_of_manual_optimization_is_logged_and_told_by_the_wrapper(tmp_path):
    told = []

    class Module(Manual):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            told.append(self.optimizers().telemetry())

    module = Module(optimizer="small_fc_lopt")
    run, logged = fit_with_log(module, tmp_path, [LearnedOptimizerCallback(telemetry="per_parameter")])
    name = "optim/SmallFCLOpt/param/net.2.bias/cosine"
    assert [float(row[name]) for row in logged] == pytest.approx([numbers[name] for numbers in told[1::2]])


def test_telemetry_goes_on_after_a_resume(tmp_path):
    def run(*callbacks, **options):
        module = Regression("small_fc_lopt", num_steps=2 * BATCHES)
        return fit(module, [LearnedOptimizerCallback(telemetry=True), *callbacks], log_every_n_steps=2, **options)

    whole, resumed = CSVLogger(tmp_path / "whole"), CSVLogger(tmp_path / "resumed")
    run(max_epochs=2, logger=whole)
    run(ModelCheckpoint(tmp_path, "half"), enable_checkpointing=True)
    run(max_epochs=2, logger=resumed, ckpt_path=tmp_path / "half.ckpt")
    expected = [row["optim/SmallFCLOpt/group0/cosine"] for row in rows(tmp_path / "whole")]
    assert len(set(expected)) == BATCHES
    assert [row["optim/SmallFCLOpt/group0/cosine"] for row in rows(tmp_path / "resumed")] == expected[BATCHES // 2 :]


def test_without_telemetry_nothing_of_the_optimizer_is_logged(tmp_path):
    run = fit(Regression("small_fc_lopt"), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert not [name for name in run.logged_metrics if name.startswith("optim/")]


def test_fabrics_wrapper_tells_telemetry():
    fabric = Fabric(accelerator="cpu", devices=1)
    model = net()
    model, optimizer = fabric.setup(model, create_optimizer(model, "small_fc_lopt", telemetry=True))
    fabric.backward(mse(model, batches()[0]))
    optimizer.step()
    assert optimizer.telemetry() == unwrap_optimizer(optimizer).telemetry()
    assert optimizer.telemetry()["optim/SmallFCLOpt/group0/update_rms"] > 0


def test_callback_refuses_unknown_telemetry():
    with pytest.raises(ValueError, match="telemetry='all' is unknown"):
        LearnedOptimizerCallback(telemetry="all")
