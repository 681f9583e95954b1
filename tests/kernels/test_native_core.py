"""Does the C++ core stay inside its buffers and refuse nonsense? (tests/kernels/csrc/driver.cpp under sanitizers)"""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from native_library import build, library_or_skip

from pylo_integrations.ops.loader import ISAS, NativeError, open_library


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_driver_runs_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    # -Og: the checks are compiled into every access, and at -O3 that takes minutes.
    # What is undefined traps: to compile the words of every check takes a third of the time, and a build without that
    # option finds them.
    flags = "-DCMAKE_CXX_FLAGS=-Og -fsanitize-undefined-trap-on-error"
    # What this machine cannot run it need not compile: a third of the time.
    isas = library_or_skip().isas()
    avx512 = f"-DPYLO_AVX512={'ON' if 'avx512' in isas else 'OFF'}"
    driver = build(tmp_path, "-DCMAKE_BUILD_TYPE=Sanitized", flags, avx512, "-DPYLO_SANITIZE=address,undefined")
    # libgomp keeps the memory of its worker threads until the process ends.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([driver], capture_output=True, text=True, timeout=600, env=environment)
    assert run.returncode != -signal.SIGILL, "undefined behaviour; for where, see Sanitizers in docs/contributing.md"
    assert run.returncode == 0, run.stderr[-3000:]
    # Every instruction set that this machine has was run, by its number, and not just the best one.
    *ran, verdict, _ = run.stdout.split()
    assert ran == [str(ISAS[isa]) for isa in isas] and verdict == "ok"


def test_a_library_that_lacks_openmp_says_how_to_get_it(monkeypatch, tmp_path):
    def without_openmp(path):
        raise OSError("libgomp.so.1: cannot open shared object file: No such file or directory")

    monkeypatch.setattr("ctypes.CDLL", without_openmp)
    with pytest.raises(NativeError, match="libgomp.so.1: cannot open.*apt-get install libgomp1"):
        open_library(tmp_path / "libpylo_cpu.so", "pylo_abi_version")
