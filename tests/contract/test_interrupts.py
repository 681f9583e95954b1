"""Is a step taken whole when signals arrive, and can training go on after whatever else is raised in its midst?"""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from native_library import library_or_skip
from thetas import create, distinct_rules
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pylo_integrations.rules.celo2 import Celo2Rule
from pylo_integrations.step.writing import Writer
from pylo_integrations.steplock import StepLock

pytestmark = pytest.mark.usefixtures("small_thetas")

NAMES = distinct_rules()
SHAPES = [(6, 5), (5,), (4, 3), (3, 3)]


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def everything(optimizer, params) -> list[torch.Tensor]:
    states = [value for p in params for value in optimizer.state[p].values()]
    return [t.clone() for t in (*params, *states, *optimizer._progress.memory.values())]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class AtCall(TorchDispatchMode):
    """Does something at the ``number``-th operation of torch; counts them."""

    def __init__(self, number: int, action) -> None:
        super().__init__()
        self.number, self.action, self.count = number, action, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.number:
            self.action()
        return func(*args, **kwargs or {})


@pytest.fixture
def ctrl_c():
    """The handler of a Python that nobody embedded, whatever the test runner has."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_ctrl_c_meets_is_whole(name, backend, ctrl_c):
    params, plain = parameters(), parameters()
    optimizer, other = create(params, name, backend=backend), create(plain, name, backend=backend)
    give(params, 0), give(plain, 0)
    optimizer.step(loss=1.0), other.step(loss=1.0)
    with AtCall(0, None) as counter:
        optimizer.step(loss=1.0)
    other.step(loss=1.0)
    begun = 0
    for k, number in enumerate(range(1, counter.count, max(1, counter.count // 12)), start=2):
        give(params, k), give(plain, k)
        with pytest.raises(KeyboardInterrupt), AtCall(number, ctrl_c):
            optimizer.step(loss=1.0 + k)
        if optimizer.iteration == other.iteration:  # torch's profiling comes before the step
            assert equal(everything(optimizer, params), everything(other, plain)), number
            optimizer.step(loss=1.0 + k)
        else:
            begun += 1
        other.step(loss=1.0 + k)
        assert optimizer.iteration == other.iteration
        assert equal(everything(optimizer, params), everything(other, plain)), number
    assert begun > 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_handlers_of_all_kinds_run_once_each_after_the_step(ctrl_c):
    params = parameters()
    optimizer = create(params, "celo")
    seen = []
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGCHLD]
    before = {number: signal.getsignal(number) for number in numbers}

    def handler(number, frame):
        seen.append((signal.Signals(number), optimizer.iteration))
        optimizer.state_dict()  # as those do that save a checkpoint
        optimizer.step(loss=1.0)
        if number == signal.SIGTERM:
            raise SystemExit(3)

    def act():
        for number in (*numbers, *numbers):
            signal.raise_signal(number)
        ctrl_c()

    try:
        for number in numbers:
            signal.signal(number, handler)
        give(params, 0)
        with pytest.raises((SystemExit, KeyboardInterrupt)), AtCall(5, act):
            optimizer.step(loss=1.0)
        assert {number for number, _ in seen} == set(numbers) and len(seen) == len(numbers)
        assert min(iteration for _, iteration in seen) == 1 and optimizer.iteration == 5
        assert all(signal.getsignal(number) is handler for number in numbers)
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def test_ignored_and_default_signals_stay_so():
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        params = parameters()
        optimizer = create(params, "celo2")
        give(params, 0)
        with AtCall(3, lambda: signal.raise_signal(signal.SIGUSR1)):
            optimizer.step()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_after_an_exception_at_any_operation(name, backend):
    """The step may be torn, which the documentation says; the optimizer is not."""
    params = parameters()
    optimizer = create(params, name, backend=backend)
    give(params, 0)
    optimizer.step(loss=1.0)
    with AtCall(0, None) as counter:
        optimizer.step(loss=1.0)

    def fail():
        raise MemoryError("by the test")

    for number in range(1, counter.count, max(1, counter.count // 12)):
        iteration = optimizer.iteration
        with pytest.raises(MemoryError, match="by the test"), AtCall(number, fail):
            optimizer.step(loss=1.0)
        assert optimizer.iteration in (iteration, iteration + 1)
        optimizer.step(loss=1.0)
        assert all(t.isfinite().all() for t in everything(optimizer, params)), number
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step(loss=1.0)


@pytest.mark.parametrize("name", ["celo2", "celo2_base", "elo_celo2"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_celo2_steps_again_after_finish_was_left(name, error, backend, monkeypatch):
    directions, calls = Celo2Rule.directions, []

    def failing(self, *args):
        calls.append(optimizer.iteration)
        if calls.count(1) == 2:
            raise error("by the test")
        return directions(self, *args)

    monkeypatch.setattr(Celo2Rule, "directions", failing)  # before kernels take it
    params = parameters()
    optimizer = create(params, name, backend=backend)
    give(params, 0)
    optimizer.step()
    with pytest.raises(error, match="by the test"):
        optimizer.step()
    assert optimizer.iteration == 1
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert optimizer.iteration == 2
    assert all(p.isfinite().all() and not torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_celo2_steps_again_after_the_kernels_were_left(monkeypatch):
    library_or_skip()
    from pylo_integrations.ops.records import Table

    params = parameters()
    optimizer = create(params, "celo2", backend="native")
    give(params, 0)
    optimizer.step()

    def leave(self, stage, rows):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Table, "run_some", leave)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    optimizer.step()
    assert optimizer.iteration == 2


@pytest.mark.parametrize("name", ["velo", "celo", "celo_adam"])
def test_a_step_that_failed_is_not_remembered(name, monkeypatch):
    params = parameters()
    optimizer = create(params, name)
    give(params, 0)
    optimizer.step(loss=1.0)
    before = {key: value.clone() for key, value in optimizer._progress.memory.items()}
    monkeypatch.setattr(Writer, "write_", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        optimizer.step(loss=5.0)
    assert all(torch.equal(value, before[key]) for key, value in optimizer._progress.memory.items())
    assert optimizer.iteration == 1


def test_exceptions_of_the_users_own_code_leave_all_as_it_was():
    params = parameters()
    optimizer = create(params, "celo")
    give(params, 0)
    optimizer.step(loss=1.0)
    before = everything(optimizer, params)

    def fail(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fail)
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss=1.0)
    handle.remove()
    assert equal(everything(optimizer, params), before) and optimizer.iteration == 1
    handle = optimizer.register_step_post_hook(fail)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(loss=1.0)
    handle.remove()
    assert optimizer.iteration == 2, "the step was over"


def test_signals_between_handing_over_lose_no_handler(ctrl_c, monkeypatch):
    """Handlers are put back whenever a signal arrives."""
    import pylo_integrations.steplock as steplock

    set_handler = steplock._set_handler
    for number in range(1, 5):
        calls = []

        def interrupted(signum, handler, number=number, calls=calls):
            result = set_handler(signum, handler)
            calls.append(signum)
            if len(calls) == number:
                ctrl_c()
            return result

        monkeypatch.setattr(steplock, "_set_handler", interrupted)
        lock, ran = StepLock(), []
        try:
            with lock.stepping():
                ran.append(1)
        except KeyboardInterrupt:
            pass
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, number
        assert not lock._is_stepping
        with lock.stepping():
            pass


def test_real_interrupts_from_outside_tear_nothing(backend, ctrl_c):
    """Another thread has the system send them; they come wherever the main thread is just then."""
    params = [nn.Parameter(torch.randn(24, 24)) for _ in range(12)]
    optimizer = create(params, "celo2", backend=backend)
    give(params, 0)
    optimizer.step()
    began = time.perf_counter()
    optimizer.step()
    duration = time.perf_counter() - began

    def now():
        return optimizer.iteration, [p.detach().clone() for p in params]

    def interrupt(delay):
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    met_a_step = 0
    for attempt in range(12):
        sender = threading.Thread(target=interrupt, args=(duration * attempt / 12,))
        was, deadline = now(), time.monotonic() + 60
        with pytest.raises(KeyboardInterrupt) as caught:
            sender.start()
            while time.monotonic() < deadline:
                was = now()
                optimizer.step()
        sender.join()
        moved = {not torch.equal(p, old) for p, old in zip(params, was[1], strict=True)}
        assert moved == {optimizer.iteration > was[0]}, "torn"
        met_a_step += any(entry.name == "stepping" for entry in caught.traceback)
    assert met_a_step
    optimizer.step()
