"""A stage at work: its space, its estimator, and the groups of episodes that its gradients come from."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from pylo_integrations.metatrain.config import Config, Stage
from pylo_integrations.metatrain.episodes import Episode
from pylo_integrations.metatrain.estimators import PES, Estimator, Group, TruncatedBackprop
from pylo_integrations.metatrain.learners import Learner
from pylo_integrations.metatrain.seeds import generator_of, seed_of
from pylo_integrations.metatrain.spaces import LINEAR_SPACES, FullSpace, LinearSpace, Space
from pylo_integrations.metatrain.tasks import Family
from pylo_integrations.profiles import architecture_of


def linear_space(config: Config) -> LinearSpace:
    """The space of few numbers that a config starts in, or meta-trains in."""
    space = LINEAR_SPACES[architecture_of(config.optimizer)]
    return space(**config.start.construction(), seed=config.seed)


class VectorEpisode:
    """An episode whose members' theta are vectors of a space."""

    def __init__(self, episode: Episode, space: Space) -> None:
        self.inner, self._space, self.horizon = episode, space, episode.horizon

    @property
    def iteration(self) -> int:
        """Steps taken."""
        return self.inner.iteration

    def unroll(self, vectors: Tensor, steps: int) -> Tensor:
        """As that of the episode, with a vector for every member."""
        return self.inner.unroll(self._space.arrays(vectors), steps)

    def detach_(self) -> None:
        """As that of the episode."""
        self.inner.detach_()


class RunningStage:
    """Stage ``index`` of a config.

    Args:
        config: Whose.
        index: Of the stage.
        learner: Who steps the members of its episodes.
        template: Theta that the stage begins at.
        device: Of episodes.

    Attributes:
        stage: What the config says of it.
        space: What its vectors stand for.
        estimator: Of gradients.
        groups: By family and number.
    """

    def __init__(
        self, config: Config, index: int, learner: Learner, template: Mapping[str, Tensor], device: torch.device
    ) -> None:
        self._config, self._index, self._device = config, index, device
        self.stage = stage = config.stages[index]
        self.space: Space = linear_space(config) if stage.space == "linear" else FullSpace(template, stage.scales)
        self._learner = learner.shaped_as(self.space.arrays(self.space.start))
        self.estimator = _make_estimator(stage)
        self.groups = {
            (family.name, number): self._make_group(family, number)
            for family in config.train
            for number in range(stage.groups)
        }

    def drawn(self, iteration: int) -> set[str]:
        """Names of the families of an iteration of the run."""
        names, count = [family.name for family in self._config.train], self.stage.families
        if count is None:
            return set(names)
        generator = generator_of("families", self._config.seed, iteration)
        return {names[int(index)] for index in torch.randperm(len(names), generator=generator)[:count]}

    def _make_group(self, family: Family, number: int) -> Group:
        key = (self._config.seed, self._index, family.name, number)
        return Group(functools.partial(self._begin, family, key), lambda count: generator_of("noise", *key, count))

    def _begin(self, family: Family, key: tuple[object, ...], number: int) -> VectorEpisode:
        """Episode ``number`` of a group."""
        config, stage = self._config, self.stage
        generator = generator_of("episode", *key, number)
        low, high = map(math.log, stage.horizon)
        draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        horizon = round(math.exp(low + (high - low) * draw[0]))
        if number == 0 and stage.estimator != "es":
            # Episodes of different groups must not begin together for ever: the first ends early.
            horizon = max(1, round(horizon * draw[1]))
        episode = Episode(
            self._learner,
            family.sample(generator, config.base_width),
            config.objective,
            horizon,
            [seed_of("member", *key, number, pair) for pair in range(stage.pairs)],
            self.estimator.copies,
            config.reparametrisation,
            config.schedules[int(torch.randint(len(config.schedules), (), generator=generator))],
            self._device,
        )
        return VectorEpisode(episode, self.space)


def _make_estimator(stage: Stage) -> Estimator:
    if stage.estimator == "backprop":
        return TruncatedBackprop(stage.pairs, stage.truncation, stage.clip)
    return PES(stage.pairs, stage.sigma, None if stage.estimator == "es" else stage.truncation, stage.clip)
