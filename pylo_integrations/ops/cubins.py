"""The CUDA kernels as machine code: compiled one by one, for one architecture, when they are first needed.

Their sources are part of the package. A cubin is kept by what it follows from: sources, architecture, compiler and
options (:mod:`pylo_integrations.ops.cache`), so a machine compiles a kernel once.
"""

from __future__ import annotations

import hashlib
import logging
import re
from functools import cache
from pathlib import Path

from pylo_integrations.ops import cache as kept
from pylo_integrations.ops.nvrtc import Compiled, Nvrtc, NvrtcError

logger = logging.getLogger(__name__)

PREBUILT = "pylo_cuda.fatbin"
"""All kernels, compiled by nvcc when the package was built, where that was asked for."""

OLDEST_ARCHITECTURE = 80

OPTIONS = ("--std=c++17", "-fmad=false", "-default-device")

_PATIENCE = 600.0  # seconds for another process that compiles the same

# NVRTC has no headers of the C library; its compiler has these types on every platform.
_HEADERS = {
    "stdint.h": """#pragma once
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
"""
}


@cache
def sources() -> Path:
    """The folder with the kernels' sources, ``csrc``: inside an installed wheel, else beside the package in a clone."""
    inside = Path(__file__).with_name("csrc")
    return inside if inside.is_dir() else Path(__file__).parents[2] / "csrc"


@cache
def kernel_lines() -> dict[str, str]:
    """What defines each kernel, a line of ``kernels.inc``, by its name.

    Raises:
        NvrtcError: The sources are not there.
    """
    try:
        text = (sources() / "cuda" / "kernels.inc").read_text()
    except OSError as error:
        raise NvrtcError(f"the kernels' sources are not part of this installation: {error}") from error
    return {match[1]: match[0] for match in re.finditer(r"^PYLO_KERNEL\((\w+), .*\)$", text, re.MULTILINE)}


@cache
def digest() -> str:
    """Of all sources, and of the prebuilt kernels, if there are any."""
    files = [path for folder in ("core", "cuda") for path in sorted((sources() / folder).glob("*"))]
    every = hashlib.sha256()
    for path in (*files, *filter(None, [prebuilt()])):
        if path.suffix in (".h", ".cuh", ".inc", ".fatbin"):
            every.update(path.name.encode() + path.read_bytes())
    return every.hexdigest()


def prebuilt() -> Path | None:
    """Where the prebuilt kernels are."""
    path = Path(__file__).with_name(PREBUILT)
    return path if path.is_file() else None


def architecture_for(capability: int, supported: list[int]) -> int:
    """What to compile for a device: its own architecture, or one whose code it runs.

    Args:
        capability: Of the device, 90 for compute capability 9.0.
        supported: By the compiler.

    Raises:
        NvrtcError: There is none.
    """
    if capability < OLDEST_ARCHITECTURE:
        raise NvrtcError(f"the device has compute capability {_dotted(capability)}, the kernels need 8.0 or newer")
    runs = [each for each in supported if each // 10 == capability // 10 and OLDEST_ARCHITECTURE <= each <= capability]
    if not runs:
        known = ", ".join(map(_dotted, supported))
        raise NvrtcError(
            f"the device has compute capability {_dotted(capability)}, which NVRTC does not know (only {known})"
        )
    return max(runs)


def _dotted(architecture: int) -> str:
    return f"{architecture // 10}.{architecture % 10}"


def compile_kernel(compiler: Nvrtc, kernel: str, architecture: int, *options: str) -> Compiled:
    """Compile one kernel for an architecture.

    Raises:
        NvrtcError: It does not compile; the message says why.
    """
    program = f'#include "cuda/kernels.cuh"\n{kernel_lines()[kernel]}\n'
    every = [f"--gpu-architecture=sm_{architecture}", *OPTIONS, f"--include-path={sources()}", *options]
    return compiler.compile(program, every, _HEADERS)


class Cubins:
    """The kernels for one architecture.

    Args:
        compiler: NVRTC.
        capability: Of the device.

    Attributes:
        compiler: As given.
        architecture: What is compiled for.

    Raises:
        NvrtcError: They cannot be compiled for it; the message says why.
    """

    def __init__(self, compiler: Nvrtc, capability: int) -> None:
        self.compiler = compiler
        self.architecture = architecture_for(capability, compiler.architectures())
        self._announced = False

    def file_name(self, kernel: str) -> str:
        """Under which a kernel is kept."""
        facts = digest(), kernel_lines()[kernel], self.architecture, self.compiler.version, OPTIONS
        return f"{kernel}-sm_{self.architecture}-{kept.key_of(*facts)}.cubin"

    def kept(self) -> list[str]:
        """Names of the kernels that are compiled already."""
        return [kernel for kernel in kernel_lines() if kept.read(self.file_name(kernel)) is not None]

    def image(self, kernel: str) -> bytes:
        """The cubin of a kernel, which takes seconds where it has to be compiled; the first time, a log line says so.

        Raises:
            NvrtcError: It cannot be compiled; the message says why.
        """
        made = kept.make_once(self.file_name(kernel), lambda: self._compile(kernel), _PATIENCE)
        assert made is not None, "whoever compiles returns something or raises"
        return made

    def _compile(self, kernel: str) -> bytes:
        if not self._announced:
            self._announced = True
            logger.warning(
                "compiling CUDA kernels for sm_%d with NVRTC %s; they are kept for later runs",
                self.architecture,
                self.compiler,
            )
        return compile_kernel(self.compiler, kernel, self.architecture).cubin
