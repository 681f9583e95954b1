"""What a run was, and several of them side by side: a table, a verdict and a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from pylo_integrations.bench.share import OptimizerShare


class History(Callback):
    """Losses and time of a whole run, and the optimizer's part in it; they travel in its checkpoints, without a gap."""

    def __init__(self) -> None:
        self.losses: list[Tensor | float] = []  # not floats at once: a GPU would be waited for in every step
        self.validation: list[tuple[int, float]] = []
        self.seconds, self.share = 0.0, math.nan

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._clock = OptimizerShare(trainer.optimizers[0])

    def on_train_batch_start(self, *args: Any) -> None:
        self._clock.begin()
        self._began = perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean"))
        self.seconds += perf_counter() - self._began
        self._clock.end()
        if not math.isnan(self._clock.value):
            self.share = self._clock.value

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.training or trainer.validating and trainer.state.fn == "fit":
            loss, accuracy = (trainer.callback_metrics[f"validation_{name}"].item() for name in ("loss", "accuracy"))
            self.validation.append((trainer.global_step, loss))
            if trainer.is_global_zero and trainer.progress_bar_callback is None:
                done = f"step {trainer.global_step} of {int(trainer.estimated_stepping_batches)}"
                told = f"validation loss {loss:.3f}, accuracy {accuracy:.1%}; {self.seconds:.0f} s"
                print(f"{done:>17}: {told}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        self.losses = [float(loss) for loss in self.losses]
        return {name: getattr(self, name) for name in ("losses", "validation", "seconds", "share")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass(frozen=True)
class Run:
    """One optimizer's training.

    Attributes:
        optimizer: Its name.
        lr: Peak learning rate.
        steps: Of the optimizer.
        losses: Of every training batch: as many as steps, unless gradients accumulate.
        validation: Steps and the validation loss there.
        validation_loss: At the end.
        validation_accuracy: At the end.
        seconds: Time in training steps, i.e. without validation and reading data.
        share: Of that, what the optimizer takes, in some steps after the first; NaN in a shorter run.
        note: What a reader must know about it.
    """

    optimizer: str
    lr: float
    steps: int
    losses: list[float]
    validation: list[tuple[int, float]]
    validation_loss: float
    validation_accuracy: float
    seconds: float
    share: float = math.nan
    note: str = ""

    def smooth_losses(self) -> Tensor:
        """Means over a sliding twentieth of the run: single batches are too noisy to compare."""
        losses = torch.tensor(self.losses)
        return losses.unfold(0, max(1, len(losses) // 20), 1).mean(1)


def make_table(runs: list[Run]) -> str:
    """A Markdown table with a line for each run, and what must be said about them."""
    lines = [("optimizer", "lr", "train loss", "val. loss", "accuracy", "steps", "ms/step")]
    for run in runs:
        figures = (run.smooth_losses()[-1], run.validation_loss, run.validation_accuracy)
        cost = f"{1000 * run.seconds / run.steps:.1f}"
        lines.append((run.optimizer, f"{run.lr:g}", *(f"{x:.4f}" for x in figures), str(run.steps), cost))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = [f"{run.optimizer}: {run.note}." for run in runs if run.note]
    shares = [f"{100 * run.share:.1f} % with {run.optimizer}" for run in runs if not math.isnan(run.share)]
    cost = [f"Of a training step, the optimizer takes {', '.join(shares)}."] if shares else []
    return "\n".join([*rows, "", "Train loss: mean over the last twentieth of the steps.", *cost, *notes])


def verdict(run: Run, baseline: Run) -> str:
    """Who won, by how much and at what cost, in words."""
    ours, theirs = run.validation_loss, baseline.validation_loss
    names = f"{run.optimizer} at lr {run.lr:g}", f"{baseline.optimizer} at lr {baseline.lr:g}"
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return f"No verdict: {' and '.join(names)} ended at validation losses of {ours:g} and {theirs:g}."
    accuracies = f"accuracy {run.validation_accuracy:.1%} against {baseline.validation_accuracy:.1%}"
    cost = run.seconds / run.steps * baseline.steps / baseline.seconds
    won = "won" if ours < theirs else "lost"
    told = f"{run.optimizer} {won}: validation loss {ours:.3f} against {theirs:.3f} of {names[1]}, {accuracies}."
    first = next((step for step, loss in run.validation if loss <= theirs), None)
    if won == "won" and first is not None:
        told += f" It was there after at most {first} of {run.steps} steps."
    return f"{told} A step took {cost:.2f} times as long."


def plot(runs: list[Run], title: str, path: Path) -> None:
    """Draw the loss curves of all runs into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not pyplot, which needs to know about displays
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        smooth, colour = run.smooth_losses(), f"C{index}"
        steps = torch.linspace(0, run.steps, len(run.losses) + 1)[-len(smooth) :]
        axes.plot(steps, smooth, color=colour, alpha=0.5, linewidth=1)
        label = f"{run.optimizer}, lr {run.lr:g}"
        axes.plot(*zip(*run.validation, strict=True) if run.validation else ([], []), "o-", color=colour, label=label)
    axes.plot([], [], color="gray", alpha=0.5, linewidth=1, label="training, sliding mean; dots: validation")
    axes.set(title=title, xlabel="step", ylabel="cross-entropy", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    notes = "\n".join(f"{run.optimizer}: {run.note}" for run in runs if run.note)
    figure.supxlabel(notes, fontsize=8, color="gray")
    FigureCanvasAgg(figure).print_png(path)
