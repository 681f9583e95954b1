"""The CUDA kernels with the CPU library's face.

A table of tensors becomes a plan, which lives on the device as long as the table is used; a stage then only launches
kernels on the current stream. What changes from step to step is copied to the device when it has changed, from
page-locked memory and without waiting. The CPU library makes plans and tells what to launch, so nothing here is
compiled for CUDA but the kernels themselves (:mod:`pylo_integrations.ops.kernels`).
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from pylo_integrations.ops import kernels, loader
from pylo_integrations.ops.driver import DriverError
from pylo_integrations.ops.kernels import Kernels, LaunchStruct
from pylo_integrations.ops.loader import ABI_VERSION, CallStruct, Library, NativeError
from pylo_integrations.ops.nvrtc import NvrtcError
from pylo_integrations.ops.records import STEP, STORED

STAGES = {"collect": 0, "prepare": 1, "describe": 2, "advance": 3, "apply": 4}
"""Numbers of the stages; ``measure`` is done by ``collect``."""

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
        ("stored", ctypes.c_void_p),
        ("device_stored", ctypes.c_void_p),
        ("grad_squares", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("stage", ctypes.c_int32),
        ("precision", ctypes.c_int32),
    ]


class KernelsStruct(ctypes.Structure):
    """``pylo_cuda_kernels``."""

    _fields_ = [("name", ctypes.c_char_p * 9), ("count", ctypes.c_int64)]


class _Copy:
    """What a table tells of every step, on the device; copied there when it has changed."""

    def __init__(self, count: int, itemsize: int, device: torch.device) -> None:
        self.data = torch.empty(count, itemsize, dtype=torch.uint8, device=device)
        self._uploaded = b""

    def upload(self, address: int) -> None:
        """Bring it up to date with what is at an address of the host."""
        data = ctypes.string_at(address, self.data.numel())
        if data != self._uploaded:
            self._copy(data)
            self._uploaded = data

    def _copy(self, data: bytes) -> None:
        locked = self.data.device.type == "cuda"
        # Torch gives this memory to somebody else only when the copy is done, and keeps it for the next step.
        host = torch.empty(len(data), dtype=torch.uint8, device="cpu", pin_memory=locked)
        host.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.data.view(-1).copy_(host, non_blocking=locked)


class _Plan:
    """A table of tensors on its device, and everything that stages over it need there."""

    def __init__(self, host: Tensor, count: int, rules: int, workspace_bytes: int, device: torch.device) -> None:
        self._host = host
        self._device = host.to(device, non_blocking=True, copy=True)
        self._workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=device)
        self._steps, self._stored = (_Copy(count, each.itemsize, device) for each in (STEP, STORED))
        self._fields = self._steps.data.view(torch.float32)
        self.call = CudaCallStruct(
            abi_version=ABI_VERSION,
            size=ctypes.sizeof(CudaCallStruct),
            plan=host.data_ptr(),
            device_plan=self._device.data_ptr(),
            device_steps=self._steps.data.data_ptr(),
            device_stored=self._stored.data.data_ptr(),
            workspace=self._workspace.data_ptr(),
            workspace_bytes=workspace_bytes,
        )
        self.launches = (LaunchStruct * (rules + 1))()

    def upload(self, call: CallStruct) -> None:
        """Bring the device's copies up to date."""
        self.call.steps, self.call.stored = call.steps, call.stored
        self._steps.upload(call.steps)
        self._stored.upload(call.stored)
        for (field, first, end), value in call.on_device.items():
            self._fields[first:end, OFFSETS[field] // 4] = value


class CudaLibrary:
    """The kernels for one device, a :class:`~pylo_integrations.ops.loader.NativeLibrary`.

    Args:
        cpu: The CPU library.
        kernels: Those of the device.
        device: Where the tensors are.
        precision: One of :data:`PRECISIONS`.
    """

    def __init__(self, cpu: Library, kernels: Kernels, device: torch.device, precision: str = "precise") -> None:
        self._cpu = cpu
        self._kernels = kernels
        self.device = device
        self._precision = PRECISIONS[precision]

    def feature_names(self) -> tuple[str, ...]:
        """See :class:`~pylo_integrations.ops.loader.NativeLibrary`."""
        return self._cpu.feature_names()

    def check(self, call: CallStruct) -> tuple[int, int]:
        """Validate rules and table, plan stages over them, and have their kernels ready; the plan stays with ``call``.

        Returns:
            A token, which nothing asks for, and the workspace that the caller must provide, which is none.

        Raises:
            NativeError: The message says which argument is wrong, or why there are no kernels.
        """
        plan_bytes, workspace_bytes = ctypes.c_int64(), ctypes.c_int64()
        self._cpu.call("pylo_cuda_check", call, plan_bytes, workspace_bytes)
        on_cuda = self.device.type == "cuda"
        # Page-locked, so that nobody waits for its copy.
        host = torch.empty(plan_bytes.value, dtype=torch.uint8, device="cpu", pin_memory=on_cuda)
        self._cpu.call("pylo_cuda_plan", call, ctypes.c_char.from_address(host.data_ptr()), plan_bytes.value)
        needed = KernelsStruct()
        for rule in range(call.rule_count):
            self._cpu.call("pylo_cuda_kernels_of", call, rule, self._precision, needed)
            try:
                self._kernels.load(needed.name[: needed.count])
            except (DriverError, NvrtcError) as error:
                raise NativeError(f"CUDA kernels: {error}") from error
        call.plan = _Plan(host, call.count, call.rule_count, workspace_bytes.value, self.device)
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
        plan.call.stage, plan.call.precision = STAGES[stage], self._precision
        plan.call.grad_squares = call.grad_squares
        plan.upload(call)
        count = ctypes.c_int64()
        self._cpu.call("pylo_cuda_launches_of", plan.call, plan.launches, len(plan.launches), count)
        on_cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_cuda else 0
        try:
            self._kernels.launch(plan.launches[: count.value], stream)
        except DriverError as error:
            raise NativeError(f"CUDA kernels: {error}") from error


@cache
def load(device: torch.device) -> CudaLibrary | str:
    """The kernels for a device, or the reason why there are none, in words."""
    cpu = loader.load()
    if isinstance(cpu, str):
        return cpu
    found = kernels.load(device.index or 0)
    return found if isinstance(found, str) else CudaLibrary(cpu, found, device)
