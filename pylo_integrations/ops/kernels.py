"""The CUDA kernels on one device: loaded when a table that needs them is made, launched in its steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from functools import cache

import torch

from pylo_integrations.ops import cubins, driver, nvrtc
from pylo_integrations.ops.cubins import Cubins
from pylo_integrations.ops.driver import Driver, DriverError
from pylo_integrations.ops.nvrtc import NvrtcError


class LaunchStruct(ctypes.Structure):
    """``pylo_cuda_launch``."""

    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("blocks", ctypes.c_uint32),
        ("threads", ctypes.c_uint32),
        ("arguments", ctypes.c_uint64 * 32),
    ]


class Kernels:
    """The kernels on one device.

    Args:
        driver: CUDA's.
        index: Of the device.
        image: The code of a kernel by its name, which may have to be compiled.

    Raises:
        DriverError: There is no such device.
    """

    def __init__(self, driver: Driver, index: int, image: Callable[[str], bytes]) -> None:
        self._driver = driver
        self._context = driver.primary_context(index)
        self._image = image
        self._modules: dict[bytes, ctypes.c_void_p] = {}  # by their code: prebuilt kernels share one
        self._functions: dict[bytes, ctypes.c_void_p] = {}

    def load(self, names: Iterable[bytes]) -> None:
        """Have kernels ready, so that launches load nothing and may be captured in a graph.

        Raises:
            NvrtcError: One cannot be compiled.
            DriverError: One cannot be loaded.
        """
        for name in names:
            if name not in self._functions:
                image = self._image(name.decode())
                with self._driver.within(self._context):
                    if image not in self._modules:
                        self._modules[image] = self._driver.load(image)
                    self._functions[name] = self._driver.function(self._modules[image], f"pylo_{name.decode()}")

    def launch(self, launches: Iterable[LaunchStruct], stream: int) -> None:
        """Launch kernels that were loaded, one after the other on a stream; allocates nothing and waits for nothing.

        Raises:
            DriverError: The driver refuses; what was launched before may have changed memory.
        """
        with self._driver.within(self._context):
            for each in launches:
                arguments = ctypes.c_void_p(ctypes.addressof(each) + LaunchStruct.arguments.offset)
                self._driver.launch(self._functions[each.kernel], each.blocks, each.threads, stream, arguments)


@cache
def load(index: int) -> Kernels | str:
    """The kernels on a device, or the reason why they cannot be had, in words. Nothing is compiled yet."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is not built for CUDA"
    if isinstance(found := driver.load(), str):
        return found
    try:
        return Kernels(found, index, _prebuilt_image(found, index) or _cubins(index).image)
    except (DriverError, NvrtcError) as error:
        return str(error)


def origin(index: int) -> str:
    """Where the code of the kernels on a device comes from, in words.

    Raises:
        NvrtcError: They cannot be compiled for it.
        DriverError: There is no such device.
    """
    found = driver.load()
    if not isinstance(found, str) and _prebuilt_image(found, index):
        return "compiled with the package"
    code = _cubins(index)
    ready = f"{len(code.kept())} of {len(cubins.kernel_lines())} compiled for sm_{code.architecture}"
    return f"{ready} by NVRTC {code.compiler}, the others when they are needed"


def _prebuilt_image(driver: Driver, index: int) -> Callable[[str], bytes] | None:
    if (path := cubins.prebuilt()) is None:
        return None
    image = path.read_bytes()
    try:
        with driver.within(driver.primary_context(index)):
            driver.load(image)
    except DriverError:  # it has no code for this device
        return None
    return lambda name: image


def _cubins(index: int) -> Cubins:
    if isinstance(compiler := nvrtc.load(), str):
        raise NvrtcError(compiler)
    major, minor = torch.cuda.get_device_capability(index)
    return Cubins(compiler, 10 * major + minor)
