"""Finds the library of native kernels, loads it on first use, and says why when it cannot.

The library has a plain C interface (``csrc/core/pylo.h``); the structures here and in
:mod:`pylo_integrations.ops.records` mirror it, and its version is checked before anything is called.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

ABI_VERSION = 11
MAX_RANK = 6
SLOTS = 30
MAX_LAYERS = 4
MAX_WIDTH = 64
TENSOR_SUMS = 9
NESTEROV = -1

ISAS = {"baseline": 1, "avx2": 2, "avx512": 3}
"""Instruction sets by name; 0 stands for the best one of this machine."""

FILE = {"darwin": "libpylo_cpu.dylib", "win32": "pylo_cpu.dll"}.get(sys.platform, "libpylo_cpu.so")
"""Name of the shared library."""


class NativeError(RuntimeError):
    """The native library refused a call; nothing was changed."""


class RuleStruct(ctypes.Structure):
    """``pylo_rule``."""

    _fields_ = [
        ("features", ctypes.c_uint32),
        ("layers", ctypes.c_int32),
        ("width", ctypes.c_int32 * MAX_LAYERS),
        ("momentum_keep", ctypes.c_float * 3),
        ("momentum_weight", ctypes.c_float * 3),
        ("factored_keep", ctypes.c_float * 3),
        ("factored_weight", ctypes.c_float * 3),
        ("rms_keep", ctypes.c_float),
        ("rms_weight", ctypes.c_float),
        ("rms_eps", ctypes.c_float),
        ("vector_momentum_eps", ctypes.c_float),
        ("norm_eps", ctypes.c_float),
        ("exp_mult", ctypes.c_float),
        ("grad_clip", ctypes.c_float),
        ("grad_limit", ctypes.c_float),
        ("adam_eps", ctypes.c_float),
        ("adam_eps_root", ctypes.c_float),
        ("measures", ctypes.c_int32),
    ]


class TorchStruct(ctypes.Structure):
    """``pylo_torch``."""

    _fields_ = [
        ("member", ctypes.c_int64),
        ("data_ptr", ctypes.c_void_p),
        ("device_type", ctypes.c_void_p),
        ("device_index", ctypes.c_void_p),
        ("dtype", ctypes.c_void_p),
        ("dim", ctypes.c_void_p),
        ("sizes", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("storage_size", ctypes.c_void_p),
        ("storage_offset", ctypes.c_void_p),
        ("is_neg", ctypes.c_void_p),
        ("bump_version", ctypes.c_void_p),
        ("dict_get", ctypes.c_void_p),
    ]


class CallStruct(ctypes.Structure):
    """``pylo_call``.

    Attributes:
        plan: What a library that plans ahead keeps with a call.
        on_device: Fields of steps whose values are on the device, by their name and range of records.
    """

    plan: object = None
    on_device: Mapping[tuple[str, int, int], Tensor] = MappingProxyType({})

    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        ("rules", ctypes.POINTER(RuleStruct)),
        ("rule_count", ctypes.c_int64),
        ("tensors", ctypes.c_void_p),
        ("steps", ctypes.c_void_p),
        ("stored", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("grad_squares", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_bytes", ctypes.c_int64),
        ("token", ctypes.c_uint64),
        ("threads", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    ]


class NativeLibrary(Protocol):
    """What tables ask of a library of kernels.

    Attributes:
        device: Where its tensors are.
    """

    device: torch.device

    def feature_names(self) -> tuple[str, ...]:
        """The feature of every slot; the channels of one feature share its name."""

    def check(self, call: CallStruct) -> tuple[int, int]:
        """Validate rules and table.

        Returns:
            The token that the stages ask for, and the workspace that they need, in bytes.

        Raises:
            NativeError: The message says which argument is wrong.
        """

    def run(self, stage: str, call: CallStruct) -> None:
        """Run a stage over all tensors of a call.

        Raises:
            NativeError: The message says which argument is wrong; nothing was changed.
        """


def open_library(path: Path, version_function: str) -> ctypes.CDLL:
    """A shared library that has this package's interface version, as the function of that name tells.

    Raises:
        NativeError: It cannot be loaded or has another version; the message says which.
    """
    try:
        dll = ctypes.CDLL(str(path))
        tell = getattr(dll, version_function)
    except (OSError, AttributeError) as error:
        # torch brings it, but some versions under a name of their own.
        remedy = "; apt-get install libgomp1, or dnf install libgomp" if "libgomp" in str(error) else ""
        raise NativeError(f"the native library {path} cannot be loaded: {error}{remedy}") from error
    tell.restype = ctypes.c_uint32
    if (version := tell()) != ABI_VERSION:
        raise NativeError(
            f"the native library {path} has interface version {version}, this package needs {ABI_VERSION}: "
            "install the package again"
        )
    return dll


class Library:
    """The loaded library for CPUs, a :class:`NativeLibrary`.

    Args:
        path: The shared library.

    Raises:
        NativeError: It cannot be loaded or has another interface version; the message says which.
    """

    device = torch.device("cpu")
    STAGES = ("collect", "measure", "prepare", "describe", "advance", "apply")
    QUESTIONS = {"read_memory": 3, "has_entries": 4, "raise_versions": 2}  # and how many addresses they take

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dll = open_library(path, "pylo_abi_version")
        self._dll.pylo_last_error.restype = ctypes.c_char_p
        self._dll.pylo_feature_name.restype = ctypes.c_char_p
        self._dll.pylo_network_floats.restype = ctypes.c_int64
        self._stages = {stage: getattr(self._dll, f"pylo_cpu_{stage}") for stage in self.STAGES}
        asking = ctypes.PyDLL(str(path))  # which keeps the interpreter's lock
        self._questions = {name: getattr(asking, f"pylo_{name}") for name in self.QUESTIONS}
        for name, pointers in self.QUESTIONS.items():
            self._questions[name].argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64]

    @property
    def isa(self) -> str:
        """The instruction set that is used by default."""
        best = self._dll.pylo_best_isa()
        return next(name for name, number in ISAS.items() if number == best)

    def isas(self) -> list[str]:
        """Instruction sets that are compiled in and run on this machine."""
        return [name for name, number in ISAS.items() if self._dll.pylo_has_isa(number)]

    def feature_names(self) -> tuple[str, ...]:
        """See :class:`NativeLibrary`."""
        return tuple(self._dll.pylo_feature_name(slot).decode() for slot in range(SLOTS))

    def network_floats(self, rule: RuleStruct) -> int:
        """Size of a network in floats; 0 if the kernels cannot evaluate its geometry."""
        return int(self._dll.pylo_network_floats(ctypes.byref(rule)))

    def ask(self, question: str, *args: int) -> int:
        """What a function of :attr:`QUESTIONS` answers; it takes addresses, and a count."""
        return int(self._questions[question](*args))

    def multiply_adds(self, rounds: int) -> int:
        """Run a loop of nothing but multiply-adds on one thread; returns how many it made."""
        run = self._dll.pylo_cpu_multiply_adds
        run.restype = ctypes.c_int64
        return int(run(ctypes.c_int64(rounds)))

    def check(self, call: CallStruct) -> tuple[int, int]:
        """See :class:`NativeLibrary`."""
        token, size = ctypes.c_uint64(), ctypes.c_int64()
        self._raise_for(self._dll.pylo_check(ctypes.byref(call), ctypes.byref(token), ctypes.byref(size)))
        return token.value, size.value

    def run(self, stage: str, call: CallStruct) -> None:
        """See :class:`NativeLibrary`."""
        self._raise_for(self._stages[stage](ctypes.byref(call)))

    def call(self, function: str, *args: Any) -> None:
        """Call another function of the interface, structures and numbers to be written by reference.

        Raises:
            NativeError: The message says which argument is wrong.
        """
        passed = (ctypes.c_int64(arg) if isinstance(arg, int) else ctypes.byref(arg) for arg in args)
        self._raise_for(getattr(self._dll, function)(*passed))

    def _raise_for(self, status: int) -> None:
        if status:
            raise NativeError(f"native kernels: {self._dll.pylo_last_error().decode()}")


def find_library() -> Path | None:
    """The shared library: beside this module, or where an editable install put it."""
    beside = Path(__file__).with_name(FILE)
    if beside.exists():
        return beside
    try:
        files = importlib.metadata.files("pylo-integrations") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    located = (Path(str(file.locate())) for file in files if file.name == FILE)
    return next((path for path in located if path.exists()), None)


@cache
def load() -> Library | str:
    """The library, or the reason why there is none, in words."""
    path = find_library()
    if path is None:
        return (
            f"{FILE} is not part of this installation: it is built when pip finds a C++ compiler; "
            'the reference backend does all the work ("pip install --force-reinstall" of this package builds it again)'
        )
    try:
        return Library(path)
    except NativeError as error:
        return str(error)
