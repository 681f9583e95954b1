"""What of theta is free: a vector of numbers about as large as their useful changes, and theta made of it."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.rules.features import TIME_SCALES, channel_counts
from pylo_integrations.rules.small_fc import SmallFC

DECAY_SCALE = 0.1
"""Offsets of decays enter as ``exp(10 * offset)``: a unit step of the vector is a factor e on ``1 - beta``."""


class Space(ABC):
    """A differentiable map from vectors to theta's arrays.

    Attributes:
        start: The vector to start from, ``(size,)``, float32.
    """

    start: Tensor

    @abstractmethod
    def arrays(self, vectors: Tensor) -> dict[str, Tensor]:
        """Theta's arrays of ``(..., size)`` vectors, each ``(..., *shape)``."""


class FullSpace(Space):
    """All of theta: the vector is the difference from a template, divided by a scale for every array.

    Args:
        template: Theta's arrays.
        scales: By patterns of names; the first that matches counts, then ``*decays`` is 0.1 and all else 1.
    """

    def __init__(self, template: Mapping[str, Tensor], scales: Mapping[str, float] | None = None) -> None:
        self._template = {name: array.float() for name, array in sorted(template.items())}
        patterns = {**(scales or {}), "*decays": DECAY_SCALE, "*": 1.0}
        self._scales = [
            next(scale for pattern, scale in patterns.items() if fnmatch.fnmatchcase(name, pattern))
            for name in self._template
        ]
        self.start = torch.zeros(sum(array.numel() for array in self._template.values()))

    def arrays(self, vectors: Tensor) -> dict[str, Tensor]:
        """The template plus the scaled vector."""
        pieces = vectors.split_with_sizes([array.numel() for array in self._template.values()], dim=-1)
        return {
            name: array.to(vectors) + scale * piece.reshape(*piece.shape[:-1], *array.shape)
            for (name, array), scale, piece in zip(self._template.items(), self._scales, pieces, strict=True)
        }


class LinearSpace(Space):
    """For small_fc: a direction linear in features that have a sign, times a schedule, and the decays.

    The direction is a weighted sum of the 14 features that change sign with the gradient or the parameter, so that it
    cannot drift; the logarithm of the step is a sum of tanh time features. A ReLU network represents both exactly: the
    direction as the difference of two units, the schedule as a unit that is always positive. Its other units are random
    and not connected to the outputs, ready for :class:`FullSpace` to go on from here.

    The vector holds the weights of the direction, of the time features up to 1000 steps, the logarithm of the step, and
    the decays. Slower time features keep weights that make the step fall as the inverse root of time.

    Args:
        hidden: Width of the network's two hidden layers, at least 3.
        step: Root mean square of the first step, about.
        exp_mult: The rule's constant.
        step_mult: The rule's constant.
        seed: Of the unconnected units.
    """

    signed = ("grad", "param", "momentum", "momentum_over_rms", "factored_grad", "factored_momentum")
    free_times = 7
    per_time = -0.327
    """Weight of a time feature for steps that fall as ``t ** -0.5``: each rises by 1.76 over half a decade."""
    offset = 6.0
    """Keeps the schedule's unit positive; small enough for half precision."""

    def __init__(
        self, *, hidden: int = 32, step: float = 5e-3, exp_mult: float = 1.0, step_mult: float = 1e-2, seed: int = 0
    ) -> None:
        if hidden < 3:
            raise ValueError(f"hidden={hidden} must be at least 3")
        self._hidden, self._exp_mult, self._seed = hidden, exp_mult, seed
        counts = channel_counts(SmallFC.features)
        ends = torch.tensor(counts).cumsum(0).tolist()
        self._channels = [
            channel
            for name, count, end in zip(SmallFC.features, counts, ends, strict=True)
            if name in self.signed
            for channel in range(end - count, end)
        ]
        self._times = torch.tensor([0.0 if scale < 30 else self.per_time for scale in TIME_SCALES])
        self._decays = {name: len(initial) for name, initial in SmallFC.initial_decays.items()}
        direction = torch.zeros(len(self._channels))
        direction[self._channels.index(sum(counts[: SmallFC.features.index("momentum_over_rms")]))] = 1
        first = float((self._times * torch.tanh(-torch.ones(len(TIME_SCALES)))).sum())
        self.start = torch.cat(
            [
                direction,
                self._times[: self.free_times],
                torch.tensor([math.log(step / step_mult) - first]),
                torch.zeros(sum(self._decays.values())),
            ]
        )

    def arrays(self, vectors: Tensor) -> dict[str, Tensor]:
        """The network."""
        sizes = [len(self._channels), self.free_times, 1, sum(self._decays.values())]
        direction, times, log_step, decays = vectors.split_with_sizes(sizes, dim=-1)
        batch, inputs = vectors.shape[:-1], sum(channel_counts(SmallFC.features))
        arrays = {name: array.to(vectors).expand(*batch, *array.shape) for name, array in self._unconnected().items()}
        slow = self._times[self.free_times :].to(vectors).expand(*batch, -1)
        index = torch.tensor(self._channels, device=vectors.device)
        up = vectors.new_zeros(*batch, inputs + len(TIME_SCALES)).index_copy(-1, index, direction)
        schedule = torch.cat([torch.zeros_like(up[..., :inputs]), times, slow], dim=-1)
        first = torch.stack([up, -up, schedule], dim=-1)
        arrays["nn/~/w0"] = torch.cat([first, arrays["nn/~/w0"][..., 3:]], dim=-1)
        last = torch.cat([arrays["nn/~/b2"][..., :1], (log_step - self.offset) / self._exp_mult], dim=-1)
        arrays["nn/~/b2"] = last
        pieces = (DECAY_SCALE * decays).split_with_sizes(list(self._decays.values()), dim=-1)
        return arrays | dict(zip(self._decays, pieces, strict=True))

    def _unconnected(self) -> dict[str, Tensor]:
        """The network but for what the vector decides."""
        hidden, inputs = self._hidden, sum(channel_counts(SmallFC.features)) + len(TIME_SCALES)
        generator = generator_of("unconnected", self._seed)
        w0 = torch.randn(inputs, hidden, generator=generator) / inputs**0.5
        w1 = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
        w1[:3], w1[:, :3], w1[:3, :3] = 0, 0, torch.eye(3)
        b0, b1, w2, b2 = torch.zeros(hidden), torch.zeros(hidden), torch.zeros(hidden, 2), torch.zeros(2)
        b0[2] = self.offset
        w2[0, 0], w2[1, 0], w2[2, 1] = 1, -1, 1 / self._exp_mult
        return {
            "nn/~/w0": w0,
            "nn/~/b0": b0,
            "nn/~/w1": w1,
            "nn/~/b1": b1,
            "nn/~/w2": w2,
            "nn/~/b2": b2,
        }


SPACES = ("full", "linear")
"""Names of spaces in a config."""


def make_space(kind: str, template: Mapping[str, Tensor] | None, scales: Mapping[str, float], **linear: Any) -> Space:
    """A space by its name; ``template`` is where ``"full"`` starts, by default ``"linear"``'s own start."""
    if kind == "linear":
        return LinearSpace(**linear)
    if template is None:
        origin = LinearSpace(**linear)
        template = origin.arrays(origin.start)
    return FullSpace(template, scales)
