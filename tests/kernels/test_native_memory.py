"""Do the kernels notice what other code does to tensors between steps, and read the memory that is there then?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from thetas import create
from torch import nn

from pylo_integrations.ops import memory
from pylo_integrations.ops.memory import addresses, formats, read_memory


@pytest.fixture(autouse=True)
def library():
    return library_or_skip()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "python"])
def test_memory_tells_addresses_and_formats_apart(exchange, monkeypatch):
    if not exchange:
        monkeypatch.setattr(memory, "_exchange_api", lambda: None)
    base = torch.zeros(4, 4)
    same = [base, base.detach(), nn.Parameter(base)]
    other = [base.double(), base[:2], base.T, base.view(16), base.view(torch.int32), torch.zeros(4, 4)]
    found = read_memory(iter(same + other), len(same + other))
    assert addresses(found).tolist() == [tensor.data_ptr() for tensor in same + other]
    assert len({tuple(row) for row in found[:3, :2].tolist()}) == 1
    assert len(set(formats(found[:8]).tolist())) == 6
    assert formats(found)[8] == formats(found)[0]
    with pytest.raises(ValueError):
        read_memory(same, 4)


def replace_state(params, optimizer):
    optimizer.state[params[0]]["rms"] = optimizer.state[params[0]]["rms"].clone()


def move_state(params, optimizer):
    optimizer.state[params[1]]["momentum_1"].data = optimizer.state[params[1]]["momentum_1"].clone()


def resize_state(params, optimizer):
    momentum = optimizer.state[params[0]]["momentum_0"]
    kept = momentum.clone()
    momentum.untyped_storage().resize_(0)
    momentum.untyped_storage().resize_(1 << 16)
    momentum.copy_(kept)


def move_parameter(params, optimizer):
    params[0].data = params[0].data.clone()


def lay_out_gradient_otherwise(params, optimizer):
    params[0].grad = params[0].grad.T.contiguous().T


def narrow_gradient(params, optimizer):
    params[0].grad = nn.Parameter(torch.empty(4, 3)).grad
    params[0].grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(9))


def drop_gradient(params, optimizer):
    params[1].grad = None


def change_options(params, optimizer):
    optimizer.param_groups[0].update(lr=0.5, weight_decay=0.1, maximize=True)


CHANGES = [
    replace_state,
    move_state,
    resize_state,
    move_parameter,
    lay_out_gradient_otherwise,
    narrow_gradient,
    drop_gradient,
    change_options,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_between_steps_is_seen(change):
    """An optimizer that has stepped before must step like a copy of it, which has not."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(4, 3), (5,), (4, 3)]]
    optimizer = create(params, "small_fc_lopt", backend="native")
    for step in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        if step < 2:
            optimizer.step()
    change(params, optimizer)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, twins, strict=True):
        twin.grad = param.grad
    fresh = create(twins, "small_fc_lopt", backend="native")
    fresh.load_state_dict(optimizer.state_dict())
    optimizer.step()
    fresh.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
        for key, value in fresh.state[twin].items():
            assert torch.equal(optimizer.state[param][key], value)


def test_a_sparse_gradient_after_dense_ones_is_refused():
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = create([param], "small_fc_lopt", backend="native")
    for _ in range(2):
        param.grad = torch.ones(4, 3)
        optimizer.step()
    before = param.detach().clone()
    param.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(param, before)


def test_a_step_like_the_last_one_makes_no_plan(monkeypatch):
    param = nn.Parameter(torch.ones(4, 3))
    optimizer = create([param], "small_fc_lopt", backend="native")
    for step in range(3):
        if step:
            monkeypatch.setattr(optimizer._engine, "plan", lambda *args: pytest.fail("planned again"))
        param.grad = torch.full((4, 3), step + 1.0)
        optimizer.step()
    assert optimizer.iteration == 3
