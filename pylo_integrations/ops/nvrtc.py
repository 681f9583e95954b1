"""NVRTC, NVIDIA's compiler as a library: machine code for a device from C++, without nvcc and without a driver.

torch's CUDA wheels depend on it, so it is there wherever torch knows CUDA devices.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

OLDEST = (12, 4)
"""Version from which on the kernels are known to compile; older ones are not asked."""

_NAMES = {"win32": "nvrtc64_*.dll"}.get(sys.platform, "libnvrtc.so.*")


class NvrtcError(RuntimeError):
    """NVRTC cannot be used, or refused to compile something; the message says why."""


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
        cubin: Machine code.
        log: What the compiler has to say about it.
    """

    cubin: bytes
    log: str


class Nvrtc:
    """The loaded compiler.

    Args:
        path: The shared library.

    Attributes:
        version: Major and minor.

    Raises:
        NvrtcError: It cannot be loaded, or is older than :data:`OLDEST`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._dll = ctypes.CDLL(str(path))
            self._dll.nvrtcGetErrorString.restype = ctypes.c_char_p
            major, minor = ctypes.c_int(), ctypes.c_int()
            self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        except (OSError, AttributeError) as error:
            raise NvrtcError(f"{path} cannot be loaded: {error}") from error
        self.version = major.value, minor.value
        if self.version < OLDEST:
            raise NvrtcError(f"{path} is NVRTC {self}; the kernels need {OLDEST[0]}.{OLDEST[1]} or newer")

    def __str__(self) -> str:
        return "{}.{}".format(*self.version)

    def architectures(self) -> list[int]:
        """What it compiles for: 90 is compute capability 9.0."""
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", numbers)
        return list(numbers)

    def compile(self, source: str, options: Sequence[str], headers: Mapping[str, str]) -> Compiled:
        """Compile a program.

        Args:
            source: C++.
            options: Of the command line; one of them is ``--gpu-architecture=sm_...``.
            headers: Contents of files by the names under which they are included.

        Raises:
            NvrtcError: With the compiler's messages.
        """
        program = ctypes.c_void_p()
        contents, names = (_strings(part) for part in (headers.values(), headers.keys()))
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"pylo.cu", len(headers), contents, names)
        try:
            status = self._dll.nvrtcCompileProgram(program, len(options), _strings(options))
            log = self._read(program, "ProgramLog").decode(errors="replace").rstrip("\0")
            if status:
                errors = [line for line in log.splitlines() if "error" in line] or log.splitlines()
                raise NvrtcError(f"NVRTC {self} does not compile the kernels: {'; '.join(errors[:3]) or 'no message'}")
            return Compiled(self._read(program, "CUBIN"), log)
        finally:
            self._dll.nvrtcDestroyProgram(ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *args: object) -> None:
        if status := getattr(self._dll, f"nvrtc{function}")(*args):
            raise NvrtcError(f"nvrtc{function}: {self._dll.nvrtcGetErrorString(status).decode()}")


def _strings(texts: Iterable[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def find() -> Path | None:
    """The library that torch depends on, or one of a CUDA installation; that of torch's CUDA version before others."""
    major = (torch.version.cuda or "").split(".")[0]
    found = sorted({path for folder in _folders() for path in folder.glob(_NAMES) if _major(path)}, key=str)
    return next((path for path in found if _major(path) == major), found[-1] if found else None)


def _major(path: Path) -> str:
    match = re.fullmatch(r"libnvrtc\.so\.(\d+)|nvrtc64_(\d+?)\d_0\.dll", path.name)
    return match[1] or match[2] if match else ""


def _folders() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        for pattern in ("*/lib", "*/bin", "*/bin/x86_64"):
            yield from Path(place).glob(pattern)
    yield Path(torch.__file__).parent / "lib"
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if root := os.environ.get(variable):
            yield from (Path(root) / name for name in ("lib64", "lib", "bin"))
    if sys.platform != "win32":
        yield Path("/usr/local/cuda/lib64")


@cache
def load() -> Nvrtc | str:
    """The compiler, or the reason why there is none, in words."""
    path = find()
    if path is None:
        return "there is no NVRTC, which torch's CUDA wheels bring (nvidia-cuda-nvrtc)"
    try:
        return Nvrtc(path)
    except NvrtcError as error:
        return str(error)
