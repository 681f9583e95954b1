"""What of theta is free: a vector of numbers about as large as their useful changes, and theta made of it."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

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
        """Theta's arrays of ``(..., size)`` vectors, each ``(..., *shape)``, as members are trained by them."""

    def theta(self, vector: Tensor) -> dict[str, Tensor]:
        """Theta's arrays of a ``(size,)`` vector, to be kept; the same function as :meth:`arrays`."""
        return self.arrays(vector)


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
    direction as the difference of two units, the schedule as a unit that is always positive. Members are trained by a
    network of these three, which is faster; the theta to keep has the width asked for, its other units being random and
    not connected to the outputs, ready for :class:`FullSpace` to go on from here.

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
        """The network of three units."""
        sizes = [len(self._channels), self.free_times, 1, sum(self._decays.values())]
        direction, times, log_step, decays = vectors.split_with_sizes(sizes, dim=-1)
        batch, inputs = vectors.shape[:-1], sum(channel_counts(SmallFC.features))
        fixed = {
            "b0": torch.tensor([0, 0, self.offset]),
            "b1": torch.zeros(3),
            "w1": torch.eye(3),
            "w2": torch.tensor([[1, 0], [-1, 0], [0, 1 / self._exp_mult]]),
        }
        arrays = {f"nn/~/{name}": array.to(vectors).expand(*batch, *array.shape) for name, array in fixed.items()}
        slow = self._times[self.free_times :].to(vectors).expand(*batch, -1)
        index = torch.tensor(self._channels, device=vectors.device)
        up = vectors.new_zeros(*batch, inputs + len(TIME_SCALES)).index_copy(-1, index, direction)
        schedule = torch.cat([torch.zeros_like(up[..., :inputs]), times, slow], dim=-1)
        arrays["nn/~/w0"] = torch.stack([up, -up, schedule], dim=-1)
        arrays["nn/~/b2"] = torch.cat([torch.zeros_like(log_step), (log_step - self.offset) / self._exp_mult], dim=-1)
        pieces = (DECAY_SCALE * decays).split_with_sizes(list(self._decays.values()), dim=-1)
        return arrays | dict(zip(self._decays, pieces, strict=True))

    def theta(self, vector: Tensor) -> dict[str, Tensor]:
        """The network of the width asked for."""
        arrays, hidden = self.arrays(vector), self._hidden
        generator, inputs = generator_of("unconnected", self._seed), len(arrays["nn/~/w0"])
        w0 = torch.randn(inputs, hidden, generator=generator).to(vector) / inputs**0.5
        w1 = torch.randn(hidden, hidden, generator=generator).to(vector) / hidden**0.5
        w0[:, :3] = arrays["nn/~/w0"]
        w1[:3], w1[:, :3] = 0, 0
        w1[:3, :3] = arrays["nn/~/w1"]
        pad = torch.nn.functional.pad
        return arrays | {
            "nn/~/w0": w0,
            "nn/~/w1": w1,
            "nn/~/b0": pad(arrays["nn/~/b0"], (0, hidden - 3)),
            "nn/~/b1": pad(arrays["nn/~/b1"], (0, hidden - 3)),
            "nn/~/w2": pad(arrays["nn/~/w2"], (0, 0, 0, hidden - 3)),
        }
