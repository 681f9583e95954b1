"""Does a step see numbers that torch has not written down: negated views, parts of conjugates, zeros without memory?"""

from __future__ import annotations

import pytest
import torch
from share_cases import lazy_case
from state_changes import Run, assert_equal_runs, named
from thetas import create, distinct_rules
from torch import nn

from pylo_integrations import StateError
from pylo_integrations.fitting import is_lazy

BACKENDS = ["auto", "reference"]


def negated(values):
    """The same numbers, as a view that negates what is in memory."""
    return torch._neg_view(-values)


def negated_in_place(values):
    """The same numbers at the same place in memory."""
    return torch._neg_view(values.neg_())


def imaginary_part(values):
    """The same numbers, as ordinary code makes such views."""
    return torch.complex(torch.zeros_like(values), -values).conj().imag


LAZY = [negated, negated_in_place, imaginary_part]


def flag_gradients(run: Run, lazy) -> None:
    for param in run.params:
        param.grad = lazy(param.grad)
    # Those of one element are what ``AccumulateGrad`` keeps as they come: their strides mean nothing.
    assert all(param.grad.is_neg() for param in run.params)


def flag_parameters(run: Run, lazy) -> None:
    for param in run.params[:2]:
        param.data = lazy(param.data)
        assert param.is_neg()


def flag_states(run: Run, lazy) -> None:
    for param in run.params[1:]:
        state = run.optimizer.state[param]
        state.update({name: lazy(value) for name, value in state.items()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lazy", LAZY, ids=lambda lazy: lazy.__name__)
@pytest.mark.parametrize("flag", [flag_gradients, flag_parameters, flag_states], ids=lambda flag: flag.__name__)
def test_lazily_negated_tensors_are_read_as_what_they_are(flag, lazy, backend):
    for name in distinct_rules():
        run = Run(name, backend)
        fresh = run.fresh()
        fresh.optimizer.backend = backend
        flag(run, lazy)
        for _ in range(2):  # what was resolved is remembered rightly
            for each in (run, fresh):
                each.step()
            for param, twin in zip(run.params, fresh.params, strict=True):
                if flag is flag_parameters:  # stepped by the reference, whichever backend the other takes
                    torch.testing.assert_close(param, twin, rtol=1e-4, atol=1e-6)
                else:
                    assert torch.equal(param, twin), name
        if flag is not flag_parameters:
            assert_equal_runs(run, fresh)
        assert not any(is_lazy(value) for state in run.optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_get_the_flag_in_a_later_step_at_the_same_place(backend):
    """The cached step compares addresses and formats, which are equal."""
    for name in distinct_rules():
        run = Run(name, backend)
        fresh = run.fresh()
        for step in range(4):
            for param, twin in zip(run.params, fresh.params, strict=True):
                twin.grad = torch.full_like(twin, 0.1 * (1 + step))
                kept = param.grad.data_ptr()
                with torch.no_grad():
                    plain = param.grad._neg_view() if param.grad.is_neg() else param.grad
                    plain.copy_(-twin.grad if step % 2 else twin.grad)
                    param.grad = torch._neg_view(plain) if step % 2 else plain
                assert param.grad.data_ptr() == kept and param.grad.is_neg() == bool(step % 2)
            for each in (run, fresh):
                each.step()
        assert_equal_runs(run, fresh)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_conjugates_in_ordinary_code(backend):
    """One-element parameters get the lazy view itself as their gradient."""
    for name in distinct_rules():
        found = []
        for resolve in (False, True):
            real, imag = (nn.Parameter(torch.tensor([value])) for value in (0.3, -0.7))
            optimizer = create(named([real, imag]), name, backend=backend)
            for _ in range(3):
                optimizer.zero_grad()
                loss = (torch.complex(real, imag).conj() * torch.tensor([1 + 2j])).imag.sum()
                loss.backward()
                if resolve:
                    for param in (real, imag):
                        param.grad = param.grad.resolve_neg().clone()
                optimizer.step(loss=loss.detach())
            found.append((real.item(), imag.item()))
        assert found[0] == found[1], name


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_without_memory_are_zeros(backend):
    for name in distinct_rules():
        run = Run(name, backend)
        for param in run.params:
            param.grad = torch.zeros_like(param)
        fresh = run.fresh()
        run.params[0].grad = torch._efficientzerotensor(run.params[0].shape)
        state = run.optimizer.state[run.params[1]]
        fresh.optimizer.state[fresh.params[1]]["rms"].zero_()
        state["rms"] = torch._efficientzerotensor(state["rms"].shape)
        for each in (run, fresh):
            each.step()
        assert_equal_runs(run, fresh)
        run.params[2].data = torch._efficientzerotensor(run.params[2].shape)
        before = run.bits()
        with pytest.raises(StateError, match="parameter 'layer.2' of group 0 is a ZeroTensor.*clone"):
            run.step()
        assert run.bits() == before


def test_kernels_say_that_they_do_not_write_through_lazy_views():
    run = Run("small_fc_lopt", "native")
    flag_parameters(run, negated_in_place)
    before = run.bits()
    with pytest.raises(RuntimeError, match="lazily negated.*resolve_neg"):
        run.step()
    assert run.bits() == before


@pytest.mark.dist
def test_gradients_of_shares_are_resolved(workers):
    for rank in workers.run(2, lazy_case):
        assert rank["error"] <= 1e-6 < rank["moved"]


@pytest.mark.slow
def test_compiled_steps_resolve_too():
    for backend in BACKENDS:
        torch._dynamo.reset()
        run = Run("small_fc_lopt", backend)

        @torch.compile(backend="eager")
        def step(optimizer=run.optimizer):
            optimizer.step()

        step()
        fresh = run.fresh()
        flag_gradients(run, negated_in_place)
        step()
        fresh.step()
        assert_equal_runs(run, fresh)
    torch._dynamo.reset()
