"""May threads share an optimizer, and may a process fork that has one?"""

from __future__ import annotations

import copy
import os
import pickle
import threading

import pytest
import torch
from forked import Forked
from native_library import library_or_skip
from thetas import create, distinct_rules
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = distinct_rules()
SHAPES = [(24, 20), (20,), (16, 16)]


@pytest.fixture(params=[pytest.param("reference", marks=pytest.mark.slow), "native"])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def together(*actions) -> None:
    """Run them in threads of their own; raises what one of them raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(actions))

    def run(action):
        try:
            start.wait(60)
            action()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(action,), daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread waits for ever"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_two_threads_are_those_of_one(name, backend):
    params, plain = parameters(), parameters()
    optimizer, other = create(params, name, backend=backend), create(plain, name, backend=backend)

    def steps():
        for _ in range(8):
            optimizer.step(loss=1.0)

    together(steps, steps)
    for _ in range(16):
        other.step(loss=1.0)
    assert optimizer.iteration == 16
    assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo", "celo2"])
def test_what_looks_at_state_sees_no_half_a_step(name):
    params = parameters()
    optimizer = create(params, name)
    optimizer.step(loss=1.0)
    late = parameters()

    def steps():
        for _ in range(12):
            optimizer.step(loss=1.0)

    def look():
        for _ in range(12):
            optimizer.state_dict()
            optimizer.init_state()

    def grow():
        for p in late:
            optimizer.add_param_group({"params": [p]})

    together(steps, look, grow)
    assert optimizer.iteration == 13 and all(p in optimizer.state for p in late)
    assert all(p.isfinite().all() for p in params)


def test_observed_losses_of_threads_add_up(toy_loss):
    from pylo_integrations import create_optimizer

    params = parameters()
    optimizer = create_optimizer(params, "toy_loss", num_steps=100)

    def observe():
        for _ in range(200):
            optimizer.observe_loss(1.0)

    together(observe, observe, observe)
    optimizer.step()
    assert optimizer.rule.seen_losses == [600.0]


def test_a_closure_may_step_the_same_optimizer_and_threads_do_not_wait_for_closures():
    params = parameters()
    optimizer = create(params, "celo")

    def closure():
        optimizer.step(loss=1.0)
        together(lambda: optimizer.step(loss=2.0))
        return torch.tensor(3.0)

    optimizer.step(closure)
    assert optimizer.iteration == 3


def test_hooks_may_step_the_same_optimizer():
    params = parameters()
    optimizer = create(params, "celo")
    calls = []

    def again(*_):
        calls.append(1)
        if len(calls) < 3:
            optimizer.step(loss=1.0)

    optimizer.register_step_post_hook(again)
    optimizer.step(loss=1.0)
    assert optimizer.iteration == 3


def test_a_step_from_within_a_step_is_an_error_and_no_deadlock():
    class Again(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if optimizer._steplock._is_stepping:  # before that, it is one step after the other
                optimizer.step(loss=1.0)
            return func(*args, **kwargs or {})

    params = parameters()
    optimizer = create(params, "celo")
    optimizer.step(loss=1.0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match="while a step of the same optimizer runs"), Again():
        optimizer.step(loss=1.0)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    optimizer.step(loss=1.0)
    assert optimizer.iteration == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_do_not_wait_for_the_original(clone):
    params = parameters()
    optimizer = create(params, "celo")
    twin = clone(optimizer)
    with optimizer._steplock.between_steps:
        together(lambda: twin.step(loss=1.0), twin.state_dict)
    assert copy.copy(optimizer._steplock) is not optimizer._steplock


@pytest.fixture(scope="module")
def interpreter():
    forked = Forked("torch", "pylo_integrations", environment=os.environ, options=("-W", "ignore"))
    yield forked
    forked.close()


SCRIPT = """
import os, threading
import torch
from pylo_integrations import create_optimizer
torch.set_num_threads(2)
model = torch.nn.Linear(40, 40)
optimizer = create_optimizer(model, "celo", num_steps=9, backend=BACKEND)
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizer.step(loss=1.0)
held, let_go = threading.Event(), threading.Event()
def hold():
    with optimizer._steplock.between_steps:
        held.set()
        let_go.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    optimizer.state_dict()
    optimizer.step(loss=1.0)
    os._exit(0 if optimizer.iteration == 2 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
let_go.set()
optimizer.step(loss=1.0)
print(optimizer.iteration)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "auto"])
def test_the_child_of_a_fork_does_not_wait_for_threads_of_its_parent(interpreter, backend):
    done = interpreter.run(f"BACKEND = {backend!r}\n{SCRIPT}")
    assert done.returncode == 0 and done.stdout.strip() == "2", done.stderr[-2000:]


LOADER = """
import torch
from torch.utils.data import DataLoader
from pylo_integrations import create_optimizer
model = torch.nn.Linear(4, 2)
optimizer = create_optimizer(model, "celo2")
for batch in DataLoader(torch.randn(24, 4), batch_size=4, num_workers=2, multiprocessing_context="fork"):
    optimizer.zero_grad()
    loss = model(batch).square().mean()
    loss.backward()
    optimizer.step(loss=loss)
print(optimizer.iteration)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_training_with_forked_loaders(interpreter):
    done = interpreter.run(LOADER)
    assert done.returncode == 0 and done.stdout.strip() == "6", done.stderr[-2000:]
