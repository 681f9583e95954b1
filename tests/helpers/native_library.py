"""The native library for tests, and a build of the core for those that need one of their own."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from pylo_integrations.ops import loader
from pylo_integrations.ops.loader import Library

CSRC = Path(__file__).parents[2] / "csrc"


def library_or_skip() -> Library:
    library = loader.load()
    if isinstance(library, str):
        pytest.skip(library)
    return library


def build(folder: Path, *options: str) -> Path:
    """Configure and compile the core and its driver into ``folder``; returns the driver."""
    configure = ["cmake", "-S", str(CSRC), "-B", str(folder), "-DPYLO_TESTS=ON", *options]
    for command in (configure, ["cmake", "--build", str(folder), "-j2"]):
        _run(command)
    return folder / "pylo_driver"


def driver_of_library(folder: Path) -> Path:
    """A driver of the library that tests use, compiled into ``folder``."""
    library = library_or_skip().path
    driver = folder / "pylo_driver"
    source = Path(__file__).parents[1] / "kernels" / "csrc" / "driver.cpp"
    _run(["c++", "-std=c++17", f"-I{CSRC / 'core'}", source, library, f"-Wl,-rpath,{library.parent}", "-o", driver])
    return driver


def _run(command: Sequence[str | Path]) -> None:
    """Run a tool of building; skips the test where it is missing."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"building the core needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
