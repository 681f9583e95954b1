"""Scores of a theta, or of AdamW, on families of tasks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from pylo_integrations.metatrain.config import Config
from pylo_integrations.metatrain.episodes import Episode
from pylo_integrations.metatrain.learners import Arrays, Learner
from pylo_integrations.metatrain.seeds import generator_of, seed_of
from pylo_integrations.metatrain.tasks import Family


@dataclass(frozen=True)
class Score:
    """Of one family; lower is better.

    Attributes:
        objective: Mean over the steps of all runs.
        validation: Mean loss on validation batches after the last step; not finite if a run diverged.
    """

    objective: float
    validation: float


def evaluate(learner: Learner, arrays: Arrays, family: Family, config: Config) -> Score:
    """Train the family's evaluation tasks, the same at any time, as ``config.evaluation`` says.

    Args:
        learner: Who steps.
        arrays: Theta; ignored by a learner without.
        family: The tasks; they are used as they are, without reparametrisation.
        config: For everything else.
    """
    plan, objectives, validations = config.evaluation, [], []
    for index, schedule in itertools.product(range(plan.tasks), config.schedules):
        key = (config.seed, "evaluation", family.name, index)
        episode = Episode(
            learner,
            family.sample(generator_of(*key), config.base_width),
            config.objective,
            plan.horizon,
            [seed_of(*key, seed) for seed in range(plan.seeds)],
            schedule=schedule,
            device=torch.device(config.device),
        )
        with torch.no_grad():
            members = {name: array.expand(episode.members, *array.shape) for name, array in arrays.items()}
            objectives.append(float(episode.unroll(members, plan.horizon).mean()))
            validations.append(float(episode.validation_loss().mean()))
    return Score(fmean(objectives), fmean(validations))


def best_adamw(family: Family, config: Config, lrs: Sequence[float]) -> tuple[float, Score]:
    """AdamW at the best of some learning rates, chosen for this family: the rate, and its score."""
    scores = {lr: evaluate(Learner.adamw(lr), {}, family, config) for lr in lrs}
    best = min(scores, key=lambda lr: scores[lr].objective)
    return best, scores[best]
