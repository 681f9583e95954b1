"""Does nvcc compile the kernels, and what do they cost by count? (csrc/cuda/count_sass.py)"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from native_library import CSRC

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc"),
]


@pytest.fixture(scope="module")
def count_sass():
    spec = importlib.util.spec_from_file_location("count_sass", CSRC / "cuda/count_sass.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["count_sass"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]


@pytest.fixture(scope="module")
def compiled(count_sass, tmp_path_factory):
    """What is compiled for every architecture: a minute each, so two at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        yield {arch: pool.submit(count_sass.compile_kernels, arch, folder) for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_compile_without_spills_within_their_budget(count_sass, compiled, arch):
    cubin, kernels = compiled[arch].result()
    by_name = {kernel.name: kernel for kernel in kernels.values()}
    fast = ["tensor_core_kernel<1>", "exact_kernel<4, 2, 1>", "exact_kernel<32, 2, 1>", "describe_kernel<1>"]
    assert {*fast, "collect_kernel", "merge_kernel", "prepare_kernel"} <= set(by_name)
    for kernel in by_name.values():
        spilled = kernel.spill_stores, kernel.spill_loads
        assert spilled == (0, 0) or kernel.name not in fast, (kernel.name, spilled)
    if count_sass.tool("cuobjdump") is None:
        pytest.skip("there is no cuobjdump: nothing was counted")
    count_sass.read_loops(cubin, kernels)
    loops = by_name["tensor_core_kernel<1>"].loops
    assert len(loops) == 2  # vectors, and tensors with factored moments
    assert all(loop["HMMA"] >= 100 for loop in loops)
    assert max(map(by_name["tensor_core_kernel<1>"].instructions, loops)) <= 25 * 32
