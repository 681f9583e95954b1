"""Do steps create, keep and find their own state beside what others keep in ``optimizer.state[p]``?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from thetas import create, distinct_rules
from torch import nn

from pylo_integrations import StateError

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = distinct_rules()
SHAPES = [(4, 3), (5,), ()]


@pytest.fixture(params=[pytest.param("reference", marks=pytest.mark.slow), "native"])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def step(optimizer, params, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step(loss=1.0 + k)


def foreign(p: torch.Tensor) -> dict:
    """What wrappers keep there: slow weights, old parameters, and what is no tensor."""
    return {
        "lookahead_slow_buff": torch.full_like(p, 7.0),
        "old_p": p.detach().clone(),
        "momentum_buffer": None,
        "rms_prop": [1, 2],
        "diagonal": "yes",
        "step": 3,
        "z": torch.zeros(9, dtype=torch.int64),
    }


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [0, 2], ids=["before the first step", "later"])
def test_entries_of_others_change_nothing_and_stay(name, first, backend):
    params, plain = parameters(), parameters()
    optimizer, other = create(params, name, backend=backend), create(plain, name, backend=backend)
    kept = {}
    for k in range(5):
        if k == first:
            for p in params:
                kept[p] = foreign(p)
                optimizer.state[p].update(kept[p])
                kept[p] = dict(kept[p])
        step(optimizer, params, k), step(other, plain, k)
    for p, q in zip(params, plain, strict=True):
        assert torch.equal(p, q)
        assert all(same(optimizer.state[p][key], value) for key, value in kept[p].items())
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in other.state[q].items())


@pytest.mark.parametrize("name", NAMES)
def test_a_touched_state_is_not_an_initialised_one(name, backend):
    params, plain = parameters(), parameters()
    optimizer, other = create(params, name, backend=backend), create(plain, name, backend=backend)
    assert [len(optimizer.state[p]) for p in params] == [0, 0, 0]  # which makes empty entries
    for k in range(3):
        step(optimizer, params, k), step(other, plain, k)
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_entries_that_come_and_go_between_steps(name, backend):
    """As of sharpness-aware minimisation."""
    params, plain = parameters(), parameters()
    optimizer, other = create(params, name, backend=backend), create(plain, name, backend=backend)
    for k in range(4):
        for p in params:
            optimizer.state[p]["old_p"] = p.detach().clone()
        step(optimizer, params, k), step(other, plain, k)
        for p in params:
            del optimizer.state[p]["old_p"]
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_state_that_lacks_a_part_is_an_error_before_anything_moves(name, backend):
    params = parameters()
    optimizer = create(params, name, backend=backend)
    for k in range(2):
        step(optimizer, params, k)
    # One with other parts: a state that has lost its only one is that of a tensor which begins.
    which = max(range(len(params)), key=lambda index: len(optimizer.state[params[index]]))
    part = list(optimizer.state[params[which]])[-1]
    gone = optimizer.state[params[which]].pop(part)
    before = [p.detach().clone() for p in params]
    with pytest.raises(StateError, match=f"the state of parameter {which} of group 0 has no {part!r}"):
        step(optimizer, params, 2)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True)) and optimizer.iteration == 2
    optimizer.state[params[which]][part] = gone
    step(optimizer, params, 2)
    optimizer.state.pop(params[which])  # begins anew
    step(optimizer, params, 3)
    assert part in optimizer.state[params[which]]


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo"])
@pytest.mark.slow
def test_compiled_steps_leave_them_out(name):
    params, plain = parameters(), parameters()
    optimizer, other = create(params, name), create(plain, name)
    for one in (optimizer, other):
        one.init_state()
    for p in params:
        optimizer.state[p].update(foreign(p))
    compiled = torch.compile(lambda loss: optimizer.step(loss=loss), backend="aot_eager")
    for k in range(2):
        for mine, seed in ((params, k), (plain, k)):
            generator = torch.Generator().manual_seed(seed)
            for p in mine:
                p.grad = torch.randn(p.shape, generator=generator)
        compiled(torch.tensor(1.0)), other.step(loss=torch.tensor(1.0))
    assert optimizer.iteration == 2
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    assert optimizer.state[params[0]]["rms_prop"] == [1, 2]
