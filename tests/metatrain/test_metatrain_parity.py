"""Does a theta step in meta-training exactly as it does in the optimizer?"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from thetas import slow_unless, theta_for
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR

from pylo_integrations import Theta, create_optimizer, get_optimizer_info, mup_param_groups
from pylo_integrations.metatrain.episodes import Episode, Objective, Reparametrisation
from pylo_integrations.metatrain.learners import Learner
from pylo_integrations.metatrain.spaces import CeloLinear, SmallFCLinear
from pylo_integrations.metatrain.tasks import FAMILIES

SEEDS = [11, 12]
SCHEDULERS = {
    "constant": lambda optimizer, steps: ConstantLR(optimizer, 1.0),
    "linear": lambda optimizer, steps: LinearLR(optimizer, 1.0, 0.0, steps),
    "cosine": CosineAnnealingLR,
}


def observed(task):
    """A task that remembers the networks that it made and the batches that it drew."""
    models, batches = [], []

    def model():
        models.append(task.model())
        return copy.deepcopy(models[-1])

    def draw(*args):
        batches.append(task.batches(*args))
        return batches[-1]

    return replace(task, model=model, batches=draw), models, batches


def thetas(optimizer):
    """Three theta that differ in every array."""
    if optimizer in ("small_fc_lopt", "mulo", "celo"):
        space = CeloLinear(lstm=20) if optimizer == "celo" else SmallFCLinear(hidden=8)
        noise = torch.randn(3, len(space.start), generator=torch.Generator().manual_seed(1))
        kept = [space.theta(space.start + 0.05 * row) for row in noise]
        arrays = {name: torch.stack([theta[name] for theta in kept]) for name in kept[0]}
        hyper = space.hyper
    else:
        theta = theta_for(optimizer)
        generator = torch.Generator().manual_seed(2)
        arrays = {
            name: torch.stack([a + 0.01 * torch.randn(a.shape, generator=generator) for _ in range(3)])
            for name, a in theta.arrays.items()
        }
        hyper = dict(theta.hyper)
    architecture = get_optimizer_info(optimizer).cls.architecture
    return [Theta(architecture, {name: a[i] for name, a in arrays.items()}, hyper) for i in range(3)]


def train_twice(family, optimizer, steps, dtype=torch.float64, base_width=None, schedule="constant"):
    """Parameters of members after ``steps`` steps, by the meta-trainer and by the optimizer."""
    mine = thetas(optimizer)
    task, models, batches = observed(family.sample(torch.Generator().manual_seed(3), base_width))
    learner = Learner.learned(optimizer, mine[0].arrays, mine[0].hyper)
    episode = Episode(learner, task, Objective(), 2 * steps, SEEDS, copies=3, dtype=dtype, schedule=schedule)
    # Copies are outermost: theta i steps members 2 i and 2 i + 1.
    arrays = {n: torch.stack([t.arrays[n] for t in mine for _ in SEEDS]) for n in mine[0].arrays}
    losses = episode.unroll(arrays, steps)
    initial, drawn = models[: len(SEEDS)], batches[:steps]
    pairs = []
    for index, theta in enumerate(mine):
        for seed in range(len(SEEDS)):
            model = copy.deepcopy(initial[seed]).to(dtype)
            groups = model if base_width is None else mup_param_groups(model, task.base())
            oracle = create_optimizer(groups, optimizer, weights=theta, backend="reference", num_steps=2 * steps)
            scheduler = SCHEDULERS[schedule](oracle, 2 * steps)
            for batch in drawn:
                oracle.zero_grad()
                loss = task.loss(model, tuple(x[seed].to(dtype) if x.is_floating_point() else x[seed] for x in batch))
                loss.backward()
                oracle.step(loss=loss)
                scheduler.step()
            member = index * len(SEEDS) + seed
            for name, param in model.named_parameters():
                pairs.append((episode.params[name][member], param.detach()))
                assert not torch.equal(param, initial[seed].get_parameter(name).to(dtype)), "it was trained"
    assert losses.shape == (steps, 6) and losses.isfinite().all()
    return pairs


def largest_difference(pairs):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.slow
def test_200_steps_are_those_of_the_optimizer():
    family = FAMILIES["teacher"](width=8, activation="tanh", batch=8)
    pairs = train_twice(family, "small_fc_lopt", 200, torch.float32)
    assert len(pairs) == 36
    assert largest_difference(pairs) < 1e-5


def test_a_rule_that_finishes_in_float64_keeps_networks_in_float32():
    family = FAMILIES["teacher"](width=8, activation="tanh", batch=8)
    # Newton-Schulz multiplies the rounding errors of gradients.
    assert largest_difference(train_twice(family, "celo2", 12, torch.float32)) < 1e-4


@pytest.mark.parametrize(
    "kind", [slow_unless(kind not in ("image_mlp", "text_mlp"), kind) for kind in sorted(FAMILIES)]
)
def test_every_family_is_stepped_as_the_optimizer_steps_it(kind):
    if kind.startswith("image"):
        pytest.importorskip("sklearn")
    assert largest_difference(train_twice(FAMILIES[kind](width=8, batch=4), "small_fc_lopt", 12)) < 1e-8


@pytest.mark.parametrize(
    "optimizer",
    ["celo", "celo_adam", "celo2", *(slow_unless(False, name) for name in ("velo", "celo2_base", "elo_celo2"))],
)
def test_every_rule_can_be_unrolled(optimizer):
    # Two layers of equal shape share a stack; the loss and the horizon reach the rules that want them.
    family = FAMILIES["teacher"](width=8, activation="tanh", depth=3, batch=8)
    assert largest_difference(train_twice(family, optimizer, 25)) < 1e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_are_those_of_torch(schedule):
    pairs = train_twice(FAMILIES["teacher"](width=8, batch=8), "small_fc_lopt", 12, schedule=schedule)
    assert largest_difference(pairs) < 1e-8


def test_width_multipliers_are_those_of_the_optimizer():
    family = FAMILIES["text_attention"](width=16, batch=4, length=6)
    pairs = train_twice(family, "mulo", 12, base_width=8)
    assert largest_difference(pairs) < 1e-8
    task = family.sample(torch.Generator().manual_seed(3), 8)
    lrs = {group["lr"] for group in mup_param_groups(task.model(), task.base())}
    assert lrs == {1.0, 0.5}, "the case has multipliers"


def test_local_functions_go_through_the_learners_runner():
    """Which is ``torch.compile`` where a config says so."""
    seen = []

    def local(function):
        seen.append(function.__name__)
        return function

    [mine, *_] = thetas("small_fc_lopt")
    learner = Learner.learned("small_fc_lopt", mine.arrays, mine.hyper, local=local)
    episode = Episode(learner, FAMILIES["teacher"]().sample(torch.Generator().manual_seed(3)), Objective(), 10, SEEDS)
    episode.unroll({name: array.expand(2, *array.shape) for name, array in mine.arrays.items()}, 1)
    assert set(seen) == {"accumulate_", "normalised", "steps"}


def episode(copies=1, reparametrisation=None):
    theta = thetas("small_fc_lopt")[0]
    learner = Learner.learned("small_fc_lopt", theta.arrays, theta.hyper)
    task = FAMILIES["teacher"](width=8, batch=8).sample(torch.Generator().manual_seed(3))
    made = Episode(learner, task, Objective(), 10, SEEDS, copies, reparametrisation, dtype=torch.float64)
    made.unroll({name: array.expand(made.members, *array.shape) for name, array in theta.arrays.items()}, 3)
    return made


def test_twins_differ_by_theta_alone():
    params = episode(copies=2).params
    for value in params.values():
        assert torch.equal(value[0], value[2]) and torch.equal(value[1], value[3])
        assert not torch.equal(value[0], value[1])


def test_reparametrisation_changes_the_training_but_not_the_network():
    plain, scaled = episode(), episode(reparametrisation=Reparametrisation(0.3, 0.9))
    torch.testing.assert_close(plain.tensors()["first"], scaled.tensors()["first"], rtol=1e-6, atol=0)
    assert any(not torch.allclose(plain.params[name], value) for name, value in scaled.params.items())


def test_the_objective_bounds_what_diverges():
    objective = Objective(floor=0.01, ceiling=3.0)
    losses = torch.tensor([1.0, 0.0, 100.0, torch.inf, torch.nan])
    want = torch.log(torch.tensor([0.51, 0.01, 3.01, 3.01, 3.01]))
    torch.testing.assert_close(objective(losses, torch.full((5,), 2.0)), want)
