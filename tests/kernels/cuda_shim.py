"""The CUDA kernels compiled by a C++ compiler, with the emulation of ``csrc/shim`` in the place of CUDA."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from native_library import CSRC, library_or_skip

from pylo_integrations.ops.cuda import CudaLibrary
from pylo_integrations.ops.driver import Driver
from pylo_integrations.ops.kernels import Kernels
from pylo_integrations.ops.loader import Library

PROBES = Path(__file__).parent / "csrc" / "cuda_probes.cu"


@functools.cache
def cpu_library() -> Library:
    """The CPU library, whatever a test has put in its place since."""
    return library_or_skip()


def compile_for_cpu(source: Path, target: Path, *options: str) -> Path:
    """Compile a ``.cu`` file into a shared library."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, *warnings, "-x", "c++", str(source), "-x", "none", *options, "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return target


def compile_kernels(folder: Path) -> Path:
    """The kernels, and the driver that launches them."""
    return compile_for_cpu(CSRC / "shim/driver.cpp", folder / "libcuda_shim.so")


class Shim(CudaLibrary):
    """Kernels that run on the CPU.

    Args:
        path: What :func:`compile_kernels` made.
        precision: As for the library.
        cpu: The CPU library, which plans.
    """

    isa = "emulated"

    def __init__(self, path: Path, precision: str = "precise", cpu: Library | None = None) -> None:
        kernels = Kernels(Driver(path), 0, lambda name: b"the emulation has them all")
        super().__init__(cpu or cpu_library(), kernels, torch.device("cpu"), precision)
        self._emulation = ctypes.CDLL(str(path))

    def order(self, seed: int) -> None:
        """Choose in which order blocks and threads run: 0 ascending, 1 descending, else mixed up."""
        self._emulation.shim_order(ctypes.c_uint(seed))
