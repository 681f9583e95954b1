"""Where tensors are in memory, asked of all of them at every step.

Other code may give a tensor new storage, another type or another shape, or take memory from beneath it, and the
kernels' tables hold addresses. Python takes 50 ns for each question about each tensor. In that time the library has all
answers about a tensor, from functions of torch: those of its C interface, made for compiled models, and two of C++.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pylo_integrations.ops import loader
from pylo_integrations.sharding.pieces import local_part

Memory = np.ndarray[Any, np.dtype[np.uint64]]
"""One row per tensor: its address, its identity, a word for its format, the bytes of its storage, and where in that it
begins, in elements. The words of two tensors are equal if they have the same device, type, shape and strides, both have
memory or both have not, and both are lazily negated or are not."""

_ADDRESS, _IDENTITY, _FORMAT = 0, 1, 2
_COLUMNS = 5


def read_memory(tensors: Iterable[Tensor], count: int) -> Memory:
    """Where the first ``count`` of some tensors are, ``(count, 5)``. They must be plain ones, with memory.

    Raises:
        ValueError: There are fewer.
        RuntimeError: One of them has no memory, as sparse ones.
    """
    objects = np.fromiter(tensors, object, count)
    if (asked := _asked()) is not None:
        memory = np.empty((count, _COLUMNS), np.uint64)
        if asked.read(objects.ctypes.data, memory.ctypes.data, count):
            return memory
    known = [(t.data_ptr(), id(t), _format(t), t.untyped_storage().nbytes(), t.storage_offset()) for t in objects]
    return np.array(known, np.uint64).reshape(count, _COLUMNS)


def look_at(tensors: Sequence[Tensor]) -> bytes:
    """Which tensors these are, where what is here of them is, of what kind, and in how large a storage, to be compared.

    Raises:
        RuntimeError: One has no memory.
        TypeError: One is no tensor, as an entry of a state may have become.
    """
    local = list(map(local_part, tensors))
    if not all(issubclass(kind, Tensor) for kind in set(map(type, local))):  # the library takes them at their word
        raise TypeError("there is something else than tensors")
    memory = read_memory(local, len(local))
    memory[:, _IDENTITY] = list(map(id, tensors))
    return memory.tobytes()


def addresses(memory: Memory) -> Memory:
    """Where the tensors begin, ``(count,)``."""
    return memory[:, _ADDRESS]


def formats(memory: Memory) -> Memory:
    """How they are to be read, and what lies beneath them, ``(count, 3)``."""
    return memory[:, _FORMAT:]


def identities_of(objects: Iterable[object]) -> bytes:
    """Which Python objects these are, to be compared: equal as long as all of them are alive and in this order."""
    return np.fromiter(objects, object).tobytes()


class Written:
    """Tensors that kernels write, which other code may replace, move and change in between.

    Args:
        params: Parameters, the same ones as long as this is used.
        entries: Of states, each with the name of a tensor in it.
        wrappers: Tensors whose memory is that of others here, and which count their versions by themselves.

    Raises:
        RuntimeError: One of them has no memory.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        entries: Sequence[tuple[Mapping[str, Tensor], str]],
        wrappers: Sequence[Tensor] = (),
    ) -> None:
        self._params, self._entries, self._wrappers = params, entries, wrappers
        self.tensors = self._now()
        local = list(map(local_part, self.tensors))
        # Wrappers and what they wrap count their versions by themselves.
        is_plain = all(map(_is, local, self.tensors))
        self._versioned = self.tensors if is_plain else self.tensors + local
        # All of it as the library reads it, where there is nothing that only Python can tell.
        self._asked = _asked() if is_plain and {type(state) for state, _ in entries} <= {dict} else None
        self._memory = look_at(self.tensors)
        owners, names = zip(*entries, strict=True) if entries else ((), ())
        self._arrays = [_array(owners), _array(names), _array(self.tensors)]
        self._read = np.empty((len(local), _COLUMNS), np.uint64)
        states = self._arrays[2][len(params) :]
        self._where = [array.ctypes.data for array in (*self._arrays, self._read)]
        self._states_at = states.ctypes.data

    def is_current(self) -> bool:
        """Whether all of them and their memory are what they were when this was made."""
        if self._asked is not None:
            owners, names, tensors, read = self._where
            return (
                self._asked.has_entries(owners, names, self._states_at, len(self._entries))
                and self._asked.read(tensors, read, len(self.tensors))
                and self._read.tobytes() == self._memory
            )
        try:
            return look_at(self._now()) == self._memory
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError):  # one is gone, or no dense tensor
            return False

    def raise_versions(self) -> None:
        """Tell autograd that all of them are written to."""
        if self._asked is None or not self._asked.raise_versions(self._where[2], len(self.tensors)):
            torch.autograd.graph.increment_version(self._versioned)
        if self._wrappers:
            torch.autograd.graph.increment_version(self._wrappers)

    def _now(self) -> list[Tensor]:
        return [*self._params, *(state[name] for state, name in self._entries)]


def _is(one: object, other: object) -> bool:
    return one is other


def _array(objects: Sequence[object]) -> np.ndarray[Any, Any]:
    return np.fromiter(objects, object, len(objects))


def _format(tensor: Tensor) -> int:
    form = tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() != 0, tensor.is_neg()
    return hash(form) % 2**64


class _Asked:
    """The library's questions, with torch's functions to answer them.

    Args:
        library: The loaded library.
        struct: What they take.
    """

    def __init__(self, library: loader.Library, struct: loader.TorchStruct) -> None:
        self._library, self._struct = library, struct
        self._torch = ctypes.addressof(struct)

    def read(self, objects: int, memory: int, count: int) -> bool:
        """Whether the rows at ``memory`` could be filled for Python objects whose pointers are at ``objects``."""
        return self._library.ask("read_memory", self._torch, objects, memory, count) == 0

    def has_entries(self, owners: int, names: int, objects: int, count: int) -> bool:
        """Whether dictionaries have these objects under these names."""
        return self._library.ask("has_entries", self._torch, owners, names, objects, count) == 1

    def raise_versions(self, objects: int, count: int) -> bool:
        """Whether all tensors have versions, which are raised then."""
        return self._library.ask("raise_versions", self._torch, objects, count) == 0


@cache
def _asked() -> _Asked | None:
    """How the library asks; None where there is none, or it would not get right answers from this torch."""
    library, struct = loader.load(), _torch_functions()
    if not isinstance(library, loader.Library) or struct is None:
        return None
    asked = _Asked(library, struct)
    return asked if _answers_rightly(asked) else None


_FUNCTIONS = {field[0]: f"aoti_torch_get_{field[0]}" for field in loader.TorchStruct._fields_} | {
    "is_neg": "_ZN2at6native6is_negERKNS_6TensorE",  # bool at::native::is_neg(const at::Tensor&)
    # void torch::autograd::impl::bump_version(const at::Tensor&)
    "bump_version": "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE",
}


def _torch_functions() -> loader.TorchStruct | None:
    """Where they are in this process; None if there are not all of them."""
    member = _member()
    found = sorted(Path(torch.__file__).with_name("lib").glob("libtorch_cpu.[sd]*"))
    if member is None or not found:
        return None
    try:
        dll, python = ctypes.CDLL(str(found[0])), ctypes.pythonapi
        places = {"dict_get": python.PyDict_GetItem} | {
            name: getattr(dll, symbol) for name, symbol in _FUNCTIONS.items() if name not in ("member", "dict_get")
        }
    except (OSError, AttributeError):
        return None
    return loader.TorchStruct(member=member, **{k: ctypes.cast(v, ctypes.c_void_p).value for k, v in places.items()})


@torch.inference_mode(False)  # tensors of inference have no versions, and the first step may be in it
def _samples() -> list[Tensor]:
    """Tensors of which no two have the same format."""
    base = torch.zeros(4, 6, device="cpu")
    halves = base.view(torch.float16)
    return [base, base.t(), base[1:, 2:], torch._neg_view(base), halves, nn.Parameter(base.view(24)), base[0, 0]]


def _member() -> int | None:
    """Where in a tensor's Python object the one word is that an ``at::Tensor`` consists of; None if unknown.

    It is the address that ``_cdata`` tells as well, and as much part of an object of a subclass.
    """
    tensors = _samples()
    word = ctypes.sizeof(ctypes.c_void_p)
    for place in range(2 * word, Tensor.__basicsize__ - word + 1, word):
        if all(ctypes.c_size_t.from_address(id(tensor) + place).value == tensor._cdata for tensor in tensors):
            return place
    return None


def _answers_rightly(asked: _Asked) -> bool:
    """Whether answers are those that Python gets."""
    tensors = _samples() + _samples()
    objects, memory = _array(tensors), np.zeros((len(tensors), _COLUMNS), np.uint64)
    if not asked.read(objects.ctypes.data, memory.ctypes.data, len(tensors)):
        return False
    for tensor, (address, identity, _, size, offset) in zip(tensors, memory.tolist(), strict=True):
        expected = tensor.data_ptr(), id(tensor), tensor.untyped_storage().nbytes(), tensor.storage_offset()
        if (address, identity, size, offset) != expected:
            return False
    words, kinds = memory[:, _FORMAT].tolist(), len(tensors) // 2
    before = tensors[0]._version
    raised = asked.raise_versions(objects.ctypes.data, 1) and tensors[0]._version == before + 1
    return raised and words[:kinds] == words[kinds:] and len(set(words)) == kinds
