from __future__ import annotations

from pathlib import Path

import pytest
from cuda_shim import compile_kernels


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory) -> Path:
    """The CUDA kernels and their driver for the CPU, which compile in seconds: once for all files."""
    return compile_kernels(tmp_path_factory.mktemp("kernels"))
