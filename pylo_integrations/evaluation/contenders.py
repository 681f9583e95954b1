"""Who trains the held-out tasks: learned optimizers as they come, and baselines at every setting of a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info
from pylo_integrations.evaluation.tasks import HeldOutTask
from pylo_integrations.metatrain.tasks import Readout
from pylo_integrations.mup import mup_param_groups
from pylo_integrations.optimizers import MuLO
from pylo_integrations.schedules import constant, cosine, linear
from pylo_integrations.weights import Theta, load_theta

WARM_UP = 0.05
"""Part of the run in which the cosine schedule rises."""

MUP_BASE_WIDTH = 16
"""Of a theta that is for muP and has no record of its meta-training."""


def _warmed_up(progress: float) -> float:
    return progress / WARM_UP if progress < WARM_UP else cosine((progress - WARM_UP) / (1 - WARM_UP))


SCHEDULES: Mapping[str, Callable[[float], float]] = {"constant": constant, "cosine": _warmed_up, "linear": linear}
"""Factors on the learning rate by name, from the part of the run that is over: constant; linear warm-up and a cosine to
zero; linear to zero, the default of the Hugging Face Trainer."""


@dataclass(frozen=True)
class Setting:
    """An optimizer with all that it needs to know.

    Attributes:
        optimizer: A key of :data:`BASELINES` or a catalogue name.
        schedule: A key of :data:`SCHEDULES`.
        lr: The learning rate; None for a learned optimizer's own.
        weights: A learned optimizer's theta, or "" for its own.
        sha256: Of theta.
        base_width: Where muP's multipliers are 1; None for an optimizer without.
    """

    optimizer: str
    schedule: str = "constant"
    lr: float | None = None
    weights: str = ""
    sha256: str = ""
    base_width: int | None = None

    @property
    def name(self) -> str:
        """As on the command line; of a baseline also its learning rate."""
        name = self.optimizer if self.lr is None else f"{self.optimizer} lr={self.lr:g}"
        return name + f":{self.weights}" * bool(self.weights) + f"@{self.schedule}" * (self.schedule != "constant")

    @classmethod
    def learned(cls, text: str) -> Setting:
        """Parse ``NAME[:WEIGHTS][@SCHEDULE]`` and look at theta.

        Raises:
            ValueError: Unknown optimizer or schedule, or theta is for another optimizer.
            FileNotFoundError: There is no such theta.
        """
        head, at, schedule = text.rpartition("@")
        if not at or "/" in head and schedule not in SCHEDULES:  # hub:<owner>/<repo>@<revision>
            head, schedule = text, "constant"
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} of {text!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        optimizer, _, weights = head.partition(":")
        spec = get_optimizer_info(optimizer)
        theta = _theta_of(spec, weights)
        return cls(
            optimizer,
            schedule,
            weights=weights,
            sha256=theta.sha256 if theta else "",
            base_width=_base_width_of(spec, theta),
        )

    def optimizers(self, model: nn.Module, task: HeldOutTask, steps: int) -> list[Optimizer]:
        """Those that step ``model`` together, in a run of that many steps.

        Raises:
            ValueError: Theta is no longer that of :attr:`sha256`.
        """
        if self.optimizer in BASELINES:
            assert self.lr is not None, "the grid gives one"
            return BASELINES[self.optimizer].make(model, self.lr)
        spec = get_optimizer_info(self.optimizer)
        theta = _theta_of(spec, self.weights)
        if theta and theta.sha256 != self.sha256:
            raise ValueError(f"the theta of {self.name} changed while it was evaluated")
        params: Any = model
        if self.base_width is not None:
            params = mup_param_groups(model, task.base(self.base_width), spec.weight_decay, lr=spec.lr)
        options: dict[str, Any] = {"weights": theta} if theta else {}
        return [create_optimizer(params, self.optimizer, num_steps=steps, **options)]


def _theta_of(spec: OptimizerSpec, weights: str) -> Theta | None:
    """None if the optimizer has none."""
    if spec.architecture is None:
        return None
    source = weights or spec.weights
    if source is None:
        raise ValueError(f"{spec.name} has no default weights; give some: {spec.name}:WEIGHTS")
    theta = load_theta(source, spec.name)
    if theta.architecture != spec.architecture:
        raise ValueError(f"{spec.name}:{source}: these weights are for {theta.architecture}")
    return theta


def _base_width_of(spec: OptimizerSpec, theta: Theta | None) -> int | None:
    config = theta.training.get("config", {}) if theta else {}
    width: int | None = config.get("base_width")
    return MUP_BASE_WIDTH if width is None and issubclass(spec.cls, MuLO) else width


# -- baselines -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """An optimizer that is tuned: its grid is ``lrs`` x ``schedules``.

    Attributes:
        make: The optimizers that step a model together, at a learning rate.
        lrs: Learning rates.
        schedules: Names of schedules.
    """

    make: Callable[[nn.Module, float], list[Optimizer]]
    lrs: tuple[float, ...]
    schedules: tuple[str, ...]

    def settings(self, name: str) -> list[Setting]:
        """The grid."""
        return [Setting(name, schedule, lr) for schedule in self.schedules for lr in self.lrs]


def _adamw(model: nn.Module, lr: float) -> list[Optimizer]:
    return [AdamW(model.parameters(), lr, fused=True)]


def _sgd(model: nn.Module, lr: float) -> list[Optimizer]:
    return [SGD(model.parameters(), lr, momentum=0.9)]


def _muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """torch's Muon for hidden matrices, its steps as large as AdamW's, which takes all other parameters."""
    ends = {
        param
        for module in model.modules()
        if isinstance(module, (nn.Embedding, Readout))
        for param in module.parameters()
    }
    hidden = [param for param in model.parameters() if param.dim() == 2 and param not in ends]
    rest = [param for param in model.parameters() if param.dim() != 2 or param in ends]
    muon = [torch.optim.Muon(hidden, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")] if hidden else []
    return [*muon, AdamW(rest, lr, fused=True)]


BASELINES: dict[str, Baseline] = {
    "adamw": Baseline(_adamw, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ("constant", "cosine")),
    "sgd": Baseline(_sgd, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), ("cosine",)),
    "muon": Baseline(_muon, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ("cosine",)),
}
"""What learned optimizers are compared with. Muon is in torch from 2.9 on."""


def available_baselines() -> list[str]:
    """The baselines that this version of torch has."""
    return [name for name in BASELINES if name != "muon" or hasattr(torch.optim, "Muon")]


def parse_contenders(texts: Sequence[str]) -> list[Setting]:
    """Those of the command line, each once."""
    return list(dict.fromkeys(Setting.learned(text) for text in texts))
