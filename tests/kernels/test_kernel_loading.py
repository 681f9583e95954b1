"""What becomes of the CUDA kernels where something is missing, old, damaged, or shared by processes?

The compiler is a fake one that counts, but for one test; the driver is that of the emulation (csrc/shim).
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from cuda_shim import Shim, cpu_library
from test_native_kernels import assert_equal_bits, give_gradients, parameters, snapshot, stages_of

from pylo_integrations.files import try_lock, unlock
from pylo_integrations.ops import cache, cubins, cuda, driver, kernels, nvrtc, self_check
from pylo_integrations.ops.cubins import Cubins, architecture_for
from pylo_integrations.ops.driver import Driver, DriverError
from pylo_integrations.ops.kernels import Kernels
from pylo_integrations.ops.nvrtc import Compiled, Nvrtc, NvrtcError
from pylo_integrations.sharding.rounds import Ranks

TESTS = Path(__file__).parent


class FakeCompiler:
    """Says what it was asked for, and leaves a mark in a file."""

    version = (13, 0)

    def __init__(self, tally: Path) -> None:
        self.tally = tally

    def __str__(self) -> str:
        return "13.0"

    def architectures(self) -> list[int]:
        return [75, 80, 86, 90, 100]

    def compile(self, source, options, headers) -> Compiled:
        with self.tally.open("a") as file:
            file.write("x")
        return Compiled(source.encode() + b"\n" + " ".join(options).encode(), "")

    @property
    def count(self) -> int:
        return len(self.tally.read_text()) if self.tally.exists() else 0


@pytest.fixture
def compiler(tmp_path) -> FakeCompiler:
    return FakeCompiler(tmp_path / "tally")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """Where files are kept, none of which exists yet."""
    places = {name: tmp_path / name for name in ("named", "home", "temporary")}
    monkeypatch.setenv("PYLO_CACHE", str(places["named"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(places["home"]))
    places["temporary"].mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(places["temporary"]))
    return places


@pytest.fixture(autouse=True)
def forget():
    """Nothing that one test found out is known in the next."""
    cached = (nvrtc.load, driver.load, kernels.load, cuda.load, self_check.verdict, self_check._tell)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


# -- files ------------------------------------------------------------------------------------------------------------


def kept_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.cubin"))


def test_a_kernel_is_compiled_once_and_said_to_be(compiler, folders, caplog):
    for _ in range(2):
        code = Cubins(compiler, 90)
        assert b"apply_exactly<4, 2, true>" in code.image("apply_4_plain") and b"sm_90" in code.image("apply_4_plain")
        assert b"PYLO_KERNEL(merge" in code.image("merge")
    assert compiler.count == 2 and len(kept_in(folders["named"])) == 2
    assert not folders["home"].exists()
    (line,) = caplog.messages
    assert "compiling CUDA kernels for sm_90 with NVRTC 13.0" in line
    assert code.kept() == ["merge", "apply_4_plain"]


def test_whatever_a_cubin_follows_from_makes_another_one(compiler, monkeypatch, tmp_path):
    def name(capability: int = 90) -> str:
        return Cubins(compiler, capability).file_name("merge")

    names = [name(), name(80)]
    monkeypatch.setattr(FakeCompiler, "version", (13, 1))
    names.append(name())
    monkeypatch.setattr(cubins, "OPTIONS", ("--std=c++20",))
    names.append(name())
    changed = tmp_path / "csrc"
    for folder in ("core", "cuda"):
        (changed / folder).mkdir(parents=True)
        for path in filter(Path.is_file, (cubins.sources() / folder).iterdir()):  # scripts may have been imported
            (changed / folder / path.name).write_text(path.read_text() + "\n")
    monkeypatch.setattr(cubins, "sources", lambda: changed)
    cubins.digest.cache_clear()
    names.append(name())
    cubins.digest.cache_clear()
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("damage", [b"", b"short", bytes(32), bytes(1000)], ids=len)
def test_a_damaged_file_is_made_again(compiler, folders, damage):
    code = Cubins(compiler, 90)
    image = code.image("merge")
    (name,) = kept_in(folders["named"])
    (folders["named"] / name).write_bytes(damage)
    assert code.image("merge") == image and compiler.count == 2
    assert code.image("merge") == image and compiler.count == 2


def test_the_next_folder_is_taken_where_one_cannot_be_written(compiler, folders, monkeypatch):
    folders["named"].write_text("a file in the place of the folder")
    Cubins(compiler, 90).image("merge")
    assert len(kept_in(folders["home"])) == 1
    folders["home"].rename(folders["home"].with_name("gone"))
    folders["home"].write_text("")
    Cubins(compiler, 90).image("merge")
    (found,) = folders["temporary"].rglob("*.cubin")
    assert found.parent.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("PYLO_CACHE")
    assert Cubins(compiler, 90).image("merge") and compiler.count == 2


def test_without_a_place_every_process_compiles_for_itself(compiler, folders, monkeypatch):
    for folder in folders.values():
        if folder.is_dir():
            folder.rmdir()
        folder.write_text("")
    first = Cubins(compiler, 90).image("merge")
    assert Cubins(compiler, 90).image("merge") == first and compiler.count == 2


def test_no_folder_is_made_in_the_working_directory_for_want_of_a_home(monkeypatch):
    monkeypatch.delenv("PYLO_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert all(folder.is_absolute() for folder in cache.folders())


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files")
def test_what_somebody_else_left_in_a_shared_folder_is_not_run(compiler, folders, monkeypatch):
    Cubins(compiler, 90).image("merge")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    Cubins(compiler, 90).image("merge")
    assert compiler.count == 2


@pytest.mark.slow
def test_processes_at_once_compile_once(compiler):
    program = (
        "import sys, time, pathlib\n"
        f"sys.path[:0] = {[str(TESTS), str(TESTS.parent / 'helpers')]!r}\n"
        "from test_kernel_loading import Cubins, FakeCompiler\n"
        "class Slow(FakeCompiler):\n"
        "    def compile(self, *args):\n"
        "        time.sleep(0.5)\n"
        "        return super().compile(*args)\n"
        f"print(len(Cubins(Slow(pathlib.Path({str(compiler.tally)!r})), 90).image('merge')))\n"
    )
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert len(set(said)) == 1 and int(said[0]) > 0
    assert compiler.count == 1


def test_nobody_waits_for_ever_for_another_process(compiler, folders):
    folders["named"].mkdir()
    held = folders["named"] / "thing.lock"
    held.touch()
    lock = try_lock(held)
    try:
        assert cache.make_once("thing", lambda: b"made", patience=0.2) == b"made"
    finally:
        unlock(lock)
    assert cache.read("thing") == b"made"


# -- what is missing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "supported", "architecture"),
    [(90, [80, 90, 100], 90), (87, [80, 86, 90], 86), (89, [80], 80), (103, [90, 100], 100), (121, [100, 120], 120)],
)
def test_code_is_for_the_device_or_runs_on_it(capability, supported, architecture):
    assert architecture_for(capability, supported) == architecture


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (75, "the device has compute capability 7.5, the kernels need 8.0 or newer"),
        (130, r"the device has compute capability 13.0, which NVRTC does not know \(only 7.5, 8.0, 8.6, 9.0, 10.0\)"),
    ],
)
def test_devices_that_are_too_old_or_too_new_are_told(compiler, capability, message):
    with pytest.raises(NvrtcError, match=message):
        Cubins(compiler, capability)


def test_the_compiler_of_torch_is_found():
    if torch.version.cuda is None:
        pytest.skip("torch knows no CUDA")
    path = nvrtc.find()
    assert path is not None and nvrtc._major(path) == torch.version.cuda.split(".")[0]
    assert 90 in Nvrtc(path).architectures()


def prepare(monkeypatch, compiled_kernels, what: str) -> None:
    """Take something away of what the kernels need, with a device at hand that has compute capability 9.0."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: (13, 0) if what == "known device" else (9, 0)
    )
    monkeypatch.setattr(driver, "load", lambda: "no libcuda" if what == "driver" else Driver(compiled_kernels))
    if what == "NVRTC":
        monkeypatch.setattr(nvrtc, "find", lambda: None)
    elif what == "readable NVRTC":
        monkeypatch.setattr(nvrtc, "find", lambda: TESTS / "conftest.py")
    elif what == "new NVRTC":
        monkeypatch.setattr(nvrtc, "OLDEST", (99, 0))
    elif what == "CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)


MISSING = {
    "CUDA": "is not built for CUDA",
    "driver": "no libcuda",
    "NVRTC": "there is no NVRTC, which torch's CUDA wheels bring",
    "readable NVRTC": "conftest.py cannot be loaded",
    "new NVRTC": "the kernels need 99.0 or newer",
    "known device": "compute capability 13.0, which NVRTC does not know",
}


@pytest.mark.parametrize("what", MISSING)
def test_what_is_missing_leaves_the_device_to_the_reference_with_one_log_line(
    monkeypatch, compiled_kernels, caplog, what
):
    if what not in ("CUDA", "driver", "NVRTC") and nvrtc.find() is None:
        pytest.skip("there is no NVRTC")
    cpu_library()
    prepare(monkeypatch, compiled_kernels, what)
    device, rule = torch.device("cuda", 0), stages_of(parameters([(3, 2)]))[0]._natives[0].rule
    for _ in range(2):
        assert MISSING[what] in self_check.reluctance(rule, device, Ranks())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "torch's functions are" in record.message and "pylo doctor --device cuda" in record.message
    assert MISSING[what] in record.message


def test_a_driver_that_cannot_be_loaded_says_why():
    with pytest.raises(DriverError, match="cannot be loaded"):
        Driver("/nonexistent/libcuda.so.1")


def test_a_device_that_is_not_there_is_told(compiled_kernels):
    with pytest.raises(DriverError, match="cuDeviceGet failed: no CUDA-capable device is detected"):
        Kernels(Driver(compiled_kernels), 3, lambda name: b"")


def test_prebuilt_kernels_need_no_compiler(monkeypatch, compiled_kernels, tmp_path):
    prepare(monkeypatch, compiled_kernels, "NVRTC")
    fatbin = tmp_path / cubins.PREBUILT
    fatbin.write_bytes(b"code")
    monkeypatch.setattr(cubins, "prebuilt", lambda: fatbin)
    found = kernels.load(0)
    assert isinstance(found, Kernels)
    loaded = []
    original = Driver.load
    monkeypatch.setattr(Driver, "load", lambda self, image: loaded.append(image) or original(self, image))
    found.load([b"merge", b"describe_plain"])
    assert loaded == [b"code"]  # one module for both
    assert kernels.origin(0) == "compiled with the package"


def test_prebuilt_kernels_for_other_devices_are_left_alone(monkeypatch, compiled_kernels, tmp_path, compiler):
    prepare(monkeypatch, compiled_kernels, "")
    fatbin = tmp_path / cubins.PREBUILT
    fatbin.write_bytes(b"code")
    monkeypatch.setattr(cubins, "prebuilt", lambda: fatbin)
    monkeypatch.setattr(nvrtc, "load", lambda: compiler)

    def refuse(self, image):
        if image == b"code":
            raise DriverError("no kernel image is available for execution on the device")
        return original(self, image)

    original = Driver.load
    monkeypatch.setattr(Driver, "load", refuse)
    found = kernels.load(0)
    assert isinstance(found, Kernels)
    found.load([b"merge"])
    assert compiler.count == 1
    assert kernels.origin(0).startswith(f"1 of {len(cubins.kernel_lines())} compiled for sm_90 by NVRTC 13.0")


# -- all of it --------------------------------------------------------------------------------------------------------


def test_steps_from_sources_to_launches(monkeypatch, compiled_kernels, folders):
    """Compiled by NVRTC, loaded by name and launched by the emulated driver: the bits of the emulation."""
    if isinstance(nvrtc.load(), str):
        pytest.skip(nvrtc.load())
    prepare(monkeypatch, compiled_kernels, "")
    images = []
    original = Driver.load
    monkeypatch.setattr(Driver, "load", lambda self, image: images.append(image) or original(self, image))
    results = []
    library = cuda.CudaLibrary(cpu_library(), kernels.load(0), torch.device("cpu"))
    for each in (library, Shim(compiled_kernels)):
        params = parameters([(130,), (33, 7)])
        stages, run = stages_of(params, library=each)
        give_gradients(params, 0)
        run()
        results.append(snapshot(stages.optimizer, params))
    assert_equal_bits(*results)
    used = [
        "collect",
        "merge",
        "prepare",
        "describe",
        "describe_plain",
        "apply_tensor_cores",
        "apply_tensor_cores_plain",
        "update",
    ]
    assert [name.split("-")[0] for name in kept_in(folders["named"])] == sorted(used)
    assert [image[:4] for image in images[:8]] == [b"\x7fELF"] * 8


def test_launches_are_what_the_plan_says(compiled_kernels, monkeypatch):
    """Names, blocks, threads and stream of every launch of a step, and where in its argument is what."""
    seen = []
    original = Driver.launch

    def launch(self, function, blocks, threads, stream, argument):
        names = {handle.value: name for name, handle in library._kernels._functions.items()}
        seen.append((names[function.value].decode(), blocks, threads, stream))
        arguments.append(bytes((ctypes.c_char * 224).from_address(argument.value)))
        original(self, function, blocks, threads, stream, argument)

    arguments: list[bytes] = []
    monkeypatch.setattr(Driver, "launch", launch)
    library = Shim(compiled_kernels)
    params = parameters([(17000,), (33, 7)])
    stages, run = stages_of(params, library=library)
    give_gradients(params, 0)
    run()
    # A vector is cut into matrices of 64 x 1024 elements, then rows, then the rest; parts of describe have 16384.
    # 33 and 7 rows and columns, and two sums of squares, are merged; 3 decays of row and of col are prepared.
    assert seen == [
        ("collect", 3, 256, 0),
        ("merge", 4, 256, 0),
        ("prepare", 6, 256, 0),
        ("describe_plain", 3, 256, 0),
        ("apply_tensor_cores_plain", 10, 128, 0),
    ]
    (nth,) = stages._tables
    rule, nothing = bytes(nth.table.rules), bytes(ctypes.sizeof(nth.table.rules))
    squares = nth.table.grad_squares.data_ptr().to_bytes(8, "little")
    steps = nth.table.call.plan.call.device_steps.to_bytes(8, "little")
    for each, of_all in zip(arguments, [True, True, False, False, False], strict=True):
        assert each.startswith(nothing if of_all else rule) and squares in each and steps in each
