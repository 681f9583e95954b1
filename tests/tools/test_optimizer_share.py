"""Is the part of a training step that the optimizer takes what the clock says, with closures and without?"""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import SGD

from pylo_integrations import create_optimizer
from pylo_integrations.bench import share
from pylo_integrations.bench.share import MEASURED, WARMUP, OptimizerShare


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to it."""
    time = [0.0]
    monkeypatch.setattr(share, "perf_counter", lambda: time[0])
    return time


class TwoSeconds(SGD):
    """Steps take two seconds, one before and one after the closure."""

    clock: list[float]

    def step(self, closure=None):
        self.clock[0] += 1.0
        loss = None if closure is None else closure()
        self.clock[0] += 1.0
        return loss


def train(optimizer, clock, steps, by_closure):
    """Training steps whose model takes six seconds; returns what the closures returned, and the share."""
    measured, losses = OptimizerShare(optimizer), []

    def model():
        clock[0] += 6.0
        return "loss"

    for _ in range(steps):
        measured.begin()
        if by_closure:
            losses.append(optimizer.step(model))
        else:
            model()
            optimizer.step()
        measured.end()
        clock[0] += 100.0  # reading data, validation: between steps
    return losses, measured.value


@pytest.mark.parametrize(("by_closure", "expected"), [(False, 2 / 8), (True, 1 / 8)])
def test_the_model_is_not_counted_in_whoever_calls_it(clock, by_closure, expected):
    optimizer = TwoSeconds([torch.nn.Parameter(torch.zeros(1))])
    optimizer.clock = clock
    losses, value = train(optimizer, clock, WARMUP + 3, by_closure)
    assert value == pytest.approx(expected) and losses == ["loss"] * (WARMUP + 3) * by_closure


def test_only_some_steps_after_the_first_are_measured(clock):
    optimizer = TwoSeconds([torch.nn.Parameter(torch.zeros(1))])
    optimizer.clock = clock
    assert math.isnan(train(optimizer, clock, WARMUP, by_closure=False)[1])
    assert len(optimizer._optimizer_step_pre_hooks) == 1  # of the run that was too short
    _, value = train(optimizer, clock, WARMUP + MEASURED, by_closure=False)
    assert value == pytest.approx(2 / 8)
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1


@pytest.mark.parametrize("by_closure", [False, True])
def test_learned_optimizers_take_the_same_steps_under_it(by_closure):
    ends = []
    for watched in (True, False):
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = create_optimizer([weight], "celo2")
        measured = OptimizerShare(optimizer) if watched else None

        def closure(weight=weight):
            weight.grad = weight.detach() * 2
            return weight.detach().square().sum()

        for _ in range(WARMUP + 3):
            if measured:
                measured.begin()
            if by_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
            if measured:
                measured.end()
        if measured:
            assert 0 < measured.value < 1
        ends.append(weight.detach())
    assert torch.equal(*ends)
