"""Does Accelerate deliver the exact loss and horizon, and resume bit for bit?

The oracle is what the loop itself computed: it notes every micro-batch loss, and a loop of plain torch repeats it.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from accelerate.tracking import GeneralTracker  # noqa: E402
from accelerate.utils import DistributedType, GradientAccumulationPlugin  # noqa: E402

from pylo_integrations import create_optimizer, unwrap_optimizer  # noqa: E402
from pylo_integrations.accelerate import attach, count_steps, log_telemetry  # noqa: E402

pytestmark = pytest.mark.timeout(120)

BATCHES = 10


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES * 4, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + torch.randn(BATCHES * 4, 1, generator=generator))


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def mse(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((model(x) - y) ** 2).mean()


def windows(losses: list[float], size: int) -> list[float]:
    """What Accelerate differentiates: losses divided by the size of a full window, in float32."""
    parts = (torch.tensor(losses) / size).split(size)
    return [sum(part[1:], part[0]).item() for part in parts]


class Overflow:
    """Makes the gradient, not the loss, of chosen micro-batches infinite."""

    def __init__(self, param: nn.Parameter, at: tuple[int, ...]) -> None:
        self.at, self.count = at, -1
        param.register_hook(self)

    def __call__(self, grad: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return grad * math.inf if self.count in self.at else grad


def with_scaler(accelerator: Accelerator) -> Accelerator:
    """Give a CPU accelerator the GradScaler that ``mixed_precision="fp16"``, refused on CPU, has on a GPU.

    From ``prepare`` on, every line that runs for the scaler on a GPU runs here; only float16 autocast is missing.
    """
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return accelerator


class Run:
    """A training script: ``train()`` takes one pass over the data."""

    def __init__(
        self, accelerator: Accelerator, name: str = "toy_loss", epochs: int = 1, schedule: bool = False
    ) -> None:
        self.accelerator = accelerator
        self.model = net()
        self.raw = create_optimizer(self.model, name, lr=0.5, weight_decay=0.1)
        prepared = accelerator.prepare(self.model, self.raw, DataLoader(data(), batch_size=4))
        self.model, self.optimizer, self.loader = prepared
        self.steps = count_steps(accelerator, self.loader, epochs)
        self.scheduler = LambdaLR(self.raw, lambda step: 1 - step / self.steps) if schedule else None
        self.scheduler = accelerator.prepare(self.scheduler) if schedule else None
        self.micro: list[float] = []
        self.rates: list[float] = []

    def attach(self):
        return attach(self.accelerator, self.optimizer, num_steps=self.steps)

    def train(self, step=lambda optimizer, loss: optimizer.step()) -> Run:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = mse(self.model, x, y)
                self.micro.append(loss.item())
                self.rates.append(self.raw.param_groups[0]["lr"])
                self.accelerator.backward(loss)
                step(self.optimizer, loss)
                if self.scheduler:
                    self.scheduler.step()
                self.optimizer.zero_grad()
        return self

    @property
    def seen(self) -> list[float]:
        return self.raw.rule.seen_losses


def plain_loop(micro_batches: int) -> nn.Module:
    model = net()
    optimizer = create_optimizer(
        model, "toy_loss", lr=0.5, weight_decay=0.1, num_steps=math.ceil(BATCHES / micro_batches)
    )
    batches = list(DataLoader(data(), batch_size=4))
    for start in range(0, BATCHES, micro_batches):
        total = torch.zeros(())
        for x, y in batches[start : start + micro_batches]:
            loss = mse(model, x, y) / micro_batches
            loss.backward()
            total = total + loss.detach()
        optimizer.step(loss=total)
        optimizer.zero_grad()
    return model


def assert_equal_parameters(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


# -- loss --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_attach_delivers_the_loss_whose_gradient_is_used(toy_loss, size):
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=size))
    run.attach()
    run.train()
    assert run.seen == windows(run.micro, size)  # of size 4 the last window has 2 micro-batches, still divided by 4
    assert run.raw.num_steps == run.raw.iteration == math.ceil(BATCHES / size)
    assert_equal_parameters(run.model, plain_loop(size))


def test_attach_before_prepare(toy_loss):
    accelerator = Accelerator(cpu=True)
    model = net()
    raw = create_optimizer(model, "toy_loss", lr=0.5, weight_decay=0.1)
    handle = attach(accelerator, raw, num_steps=BATCHES)
    model, optimizer, loader = accelerator.prepare(model, raw, DataLoader(data(), batch_size=4))
    assert attach(accelerator, optimizer) is handle, "prepared or not, it is the same optimizer"
    for x, y in loader:
        accelerator.backward(mse(model, x, y))
        optimizer.step()
        optimizer.zero_grad()
    assert_equal_parameters(model, plain_loop(1))


@pytest.mark.parametrize("scaler", [False, True])
def test_step_takes_the_loss_from_a_closure_without_attach(toy_loss, scaler):
    accelerator = Accelerator(cpu=True)
    run = Run(with_scaler(accelerator) if scaler else accelerator)
    run.raw.set_num_steps(BATCHES)
    run.train(step=lambda optimizer, loss: optimizer.step(lambda: loss))
    assert run.seen == run.micro


def test_without_loss_the_error_names_attach(toy_loss):
    run = Run(Accelerator(cpu=True))
    run.raw.set_num_steps(BATCHES)
    with pytest.raises(RuntimeError, match=r"pylo_integrations.accelerate.attach"):
        run.train()


@pytest.mark.parametrize("size", [1, 2])
def test_overflow_drops_the_losses_of_the_skipped_step(toy_loss, size):
    run = Run(with_scaler(Accelerator(cpu=True, gradient_accumulation_steps=size)), schedule=True)
    Overflow(run.model[0].weight, at=(2, 3))
    run.attach()
    run.train()
    skipped = {2 // size, 3 // size}
    assert run.seen == [loss for step, loss in enumerate(windows(run.micro, size)) if step not in skipped]
    assert run.raw.iteration == BATCHES // size - len(skipped)
    assert run.scheduler.get_last_lr()[0] == pytest.approx(0.5 * (1 - run.raw.iteration / run.steps))


def test_a_backward_whose_gradient_is_dropped_does_not_count(toy_loss):
    run = Run(Accelerator(cpu=True))
    run.attach()
    x, y = next(iter(run.loader))
    run.accelerator.backward(5 * mse(run.model, x, y))
    run.model.zero_grad()
    loss = mse(run.model, x, y)
    run.accelerator.backward(loss)
    run.optimizer.step()
    assert run.seen == [loss.item()]


def test_several_optimizers_never_get_a_guessed_loss(toy_loss):
    accelerator = Accelerator(cpu=True)
    models = [net(), net()]
    optimizers = accelerator.prepare(*[create_optimizer(m, "toy_loss", num_steps=1) for m in models])
    x, y = data().tensors
    losses = [mse(model, x, y) * factor for model, factor in zip(models, (1, 2), strict=True)]
    with (
        attach(accelerator, optimizers[0]),
        pytest.raises(RuntimeError, match=r"has 2 optimizers.*step\(lambda: loss\)"),
    ):
        accelerator.backward(losses[0])
    for loss in losses:
        accelerator.backward(loss)
    for optimizer, loss in zip(optimizers, losses, strict=True):
        optimizer.step(lambda loss=loss: loss)
        assert unwrap_optimizer(optimizer).rule.seen_losses == [loss.item()]


def test_optimizers_without_need_for_the_loss_are_only_told_the_horizon():
    run = Run(Accelerator(cpu=True), "small_fc_lopt")
    run.attach()
    run.accelerator.prepare(torch.optim.SGD(net().parameters(), 0.1))
    run.train()
    assert run.raw.num_steps == run.raw.iteration == BATCHES


# -- the attachment ----------------------------------------------------------------------------------------------------


def test_attachment_is_one_and_removable(toy_loss):
    run, other = Run(Accelerator(cpu=True)), Accelerator(cpu=True)
    handle = run.attach()
    assert attach(run.accelerator, run.raw, num_steps=50) is handle and run.raw.num_steps == 50
    assert "backward" not in vars(other) and "backward" in vars(Accelerator), "only this instance is changed"
    run.train()
    assert run.seen == run.micro
    with pytest.raises(ValueError, match="already reports its losses to another optimizer"):
        attach(run.accelerator, create_optimizer(net(), "toy_loss"))

    run.accelerator.backward = lambda loss: handle(loss)  # somebody else's wrapper, around ours
    handle.remove()
    with pytest.raises(RuntimeError, match="needs the training loss"):
        run.train()
    run.accelerator.backward = handle
    handle.remove()
    assert "backward" not in vars(run.accelerator)

    with run.attach() as handle:
        assert run.accelerator.backward is handle
    assert "backward" not in vars(run.accelerator)


def test_attach_refuses_what_it_cannot_serve(toy_loss):
    accelerator = Accelerator(cpu=True)
    with pytest.raises(TypeError, match="learned optimizer, not SGD"):
        attach(accelerator, torch.optim.SGD(net().parameters(), 0.1))
    optimizer = create_optimizer(net(), "toy_loss")
    with pytest.raises(ValueError, match="num_steps=0"):
        attach(accelerator, optimizer, num_steps=0)
    assert "backward" not in vars(accelerator)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DistributedType.DEEPSPEED, r"after accelerator.prepare\(model, optimizer\)"),
        (DistributedType.MEGATRON_LM, r"megatron\.megatron_optimizer.*docs/megatron\.md"),
    ],
)
def test_attach_refuses_what_hides_whole_tensors(toy_loss, kind, message):
    accelerator = SimpleNamespace(distributed_type=kind, deepspeed_engine_wrapped=None)
    with pytest.raises(ValueError, match=message):
        attach(accelerator, create_optimizer(net(), "toy_loss"))


# -- horizon, schedule, checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("sync_with_dataloader", [True, False])
def test_count_steps_counts_what_the_loop_takes(toy_loss, size, sync_with_dataloader):
    plugin = GradientAccumulationPlugin(num_steps=size, sync_with_dataloader=sync_with_dataloader)
    run = Run(Accelerator(cpu=True, gradient_accumulation_plugin=plugin), epochs=3)
    run.attach()
    for _ in range(3):
        run.train()
    assert run.raw.iteration == run.steps


@pytest.mark.parametrize("size", [1, 4])
def test_scheduler_steps_with_the_optimizer(toy_loss, size):
    run = Run(Accelerator(cpu=True, gradient_accumulation_steps=size), schedule=True)
    run.attach()
    run.train()
    assert run.rates == pytest.approx([0.5 * (1 - (index // size) / run.steps) for index in range(BATCHES)])
    assert run.raw.param_groups[0]["lr"] == 0


@pytest.mark.parametrize("name", ["toy_loss", "velo", "celo2"])
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("size", [1, 4])
def test_resumed_run_equals_an_uninterrupted_one(toy_loss, small_thetas, tmp_path, name, scaler, size):
    def start() -> Run:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=size)
        run = Run(with_scaler(accelerator) if scaler else accelerator, name, epochs=2, schedule=True)
        run.attach()
        return run

    whole = start().train()
    whole.accelerator.save_state(tmp_path)
    half = [param.clone() for param in whole.model.parameters()]
    whole.train()

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    resumed = start()
    resumed.accelerator.load_state(tmp_path)
    assert all(map(torch.equal, half, resumed.model.parameters()))
    resumed.train()
    assert_equal_parameters(resumed.model, whole.model)
    assert not torch.equal(half[0], resumed.model[0].weight)
    assert resumed.raw.iteration == resumed.raw.num_steps == resumed.steps
    assert resumed.rates == whole.rates[BATCHES:]


# -- telemetry ---------------------------------------------------------------------------------------------------------


class Notes(GeneralTracker):
    name = "notes"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int, dict[str, float]]] = []

    @property
    def tracker(self):
        return self.logged

    def store_init_configuration(self, values) -> None:
        pass

    def log(self, values, step=None, **kwargs) -> None:
        self.logged.append((step, values))


@pytest.mark.parametrize("name", ["toy_loss", "small_fc_lopt"])
def test_telemetry_goes_to_the_trackers(toy_loss, name):
    notes = Notes()
    accelerator = Accelerator(cpu=True, log_with=notes)
    accelerator.init_trackers("telemetry")
    run = Run(accelerator, name, epochs=2)
    run.attach()
    told = []

    def step(optimizer, loss):
        optimizer.step()
        told.append(run.raw.telemetry())
        log_telemetry(accelerator, optimizer, step=len(told))

    run.train(step)
    assert notes.logged == [] and told == [{}] * BATCHES  # off by default
    told.clear()
    run.raw.enable_telemetry()
    run.train(step)
    assert notes.logged == list(enumerate(told, start=1))
    assert all(numbers[f"optim/{type(run.raw).__name__}/group0/update_rms"] > 0 for numbers in told[:-1])


def test_log_telemetry_refuses_other_optimizers():
    with pytest.raises(TypeError, match="must be a learned optimizer, not SGD"):
        log_telemetry(Accelerator(cpu=True), torch.optim.SGD(net().parameters()))
