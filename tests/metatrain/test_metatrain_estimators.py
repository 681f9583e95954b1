"""Do the estimators estimate the gradient that they say they do?"""

from __future__ import annotations

import pytest
import torch

from pylo_integrations.metatrain.episodes import Episode, Objective, Reparametrisation
from pylo_integrations.metatrain.estimators import PES, Estimate, Group, TruncatedBackprop, mean_gradient
from pylo_integrations.metatrain.learners import Learner
from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.metatrain.spaces import Celo2Linear, CeloLinear, FullSpace, SmallFCLinear
from pylo_integrations.metatrain.tasks import FAMILIES
from pylo_integrations.rules.base import StepContext
from pylo_integrations.rules.celo import CeloRule
from pylo_integrations.rules.celo2 import unfinished_steps
from pylo_integrations.rules.control import horizon_features
from pylo_integrations.rules.features import time_features, time_rates
from pylo_integrations.rules.networks import steps
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import TensorLayout

HORIZON, TRUNCATION = 12, 3


class Walk:
    """``x <- x + a[t] . theta``, with objective ``(x - goal)**2``: quadratic in theta, so that evolution strategies
    have no bias from their width, and with effects that outlast any truncation."""

    def __init__(self, members: int) -> None:
        self.iteration, self.horizon = 0, HORIZON
        generator = torch.Generator().manual_seed(0)
        self.pushes = torch.randn(HORIZON, 3, generator=generator, dtype=torch.float64)
        self.goals = torch.randn(HORIZON, generator=generator, dtype=torch.float64)
        self.x = torch.zeros(members, dtype=torch.float64)

    def unroll(self, vectors, steps):
        objectives = []
        for _ in range(steps):
            objectives.append((self.x - self.goals[self.iteration]).square())
            self.x = self.x + vectors @ self.pushes[self.iteration]
            self.iteration += 1
        return torch.stack(objectives)

    def detach_(self):
        self.x = self.x.detach()


VECTOR = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)


def true_gradient():
    """Of the sum of the objective over an episode, in closed form."""
    walk = Walk(1)
    reach = torch.cat([torch.zeros(1, 3, dtype=torch.float64), walk.pushes.cumsum(0)[:-1]])
    return (2 * (reach @ VECTOR - walk.goals).unsqueeze(1) * reach).sum(0)


def episode_gradient(estimator, members, episodes=1):
    """The estimates of whole episodes added up, times the number of steps that they are means over."""
    group = Group(lambda number: Walk(members), lambda number: generator_of("noise", number))
    sums = []
    for _ in range(episodes):
        total, taken = torch.zeros(3, dtype=torch.float64), 0
        while taken < HORIZON:
            estimate = estimator.estimate(VECTOR, group)
            total, taken = total + estimate.gradient, taken + estimate.steps // members
        sums.append(total)
    return torch.stack(sums)


@pytest.mark.parametrize("truncation", [TRUNCATION, 5, None], ids=["pes", "pes, last one shorter", "es"])
def test_evolution_strategies_are_unbiased_over_whole_episodes(truncation):
    pairs = 4000
    sums = episode_gradient(PES(pairs, 0.1, truncation), 2 * pairs, episodes=40) * (truncation or HORIZON)
    error = (sums.mean(0) - true_gradient()).abs()
    standard_error = sums.std(0) / len(sums) ** 0.5
    assert (error < 4 * standard_error).all()
    assert (standard_error < 0.03 * true_gradient().norm()).all(), "the test could see a bias"


def test_truncation_without_memory_would_be_biased_and_is_for_backpropagation():
    short = episode_gradient(TruncatedBackprop(1, TRUNCATION), 1)[0] * TRUNCATION
    whole = episode_gradient(TruncatedBackprop(1, HORIZON), 1)[0] * HORIZON
    torch.testing.assert_close(whole, true_gradient(), rtol=1e-10, atol=0)
    assert (short - whole).norm() > 0.3 * whole.norm()


def test_clipping_bounds_what_a_pair_says():
    group = Group(lambda number: Walk(2), lambda number: generator_of("noise", number))
    estimate = PES(1, 0.1, TRUNCATION, clip=1e-3).estimate(VECTOR, group)
    assert estimate.gradient.norm() <= 1e-3 * group.drift.norm() / (2 * 0.1**2) * (1 + 1e-9)


def test_families_count_alike_whatever_their_groups():
    ones, twos = (Estimate(torch.full((2,), value), 0.0, 1) for value in (1.0, 2.0))
    estimates = {"a": [ones, ones, ones], "b": [twos]}
    assert mean_gradient(estimates, {"a": 1.0, "b": 1.0}).tolist() == [1.5, 1.5]
    assert mean_gradient(estimates, {"a": 1.0, "b": 3.0}).tolist() == [3.5, 3.5]


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("space", [SmallFCLinear(hidden=5), None], ids=["linear", "full"])
def test_backpropagation_agrees_with_finite_differences(space, split):
    origin = SmallFCLinear(hidden=5)
    space = space or FullSpace(origin.theta(origin.start))
    learner = Learner.learned("small_fc_lopt", origin.arrays(origin.start), {"exp_mult": 1.0, "step_mult": 0.01})
    task = FAMILIES["teacher"](width=4, inputs=3, depth=1, batch=8, activation="tanh").sample(generator_of("task"))

    class Vectors:
        """From the third step on, so that state from before the truncation counts."""

        def __init__(self):
            self.inner = Episode(
                learner, task, Objective(split), 50, [1, 2], 1, Reparametrisation(), dtype=torch.float64
            )
            self.horizon = 50
            with torch.no_grad():
                self.unroll(space.start.double().expand(2, -1), 3)

        @property
        def iteration(self):
            return self.inner.iteration

        def unroll(self, vectors, steps):
            return self.inner.unroll(space.arrays(vectors), steps)

        def detach_(self):
            self.inner.detach_()

    generator = generator_of("point")
    point = space.start.double() + 0.02 * torch.randn(len(space.start), generator=generator, dtype=torch.float64)
    gradient = TruncatedBackprop(2, 6).estimate(point, Group(lambda number: Vectors(), generator_of)).gradient
    for _ in range(3):
        direction = torch.randn(len(point), generator=generator, dtype=torch.float64)
        with torch.no_grad():
            up, down = (Vectors().unroll((point + sign * 1e-6 * direction).expand(2, -1), 6).mean() for sign in (1, -1))
        assert float(gradient @ direction) == pytest.approx(float(up - down) / 2e-6, rel=1e-4, abs=1e-7)
    assert gradient.norm() > 1e-3


@pytest.mark.parametrize("wide", [False, True], ids=["as trained", "as kept"])
def test_the_linear_space_is_what_it_says(wide):
    space = SmallFCLinear(hidden=8, step=0.005)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 28, 50, generator=generator)
    vector = space.start + 0.1 * torch.randn(len(space.start), generator=generator)
    kept = space.theta(vector) if wide else space.arrays(vector)
    assert kept["nn/~/w1"].shape == ((8, 8) if wide else (3, 3))
    rule = Learner.learned("small_fc_lopt", kept, {"exp_mult": 1.0, "step_mult": 0.01}).rule
    signed = [0, 1, 2, 3, 4, 6, 7, 8, 10, 11, 12, 25, 26, 27]
    for time in (0, 30, 5000):
        times = time_features(time, time_rates(torch.float32, torch.device("cpu")))
        inputs = torch.cat([features, times.view(1, -1, 1).expand(1, -1, 50)], dim=1)
        weights, biases = rule.weights, [bias.unsqueeze(0) for bias in rule.biases]
        got = 0.01 * steps(inputs, weights, biases, exp_mult=1.0).flatten()
        schedule = vector[14:21] @ times[:7] - 0.327 * times[7:].sum() + vector[21]
        want = 0.01 * torch.exp(schedule) * (vector[:14] @ features[0, signed])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    first = space.start[14:21] @ torch.full((7,), -0.76159) - 0.327 * 4 * -0.76159 + space.start[21]
    assert 0.01 * float(first.exp()) == pytest.approx(0.005, rel=1e-3)
    assert max(array.abs().max() for array in space.theta(space.start).values()) < 16, "fit for half precision"


def celo_controls(space, arrays, losses):
    """What Celo decides at every step of a run with these losses, and the rule; for one tensor of scale 1."""
    rule = CeloRule.from_arrays(arrays, **space.hyper)
    constants, memory = rule.constants(torch.device("cpu"), torch.float32), {}
    group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
    bucket = Bucket(TensorLayout.whole((1,), (0,)), [torch.ones(1)], [{}], group, torch.float32)
    for iteration, loss in enumerate(losses):
        ctx = StepContext(iteration, len(losses), torch.tensor(loss), memory=memory, constants=constants)
        (control,) = rule.control([bucket], [{"param_squares": torch.ones(1)}], ctx)
        yield rule, control, memory


@pytest.mark.parametrize("wide", [False, True], ids=["as trained", "as kept"])
def test_the_linear_space_of_celo_is_what_it_says(wide):
    space = CeloLinear(hidden=6, lstm=20, step=0.02)
    generator = torch.Generator().manual_seed(0)
    vector = space.start + 0.1 * torch.randn(len(space.start), generator=generator)
    kept = space.theta(vector) if wide else space.arrays(vector)
    assert kept["ff_mod_stack/~/w1"].shape == ((1, 6, 6) if wide else (1, 2, 2))
    features = torch.randn(1, 30, 50, generator=generator)
    signed = [0, 1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 27, 28, 29]
    gate, losses, seen = torch.sigmoid(torch.tensor(5.0)), [1.0, 2.0, 0.5, 0.7, 0.6], []
    for iteration, (_, control, memory) in enumerate(celo_controls(space, kept, losses)):
        weights, biases = ([control[f"{kind}{i}"] for i in range(3)] for kind in "wb")
        got = control["lr_mult"] * steps(features, weights, biases, exp_mult=1.0).flatten()
        run = torch.cat([horizon_features(iteration, len(losses), got), memory["loss_features"]])
        unit = gate * torch.tanh(gate * torch.tanh(run))
        want = 0.1 * torch.exp(vector[16:34] @ unit + vector[34]) * (vector[:16] @ features[0, signed])
        # The gate that forgets is not quite shut: it lets sigmoid(-5) = 0.7 % of the step before through.
        torch.testing.assert_close(got, want, rtol=0.03, atol=1e-6)
        seen.append(float(memory["loss_features"].abs().max()))
    assert max(seen) > 0.1, "the course of the loss is in it"
    assert max(array.abs().max() for array in space.theta(space.start).values()) < 16, "fit for half precision"


def test_a_constructed_celo_begins_with_a_line_to_zero():
    space = CeloLinear(step=0.02)
    sizes = [
        float(control["lr_mult"]) * rule.step_mult
        for rule, control, _ in celo_controls(space, space.theta(space.start), [1.0] * 100)
    ]
    line = 0.02 * (1 - torch.arange(100) / 100)
    assert torch.tensor(sizes).sub(line).abs().max() < 0.002


@pytest.mark.parametrize("wide", [False, True], ids=["as trained", "as kept"])
def test_the_linear_space_of_celo2_is_what_it_says(wide):
    space = Celo2Linear(hidden=6, step_mult=0.5)
    assert space.hyper == {"step_mult": 0.5}
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 30, 50, generator=generator, dtype=torch.float64)
    vector = space.start + 0.1 * torch.randn(len(space.start), generator=generator)
    kept = space.theta(vector) if wide else space.arrays(vector)
    assert kept["ff_mod_stack/~/w1"].shape == ((6, 6) if wide else (2, 2))
    rule = Learner.learned("celo2", kept, space.hyper).rule
    signed = [0, 1, 3, 4, 5, 7, 8, 9, 11, 12, 13, 14, 27, 28, 29]

    def direction(rule):
        biases = [bias.unsqueeze(0) for bias in rule.biases]
        weights = [weight.double() for weight in rule.weights]
        return unfinished_steps(features, weights, [b.double() for b in biases], exp_mult=rule.exp_mult).flatten()

    torch.testing.assert_close(direction(rule), vector.double() @ features[0, signed], rtol=1e-6, atol=1e-6)
    start = Learner.learned("celo2", space.theta(space.start), space.hyper).rule
    assert torch.equal(direction(start), features[0, 3]), "the momentum, as Muon has it"
