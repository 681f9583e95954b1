"""Every scheduler of torch, and the loop that steps one with its optimizer."""

from __future__ import annotations

import inspect
import warnings

import torch
from thetas import create
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

STEPS = 6


def chained(optimizer):
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.5, 2), schedulers.ExponentialLR(optimizer, 0.9)]
    )


def sequential(optimizer):
    parts = [schedulers.LinearLR(optimizer, 0.1, total_iters=2), schedulers.CosineAnnealingLR(optimizer, STEPS - 2)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


MAKERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [1, 3]),
    "ConstantLR": schedulers.ConstantLR,
    "LinearLR": schedulers.LinearLR,
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "SequentialLR": sequential,
    "PolynomialLR": schedulers.PolynomialLR,
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, STEPS),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.1, 1.0, step_size_up=2),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 1.0, total_steps=STEPS),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}
BASES = {"LRScheduler", "_LRScheduler"}
OFFERED = {
    n for n, c in vars(schedulers).items() if inspect.isclass(c) and issubclass(c, schedulers.LRScheduler)
} - BASES


def start(name, make):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = create(model, name) if isinstance(name, str) else name(model.parameters())
    return model, optimizer, make(optimizer)


def step(model, optimizer, scheduler, index) -> list[float]:
    """One step; the learning rates that it was taken with."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(index))
    loss = (model(x) - x[:, :2]).square().mean()
    optimizer.zero_grad()
    loss.backward()
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    optimizer.step(*([lambda: loss] if isinstance(optimizer, torch.optim.SGD) else [loss]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*epoch parameter")
        scheduler.step(*([loss.detach()] if isinstance(scheduler, schedulers.ReduceLROnPlateau) else []))
    return rates
