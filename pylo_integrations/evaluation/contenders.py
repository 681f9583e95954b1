"""Who trains the held-out tasks: learned optimizers as they come, and any setting of a baseline."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info
from pylo_integrations.evaluation.baselines import BASELINES
from pylo_integrations.evaluation.tasks import HeldOutTask
from pylo_integrations.formats import FORMATS, StateDtype
from pylo_integrations.mup import mup_param_groups
from pylo_integrations.optimizers import MuLO
from pylo_integrations.schedules import constant, linear, warmed_up
from pylo_integrations.weights import Theta, load_theta

MUP_BASE_WIDTH = 16
"""Of a theta that is for muP and has no record of its meta-training."""


SCHEDULES: Mapping[str, Callable[[float], float]] = {"constant": constant, "cosine": warmed_up, "linear": linear}
"""Factors on the learning rate by name, from the part of the run that is over: constant; linear warm-up and a cosine to
zero; linear to zero, the default of the Hugging Face Trainer."""


_FUSED = {"query_key_value": 3}
"""Of the held-out tasks, what is told neither by a module's type nor, as it is in GPT-2 and timm, by its name."""


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
        factor: On a learned optimizer's own learning rate.
        split: Whether tensors that share a parameter are stepped each by itself, see
            :func:`~pylo_integrations.param_groups`; None for what is the optimizer's default.
        state_dtype: How a learned optimizer stores its state.
    """

    optimizer: str
    schedule: str = "constant"
    lr: float | None = None
    weights: str = ""
    sha256: str = ""
    base_width: int | None = None
    factor: float = 1.0
    split: bool | None = None
    state_dtype: StateDtype = "float32"

    @property
    def name(self) -> str:
        """As on the command line; of a baseline also its learning rate."""
        name = self.optimizer if self.lr is None else f"{self.optimizer} lr={self.lr:g}"
        name += "" if self.split is None else "+split" if self.split else "-split"
        name += f":{self.weights}" * bool(self.weights) + f"*{self.factor:g}" * (self.factor != 1)
        name += f"@{self.schedule}" * (self.schedule != "constant")
        return name + f"+{self.state_dtype}" * (self.state_dtype != "float32")

    @classmethod
    def learned(cls, text: str) -> Setting:
        """Parse ``NAME[+split|-split][:WEIGHTS][*FACTOR][@SCHEDULE][+FORMAT]`` and look at theta.

        Raises:
            ValueError: Unknown optimizer or schedule, a factor that is not positive, or theta is for another
                optimizer.
            FileNotFoundError: There is no such theta.
        """
        rest, plus, form = text.rpartition("+")
        if form not in FORMATS or not plus:  # paths may have a plus
            rest, form = text, "float32"
        head, at, schedule = rest.rpartition("@")
        if not at or "/" in head and schedule not in SCHEDULES:  # hub:<owner>/<repo>@<revision>
            head, schedule = rest, "constant"
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule {schedule!r} of {text!r} is unknown; choose one of {', '.join(SCHEDULES)}")
        head, times, factor = head.partition("*")
        optimizer, _, weights = head.partition(":")
        splits = {"+split": True, "-split": False}.get(optimizer[-6:])
        optimizer = optimizer if splits is None else optimizer[:-6]
        spec = get_optimizer_info(optimizer)
        theta = _theta_of(spec, weights)
        return cls(
            optimizer,
            schedule,
            weights=weights,
            sha256=theta.sha256 if theta else "",
            base_width=_base_width_of(spec, theta),
            factor=_factor(factor, text) if times else 1.0,
            split=splits,
            state_dtype=cast(StateDtype, form),
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
            lr = spec.lr * self.factor
            params = mup_param_groups(model, task.base(self.base_width), spec.weight_decay, lr=lr)
        options: dict[str, Any] = {"weights": theta} if theta else {}
        if self.base_width is None:
            divides = spec.cls.splits_fused if self.split is None else self.split
            parts = {name.rpartition(".")[2] for name, each in model.named_modules() if type(each) is nn.Linear}
            options["split"] = divides and {name: count for name, count in _FUSED.items() if name in parts}
        if self.factor != 1:
            options["lr"] = spec.lr * self.factor
        if self.state_dtype != "float32":
            options["state_dtype"] = self.state_dtype
        return [create_optimizer(params, self.optimizer, num_steps=steps, **options)]


def _factor(text: str, where: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(f"factor {text[:20]!r} of {where!r} is not a positive number")
    return factor


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


def grid_of(baseline: str) -> list[Setting]:
    """All settings on which a baseline is tuned."""
    found = BASELINES[baseline]
    return [Setting(baseline, schedule, lr) for schedule in found.schedules for lr in found.lrs]


def default_of(baseline: str) -> Setting:
    """The setting of a baseline that its documentation begins with."""
    found = BASELINES[baseline]
    return Setting(baseline, found.schedules[0], found.default_lr)


def parse_contenders(texts: Sequence[str]) -> list[Setting]:
    """Those of the command line, each once."""
    return list(dict.fromkeys(Setting.learned(text) for text in texts))
