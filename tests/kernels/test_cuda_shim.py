"""Is the emulation, on which the CUDA kernels are tested without a GPU, what CUDA documents?

Layouts are compared with tables written out here from NVIDIA's PTX ISA, "Matrix fragments for mma.m16n8k16 with
floating point type" and "ldmatrix". On a machine with a GPU the same probes run on it.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_shim import PROBES, compile_for_cpu


class Probes:
    """Functions of ``tests/kernels/csrc/cuda_probes.cu``."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))

    def __call__(self, name: str, *args) -> str | None:
        function = getattr(self._dll, f"probe_{name}")
        function.restype = ctypes.c_char_p
        message = function(
            *(arg.ctypes.data_as(ctypes.c_void_p) if isinstance(arg, np.ndarray) else arg for arg in args)
        )
        return message and message.decode()

    def order(self, seed: int) -> None:
        self._dll.shim_order(ctypes.c_uint(seed))


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Probes:
    return Probes(compile_for_cpu(PROBES, tmp_path_factory.mktemp("probes") / "probes.so"))


@pytest.fixture(scope="module")
def on_device(tmp_path_factory) -> Probes:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    target = tmp_path_factory.mktemp("probes") / "probes.so"
    command = ["nvcc", "-std=c++17", "-arch=native", "-shared", "-Xcompiler=-fPIC", str(PROBES), "-o", str(target)]
    subprocess.run(command, check=True, timeout=600)
    return Probes(target)


@pytest.fixture(params=["emulated", pytest.param("on_device", marks=pytest.mark.gpu)])
def probes(request) -> Probes:
    return request.getfixturevalue(request.param)


# The element of a matrix that a lane holds as its i-th, by PTX: groupID is lane >> 2, threadID_in_group lane % 4.
def element_of_a(lane: int, i: int) -> tuple[int, int]:
    """a0 to a7 of the (16, 16) multiplicand, two to a register."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) + (0 if i < 4 else 8)
    return row, column


def element_of_b(lane: int, i: int) -> tuple[int, int]:
    """b0 to b3 of the (16, 8) multiplicand, two to a register."""
    group, thread = lane >> 2, lane % 4
    row = thread * 2 + (i & 1) + (0 if i < 2 else 8)
    return row, group


def element_of_c(lane: int, i: int) -> tuple[int, int]:
    """c0 to c3 of the (16, 8) accumulator, one to a register."""
    group, thread = lane >> 2, lane % 4
    row = group if i < 2 else group + 8
    return row, thread * 2 + (i & 1)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def registers(matrix: np.ndarray, element, each: int) -> np.ndarray:
    """What 32 lanes hold of a matrix of 16-bit numbers; the first of two is in the lower half of a register."""
    held = [[matrix[element(lane, i)] for i in range(each)] for lane in range(32)]
    return np.array(held, np.uint16).view(np.uint32)


def test_mma_has_the_documented_layout(probes):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 8, (16, 16)).astype(np.float32), rng.integers(-8, 8, (16, 8)).astype(np.float32)
    c = rng.integers(-100, 100, (16, 8)).astype(np.float32)
    held = np.array([[c[element_of_c(lane, i)] for i in range(4)] for lane in range(32)], np.float32)
    a_held, b_held = registers(to_bfloat16(a), element_of_a, 8), registers(to_bfloat16(b), element_of_b, 4)
    assert probes("mma", a_held, b_held, held) is None
    want = a @ b + c  # of small integers: exact
    for lane in range(32):
        for i in range(4):
            assert held[lane, i] == want[element_of_c(lane, i)], (lane, i)


def test_every_element_of_a_matrix_has_one_owner():
    for element, each, shape in ((element_of_a, 8, (16, 16)), (element_of_b, 4, (16, 8)), (element_of_c, 4, (16, 8))):
        owned = {element(lane, i) for lane in range(32) for i in range(each)}
        assert owned == set(np.ndindex(shape))


def test_load_matrices_has_the_documented_layout(probes):
    """Lanes 0-7 bring the rows of matrix 0, 8-15 those of matrix 1...; lane l gets 2 elements of row l / 4 of each."""
    rows = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    got = np.zeros((32, 4), np.uint32)
    assert probes("load_matrices", rows, got) is None
    halves = got.view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for matrix in range(4):
            for i in range(2):
                assert halves[lane, matrix, i] == rows[8 * matrix + lane // 4, lane % 4 * 2 + i], (lane, matrix, i)


def test_rows_of_inputs_reach_the_first_multiplicand(probes):
    """A (16, 16) matrix in memory, with the addresses that the kernel of apply gives, lands as `mma` wants it."""
    matrix = np.arange(256, dtype=np.uint16).reshape(16, 16)
    rows = np.stack([matrix[lane % 16, lane // 16 * 8 : lane // 16 * 8 + 8] for lane in range(32)])
    got = np.zeros((32, 4), np.uint32)
    assert probes("load_matrices", np.ascontiguousarray(rows), got) is None
    assert np.array_equal(got, registers(matrix, element_of_a, 8))


def test_numbers_are_rounded_as_torch_rounds(probes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, generator=generator) * torch.logspace(-42, 6, 5000)
    x = torch.cat(
        [x, torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 65519.0, 65520.0, 3.3e38, torch.inf, -torch.inf])]
    )
    count = len(x)
    bfloat16, float16 = np.zeros(count, np.uint16), np.zeros(count, np.uint16)
    packed = np.zeros(count, np.uint32)
    assert probes("halves", x.numpy(), count, bfloat16, float16, packed) is None
    assert np.array_equal(bfloat16, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(float16, x.half().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(packed & 0xFFFF, bfloat16) and np.array_equal(packed >> 16, bfloat16 ^ 0x8000)


@pytest.mark.parametrize("order", [0, 1, 5])
def test_shuffles_barriers_and_shared_memory_add_up(emulated, order):
    x = np.random.default_rng(0).random(100_003).astype(np.float32)
    sums = np.zeros(7)
    emulated.order(order)
    assert emulated("sum", x, len(x), 7, sums) is None
    emulated.order(0)
    assert abs(sums.sum() - x.astype(np.float64).sum()) < 1e-6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (1, r"divergent barrier in block 0: thread 0 waits at \S+:\d+, thread 40 waits at \S+:\d+"),
        (2, r"divergent barrier in block 0: thread 0 waits at \S+:\d+, thread 3 has ended"),
        (3, r"divergent barrier in block 0: thread 0 is in the warp operation at \S+:\d+, thread 16 has ended"),
    ],
)
def test_threads_that_wait_for_ever_are_found(emulated, fault, message):
    found = emulated("fault", fault, np.zeros(64, np.float32))
    assert found is not None
    assert re.fullmatch(message, found), found
    assert emulated("fault", 0, np.zeros(64, np.float32)) is None  # and the next launch is not impaired


def test_shared_memory_begins_as_nan(emulated):
    out = np.zeros(64, np.float32)
    assert emulated("fault", 0, out) is None
    assert np.isnan(out).all()
