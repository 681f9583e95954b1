"""What does pace make of the loss of the first step?"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from pylo_integrations import create_optimizer


class Sines(nn.Module):
    """A function of one number, as SIREN has it: weights are small by design, and gains make up for it."""

    def __init__(self, width: int = 48, gain: float = 30.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gain, self.layers = (
            gain,
            nn.ModuleList([nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, 1)]),
        )
        for layer in self.layers[1:]:
            nn.init.uniform_(layer.weight, -math.sqrt(6 / width) / gain, math.sqrt(6 / width) / gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.sin(self.gain * layer(x))
        return self.layers[-1](x)


def train(steps: int = 150, told: bool = True) -> list[float]:
    model, generator = Sines(), torch.Generator().manual_seed(1)
    optimizer = create_optimizer(model, "pace", num_steps=steps)
    losses = []
    for _ in range(steps):
        x = 2 * torch.rand(64, 1, generator=generator) - 1
        optimizer.zero_grad()
        loss = (model(x) - torch.sin(12 * x)).square().mean()
        loss.backward()
        optimizer.step(loss=loss if told else None)
        losses.append(loss.item())
    return losses


def test_it_keeps_steps_from_wrecking_a_network():
    """Whose weights are small by design, so that the usual step is many times too long."""
    losses, blind = train(), train(told=False)
    assert sum(losses[-10:]) / 10 < 0.01 * losses[0]
    assert sum(blind[-10:]) > 30 * sum(losses[-10:])


def largest_promises(scales: list[float]) -> list[float]:
    """After every step, for gradients of these sizes."""
    torch.manual_seed(0)
    param, grad = nn.Parameter(torch.randn(8, 6)), torch.randn(8, 6)
    optimizer = create_optimizer([param], "pace", num_steps=100, telemetry=True)
    found = []
    for scale in scales:
        param.grad = scale * grad
        optimizer.step(loss=2.0)
        found.append(optimizer.telemetry()["optim/Pace/largest_promise"])
    return found


def test_what_steps_once_promised_counts_for_the_rest_of_the_run():
    found = largest_promises([10.0] * 40 + [1e-3] * 40)
    assert found == sorted(found)
    assert found[39] > 10 * found[0] > 0
    assert found[-1] == found[-20]


def test_one_bad_batch_counts_for_a_tenth():
    *_, before, bad = largest_promises([1.0] * 40 + [1e4])
    assert bad == pytest.approx(1.1 * before)


def test_vectors_go_less_far_where_matrices_promise_too_much():
    def moved(scale: float) -> float:
        torch.manual_seed(0)
        matrix, vector = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(5))
        optimizer, starts = create_optimizer([matrix, vector], "pace", num_steps=100_000), []
        for _ in range(100):
            matrix.grad, vector.grad = scale * torch.ones(8, 6), torch.ones(5)
            optimizer.step(loss=1.0)
            starts.append(vector.detach().clone())
        return (starts[-1] - starts[-2]).abs().max().item()

    # And no less than this: the first batch may be an easy one.
    assert moved(1e4) == pytest.approx(0.05 * moved(1e-4), rel=1e-2)


def stepped(*losses: Any, closure: bool = False, observed: bool = False, num_steps: int = 100) -> torch.Tensor:
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(8, 6))
    optimizer = create_optimizer([param], "pace", num_steps=num_steps)
    for loss in losses:
        param.grad = torch.randn(8, 6)
        if observed and loss is not None:
            optimizer.observe_loss(loss)
            optimizer.step()
        elif closure:
            optimizer.step(lambda loss=loss: loss)
        else:
            optimizer.step(loss=loss)
    return param.detach()


def test_usual_later_losses_do_not_matter():
    assert torch.equal(stepped(2.0, 1.0, 0.5), stepped(2.0, 3.9, None))
    assert torch.equal(stepped(None, 1.0, 0.5), stepped(None, None, None))
    assert not torch.equal(stepped(2.0, 1.0, 0.5), stepped(None, 1.0, 0.5))


def remembered(losses: list[float | None]) -> list[float]:
    """What is remembered as the first loss, after every step."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(8, 6))
    optimizer = create_optimizer([param], "pace", num_steps=1000, telemetry=True)
    found = []
    for loss in losses:
        param.grad = torch.randn(8, 6)
        optimizer.step(loss=loss)
        found.append(optimizer.telemetry()["optim/Pace/first_loss"])
    return found


def test_an_easy_first_batch_is_made_up_for():
    """By a tenth a step at most, up to half of what is usual, so that one bad batch counts little."""
    found = remembered([0.01] + [1.0] * 60)
    assert found[:3] == pytest.approx([0.01, 0.011, 0.0121])
    assert found[-1] == 0.5
    assert remembered([1.0, 1e6, 1.0, -1.0])[-1] == pytest.approx(1.1)
    assert remembered([0.01, None, -1.0])[-1] == pytest.approx(0.011)


def test_after_a_hundred_steps_no_loss_is_read():
    assert remembered([0.01] + [0.01] * 99 + [1.0] * 10)[-1] == pytest.approx(0.01)
    assert remembered([0.01] + [0.01] * 98 + [1.0] * 10)[-1] == pytest.approx(0.011)


def test_a_first_loss_that_is_no_measure_stays_none():
    assert remembered([1e-4] + [1.0] * 60)[-1] == pytest.approx(1e-4)
    assert remembered([None] + [1.0] * 3)[-1] == 0.0


def test_a_run_whose_first_batch_is_easy_trains():
    def train(first: float) -> float:
        torch.manual_seed(0)
        model, truth = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1)), torch.randn(8)
        optimizer = create_optimizer(model, "pace", num_steps=300)
        for index in range(300):
            x = torch.randn(64, 8)
            loss = (model(x).squeeze(1) - (x @ truth).tanh() * 3).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss * first if index == 0 else loss)
        return loss.item()

    assert train(0.01) < 1.5 * train(1.0)


def test_its_sign_does_not_matter_and_a_small_one_is_no_measure():
    assert torch.equal(stepped(2.0), stepped(-2.0))
    assert torch.equal(stepped(1e-4), stepped(None))
    assert torch.equal(stepped(0.0), stepped(None))


@pytest.mark.parametrize("way", ["closure", "observed"])
def test_all_ways_to_tell_it_are_one(way):
    assert torch.equal(stepped(2.0, 1.0, **{way: True}), stepped(2.0, 1.0))


@pytest.mark.parametrize("returned", ["no loss", True])
def test_a_closure_may_return_anything(returned):
    assert torch.equal(stepped(returned, closure=True), stepped(None))


@pytest.mark.parametrize("rule", ["learned", "adamw"])
def test_a_matrix_whose_gradients_come_later_goes_by_it(rule):
    """Whoever has the first step, as the head of a network that is thawed layer by layer."""

    def train(has_gradient: bool) -> torch.Tensor:
        torch.manual_seed(0)
        first, late = (
            nn.Parameter(torch.randn(8, 6) if rule == "adamw" else torch.randn(8)),
            nn.Parameter(torch.randn(8, 6)),
        )
        optimizer = create_optimizer([{"params": [first], "rule": rule}, {"params": [late]}], "pace", num_steps=10)
        for index in range(2):
            first.grad, late.grad = torch.randn_like(first), torch.randn_like(late)
            if index == 0:
                late.grad = torch.zeros_like(late) if has_gradient else None
            optimizer.step(loss=0.01)
        return late.detach()

    torch.testing.assert_close(train(False), train(True), rtol=1e-3, atol=1e-6)


def test_a_run_that_goes_on_remembers_it():
    torch.manual_seed(0)
    starts, grads = torch.randn(8, 6), torch.randn(4, 8, 6)
    whole, first = nn.Parameter(starts.clone()), nn.Parameter(starts.clone())

    def step(optimizer, param, index):
        param.grad = grads[index]
        optimizer.step(loss=3.0 - index)

    one, other = (create_optimizer([param], "pace", num_steps=10) for param in (whole, first))
    for index in range(2):
        step(one, whole, index)
        step(other, first, index)
    second = nn.Parameter(first.detach().clone())
    resumed = create_optimizer([second], "pace", num_steps=10)
    resumed.load_state_dict(other.state_dict())
    resumed.enable_telemetry()
    for index in (2, 3):
        step(one, whole, index)
        step(resumed, second, index)
    assert torch.equal(whole, second)
    assert resumed.telemetry()["optim/Pace/first_loss"] == 3.0


def dtensor_case(rank: int, world: int) -> torch.Tensor:
    mesh = init_device_mesh("cpu", (world,))
    return stepped(DTensor.from_local(torch.tensor(1.0 + rank), mesh, [Partial("avg")]))


@pytest.mark.dist
def test_it_may_be_a_dtensor(workers):
    assert all(torch.equal(param, stepped(1.5)) for param in workers.run(2, dtensor_case))


def mean_case(rank: int, world: int) -> tuple[float, torch.Tensor]:
    """Replicas, each with a loss of its own, for gradients that promise more than any of them."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(8, 6))
    optimizer = create_optimizer([param], "pace", num_steps=10, telemetry=True)
    param.grad = torch.randn(8, 6)
    optimizer.step(loss=1.0 + rank)
    return optimizer.telemetry()["optim/Pace/first_loss"], param.detach()


@pytest.mark.dist
def test_ranks_go_by_the_mean_of_theirs(workers):
    ranks = workers.run(2, mean_case)
    assert [loss for loss, _ in ranks] == [1.5, 1.5]
    assert all(torch.equal(param, stepped(1.5, num_steps=10)) for _, param in ranks)
    assert not torch.equal(stepped(1.5, num_steps=10), stepped(1.0, num_steps=10))
