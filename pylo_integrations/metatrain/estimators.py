"""Estimators of the meta-gradient: how the mean objective of many episodes changes with theta.

=============  =====================================================================================================
``pes``        Persistent evolution strategies (Vicol, Metz, Sohl-Dickstein, ICML 2021): antithetic pairs are unrolled a
               little at a time; a pair's difference is credited to the sum of all perturbations since its episode
               began, which makes the estimate unbiased for whole episodes, however short the truncation.
``es``         The same with episodes unrolled as a whole: one perturbation an episode.
``backprop``   The exact gradient of a truncation, by back-propagation through the steps; what went before is taken as
               given, so it is biased towards the short term, and it keeps every intermediate of a truncation.
=============  =====================================================================================================

Each is a pure function of theta's vector, the groups and their noise, so whatever has the two methods of
:class:`Unrollable` can be meta-trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Generator, Tensor


class Unrollable(Protocol):
    """An episode in progress."""

    @property
    def iteration(self) -> int:
        """Steps taken."""

    @property
    def horizon(self) -> int:
        """Steps in all."""

    def unroll(self, vectors: Tensor, steps: int) -> Tensor:
        """Objective before each of ``steps`` steps, ``(steps, members)``, for ``(members, size)`` vectors."""

    def detach_(self) -> None:
        """Cut the graph of the steps taken so far."""


@dataclass
class Group:
    """Members that go through episodes together, one episode after the other.

    Attributes:
        begin: Starts episode number ``n`` of this group.
        noise: The generator of perturbations number ``n`` of this group.
        begun: Episodes begun.
        perturbed: Perturbations drawn.
        drift: Sum of the perturbations since the episode began, ``(pairs, size)``.
        episode: The current one.
    """

    begin: Callable[[int], Unrollable]
    noise: Callable[[int], Generator]
    begun: int = 0
    perturbed: int = 0
    drift: Tensor | None = None
    episode: Unrollable | None = None

    def current(self) -> Unrollable:
        """The episode in progress; a new one if there is none or it has ended."""
        if self.episode is None or self.episode.iteration >= self.episode.horizon:
            self.episode, self.drift = self.begin(self.begun), None
            self.begun += 1
        return self.episode


@dataclass(frozen=True)
class Estimate:
    """What one group has to say.

    Attributes:
        gradient: ``(size,)``.
        objective: Mean over members and steps.
        steps: Inner steps taken, all members together.
    """

    gradient: Tensor
    objective: float
    steps: int


class Estimator(ABC):
    """An estimator; its subclasses hold constants only."""

    copies: int
    """Members for every seed of an episode."""

    @abstractmethod
    def estimate(self, vector: Tensor, group: Group) -> Estimate:
        """Unroll a group a little further from ``vector``, ``(size,)``."""


@dataclass(frozen=True)
class PES(Estimator):
    """Persistent evolution strategies with antithetic pairs.

    Attributes:
        pairs: In a group.
        sigma: Standard deviation of perturbations.
        truncation: Steps; None for whole episodes, which is ``es``.
        clip: Bound on the difference within a pair; bounds variance at the cost of bias.
    """

    pairs: int
    sigma: float
    truncation: int | None = 20
    clip: float = float("inf")
    copies: int = field(default=2, init=False)

    def estimate(self, vector: Tensor, group: Group) -> Estimate:
        """Unroll every pair under a new perturbation."""
        episode = group.current()
        left = episode.horizon - episode.iteration
        steps = left if self.truncation is None else min(self.truncation, left)
        noise = torch.randn(self.pairs, len(vector), generator=group.noise(group.perturbed), dtype=vector.dtype)
        noise = self.sigma * noise
        group.perturbed += 1
        group.drift = noise if group.drift is None else group.drift + noise
        with torch.no_grad():
            objective = episode.unroll(torch.cat([vector + noise, vector - noise]), steps).cpu()
        # The last truncation of an episode may be shorter: its steps weigh as those of others do.
        means = objective.sum(0) / (steps if self.truncation is None else self.truncation)
        difference = (means[: self.pairs] - means[self.pairs :]).clamp(-self.clip, self.clip)
        gradient = (difference.to(vector).unsqueeze(1) * group.drift).mean(0) / (2 * self.sigma**2)
        return Estimate(gradient, float(objective.mean()), objective.numel())


@dataclass(frozen=True)
class TruncatedBackprop(Estimator):
    """Back-propagation through a truncation.

    Attributes:
        members: In a group.
        truncation: Steps.
        max_norm: Bound on the gradient's norm, which is large where training is chaotic.
    """

    members: int
    truncation: int = 20
    max_norm: float = float("inf")
    copies: int = field(default=1, init=False)

    def estimate(self, vector: Tensor, group: Group) -> Estimate:
        """Differentiate the mean objective of the next steps."""
        episode = group.current()
        steps = min(self.truncation, episode.horizon - episode.iteration)
        with torch.enable_grad():
            leaf = vector.detach().clone().requires_grad_()
            objective = episode.unroll(leaf.expand(self.members, -1), steps)
            total = objective.sum() / (self.truncation * self.members) + 0 * leaf.sum()  # the first step sees no theta
            (gradient,) = torch.autograd.grad(total, leaf)
        episode.detach_()
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        norm = gradient.norm()
        if norm > self.max_norm:
            gradient = gradient * (self.max_norm / norm)
        return Estimate(gradient, float(objective.detach().mean()), objective.numel())


def mean_gradient(estimates: Mapping[str, list[Estimate]], weights: Mapping[str, float]) -> Tensor:
    """The mean over families, each times its weight, of the mean over each family's groups."""
    means = [
        weights[name] * torch.stack([estimate.gradient for estimate in mine]).mean(0)
        for name, mine in estimates.items()
    ]
    return torch.stack(means).mean(0)
