"""Is the horizon under the Hugging Face Trainer the number of steps that the optimizer will have taken at the end?"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

transformers = pytest.importorskip("transformers")
from pylo_integrations import create_optimizer, hf, unwrap_optimizer  # noqa: E402

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("error:.*horizon")]

ROWS = 22


class Net(nn.Module):
    """Runs out of memory in the given batch, if that is large."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 1)
        self.fails_at = fails_at

    def forward(self, x):
        if self.fails_at is not None and len(x) == 8:
            self.fails_at -= 1
            if self.fails_at < 0:
                raise RuntimeError("CUDA out of memory.")
        return {"loss": (self.net(x) - x.sum(1, keepdim=True)).square().mean()}


class Notes(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.horizons: list[int] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        learned = unwrap_optimizer(optimizer)
        self.horizons.append(learned.num_steps)
        self.rates.append(learned.param_groups[0]["lr"])


def trainer(folder, optimizers="celo", model=None, **options):
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = transformers.TrainingArguments(folder, **{"per_device_train_batch_size": 8, **quiet, **options})
    rows = [{"x": row} for row in torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(0))]
    notes = Notes()
    run = hf.Trainer(model or Net(), args, train_dataset=rows, optimizers=optimizers, callbacks=[notes])
    return run, notes


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"num_train_epochs": 2}, 6),
        ({"num_train_epochs": 1.5}, 5),
        ({"num_train_epochs": 2, "max_steps": 4}, 4),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 2}, 4),  # a batch alone at the end of each epoch
        ({"num_train_epochs": 2, "dataloader_drop_last": True}, 4),
    ],
)
def test_one_run(small_thetas, tmp_path, options, steps):
    run, notes = trainer(tmp_path, **options)
    run.train()
    assert notes.horizons == [steps] * steps and unwrap_optimizer(run.optimizer).iteration == steps


@pytest.mark.parametrize("given", [False, True], ids=["by name", "own optimizer"])
def test_a_second_train_goes_on(small_thetas, tmp_path, given):
    model = Net()
    optimizers = (create_optimizer(model, "celo"), None) if given else "celo"
    run, notes = trainer(tmp_path, optimizers, model, num_train_epochs=2)
    run.train()
    run.train()
    assert notes.horizons == [6] * 6 + [12] * 6 and unwrap_optimizer(run.optimizer).iteration == 12


def test_a_second_train_has_the_schedule_again(small_thetas, tmp_path):
    """That a function makes; torch's cosine goes on from the learning rate that it finds."""
    run, notes = trainer(tmp_path, ("celo2", lambda optimizer: CosineAnnealingLR(optimizer, 6)), num_train_epochs=2)
    run.train()
    run.train()
    assert notes.rates[6:] == pytest.approx(notes.rates[:6]) and notes.rates[5] < 0.1 * notes.rates[0]


@pytest.mark.parametrize(
    "schedule", [None, lambda optimizer: CosineAnnealingLR(optimizer, 100)], ids=["name", "function"]
)
@pytest.mark.parametrize(("fails_at", "done"), [(0, 0), (2, 3)])
def test_a_smaller_batch_after_running_out_of_memory(small_thetas, tmp_path, fails_at, done, schedule):
    options = {"num_train_epochs": 2, "auto_find_batch_size": True, "lr_scheduler_type": "cosine"}
    run, notes = trainer(tmp_path, ("celo", schedule), Net(fails_at), **options)
    run.train()
    steps = run.state.max_steps
    assert steps > 6 and notes.horizons == [6] * done + [steps + done] * steps
    assert unwrap_optimizer(run.optimizer).iteration == steps + done
    assert notes.rates[done] == pytest.approx(notes.rates[0])


def test_a_horizon_of_the_user_stays(small_thetas, tmp_path):
    run, notes = trainer(tmp_path, optim_args="num_steps=50", num_train_epochs=1)
    run.train()
    run.train()
    assert set(notes.horizons) == {50}
