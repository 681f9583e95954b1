"""Is state that no weight of theta reads left out, everywhere, without a step changing by it?"""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from native_library import library_or_skip
from torch import nn

from pylo_integrations import CheckpointError, LearnedOptimizer, Theta, create_optimizer
from pylo_integrations.rules.accumulators import MOMENTUM
from pylo_integrations.rules.features import MATRIX_FEATURES, RMS_FEATURES
from pylo_integrations.state import from_canonical, to_canonical
from pylo_integrations.weights.sources import load_theta

SHAPES = [(64, 80), (80, 64), (16, 8, 3, 3), (96,)]


def pruned(*unread: str) -> Theta:
    """``builtin:celo2`` without the weights of some states."""
    theta = load_theta("builtin:celo2", "celo2")
    arrays = {name: array.clone() for name, array in theta.arrays.items()}
    for number, feature in enumerate(MATRIX_FEATURES):
        part = arrays[f"ff_mod_stack/~/w0__{number}"]
        if "rms" in unread and feature in RMS_FEATURES:
            part.zero_()
        for k, name in enumerate(MOMENTUM):
            if name in unread and feature in ("momentum", "momentum_over_rms", "factored_momentum"):
                part[k] = 0
    return Theta.from_arrays("celo2", arrays, provenance="tests/kernels/test_unread_state.py; weights left out")


class Keeping(LearnedOptimizer):
    """The rule as it would be if all state were kept, though nothing reads it."""

    default_lr = 3e-4

    def __init__(self, params, theta, **options):
        rule = dataclasses.replace(theta.rule(), kept=(*MOMENTUM, "rms"), orthogonalise="never")
        super().__init__(params, rule, theta=theta, **options)


class Pruned(LearnedOptimizer):
    """The rule as theta has it."""

    default_lr = 3e-4

    def __init__(self, params, theta, **options):
        super().__init__(params, dataclasses.replace(theta.rule(), orthogonalise="never"), theta=theta, **options)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(params: list[nn.Parameter], optimizer: LearnedOptimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def names_of(optimizer: LearnedOptimizer, param: nn.Parameter) -> set[str]:
    return set(optimizer.state[param])


def test_the_builtin_theta_reads_all_of_its_state():
    assert load_theta("builtin:celo2", "celo2").rule().unread == ()


UNREAD = [("rms", "momentum_2"), ("momentum_0",), ("rms",), ("momentum_0", "momentum_1", "momentum_2", "rms")]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("unread", UNREAD, ids="-".join)
def test_steps_are_those_of_one_that_keeps_everything(backend, kind, unread):
    if backend == "native":
        library_or_skip()
    theta = pruned(*unread)
    assert set(theta.rule().unread) == set(unread)
    runs = []
    for kinds in (Keeping, Pruned):
        params = parameters()
        optimizer = kinds(params, theta, state_dtype=kind, backend=backend)
        train(params, optimizer, range(3))
        runs.append(params)
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    kept = {name.removesuffix("_int8").removesuffix("_scale") for name in names_of(optimizer, params[0])}
    assert kept == {*MOMENTUM, "rms", "row", "col"} - set(unread)


@pytest.mark.parametrize(("kind", "most"), [("float32", 8.2), ("bfloat16", 4.2), ("int8", 2.5)])
def test_bytes_of_a_parameter_without_the_second_moment_and_the_slowest_momentum(kind, most):
    param = nn.Parameter(torch.zeros(768, 3072))
    optimizer = create_optimizer([param], "celo2", weights=pruned("rms", "momentum_2"), state_dtype=kind)
    optimizer.init_state()
    assert sum(value.nbytes for value in optimizer.state[param].values()) / param.numel() <= most


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_checkpoints_with_more_state_load_and_those_with_less_do_not(kind, caplog):
    theta = pruned("rms", "momentum_1")
    params, others, strangers = parameters(), parameters(), parameters()
    full, lean = Keeping(params, theta, state_dtype=kind), Pruned(others, theta, state_dtype=kind)
    train(params, full, range(2))
    with caplog.at_level(logging.INFO, "pylo_integrations.checkpoints"):
        lean.load_state_dict(full.state_dict())
    assert "no weight of this theta reads were left out: momentum_1" in caplog.text
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    train(params, full, range(2, 4))
    train(others, lean, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
    assert names_of(lean, others[0]) < names_of(full, params[0])
    with pytest.raises(CheckpointError, match="has state"):
        Keeping(strangers, theta, state_dtype=kind).load_state_dict(lean.state_dict())


def test_canonical_states_with_more_state_load():
    theta = pruned("momentum_2")
    models = [nn.Linear(64, 80), nn.Linear(64, 80)]
    full = Keeping(models[0].named_parameters(), theta)
    train(list(models[0].parameters()), full, range(0))
    for p in models[0].parameters():
        p.grad = torch.ones_like(p)
    full.step()
    lean = Pruned(models[1].named_parameters(), theta)
    from_canonical(lean, models[1], to_canonical(full, models[0]))
    mine, theirs = lean.state[models[1].weight], full.state[models[0].weight]
    assert mine.keys() == theirs.keys() - {"momentum_2"}
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
