"""Whole-model control: how the loss went, how much of the run is left, and the LSTM that decides by it.

The formulas are those of docs/mathematics.md, "VeLO" and "Celo".

VeLO runs one LSTM row per tensor, the Celo family one for the whole model. The LSTM's weights go by the reference's
names throughout, so ``weights["rnn_params/step_size/w"]`` is what it says.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pylo_integrations.rules.base import StepContext, l2_penalty
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums

LOSS_AVERAGES = 10
SHORTEST_HALF_LIFE = 10
"""Of the averages of the loss, in steps."""

LONGEST_IN_FLOAT32 = 300_000
"""Half-life in steps up to which averages are made in float32, as the reference does. Of a longer one the decay is so
near to 1 that rounding it would change its complement, and with it the half-life, by more than 1 %."""

LONGEST_IN_FLOAT64 = 2**50
"""Likewise, to be safe; no run is longer."""

HORIZON_MARKS = (0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1)
"""Fractions of the run around which the horizon features change."""

LR_MULT = 0.1
"""Of the Celo family's schedule, where its head's output is 0."""

SCHEDULE_FEATURES = len(HORIZON_MARKS) + LOSS_AVERAGES - 1


# -- loss and horizon ------------------------------------------------------------------------------------------------


class LossMemory(NamedTuple):
    """Exponential averages of the loss, the fastest first.

    Attributes:
        means: ``(10,)``, not bias-corrected.
        minima: ``(10,)``, the smallest bias-corrected averages so far.
        corrected: ``(10,)``, the bias-corrected averages; of a memory that has not just observed a loss, None.
    """

    means: Tensor
    minima: Tensor
    corrected: Tensor | None = None

    @classmethod
    def recall(cls, memory: Mapping[str, Tensor], like: Tensor) -> LossMemory:
        """What :meth:`store_` put into ``memory``, else a fresh one; on the device and in the dtype of ``like``.

        Args:
            memory: Of the rule.
            like: Decays, whose dtype is wide enough.
        """
        if "loss_means" in memory:
            return cls(memory["loss_means"].to(like), memory["loss_minima"].to(like))
        return cls(like.new_zeros(LOSS_AVERAGES), like.new_full((LOSS_AVERAGES,), 999_999_999_999))

    @classmethod
    def initial(cls) -> dict[str, Tensor]:
        """The memory of a run before its first loss, with the features that there are then."""
        features = torch.zeros(LOSS_AVERAGES - 1, dtype=torch.float32, device="cpu")
        memory = {"loss_features": features}
        cls.recall({}, features).store_(memory)
        return memory

    def store_(self, memory: dict[str, Tensor]) -> None:
        """Put it into a rule's memory."""
        memory.update(loss_means=self.means, loss_minima=self.minima)

    def observe(self, loss: Tensor, decays: Tensor, seen: int) -> LossMemory:
        """The memory after one more loss, which counts as at most twice the largest average.

        Args:
            loss: 0-d.
            decays: ``(10,)``, see :func:`loss_decays`.
            seen: Losses observed before this one.
        """
        loss, correction = loss.to(self.means), _seen_part(decays, seen + 1)
        if seen:
            # By the count that includes the new loss, as the reference has it.
            loss = torch.minimum(loss, 2 * (self.means / correction).max().abs())
        means = decays * self.means + (1 - decays) * loss
        corrected = means / correction
        return LossMemory(means, torch.minimum(self.minima, corrected), corrected)

    def features(self, seen: int) -> Tensor:
        """How each average stands against the next slower one, ``(9,)`` in [-1, 1]; zeros for the first two losses.

        Args:
            seen: Losses observed, the last of which was observed by this memory.
        """
        if seen <= 2:
            return torch.zeros_like(self.means[1:])
        assert self.corrected is not None
        means, floor = self.corrected, self.minima[:-1]
        return ((means[:-1] - floor) / (means[1:] - floor).clamp_min(1e-8) - 1).clamp(-1, 1)


def loss_decays(longest: int, like: Tensor) -> Tensor:
    """EMA coefficients of ten half-lives spaced evenly in logarithm from 10 to ``longest`` steps, ``(10,)``.

    They are like ``like``, but in float64 where float32 cannot tell them from 1.
    """
    is_wide = longest > LONGEST_IN_FLOAT32 and like.device.type != "mps"  # which has no float64
    dtype = torch.float64 if is_wide else like.dtype
    limit = LONGEST_IN_FLOAT64 if dtype == torch.float64 else LONGEST_IN_FLOAT32
    return torch.tensor(_decays(longest, limit), dtype=dtype, device=like.device)


@functools.lru_cache
def _decays(longest: int, limit: int) -> tuple[float, ...]:
    """Those of :func:`loss_decays`, of half-lives up to ``limit``, which are the same at all steps of a run.

    Numbers are kept and no tensor, as that would be one of the mode that the first step was taken in.
    """
    ends = math.log10(SHORTEST_HALF_LIFE), math.log10(longest)
    half_lives = torch.logspace(*ends, LOSS_AVERAGES, dtype=torch.float64, device="cpu")
    return tuple(torch.exp(-1 / half_lives.clamp(max=limit)).tolist())


def _seen_part(decays: Tensor, count: int) -> Tensor:
    """``1 - decays ** count``: what of an average is made of the last ``count`` values."""
    if decays.dtype == torch.float64:
        return -torch.expm1(decays.log() * count)  # without cancelling
    return 1 - decays.pow(count)


def horizon_features(iteration: int, num_steps: int, like: Tensor) -> Tensor:
    """``tanh(10 * (t / N - mark))`` for every mark, ``(9,)``; ``t`` counts from 0 and may pass ``N``."""
    done = iteration / num_steps
    values = [math.tanh(10 * (done - mark)) for mark in HORIZON_MARKS]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def param_squares(block: Block) -> PartialSum:
    """Sum of squared parameters in float64."""
    return PartialSum.of(block.param.double().square(), range(len(block.box.shape)), block.box.shape)


def objective(buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext, like: Tensor) -> Tensor:
    """The 0-d loss that falls when training goes well: plus the L2 penalty, negated where all groups maximise.

    Reads ``param_squares`` from the ``sums`` of buckets whose group has an L2 penalty. Tensors without a gradient are
    not among the buckets, and not in the penalty.
    """
    assert ctx.loss is not None
    loss = ctx.loss.to(like)
    if all(bucket.group["maximize"] for bucket in buckets):
        loss = -loss
    for bucket, complete in zip(buckets, sums, strict=True):
        if penalty := l2_penalty(bucket.group):
            loss = loss + penalty * complete["param_squares"].sum().to(like)
    return loss


def schedule_features_(loss: Tensor, ctx: StepContext, longest: int | None = None) -> Tensor:
    """Horizon features, then loss features, ``(18,)``, like ``loss``; enters ``loss`` into ``ctx.memory``.

    The loss features are left there too, for :func:`loss_telemetry`.

    Args:
        loss: From :func:`objective`.
        ctx: Of the step.
        longest: The longest half-life of the loss memory in steps; by default the horizon.
    """
    assert ctx.num_steps is not None
    decays = loss_decays(longest or ctx.num_steps, loss)
    memory = LossMemory.recall(ctx.memory, decays).observe(loss, decays, ctx.iteration)
    memory.store_(ctx.memory)
    features = memory.features(ctx.iteration + 1).to(loss)
    ctx.memory["loss_features"] = features
    return torch.cat([horizon_features(ctx.iteration, ctx.num_steps, loss), features])


def loss_telemetry(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The loss features of the last step by name, that of the fastest average first; nothing before the first step."""
    return {f"loss_feature_{i}": feature for i, feature in enumerate(memory.get("loss_features", ()))}


# -- LSTM ------------------------------------------------------------------------------------------------------------


def lstm_shapes(inputs: int, hidden: int, controls: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of the LSTM's arrays and its heads: one for the step's size, and one for ``controls`` if there are any."""
    layers = {
        "linear": (inputs, hidden),  # dead: the reference computes it and overwrites the result
        "linear_1": (inputs, hidden),
        "linear_2": (inputs, hidden),
        "rnn/linear": (2 * hidden, 4 * hidden),
        "step_size": (hidden, 1),
    }
    if controls:
        layers["rnn_to_controls"] = (hidden, controls)
    return {
        "lstm_init_state/hidden": (1, hidden),
        "lstm_init_state/cell": (1, hidden),
        **{f"rnn_params/{layer}/w": shape for layer, shape in layers.items()},
        **{f"rnn_params/{layer}/b": shape[1:] for layer, shape in layers.items()},
    }


def linear(inputs: Tensor, weights: Mapping[str, Tensor], layer: str) -> Tensor:
    """``(tensors, inputs)`` through ``rnn_params/<layer>``, ``(tensors, outputs)``."""
    return torch.addmm(weights[f"rnn_params/{layer}/b"], inputs, weights[f"rnn_params/{layer}/w"])


def lstm_step(inputs: Tensor, hidden: Tensor, cell: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One step of all LSTM rows: the next ``(hidden, cell)``.

    Rows learn of each other through a maximum over all of them, so their order is irrelevant.

    Args:
        inputs: ``(tensors, inputs)``.
        hidden: ``(tensors, H)``.
        cell: ``(tensors, H)``.
        weights: By the reference's names, see :func:`lstm_shapes`.
    """
    common = linear(inputs, weights, "linear_1").relu_().amax(0)
    mixed = linear(inputs, weights, "linear_2") + common
    gates = linear(torch.cat([mixed, hidden], dim=1), weights, "rnn/linear")
    write, candidate, forget, read = gates.chunk(4, dim=1)
    cell = torch.sigmoid(forget + 1) * cell + torch.sigmoid(write) * torch.tanh(candidate)
    return torch.sigmoid(read) * torch.tanh(cell), cell


def global_lstm_step_(loss: Tensor, ctx: StepContext) -> Tensor:
    """The Celo family's controller: its new hidden state ``(1, H)``; loss and state are kept in ``ctx.memory``."""
    hidden, cell = (
        ctx.memory.get(f"lstm_{part}", ctx.constants[f"lstm_init_state/{part}"]).to(loss) for part in ("hidden", "cell")
    )
    hidden, cell = lstm_step(schedule_features_(loss, ctx).unsqueeze(0), hidden, cell, ctx.constants)
    ctx.memory.update(lstm_hidden=hidden, lstm_cell=cell)
    return hidden


def initial_global_memory(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The memory of the Celo family's controller before the first step."""
    state = {f"lstm_{part}": weights[f"lstm_init_state/{part}"].clone() for part in ("hidden", "cell")}
    return {**LossMemory.initial(), **state}


def global_lr_mult(hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """The Celo family's learned factor on the step of every parameter, ``(1,)``, positive."""
    return LR_MULT * linear(hidden, weights, "step_size").exp().squeeze(1)
