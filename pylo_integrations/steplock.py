"""A step is taken as a whole: other threads wait for it, and so do the handlers of signals.

A handler such as that of Ctrl-C runs between any two lines of Python. One that raises would leave some tensors stepped
and others not; one that saves a checkpoint would save such a mixture. While a step runs in the main thread, signals
that have a handler in Python are therefore noted, and handled when the step is over.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

_FAULTS = ("SIGILL", "SIGFPE", "SIGSEGV", "SIGBUS", "SIGKILL", "SIGSTOP")  # which cannot wait, or not be handled
_NUMBERS: tuple[int, ...] = tuple(sorted(signal.valid_signals() - {getattr(signal, name, None) for name in _FAULTS}))

# The functions of C: those around them make enumerations of everything, which takes ten times as long as the rest.
_c_signal: Any = importlib.import_module("_signal")
_set_handler: Callable[[int, Any], Any] = _c_signal.signal
_handler_of: Callable[[int], Any] = _c_signal.getsignal

_Pending = dict[int, tuple[Callable[[int, FrameType | None], Any], FrameType | None]]
"""Handlers that wait, by signal, with the frame that each interrupted."""


class StepLock:
    """What threads that share an optimizer wait for.

    Wrappers that copy an optimizer's attributes share its lock; copies and pickles of the optimizer have their own. The
    child of a fork does not wait for threads that only its parent has.
    """

    def __init__(self) -> None:
        self._renew()

    def __reduce__(self) -> tuple[type[StepLock], tuple[()]]:
        return StepLock, ()

    def _renew(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._is_stepping = False

    @property
    def between_steps(self) -> AbstractContextManager[Any]:
        """To be held where no step may come in between; the thread that holds it may enter again."""
        if self._process != os.getpid():
            self._renew()
        return self._lock

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """One thread is in here at a time, with the signals of the main thread held back.

        Raises:
            RuntimeError: This thread is in here already.
        """
        pending: _Pending = {}
        try:
            with self.between_steps:
                if self._is_stepping:
                    raise RuntimeError(
                        "step() was called while a step of the same optimizer runs in this thread, by something that "
                        "the step itself calls, such as a dispatch mode or a finalizer; call it before or after"
                    )
                with _held_back(pending):
                    self._is_stepping = True
                    try:
                        yield
                    finally:
                        self._is_stepping = False
        finally:
            _handle(pending)


def between_steps(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a method of an optimizer wait for steps that other threads take, and them for it."""

    @functools.wraps(method)
    def waiting(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        optimizer: Any = args[0]
        with optimizer._steplock.between_steps:
            return method(*args, **kwargs)

    return waiting


@contextmanager
def _held_back(pending: _Pending) -> Iterator[None]:
    """Note signals in ``pending``; only the main thread handles any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()
    handlers: dict[int, Any] = {number: handler for number in _NUMBERS if callable(handler := _handler_of(number))}
    left = dict(handlers)

    def note(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # the child of a fork in another thread, where this step never ends
            handlers[number](number, frame)
        else:
            pending.setdefault(number, (handlers[number], frame))

    try:
        for number in handlers:
            _set_handler(number, note)
        yield
    finally:
        _restore(left)


def _restore(handlers: dict[int, Any]) -> None:
    try:
        while handlers:
            number, handler = next(iter(handlers.items()))
            _set_handler(number, handler)
            del handlers[number]
    except BaseException:  # from a handler that is in place again
        _restore(handlers)
        raise


def _handle(pending: _Pending) -> None:
    try:
        while pending:
            number, (handler, frame) = pending.popitem()
            handler(number, frame)
    finally:
        if pending:
            _handle(pending)
