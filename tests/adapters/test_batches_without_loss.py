"""Is a batch that yields no loss, and so no gradient, left out as with torch's optimizers, whatever the rule needs?"""

from __future__ import annotations

import copy

import pytest
import torch
from thetas import create
from torch import nn

from pylo_integrations import list_optimizers

pytestmark = pytest.mark.timeout(120)

BATCHES = 8


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def data() -> torch.Tensor:
    return torch.randn(BATCHES * 4, 3, generator=torch.Generator().manual_seed(0))


def mse(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


def by_hand(name: str, num_steps: int, empty: set[int], size: int = 1) -> nn.Module:
    """A loop that knows which batches are empty, and does nothing for them."""
    model = net()
    optimizer = create(model, name, num_steps=num_steps)
    for start in range(0, BATCHES, size):
        window = [i for i in range(start, start + size) if i not in empty]
        if window:
            losses = [mse(model, data().split(4)[i]) / size for i in window]
            torch.autograd.backward(losses)
            optimizer.step(loss=sum(loss.detach() for loss in losses))
            optimizer.zero_grad()
    return model


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", list_optimizers())
def test_a_step_without_gradients_is_none(small_thetas, name, backend):
    model = net()
    optimizer = create(model, name, num_steps=9, backend="auto" if backend == "native" else backend)
    for index in range(3):
        before = copy.deepcopy(model.state_dict())
        optimizer.zero_grad()
        optimizer.step()
        optimizer.step(lambda: None)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        loss = mse(model, data().split(4)[index])
        loss.backward()
        optimizer.step(loss=loss)
        assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [name for name in list_optimizers() if create(net(), name).needs_loss])
def test_gradients_without_a_loss_are_still_an_error(small_thetas, name):
    model = net()
    optimizer = create(model, name, num_steps=9)
    mse(model, data()).backward()
    with pytest.raises(RuntimeError, match="needs the training loss"):
        optimizer.step()


EMPTY = [
    ({0, 3}, 1, "32"),
    ({1, 4}, 2, "32"),
    ({2, 3, 7}, 2, "32"),
    (set(range(BATCHES)), 2, "32"),
    ({2, 3, 7}, 2, "bf16-mixed"),
    ({0, 3}, 1, "16-mixed"),  # within a window, Lightning then drops all its gradients, whatever the optimizer
]


@pytest.mark.parametrize(("empty", "size", "precision"), EMPTY)
@pytest.mark.parametrize("name", ["celo", "small_fc_lopt"])
def test_lightning(small_thetas, name, empty, size, precision):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.plugins import MixedPrecision

    from pylo_integrations.lightning import LearnedOptimizerCallback, configure_optimizers

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return None if index in empty else mse(self.net, batch)

        def configure_optimizers(self):
            return configure_optimizers(self, name)

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    plugins, more = [], {"precision": precision}
    if precision == "16-mixed":  # of a CPU
        plugins, more = [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))], {}
    module = Module()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=size,
        callbacks=[LearnedOptimizerCallback()],
        plugins=plugins,
        **quiet,
        **more,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=4))
    want = by_hand(name, BATCHES // size, empty, size)
    if precision == "32":
        assert_equal(module.net, want)
    assert trainer.global_step == BATCHES // size
    if name == "celo":
        windows = [set(range(start, start + size)) for start in range(0, BATCHES, size)]
        assert trainer.optimizers[0].iteration == sum(not window <= empty for window in windows)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("name", ["celo", "celo2"])
def test_accelerate(small_thetas, name, attached):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    from pylo_integrations.accelerate import attach

    empty = {0, 3}
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        model = net()
        optimizer = create(model, name, num_steps=BATCHES)
        model, optimizer = accelerator.prepare(model, optimizer)
        if attached:
            attach(accelerator, optimizer)
        for index, batch in enumerate(data().split(4)):
            loss = None
            if index not in empty:
                loss = mse(model, batch)
                accelerator.backward(loss)
            optimizer.step(*([] if attached else [lambda loss=loss: loss]))
            optimizer.zero_grad()
        assert_equal(model, by_hand(name, BATCHES, empty))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("name", ["celo", "celo2"])
@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
def test_hf_trainer(small_thetas, tmp_path, name, stock):
    """A trainer class whose step calls no backward."""
    transformers = pytest.importorskip("transformers")
    from pylo_integrations import hf

    class Lazy(transformers.Trainer):
        at = 0

        def training_step(self, model, inputs, *args, **kwargs):
            self.at += 1
            if self.at in (1, 4):
                return torch.tensor(0.0)
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model, inputs, *args, **kwargs):
            return mse(model, inputs["x"])

        def create_model_card(self, *args, **kwargs):
            pass

    options = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "max_steps": BATCHES}
    args = {"per_device_train_batch_size": 4, "remove_unused_columns": False, "learning_rate": 0.5, **options}
    rows = [{"x": row} for row in data()]
    if stock:
        hf.install()
    try:
        made = transformers.TrainingArguments(tmp_path, **args, **({"optim": name} if stock else {}))
        given = {} if stock else {"optimizers": name}
        trainer = (Lazy if stock else hf.with_learned_optimizer(Lazy))(net(), made, train_dataset=rows, **given)
        trainer.train()
    finally:
        hf.uninstall()
    assert trainer.state.global_step == BATCHES
    assert all(torch.isfinite(param).all() for param in trainer.model.parameters())
