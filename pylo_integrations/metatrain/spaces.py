"""What of theta is free: a vector of numbers about as large as their useful changes, and theta made of it."""

from __future__ import annotations

import fnmatch
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pylo_integrations.metatrain.seeds import generator_of
from pylo_integrations.rules.control import HORIZON_MARKS, LR_MULT, SCHEDULE_FEATURES, lstm_shapes
from pylo_integrations.rules.features import MATRIX_FEATURES, TIME_SCALES, channel_counts
from pylo_integrations.rules.networks import STACK, stack_shapes
from pylo_integrations.rules.pace import NUMBERS
from pylo_integrations.rules.small_fc import SmallFCRule

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


SIGNED = (
    "grad",
    "clipped_grad",
    "param",
    "momentum",
    "momentum_over_rms",
    "factored_grad",
    "grad_over_rms",
    "factored_momentum",
)
"""Features that change sign with the gradient or the parameter: a direction made of them cannot drift."""


def _signed_channels(features: Sequence[str]) -> tuple[list[int], Tensor]:
    """Channels of :data:`SIGNED` features, and the direction that is the first ``momentum_over_rms`` alone."""
    counts = channel_counts(features)
    first = {name: sum(counts[:index]) for index, name in enumerate(features)}
    channels = [
        channel
        for name, count in zip(features, counts, strict=True)
        if name in SIGNED
        for channel in range(first[name], first[name] + count)
    ]
    return channels, torch.tensor([float(channel == first["momentum_over_rms"]) for channel in channels])


class LinearSpace(Space):
    """A theta that is constructed, of which few numbers are free: a direction linear in features, times a schedule.

    Args:
        step: Root mean square of the first step, about.
        hyper: The rule's constants.

    Attributes:
        hyper: The rule's constants.

    Raises:
        ValueError: One is not positive.
    """

    def __init__(self, step: float, **hyper: float) -> None:
        self.hyper = hyper
        for name, value in {"step": step, **hyper}.items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")


class SmallFCLinear(LinearSpace):
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

    free_times = 7
    per_time = -0.327
    """Weight of a time feature for steps that fall as ``t ** -0.5``: each rises by 1.76 over half a decade."""
    offset = 6.0
    """Keeps the schedule's unit positive; small enough for half precision."""

    def __init__(
        self, *, hidden: int = 32, step: float = 5e-3, exp_mult: float = 1.0, step_mult: float = 1e-2, seed: int = 0
    ) -> None:
        super().__init__(step, exp_mult=exp_mult, step_mult=step_mult)
        if hidden < 3:
            raise ValueError(f"hidden={hidden} must be at least 3")
        self._hidden, self._exp_mult, self._seed = hidden, exp_mult, seed
        self._channels, direction = _signed_channels(SmallFCRule.features)
        self._times = torch.tensor([0.0 if scale < 30 else self.per_time for scale in TIME_SCALES])
        self._decays = {name: len(initial) for name, initial in SmallFCRule.initial_decays.items()}
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
        batch, inputs = vectors.shape[:-1], sum(channel_counts(SmallFCRule.features))
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


def _unconnected_mlp(hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An MLP under :data:`STACK` whose output is the difference of two units without inputs; the others are random."""
    mlp = {name: torch.zeros(shape) for name, shape in stack_shapes(hidden).items()}
    for i in range(len(MATRIX_FEATURES)):
        weight = mlp[f"{STACK}w0__{i}"]
        weight.copy_(torch.randn(weight.shape, generator=generator) / sum(channel_counts(MATRIX_FEATURES)) ** 0.5)
    between = mlp[f"{STACK}w1"]
    between.copy_(torch.randn(between.shape, generator=generator) / hidden**0.5)
    between[:2], between[:, :2] = 0, 0
    between[:2, :2] = torch.eye(2)
    mlp[f"{STACK}w2"][:2, 0] = torch.tensor([1.0, -1.0])
    return mlp


def _pointed(mlp: Mapping[str, Tensor], channels: Sequence[int], direction: Tensor) -> dict[str, Tensor]:
    """First-layer weights, ``(..., count, hidden)``, that give the two units ``direction``, ``(..., channels)``."""
    counts = channel_counts(MATRIX_FEATURES)
    index = torch.tensor(channels, device=direction.device)
    up = direction.new_zeros(*direction.shape[:-1], sum(counts)).index_copy(-1, index, direction)
    names = [f"{STACK}w0__{i}" for i in range(len(counts))]
    return {
        name: torch.cat([torch.stack([piece, -piece], dim=-1), mlp[name][..., 2:]], dim=-1)
        for name, piece in zip(names, up.split_with_sizes(counts, dim=-1), strict=True)
    }


class CeloLinear(LinearSpace):
    """For Celo: a direction linear in the signed features, times a schedule linear in how the run goes, no memory.

    The LSTM's first 18 units hold one feature of the run each, squashed and forgotten at once; the logarithm of the
    step is a sum of them. Since the horizon's features are steps at the marks, it can be any curve of that many bends.
    It starts as a line to zero. The MLP's direction is the difference of two ReLU units. All other units are random and
    not connected to the outputs, ready for :class:`FullSpace` to go on from here.

    The vector holds the weights of the direction, of the features of the run, and the logarithm of the step. Members
    are trained by an MLP of the two units that count, which is faster, as with :class:`SmallFCLinear`.

    Args:
        hidden: Width of the MLP, at least 2.
        lstm: Width of the LSTM, at least 18.
        step: Root mean square of the first step in that of the parameter, about.
        exp_mult: The rule's constant.
        step_mult: The rule's constant.
        seed: Of the unconnected units.
    """

    open = 5.0
    """Bias of a gate that lets all pass, or nothing if negative; small enough for half precision."""
    last = 0.03
    """Fraction of the first step that the schedule starts out to end with."""

    def __init__(
        self,
        *,
        hidden: int = 4,
        lstm: int = 32,
        step: float = 1e-2,
        exp_mult: float = 1.0,
        step_mult: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(step, exp_mult=exp_mult, step_mult=step_mult)
        if hidden < 2 or lstm < SCHEDULE_FEATURES:
            raise ValueError(f"hidden={hidden} must be at least 2, and lstm={lstm} at least {SCHEDULE_FEATURES}")
        self._channels, direction = _signed_channels(MATRIX_FEATURES)
        generator = generator_of("unconnected", seed)
        self._fixed = self._unconnected(lstm, generator)
        self._mlp, self._two = (_unconnected_mlp(width, generator) for width in (hidden, 2))
        weights, log_ratio = self._line()
        losses = torch.zeros(SCHEDULE_FEATURES - len(HORIZON_MARKS))
        log_step = torch.tensor([math.log(step / step_mult / LR_MULT) + log_ratio])
        self.start = torch.cat([direction, weights, losses, log_step])

    def arrays(self, vectors: Tensor) -> dict[str, Tensor]:
        """The MLP's two units, and the LSTM."""
        return self._arrays(vectors, self._two)

    def theta(self, vector: Tensor) -> dict[str, Tensor]:
        """Theta of the widths asked for."""
        return self._arrays(vector, self._mlp)

    def _arrays(self, vectors: Tensor, mlp: Mapping[str, Tensor]) -> dict[str, Tensor]:
        batch = vectors.shape[:-1]
        sizes = [len(self._channels), SCHEDULE_FEATURES, 1]
        direction, schedule, log_step = vectors.split_with_sizes(sizes, dim=-1)
        fixed = {**self._fixed, **mlp}
        arrays = {name: array.to(vectors).expand(*batch, *array.shape) for name, array in fixed.items()}
        arrays |= _pointed(arrays, self._channels, direction)
        arrays |= {name: arrays[name].unsqueeze(-1 - array.dim()) for name, array in mlp.items()}  # a bank of one
        rest = arrays["rnn_params/step_size/w"][..., SCHEDULE_FEATURES:, :]
        arrays["rnn_params/step_size/w"] = torch.cat([schedule.unsqueeze(-1), rest], dim=-2)
        return arrays | {"rnn_params/step_size/b": log_step}

    def _unconnected(self, lstm: int, generator: torch.Generator) -> dict[str, Tensor]:
        """All of the LSTM but what the vector sets."""
        shapes = lstm_shapes(SCHEDULE_FEATURES, lstm, controls=1)
        arrays = {name: torch.zeros(shape) for name, shape in shapes.items()}
        units = slice(0, SCHEDULE_FEATURES)
        inputs, gates = arrays["rnn_params/linear_2/w"], arrays["rnn_params/rnn/linear/w"]
        inputs.copy_(torch.randn(inputs.shape, generator=generator) / SCHEDULE_FEATURES**0.5)
        gates.copy_(torch.randn(gates.shape, generator=generator) / (2 * lstm) ** 0.5)
        inputs[:, units] = torch.eye(SCHEDULE_FEATURES)
        blocks, biases = gates.view(2 * lstm, 4, lstm), arrays["rnn_params/rnn/linear/b"].view(4, lstm)
        blocks[:, :, units] = 0
        blocks[units, 1, units] = torch.eye(SCHEDULE_FEATURES)
        # The gates in their order: write, candidate, forget (to which the rule adds 1), read.
        biases[:, units] = torch.tensor([self.open, 0, -self.open - 1, self.open]).unsqueeze(1)
        return arrays

    def _line(self) -> tuple[Tensor, float]:
        """Weights of the horizon's units for a step that falls as a line, and what to add for it to begin at 1."""
        fraction = torch.linspace(0, 1, 101, dtype=torch.float64)
        horizon = torch.tanh(10 * (fraction.unsqueeze(1) - torch.tensor(HORIZON_MARKS, dtype=torch.float64)))
        gate = torch.sigmoid(torch.tensor(self.open, dtype=torch.float64))
        units = gate * torch.tanh(gate * torch.tanh(horizon))
        inputs = torch.cat([units, torch.ones_like(units[:, :1])], dim=1)
        wanted = torch.log(self.last + (1 - self.last) * (1 - fraction)).unsqueeze(1)
        # The ridge keeps the weights of neighbouring marks from cancelling each other.
        ridge = 0.1 * torch.eye(inputs.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(inputs.mT @ inputs + ridge, inputs.mT @ wanted).squeeze(1).float()
        return solution[:-1], float(solution[-1])


class Celo2Linear(LinearSpace):
    """For CELO2: a direction linear in the signed features, which the rule then orthogonalises and normalises.

    The parameter is not among them: steps have a size of their own, so a share of it would grow or shrink matrices
    however small the gradient is, and short episodes reward growth. The schedule is the learning rate's.

    Members are trained by an MLP of the two units that count, as with :class:`SmallFCLinear`; the vector holds their
    weights. It starts at the momentum, which makes Muon of the rule.

    Args:
        hidden: Width of the MLP, at least 2.
        step_mult: The rule's constant: root mean square of a step at ``lr=1``.
        seed: Of the unconnected units.
    """

    def __init__(self, *, hidden: int = 8, step_mult: float = 1.0, seed: int = 0) -> None:
        super().__init__(step_mult, step_mult=step_mult)
        if hidden < 2:
            raise ValueError(f"hidden={hidden} must be at least 2")
        parameter = sum(channel_counts(MATRIX_FEATURES)[: MATRIX_FEATURES.index("param")])
        self._channels = [channel for channel in _signed_channels(MATRIX_FEATURES)[0] if channel != parameter]
        self._two, self._mlp = (_unconnected_mlp(width, generator_of("unconnected", seed)) for width in (2, hidden))
        first = sum(channel_counts(MATRIX_FEATURES)[: MATRIX_FEATURES.index("momentum")])
        self.start = torch.tensor([float(channel == first) for channel in self._channels])

    def arrays(self, vectors: Tensor) -> dict[str, Tensor]:
        """The two units."""
        arrays = {
            name: array.to(vectors).expand(*vectors.shape[:-1], *array.shape) for name, array in self._two.items()
        }
        return arrays | _pointed(arrays, self._channels, vectors)

    def theta(self, vector: Tensor) -> dict[str, Tensor]:
        """The MLP of the width asked for."""
        return self._mlp | _pointed(self._mlp, self._channels, vector)


class PaceNumbers(LinearSpace):
    """For Pace: all of its numbers, from about where meta-training of shorter runs had come to.

    Args:
        step: Root mean square of a step of a matrix.
        seed: Of nothing; every space has it.
    """

    _START: Mapping[str, float] = {
        "log_table_step": math.log(4e-2),
        "log_vector_step": math.log(2e-2),
        "width_exponent": -0.4,
        "horizon_exponent": -0.3,
        "vector_horizon_exponent": -0.6,
        "momentum": math.log(0.9 / 0.1),
        "momentum_horizon": 0.3,
        "momentum_exponent": 0.75,
        "log_warmup": math.log(0.02),
        "log_power": math.log(1.4),
        "power_horizon": -0.1,
        "flatness": 0.8,
        "log_promise": math.log(0.1),
        "log_total_promise": math.log(0.1),
        "log_attention": math.log(0.4),
    }
    _UNITS: Mapping[str, float] = {
        "log_step": 0.3,
        "log_table_step": 0.5,
        "log_vector_step": 0.5,
        "width_exponent": 0.15,
        "aspect_exponent": 0.15,
        "horizon_exponent": 0.15,
        "vector_horizon_exponent": 0.2,
        "momentum": 0.5,
        "momentum_horizon": 0.3,
        "momentum_exponent": 0.15,
        "log_warmup": 0.5,
        "log_power": 0.3,
        "power_horizon": 0.2,
        "flatness": 0.4,
        "log_promise": 0.5,
        "log_total_promise": 0.5,
        "log_attention": 0.3,
    }

    def __init__(self, *, step: float = 3.5e-3, seed: int = 0) -> None:
        super().__init__(step)
        start = {**self._START, "log_step": math.log(step)}
        self._template = torch.tensor([start.get(name, 0.0) for name in NUMBERS])
        self._units = torch.tensor([self._UNITS[name] for name in NUMBERS])
        self.start = torch.zeros(len(NUMBERS))

    def arrays(self, vectors: Tensor) -> dict[str, Tensor]:
        """The numbers."""
        return {"numbers": self._template.to(vectors) + self._units.to(vectors) * vectors}


LINEAR_SPACES: Mapping[str, Callable[..., LinearSpace]] = {
    "small_fc": SmallFCLinear,
    "celo": CeloLinear,
    "celo2": Celo2Linear,
    "pace": PaceNumbers,
}
"""By architecture: those whose theta can be constructed."""
