"""The CUDA kernels: a library of its own with the CPU library's face.

A table of tensors becomes a plan, which lives on the device as long as the table is used; a stage then only launches
kernels on the current stream. What changes from step to step is copied to the device when it has changed, from
page-locked memory and without waiting.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pylo_integrations.ops import loader
from pylo_integrations.ops.loader import ABI_VERSION, CallStruct, Library, NativeError, open_library
from pylo_integrations.ops.records import STEP

FILE = loader.FILE.replace("cpu", "cuda")
"""Name of the shared library; it stands beside the CPU library, which it calls."""

PRECISIONS = {"precise": 0, "exact": 1}
"""Networks on tensor cores, numbers split into two bfloat16; or in float32 throughout."""

OFFSETS = {name: field[1] for name, field in (STEP.fields or {}).items()}
"""Where the fields of ``pylo_step`` are, in bytes."""


class CudaCallStruct(ctypes.Structure):
    """``pylo_cuda_call``."""

    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("plan", ctypes.c_void_p),
        ("device_plan", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("device_steps", ctypes.c_void_p),
        ("grad_squares", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("device", ctypes.c_int32),
        ("precision", ctypes.c_int32),
    ]


class _Plan:
    """A table of tensors on its device, and everything that stages over it need there."""

    def __init__(self, host: Tensor, count: int, workspace_bytes: int, device: torch.device) -> None:
        self._host = host
        self._device = host.to(device, copy=True)
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=device)
        self._steps = torch.empty(count, STEP.itemsize, dtype=torch.uint8, device=device)
        self._fields = self._steps.view(torch.float32)
        self._uploaded = b""
        self.call = CudaCallStruct(
            abi_version=ABI_VERSION,
            size=ctypes.sizeof(CudaCallStruct),
            plan=host.data_ptr(),
            device_plan=self._device.data_ptr(),
            device_steps=self._steps.data_ptr(),
            workspace=self._workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
            device=device.index or 0,
        )

    def upload(self, call: CallStruct) -> None:
        """Bring the device's copy of the steps up to date."""
        self.call.steps = call.steps
        data = ctypes.string_at(call.steps, self._steps.numel())
        if data != self._uploaded:
            self._copy(data)
            self._uploaded = data
        for (field, first, end), value in call.on_device.items():
            self._fields[first:end, OFFSETS[field] // 4] = value

    def _copy(self, data: bytes) -> None:
        locked = self._steps.device.type == "cuda"
        # Torch gives this memory to somebody else only when the copy is done, and keeps it for the next step.
        host = torch.empty(len(data), dtype=torch.uint8, device="cpu", pin_memory=locked)
        host.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._steps.view(-1).copy_(host, non_blocking=locked)


class CudaLibrary:
    """The loaded library for one device, a :class:`~pylo_integrations.ops.loader.NativeLibrary`.

    Args:
        path: The shared library.
        cpu: The CPU library, which checks tables for both.
        device: Where the tensors are.
        precision: One of :data:`PRECISIONS`.

    Raises:
        NativeError: It cannot be loaded or has another interface version; the message says which.
    """

    STAGES = ("collect", "prepare", "describe", "apply")

    def __init__(self, path: Path, cpu: Library, device: torch.device, precision: str = "precise") -> None:
        self.path = path
        self._cpu = cpu
        self.device = device
        self._precision = PRECISIONS[precision]
        self._dll = open_library(path, "pylo_cuda_abi_version")
        self._dll.pylo_cuda_last_error.restype = ctypes.c_char_p
        self._stages = {stage: getattr(self._dll, f"pylo_cuda_{stage}") for stage in self.STAGES}

    def feature_names(self) -> tuple[str, ...]:
        """See :class:`~pylo_integrations.ops.loader.NativeLibrary`."""
        return self._cpu.feature_names()

    def check(self, call: CallStruct) -> tuple[int, int]:
        """Validate rule and table, and plan stages over them; the plan stays with ``call``.

        Returns:
            A token, which nothing asks for, and the workspace that the caller must provide, which is none.

        Raises:
            NativeError: The message says which argument is wrong.
        """
        plan_bytes, workspace_bytes = ctypes.c_int64(), ctypes.c_int64()
        sizes = ctypes.byref(plan_bytes), ctypes.byref(workspace_bytes)
        self._raise_for(self._dll.pylo_cuda_check(ctypes.byref(call), *sizes))
        host = torch.empty(plan_bytes.value, dtype=torch.uint8, device="cpu")
        address = ctypes.c_void_p(host.data_ptr())
        self._raise_for(self._dll.pylo_cuda_plan(ctypes.byref(call), address, plan_bytes))
        call.plan = _Plan(host, call.count, workspace_bytes.value, self.device)
        return 0, 0

    def run(self, stage: str, call: CallStruct) -> None:
        """Launch a stage over all tensors of a call, on the current stream. ``measure`` is done by ``collect``.

        Raises:
            NativeError: The message says which argument is wrong, or what CUDA refused.
        """
        if stage == "measure":
            return
        plan = call.plan
        if not isinstance(plan, _Plan):
            raise NativeError("the table was not checked: check it before a stage is run")
        plan.call.precision = self._precision
        plan.call.grad_squares = call.grad_squares
        if self.device.type == "cuda":
            plan.call.stream = torch.cuda.current_stream(self.device).cuda_stream
        plan.upload(call)
        self._raise_for(self._stages[stage](ctypes.byref(plan.call)))

    def _raise_for(self, status: int) -> None:
        if status:
            raise NativeError(f"CUDA kernels: {self._dll.pylo_cuda_last_error().decode()}")


def find_library(cpu: Library) -> Path | None:
    """The shared library, which stands beside the CPU library."""
    path = cpu.path.with_name(FILE)
    return path if path.exists() else None


@cache
def load(device: torch.device) -> CudaLibrary | str:
    """The library for a device, or the reason why there is none, in words."""
    cpu = loader.load()
    if isinstance(cpu, str):
        return cpu
    path = find_library(cpu)
    if path is None:
        return f"{FILE} is not part of this installation: it is built when pip finds nvcc"
    try:
        return CudaLibrary(path, cpu, device)
    except NativeError as error:
        return str(error)
