"""Does autograd notice that a step has changed what it saved for backward?"""

from __future__ import annotations

import pytest
import torch
from share_cases import version_case
from state_changes import Run
from thetas import distinct_rules
from torch import nn

BACKENDS = ["auto", "reference"]


def backward_notices(step, params) -> bool:
    """Whether backward after a step refuses to compute a gradient of numbers that are gone."""
    loss = sum(param.square().sum() for param in params)
    step()
    try:
        loss.backward()
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return True
    return False


def test_torchs_own_optimizer_is_noticed():
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    assert backward_notices(torch.optim.SGD([param]).step, [param])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_backward_after_a_step_is_refused(dtype, backend):
    for name in distinct_rules():
        run = Run(name, backend, dtype, stochastic_rounding=dtype == torch.bfloat16)
        for param in run.params:  # each by itself
            run.give_gradients()
            assert backward_notices(run.step, [param]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_of_parameters_and_states_count_up(backend):
    for name in distinct_rules():
        run = Run(name, backend)
        for _ in range(2):
            tensors = [*run.params, *(value for state in run.optimizer.state.values() for value in state.values())]
            gradients = [param.grad for param in run.params]
            before = [tensor._version for tensor in tensors], [grad._version for grad in gradients]
            run.step()
            assert all(t._version > old for t, old in zip(tensors, before[0], strict=True)), name
            assert [grad._version for grad in gradients] == before[1], "a step only reads gradients"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_that_changes_nothing_counts_nothing(backend):
    for name in distinct_rules():
        run = Run(name, backend)
        run.params[0].grad[0] = torch.nan
        before = [param._version for param in run.params]
        with pytest.warns(RuntimeWarning, match="skipped"):
            run.step()
        assert [param._version for param in run.params] == before


@pytest.mark.dist
@pytest.mark.parametrize("backend", BACKENDS)
def test_versions_where_ranks_divide_the_work(workers, backend):
    for rank in workers.run(2, version_case, backend=backend):
        assert all(rank.values()), rank


def test_compiled_steps_count_too():
    for backend in BACKENDS:
        torch._dynamo.reset()
        run = Run("small_fc_lopt", backend)
        step = torch.compile(run.step, backend="eager")
        for _ in range(2):
            run.give_gradients()
            assert backward_notices(step, run.params[:1])
    torch._dynamo.reset()
