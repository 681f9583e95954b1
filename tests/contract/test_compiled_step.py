"""Can a compiled function contain a step, without a break, and does it then take the steps of one that is not compiled?

``aot_eager`` is the compiler up to code generation: it traces, makes the graph functional and undoes that again.
"""

from __future__ import annotations

import copy

import pytest
import torch
from native_library import library_or_skip
from thetas import create, slow_unless
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

NAMES = ["small_fc_lopt", "velo", "celo", "celo2", "elo_celo2", "celo_adam"]
QUICK = [("velo", "native"), ("small_fc_lopt", "reference"), ("celo2", "native")]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def data(step: int) -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def train(optimizer, model, step_function, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = loss_of(model, data(step))
        loss.backward()
        if isinstance(lr := optimizer.param_groups[0]["lr"], torch.Tensor):
            lr.fill_(1.0 / (1 + step))
        step_function(loss.detach())


def assert_equal_runs(model, optimizer, other_model, other) -> None:
    assert optimizer.iteration == other.iteration
    for param, twin in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(param, twin)
        for key, value in other.state[twin].items():
            assert torch.equal(optimizer.state[param][key], value), key
    for key, value in other._progress.memory.items():
        assert torch.equal(optimizer._progress.memory[key], value), key


@pytest.mark.parametrize("name", [slow_unless(name == "velo", name) for name in NAMES])
def test_the_operator_passes_torchs_own_checks(name):
    library_or_skip()
    model = network()
    optimizer = create(model.parameters(), name, backend="native")
    optimizer.init_state()
    params = [param.detach().clone() for param in model.parameters()]
    grads = [torch.randn_like(param) for param in params]
    state = [value.clone() for param in model.parameters() for value in optimizer.state[param].values()]
    memory = optimizer._progress.memory
    run = [optimizer._progress.clock.clone(), *(memory[key].clone() for key in sorted(memory))]
    arguments = (optimizer._handle, list(range(len(params))), params, grads, state, run, torch.tensor(1.5))
    torch.library.opcheck(torch.ops.pylo_integrations.step.default, arguments)
    assert optimizer.iteration == 0
    assert all(map(torch.equal, params, model.parameters()))


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        slow_unless(case in QUICK, *case)
        for case in [*((name, "native") for name in NAMES), *((name, "reference") for name in NAMES[:2])]
    ],
)
def test_a_compiled_step_is_the_step(name, backend):
    """Without a break, with a schedule, and with steps that are not compiled before and after."""
    library_or_skip()
    model, other_model = network(), network()
    optimizer = create(model.parameters(), name, backend=backend, lr=torch.tensor(1.0))
    other = create(other_model.parameters(), name, backend=backend, lr=torch.tensor(1.0))
    optimizer.init_state()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda loss: optimizer.step(loss=loss), fullgraph=True, backend=graphs)
    train(optimizer, model, compiled, 3)
    assert graphs.frame_count == 1
    train(optimizer, model, lambda loss: optimizer.step(loss=loss), 2, first=3)
    train(optimizer, model, compiled, 1, first=5)
    train(other, other_model, lambda loss: other.step(loss=loss), 6)
    assert_equal_runs(model, optimizer, other_model, other)


def test_a_compiled_training_step_is_the_training_step():
    library_or_skip()
    model, other_model = network(), network()
    optimizer, other = create(model.parameters(), "velo"), create(other_model.parameters(), "velo")

    def training_step(model, optimizer, x):
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step(loss=loss)

    compiled = torch.compile(training_step, backend="aot_eager")
    for step in range(4):  # the first creates the state, where the compiled function breaks
        compiled(model, optimizer, data(step))
        training_step(other_model, other, data(step))
    assert_equal_runs(model, optimizer, other_model, other)


def test_a_run_with_compiled_steps_is_saved_and_goes_on():
    library_or_skip()
    model = network()
    optimizer = create(model.parameters(), "velo")
    optimizer.init_state()
    compiled = torch.compile(lambda loss: optimizer.step(loss=loss), fullgraph=True, backend="aot_eager")
    train(optimizer, model, compiled, 2)
    other_model = copy.deepcopy(model)
    other = create(other_model.parameters(), "velo")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, model, compiled, 2, first=2)
    train(other, other_model, lambda loss: other.step(loss=loss), 2, first=2)
    assert_equal_runs(model, optimizer, other_model, other)


def test_a_skipped_step_counts_nothing_but_itself():
    library_or_skip()
    model = network()
    optimizer = create(model.parameters(), "small_fc_lopt")
    optimizer.init_state()
    compiled = torch.compile(lambda: optimizer.step(), fullgraph=True, backend="aot_eager")
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.full_like(param, float("nan"))
    with pytest.warns(RuntimeWarning, match="not finite"):
        compiled()
    assert (optimizer.iteration, optimizer.nonfinite_steps) == (0, 1)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_takes_the_steps():
    library_or_skip()
    model, other_model = network(), network()
    optimizer, other = create(model.parameters(), "celo"), create(other_model.parameters(), "celo")
    optimizer.init_state()
    compiled = torch.compile(lambda loss: optimizer.step(loss=loss), fullgraph=True)
    train(optimizer, model, compiled, 3)
    train(other, other_model, lambda loss: other.step(loss=loss), 3)
    assert_equal_runs(model, optimizer, other_model, other)


def test_groups_that_are_added_may_have_no_gradients_yet():
    first, second = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3, 2))
    optimizer = create([first], "small_fc_lopt")
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(4):
        if number == 2:
            optimizer.add_param_group({"params": [second]})
        first.grad = torch.ones(4, 3)
        compiled()
    assert optimizer.iteration == 4 and torch.equal(second, torch.ones(3, 2))
