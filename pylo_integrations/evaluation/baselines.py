"""Baselines: well-known optimizers and the grids on which they are tuned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import nn
from torch.optim import SGD, AdamW, NAdam, Optimizer

from pylo_integrations.metatrain.tasks import Readout


@dataclass(frozen=True)
class Baseline:
    """An optimizer that is tuned: its grid is ``lrs`` x ``schedules``. All else is as its documentation has it.

    Attributes:
        make: The optimizers that step a model together, at a learning rate.
        lrs: Learning rates.
        schedules: Names of schedules; the first is that of the default setting.
        default_lr: The learning rate that its documentation begins with.
        package: What has to be installed; "" for torch alone.
    """

    make: Callable[[nn.Module, float], list[Optimizer]]
    lrs: tuple[float, ...]
    schedules: tuple[str, ...]
    default_lr: float
    package: str = ""


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _adamw(model: nn.Module, lr: float) -> list[Optimizer]:
    return [AdamW(_trained(model), lr, fused=True)]


def _nadamw(model: nn.Module, lr: float) -> list[Optimizer]:
    return [NAdam(_trained(model), lr, weight_decay=0.01, decoupled_weight_decay=True)]


def _sgd(model: nn.Module, lr: float) -> list[Optimizer]:
    return [SGD(_trained(model), lr, momentum=0.9)]


def _muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """torch's Muon for hidden matrices, its steps as large as AdamW's, which takes all other parameters."""
    ends = {
        param
        for module in model.modules()
        if isinstance(module, (nn.Embedding, Readout))
        for param in module.parameters()
    }
    hidden = [param for param in _trained(model) if param.dim() == 2 and param not in ends]
    rest = [param for param in _trained(model) if param.dim() != 2 or param in ends]
    muon = [torch.optim.Muon(hidden, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")] if hidden else []
    return [*muon, *([AdamW(rest, lr, fused=True)] if rest else [])]


def _schedule_free(model: nn.Module, lr: float) -> list[Optimizer]:
    from schedulefree import AdamWScheduleFree

    return [AdamWScheduleFree(_trained(model), lr)]


def _soap(model: nn.Module, lr: float) -> list[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(_trained(model), lr)]


def _lion(model: nn.Module, lr: float) -> list[Optimizer]:
    from pytorch_optimizer import Lion

    return [Lion(_trained(model), lr)]


def _prodigy(model: nn.Module, lr: float) -> list[Optimizer]:
    from prodigyopt import Prodigy

    return [Prodigy(_trained(model), lr, safeguard_warmup=True)]  # as it asks where there is a warm-up


BASELINES: dict[str, Baseline] = {
    "adamw": Baseline(_adamw, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ("constant", "cosine"), 1e-3),
    "sgd": Baseline(_sgd, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), ("cosine",), 1e-3),
    "muon": Baseline(_muon, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), ("cosine",), 1e-3),
    "nadamw": Baseline(_nadamw, (6e-4, 2e-3, 6e-3, 2e-2), ("cosine",), 2e-3),
    "schedule_free": Baseline(
        _schedule_free, (8e-4, 2.5e-3, 8e-3, 2.5e-2, 8e-2), ("constant",), 2.5e-3, "schedulefree"
    ),
    "soap": Baseline(_soap, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), ("cosine",), 3e-3, "pytorch_optimizer"),
    "lion": Baseline(_lion, (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), ("cosine",), 1e-4, "pytorch_optimizer"),
    "prodigy": Baseline(_prodigy, (0.25, 0.5, 1.0, 2.0, 4.0), ("cosine",), 1.0, "prodigyopt"),
}
"""What learned optimizers are compared with. Muon is in torch from 2.9 on."""

USUAL = ("adamw", "sgd", "muon")
"""Those that need torch alone and were there from the beginning: the baselines of suite 1."""


def is_available(name: str) -> bool:
    """Whether this version of torch, or an installed package, has a baseline."""
    package = BASELINES[name].package
    return hasattr(torch.optim, "Muon") if name == "muon" else not package or find_spec(package) is not None


def available_baselines() -> list[str]:
    """The baselines that can be run here."""
    return [name for name in BASELINES if is_available(name)]
