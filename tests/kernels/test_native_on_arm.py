"""Do the kernels for ARM take the same steps as those for x86-64? (cross-compiled, and run by an emulator)"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess

import pytest
from native_library import build, driver_of_library, library_or_skip

COMPILER, EMULATOR, LIBRARIES = "aarch64-linux-gnu-g++", "qemu-aarch64", "/usr/aarch64-linux-gnu"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_neon_gives_the_bits_of_avx2_and_refuses_what_it_refuses(tmp_path):
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {' and '.join(missing)}: apt-get install g++-aarch64-linux-gnu qemu-user")
    if platform.machine() != "x86_64" or "avx2" not in library_or_skip().isas():
        pytest.skip("there is no AVX2 to compare with")
    options = ("-DCMAKE_BUILD_TYPE=Quick", "-DCMAKE_CXX_FLAGS=-O1", f"-DCMAKE_CXX_COMPILER={COMPILER}")
    cross = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64")
    drivers = driver_of_library(tmp_path), build(tmp_path / "arm", *options, *cross)
    here, arm = (
        subprocess.run(
            [*emulator, driver],
            env={**os.environ, "QEMU_LD_PREFIX": LIBRARIES},
            capture_output=True,
            text=True,
            timeout=1200,
        )
        for driver, emulator in zip(drivers, ((), (EMULATOR,)), strict=True)
    )
    assert here.returncode == 0 and arm.returncode == 0, here.stderr[-3000:] + arm.stderr[-3000:]
    assert arm.stdout.split()[:-1] == ["1", "ok"], "one instruction set, and it passed"
    assert arm.stdout.split()[-1] == here.stdout.split()[-1], "the digests of all parameters and states"
