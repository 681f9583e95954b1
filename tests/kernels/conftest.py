from __future__ import annotations

import os
from pathlib import Path

import pytest
from cuda_shim import compile_kernels
from filelock import FileLock


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory) -> Path:
    """The CUDA kernels and their driver for the CPU, which compile in seconds: once for all files and workers."""
    of_run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose own folders are in that of the run
        of_run = of_run.parent
    folder = of_run / "compiled_kernels"
    with FileLock(of_run / "compiled_kernels.lock"):
        if not folder.exists():
            made = compile_kernels(tmp_path_factory.mktemp("kernels"))
            made.parent.rename(folder)  # as a whole, so whoever finds it there can use it
    return folder / "libcuda_shim.so"
