"""May a CUDA graph hold the stages of a step: are there only launches, of the same arguments every time? Emulated.

While a stream is captured, CUDA refuses whatever waits for the device, loads a module or takes memory by itself. What
is launched then is repeated with the arguments it had. On a device, test_cuda_device.py captures a graph.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cuda_shim import Shim
from test_cuda_device import stages_and_step
from test_native_kernels import parameters
from torch.utils._python_dispatch import TorchDispatchMode

from pylo_integrations.ops import cuda, loader
from pylo_integrations.ops.kernels import LaunchStruct

pytestmark = pytest.mark.timeout(900)

CAPTURED = {"cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"}
"""Of CUDA's driver, the functions that a captured step may call, but for launches."""
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operations whose result is a number or a shape that only the device knows."""


@pytest.fixture
def shim(compiled_kernels, monkeypatch) -> Shim:
    library = Shim(compiled_kernels)
    monkeypatch.setattr(loader, "load", lambda: library)
    return library


class OnlyCaptured:
    """CUDA's driver as it is while a stream is captured."""

    def __init__(self, dll: ctypes.CDLL) -> None:
        self._dll = dll

    def __getattr__(self, name: str) -> Any:
        assert name in CAPTURED, f"{name} while a stream is captured"
        return getattr(self._dll, name)


class NothingWaits(TorchDispatchMode):
    """Refuses the operations for which the host would wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_pinned = "pin_memory" in func.name() or (kwargs or {}).get("pin_memory")
        assert WAITING.isdisjoint(func.tags) and not is_pinned, f"{func} while a stream is captured"
        return func(*args, **(kwargs or {}))


Launch = tuple[int, int, int, bytes]


@contextmanager
def capturing(shim: Shim, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Only what may be captured; yields what is launched: which kernel, blocks, threads, and its parameter."""
    launched: list[Launch] = []

    def refuse(*_: Any) -> None:
        raise AssertionError("a plan or its numbers were sent to the device while a stream is captured")

    with monkeypatch.context() as patch, NothingWaits():
        driver = shim._kernels._driver
        launch = driver.launch

        def recorded(function: Any, blocks: int, threads: int, stream: int, argument: ctypes.c_void_p) -> None:
            parameter = ctypes.string_at(argument, LaunchStruct.arguments.size)
            launched.append((id(function), blocks, threads, parameter))
            launch(function, blocks, threads, stream, argument)

        patch.setattr(driver, "_dll", OnlyCaptured(driver._dll))
        patch.setattr(driver, "launch", recorded)
        patch.setattr(cuda._Copy, "_copy", refuse)
        patch.setattr(Shim, "check", refuse)
        yield launched


@pytest.mark.parametrize(
    ("name", "shapes", "launches"),
    [("small_fc_lopt", [(33, 7), (130,), (), (8, 4, 3, 3)], 5), ("celo2", [(130,), ()], 3)],
    ids=["a network", "Adam"],
)
def test_stages_only_launch_and_always_the_same(name, shapes, launches, shim, monkeypatch):
    """Of rules that kernels step in place; steps that are finished by torch are given memory anew in each step."""
    _, step = stages_and_step(parameters(shapes), name)
    step()
    steps = []
    for _ in range(2):
        with capturing(shim, monkeypatch) as launched:
            step()
        steps.append(launched)
    first, second = steps
    assert first == second and len(first) == launches


@pytest.mark.parametrize("what", ["reads a number", "takes page-locked memory", "loads a module", "sends a number"])
def test_what_capture_forbids_is_noticed(what, shim, monkeypatch):
    """So the test above can fail."""
    optimizer, step = stages_and_step(parameters([(6, 5)]), "small_fc_lopt")
    step()
    with capturing(shim, monkeypatch), pytest.raises(AssertionError, match="while a stream is captured"):
        if what == "reads a number":
            torch.ones(2).sum().item()
        elif what == "takes page-locked memory":
            torch.empty(2, pin_memory=True)
        elif what == "loads a module":
            shim._kernels._functions.clear()
            shim._kernels.load([b"collect"])
        else:
            optimizer.param_groups[0]["weight_decay"] = 0.5
            optimizer.param_groups[0]["weight_decay_policy"] = "l2"
            step()
