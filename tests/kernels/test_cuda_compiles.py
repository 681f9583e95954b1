"""Do the CUDA kernels compile where there is no nvcc, for every architecture, and what do they cost by count?

NVRTC needs no device. What is counted is in the machine code (csrc/cuda/count_sass.py); nothing is timed.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import subprocess
import sys

import pytest
from native_library import CSRC

from pylo_integrations.ops import cubins, nvrtc
from pylo_integrations.ops.nvrtc import NvrtcError

pytestmark = pytest.mark.timeout(900)

KERNELS = list(cubins.kernel_lines())
WIDE = ["apply_4", "apply_8", "apply_16", "apply_32", "apply_32_plain", "apply_64"]  # one source, most of the time
FAST = [
    "describe_plain",
    "apply_tensor_cores_plain",
    "apply_4_plain",
    "apply_32_plain",
    "apply_linear_plain",
    "update",
    "advance",
]


@pytest.fixture(scope="module")
def count_sass():
    found = nvrtc.load()
    if isinstance(found, str):
        pytest.skip(found)
    spec = importlib.util.spec_from_file_location("count_sass", CSRC / "cuda/count_sass.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["count_sass"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.compile_kernel = functools.cache(module.compile_kernel)  # several tests ask about the same one
    return module


def assert_compiles(count_sass, kernel: str, architecture: int) -> None:
    compiled = count_sass.compile_kernel(architecture, kernel)
    assert f"pylo_{kernel}".encode() in compiled.cubin
    assert 0 < compiled.registers <= 255
    if kernel in FAST:
        # A few bytes, outside of the loop, for registers that let one more block into a multiprocessor.
        assert compiled.spill_stores + compiled.spill_loads <= 24, compiled


@pytest.mark.parametrize("kernel", [pytest.param(k, marks=pytest.mark.slow if k in WIDE else ()) for k in KERNELS])
def test_a_kernel_compiles(count_sass, kernel):
    assert_compiles(count_sass, kernel, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 86, 89, 100, 120])
def test_all_kernels_compile_for_every_architecture(count_sass, architecture):
    for kernel in KERNELS:
        assert_compiles(count_sass, kernel, architecture)


@pytest.mark.parametrize("architecture", [80, 90])
def test_an_element_on_tensor_cores_takes_25_instructions_at_most(count_sass, architecture):
    if count_sass.tool("cuobjdump") is None:
        pytest.skip("there is no cuobjdump: nothing was counted")
    kernel = count_sass.compile_kernel(architecture, "apply_tensor_cores_plain")
    count_sass.read_loops(kernel)
    assert len(kernel.loops) == 2  # vectors, and tensors with factored moments
    assert all(loop["HMMA"] >= 100 for loop in kernel.loops)
    assert max(map(kernel.instructions, kernel.loops)) <= 25 * 32


def test_what_does_not_compile_is_told(count_sass):
    compiler = nvrtc.load()
    with pytest.raises(NvrtcError, match=r'does not compile the kernels: .*identifier "nonsense" is undefined'):
        compiler.compile('extern "C" __global__ void f() { nonsense(); }', ["--gpu-architecture=sm_90"], {})


def test_the_host_knows_the_layout_of_the_device(count_sass):
    """plan.h says the sizes of what the host writes; a compiler that finds another one refuses."""
    compiler = nvrtc.load()
    program = '#include "cuda/plan.h"\nstatic_assert(sizeof(pylo::Arguments) == {}, "another size");\n'
    options = ["--gpu-architecture=sm_90", *cubins.OPTIONS, f"--include-path={cubins.sources()}"]
    assert compiler.compile(program.format(240), options, cubins._HEADERS).cubin
    with pytest.raises(NvrtcError, match="another size"):
        compiler.compile(program.format(200), options, cubins._HEADERS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_nvcc_compiles_them_ahead_where_that_is_asked_for(tmp_path):
    options = ["-DPYLO_CUDA=ON", "-DPYLO_CUDA_ARCHITECTURES=90"]
    for command in (
        ["cmake", "-S", str(CSRC), "-B", str(tmp_path), *options],
        ["cmake", "--build", str(tmp_path), "--target", "pylo_cuda"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    fatbin = tmp_path / cubins.PREBUILT
    assert fatbin.stat().st_size > 100_000  # compressed, so names cannot be looked for
