"""CUDA's driver: modules of machine code, and launches of the kernels in them.

The runtime that torch uses is built upon it, and shares a device's primary context and its streams with it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LIBRARY = {"win32": "nvcuda.dll"}.get(sys.platform, "libcuda.so.1")


class DriverError(RuntimeError):
    """The driver refused something; the message has its words."""


class Driver:
    """The loaded driver.

    Args:
        path: The shared library.

    Raises:
        DriverError: It cannot be loaded, or finds no device.
    """

    def __init__(self, path: Path | str = LIBRARY) -> None:
        try:
            self._dll = ctypes.CDLL(str(path))
            self._launch_kernel = self._dll.cuLaunchKernel
        except (OSError, AttributeError) as error:
            raise DriverError(f"CUDA's driver cannot be loaded: {error}") from error
        pointer, count = ctypes.c_void_p, ctypes.c_uint
        self._launch_kernel.argtypes = [pointer, *(count,) * 7, pointer, ctypes.POINTER(pointer), pointer]
        self._check("cuInit", self._dll.cuInit(0))

    @property
    def version(self) -> tuple[int, int]:
        """Newest CUDA version that it knows."""
        version = ctypes.c_int()
        self._check("cuDriverGetVersion", self._dll.cuDriverGetVersion(ctypes.byref(version)))
        return version.value // 1000, version.value % 1000 // 10

    def primary_context(self, index: int) -> ctypes.c_void_p:
        """The context of a device that torch works in, which then stays until the process ends."""
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._check("cuDeviceGet", self._dll.cuDeviceGet(ctypes.byref(device), index))
        retained = self._dll.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
        self._check("cuDevicePrimaryCtxRetain", retained)
        return context

    @contextmanager
    def within(self, context: ctypes.c_void_p) -> Iterator[None]:
        """Make a context current in this thread for a while, whatever device is torch's current one."""
        self._check("cuCtxPushCurrent", self._dll.cuCtxPushCurrent_v2(context))
        try:
            yield
        finally:
            self._dll.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

    def load(self, image: bytes) -> ctypes.c_void_p:
        """Load a module, a cubin or fatbin, into the current context, for as long as that lasts."""
        module = ctypes.c_void_p()
        self._check("cuModuleLoadData", self._dll.cuModuleLoadData(ctypes.byref(module), image))
        return module

    def function(self, module: ctypes.c_void_p, name: str) -> ctypes.c_void_p:
        """A kernel of a module, ready to be launched."""
        function = ctypes.c_void_p()
        found = self._dll.cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        self._check(f"cuModuleGetFunction of {name}", found)
        return function

    def launch(
        self, function: ctypes.c_void_p, blocks: int, threads: int, stream: int, argument: ctypes.c_void_p
    ) -> None:
        """Launch a kernel of the current context on a stream, in one dimension; waits for nothing.

        Args:
            function: From :meth:`function`.
            blocks: In the grid.
            threads: In a block.
            stream: Its handle.
            argument: Where its one parameter is, which is copied.
        """
        parameters = (ctypes.c_void_p * 1)(argument)
        status = self._launch_kernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, None)
        self._check("a launch", status)

    def _check(self, what: str, status: int) -> None:
        if status:
            text = ctypes.c_char_p()
            self._dll.cuGetErrorString(status, ctypes.byref(text))
            raise DriverError(f"{what} failed: {(text.value or b'unknown error').decode()}")


@cache
def load() -> Driver | str:
    """The driver, or the reason why there is none, in words."""
    try:
        return Driver()
    except DriverError as error:
        return str(error)
