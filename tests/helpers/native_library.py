"""The native library for tests, and a build of the core for those that need one of their own."""

from __future__ import annotations

import shutil
import subprocess
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
    """Configure and compile the core into ``folder``; skips the test where there are no tools."""
    missing = [tool for tool in ("cmake", "c++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"building the core needs {' and '.join(missing)}")
    for command in (["cmake", "-S", str(CSRC), "-B", str(folder), *options], ["cmake", "--build", str(folder), "-j2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder
