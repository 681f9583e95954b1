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


def compile_kernels(folder: Path, *options: str) -> Path:
    """The library of kernels, which finds the checks of tables in the CPU library."""
    cpu = cpu_library().path
    target = folder / "libpylo_cuda_shim.so"
    return compile_for_cpu(CSRC / "cuda/library.cu", target, *options, str(cpu), f"-Wl,-rpath,{cpu.parent}")


class Shim(CudaLibrary):
    """Kernels that run on the CPU.

    Args:
        path: What :func:`compile_kernels` made.
        precision: As for the library.
    """

    isa = "emulated"

    def __init__(self, path: Path, precision: str = "precise") -> None:
        super().__init__(path, cpu_library(), torch.device("cpu"), precision)
        self._emulation = ctypes.CDLL(str(path))

    def order(self, seed: int) -> None:
        """Choose in which order blocks and threads run: 0 ascending, 1 descending, else mixed up."""
        self._emulation.shim_order(ctypes.c_uint(seed))
