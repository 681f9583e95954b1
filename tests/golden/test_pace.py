"""Does pace step as docs/mathematics.md says, written down once more, tensor by tensor in float64?"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from native_library import library_or_skip
from torch import nn

from pylo_integrations import Pace
from pylo_integrations.rules.pace import NUMBERS
from pylo_integrations.weights.sources import load_theta

PLAIN = [(12, 20), (20, 12), (40, 3), (1, 9), (9, 1), (9,), (), (1, 1, 30)]
CONVOLUTIONS = [(6, 5, 3, 3), (8, 1, 3, 3), (1, 5, 3, 3), (4, 3, 5), (3, 2, 2, 2, 2)]
POSITIONS = [(1, 6, 10)]
LEARNED = PLAIN + CONVOLUTIONS + POSITIONS
TRANSPOSED = [(10, 6), (6, 5, 3, 3), (7, 1, 3, 3)]
"""In a group of ``axes="in_out"``."""
PROJECTIONS = [(36, 12), (12, 20), (30, 20, 1, 1), (20, 1, 3, 3), (24, 4, 6)]
"""In one of ``rule="attention"``, as what makes queries, keys and values is."""
TRANSPOSED_PROJECTIONS = [(12, 36), (20, 12)]
"""Likewise, of ``axes="in_out"``, as those of GPT-2 are."""
TABLES = [(7, 5)]
"""In one of ``rule="adamw"``, as embeddings are."""
SHAPES = [*LEARNED, *TRANSPOSED, *PROJECTIONS, *TRANSPOSED_PROJECTIONS, *TABLES]
STEPS = 8
DECAY = 10.0  # so that it shows in so few steps


def numbers() -> dict[str, float]:
    array = load_theta("builtin:pace", "pace").arrays["numbers"]
    return dict(zip(NUMBERS, array.double().tolist(), strict=True))


def orthogonal(d: torch.Tensor) -> torch.Tensor:
    """Of a matrix, by its singular values; divided by its root mean square."""
    left, values, right = torch.linalg.svd(d, full_matrices=False)
    values = values / (torch.linalg.matrix_norm(d) + 1e-8)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    u = left * values @ right
    return u / (u.square().mean() + 1e-9).sqrt()


def flatness(d: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    cosine = (d * u).sum() / torch.linalg.matrix_norm(d) / torch.linalg.matrix_norm(u)
    return cosine.clamp(0.05, 1)


def expected(starts, grads, horizon, losses):
    """Parameters after every step."""
    c = numbers()
    known = max(horizon or 1000, 100)
    w = 1 / (1 + math.exp(c["momentum"] + c["momentum_horizon"] * math.log(known / 1000)))
    power = math.exp(c["log_power"] + c["power_horizon"] * math.log(known / 1000))
    params = [start.double() for start in starts]
    m = [torch.zeros_like(p) for p in params]
    v = [torch.zeros_like(p) for p in params]
    kinds = (LEARNED, TRANSPOSED, PROJECTIONS, TRANSPOSED_PROJECTIONS)
    transposed, projections, in_out, tables = itertools.accumulate(map(len, kinds))
    is_matrix = [p.dim() > 1 and max(p.shape[:2]) > 1 and i < tables for i, p in enumerate(params)]
    first_loss = abs(losses[0] or 0)
    is_known = first_loss >= 1e-3
    largest = 0.01 * first_loss  # promise of all matrices together
    for t in range(STEPS):
        g = [each.double() for each in grads[t]]
        promise, part = 0.0, 1.0
        if is_known and largest > 0:
            part = max(0.05, min(1, math.exp(c["log_total_promise"]) * first_loss / largest))
        pace = 1.0
        if horizon is not None:
            warm = min(1, (t + 1) / (math.exp(c["log_warmup"]) * horizon))
            pace = warm * (1 - t / horizon) ** power
        for i, matrix in enumerate(is_matrix):
            params[i] = params[i] * (1 - DECAY * 1e-3 * pace)  # AdamW's at 1e-3; it follows the schedule alone
            if matrix:
                m[i] = m[i] + w * (g[i] - m[i])
                d = m[i] + w * (g[i] - m[i])
                d = d[0] if d.dim() == 3 and len(d) == 1 else d  # positions: an output each
                is_transposed = transposed <= i < projections or i >= in_out
                inputs = d.shape[0 if is_transposed else 1]
                width = inputs if i >= projections and d.numel() == d.shape[0] * d.shape[1] else max(d.shape[:2])
                d = d.flatten(1)
                rows, columns = d.shape
                sign = -1 if is_transposed else 1  # outputs over inputs
                u = orthogonal(d)
                u = u * flatness(d, u) ** c["flatness"]
                along = float((d * u).sum())
                u = u.view(params[i].shape)
                length = math.exp(c["log_step"]) * (max(16, width) / 256) ** c["width_exponent"]
                length *= (rows / columns) ** (sign * c["aspect_exponent"]) * (known / 1000) ** c["horizon_exponent"]
                length *= (w / 0.1) ** c["momentum_exponent"]
                length *= math.exp(c["log_attention"]) if i >= projections else 1
                promise += (along * length) ** 2
                length *= part
                if is_known:
                    length *= min(1, math.exp(c["log_promise"]) * first_loss / (along * length * pace))
                params[i] = params[i] - length * pace * u
            else:
                decay = 0.999 if i >= tables else 0.95
                rounded = torch.tensor(decay).item()  # to float32, as constants of rules are
                m[i], v[i] = 0.9 * m[i] + 0.1 * g[i], rounded * v[i] + (1 - rounded) * g[i] ** 2
                adam = m[i] / (1 - 0.9 ** (t + 1)) / ((v[i] / (1 - decay ** (t + 1))).sqrt() + 1e-8)
                length = (
                    math.exp(c["log_table_step" if i >= tables else "log_vector_step"])
                    * (known / 1000) ** c["vector_horizon_exponent"]
                )
                params[i] = params[i] - length * pace * part * adam
        largest = max(largest, 0.01 * first_loss)
        largest = max(largest, min(math.sqrt(promise), 1.1 * largest))
        if is_known and t > 0:
            first_loss = max(first_loss, min(abs(losses[t]) / 2, 1.1 * first_loss))
        yield [p.clone() for p in params]


@pytest.mark.parametrize(
    ("horizon", "first_loss", "growth"),
    [
        *[(horizon, None, 1.0) for horizon in (10, 500, None)],
        *[(500, loss, 0.8) for loss in (3.0, 1e4, 1e-2, 1e-4)],
        *[(horizon, loss, 1.2) for horizon, loss in ((500, 1e-2), (500, 1e-4), (None, -2.0))],
    ],
)
@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", torch.float64), ("reference", torch.float32), ("native", torch.float32)]
)
def test_steps_are_the_formulas(backend, dtype, horizon, first_loss, growth):
    """In float32 the iteration multiplies what is rounded off."""
    if backend == "native":
        library_or_skip()
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]
    starts[1].zero_()  # as one of LoRA's factors starts
    drift = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    grads = [
        [(d + torch.randn(d.shape, generator=generator, dtype=torch.float64)).to(dtype) for d in drift]
        for _ in range(STEPS)
    ]
    params = [nn.Parameter(start.clone()) for start in starts]
    rest = iter(params)
    groups = [
        {"params": list(itertools.islice(rest, len(LEARNED)))},
        {"params": list(itertools.islice(rest, len(TRANSPOSED))), "axes": "in_out"},
        {"params": list(itertools.islice(rest, len(PROJECTIONS))), "rule": "attention"},
        {
            "params": list(itertools.islice(rest, len(TRANSPOSED_PROJECTIONS))),
            "rule": "attention",
            "axes": "in_out",
        },
        {"params": list(rest), "rule": "adamw"},
    ]
    optimizer = Pace(groups, backend=backend, num_steps=horizon, weight_decay=DECAY)
    losses = [None if first_loss is None else first_loss * growth**t for t in range(STEPS)]
    for t, want in enumerate(expected(starts, grads, horizon, losses)):
        for param, grad in zip(params, grads[t], strict=True):
            param.grad = grad
        optimizer.step(loss=losses[t])
        for param, target, start in zip(params, want, starts, strict=True):
            moved = (target - start.double()).abs().max()
            tolerance = 1e-6 if dtype == torch.float64 else 1e-3  # theta's decays are rounded to float32
            assert (param.double() - target).abs().max() <= tolerance * moved + 1e-6, (t, tuple(param.shape))
