"""Local functions of rules, compiled by ``torch.compile``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from types import FunctionType
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


class CompiledLocal:
    """A :class:`~pylo_integrations.rules.base.Local` that compiles a function once for every format of its arguments.

    A format is the shape, strides, dtype and device of every tensor, and the value of everything else. Formats are
    told apart here and not by the compiler, which gives a function up after a handful of them, by a limit that is
    everybody's to set: it sees another function for each.
    """

    def __init__(self) -> None:
        self._compiled: dict[Hashable, Callable[..., Any]] = {}

    def __call__(self, function: Callable[_P, _R], /) -> Callable[_P, _R]:
        """What to call in place of ``function``, see :class:`~pylo_integrations.rules.base.Local`."""

        @functools.wraps(function)
        def run(*args: _P.args, **fixed: _P.kwargs) -> _R:
            key = (function, _format(args), *fixed.items())
            if key not in self._compiled:
                self._compiled[key] = torch.compile(_bind(function, fixed), fullgraph=True, dynamic=False)
            return cast(_R, self._compiled[key](*args))

        return run


@functools.cache
def check_compiler(device: torch.device) -> None:
    """Compile next to nothing, so that a step cannot fail in its middle because the compiler does not work at all.

    Raises:
        RuntimeError: It does not work for ``device``; the message says why.
    """
    try:
        torch.compile(_bind(torch.add, {"other": 1}), fullgraph=True, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # of the tracer, the code generator, or the toolchain
        raise RuntimeError(
            f"backend='compile' is not available: torch.compile fails on {device}: {error}; use backend='auto'"
        ) from error


def _bind(function: Callable[..., Any], fixed: dict[str, Any]) -> Callable[..., Any]:
    """As ``functools.partial(function, **fixed)``, but with code of its own, by which the compiler knows functions."""

    def bound(*args: Any) -> Any:
        return function(*args, **fixed)

    return FunctionType(bound.__code__.replace(), globals(), closure=bound.__closure__)


def _format(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    return tuple(map(_format, value)) if isinstance(value, list | tuple) else value
