"""Do the kernels notice what other code does to tensors between steps, and read the memory that is there then?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from thetas import create
from torch import nn

from pylo_integrations.ops import memory
from pylo_integrations.ops.memory import Written, addresses, formats, read_memory
from pylo_integrations.ops.records import Table


@pytest.fixture(autouse=True)
def library():
    return library_or_skip()


@pytest.fixture(params=["library", "python"])
def asked(request, monkeypatch):
    """Who answers: the library, or Python where it finds none of torch's functions."""
    if request.param == "python":
        monkeypatch.setattr(memory, "_asked", lambda: None)
    else:
        assert memory._asked() is not None
    return request.param


def test_the_library_may_be_asked_for_the_first_time_in_inference_mode():
    memory._asked.cache_clear()
    with torch.inference_mode():
        assert memory._asked() is not None


def test_memory_tells_addresses_and_formats_apart(asked):
    base = torch.zeros(4, 4)
    same = [base, base.detach(), nn.Parameter(base)]
    other = [
        base.double(),
        base[:2],
        base.T,
        base.view(16),
        base.view(torch.int32),
        base._neg_view(),
        torch.zeros(4, 4),
    ]
    found = read_memory(iter(same + other), len(same + other))
    assert addresses(found).tolist() == [tensor.data_ptr() for tensor in same + other]
    words = [tuple(word) for word in formats(found).tolist()]
    assert len(set(words[:3])) == 1 and len(set(words[:9])) == 7
    assert words[9] == words[0]
    with pytest.raises(ValueError):
        read_memory(same, 4)


@pytest.mark.parametrize("lost", [lambda: torch.ones(3).to_sparse(), lambda: torch.ones(3).to_mkldnn()])
def test_tensors_without_memory_are_refused(asked, lost):
    with pytest.raises(RuntimeError):
        read_memory([torch.ones(3), lost()], 2)


def swap(tensor, _):
    torch.utils.swap_tensors(tensor, tensor.clone())


def same_values(tensor, state):
    state["rms"] = tensor.clone()


def one_that_shares_all_memory(tensor, state):
    state["rms"] = tensor.detach()


def no_tensor(tensor, state):
    state["rms"] = None


def missing(tensor, state):
    del state["rms"]


def negated_where_it_is(tensor, _):
    tensor.data = tensor._neg_view()


def other_strides(tensor, _):
    tensor.data = tensor.T


def other_type(tensor, _):
    tensor.data = tensor.view(torch.int32)


def set_to_other_storage(tensor, _):
    tensor.set_(torch.ones(4, 4))


def freed(tensor, _):
    tensor.untyped_storage().resize_(0)


def shrunk_where_it_is(tensor, _):
    tensor.untyped_storage().resize_(60)


def grown(tensor, _):
    tensor.resize_(8, 8)


def resized_to_less(tensor, _):
    tensor.resize_(2, 2)


TAKEN = [
    swap,
    same_values,
    one_that_shares_all_memory,
    no_tensor,
    missing,
    negated_where_it_is,
    other_strides,
    other_type,
    set_to_other_storage,
    freed,
    shrunk_where_it_is,
    grown,
    resized_to_less,
]


@pytest.mark.parametrize("take", TAKEN, ids=lambda take: take.__name__)
def test_whatever_is_done_to_a_state_is_seen(asked, take):
    params, states = [torch.ones(4, 4)], [{"rms": torch.ones(4, 4), "other": torch.ones(2)}]
    written = Written(params, [(state, "rms") for state in states])
    states[0]["other"], states[0]["third"] = torch.ones(3), None  # not ours
    states[0]["rms"].add_(1)
    assert written.is_current()
    take(states[0]["rms"], states[0])
    assert not written.is_current()


@pytest.mark.parametrize("take", [swap, negated_where_it_is, other_strides, set_to_other_storage, freed])
def test_whatever_is_done_to_a_parameter_is_seen(asked, take):
    params = [nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3))]
    written = Written(params, [])
    assert written.is_current()
    with torch.no_grad():
        take(params[0], {})
    assert not written.is_current()


def test_states_in_mappings_of_other_kinds_are_looked_at_too():
    class Loud(dict):
        def __getitem__(self, name):
            return super().__getitem__("other")

    state = Loud(rms=torch.ones(2), other=torch.ones(3))
    written = Written([], [(state, "rms")])
    assert [tensor.shape[0] for tensor in written.tensors] == [3]
    state["rms"] = torch.ones(2)
    assert written.is_current()
    state["other"] = torch.ones(3)
    assert not written.is_current()


@pytest.mark.parametrize("mode", [False, True], ids=["outside", "inference"])
def test_autograd_is_told_of_every_write(asked, mode):
    made = torch.ones(2)
    with torch.inference_mode(mode):
        born = torch.ones(2)  # in inference mode it has no version
        written = Written([born, made], [({"rms": made}, "rms")])
        before = made._version
        written.raise_versions()
    assert made._version >= before + 2


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


def test_a_state_that_another_thread_replaces_while_addresses_are_taken_down_is_seen(monkeypatch):
    library_or_skip()
    param = nn.Parameter(torch.randn(40, 30))
    optimizer = create([param], "small_fc_lopt", backend="native")
    param.grad = torch.randn(40, 30)
    optimizer.step()
    state, check = optimizer.state[param], Table.check

    def replace(self):
        monkeypatch.setattr(Table, "check", check)
        state["momentum_0"] = state["momentum_0"].clone()
        check(self)

    monkeypatch.setattr(Table, "check", replace)
    state["momentum_1"] = state["momentum_1"].clone()  # so that a new table is made
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="replaced while a step was prepared"):
        optimizer.step()
    assert torch.equal(param, before)
    optimizer.step()
    assert not torch.equal(param, before)


def test_what_is_inside_a_wrapper_may_be_another_object_at_each_look():
    class Wrapper(torch.Tensor):
        """As a DTensor, whose inside is a new view each time."""

        def to_local(self):
            return self.as_subclass(torch.Tensor).view(-1)

    wrapper = torch.ones(6).as_subclass(Wrapper)
    written = Written([wrapper], [({"rms": torch.ones(2)}, "rms")])
    assert written.is_current()  # else kernels would make a table at every step
    wrapper.data = torch.ones(6)
    assert not written.is_current()
