"""Where tensors are in memory, asked of all of them at every step.

Other code may give a tensor new storage, another type or another shape, and the kernels' tables hold addresses. Python
takes 50 ns for each question about each tensor. The library has all answers about a tensor in that time, through the
functions that newer versions of torch lend to other libraries: DLPack's C exchange API.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.ops import loader
from pylo_integrations.sharding.pieces import local_part

Memory = np.ndarray[Any, np.dtype[np.uint64]]
"""One row per tensor: its address, a word for its format, and its identity. The words of two tensors are equal if they
have the same device, type, shape and strides, and both have memory or both have not."""

_ADDRESS, _FORMAT, _IDENTITY = 0, 1, 2


def read_memory(tensors: Iterable[Tensor], count: int) -> Memory:
    """Where the first ``count`` of some tensors are, ``(count, 3)``. They must be plain ones, with memory.

    Raises:
        ValueError: There are fewer.
        RuntimeError: One of them has no memory, as sparse ones; or BufferError.
    """
    objects = np.fromiter(tensors, object, count)
    library, exchange_api = loader.load(), _exchange_api()
    if isinstance(library, loader.Library) and exchange_api is not None:
        memory = np.empty((count, 3), np.uint64)
        if library.read_memory(exchange_api, objects.ctypes.data, count, memory.ctypes.data):
            return memory
    known = [(tensor.data_ptr(), _format(tensor), id(tensor)) for tensor in objects]
    return np.array(known, np.uint64).reshape(count, 3)


def rooms(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Bytes of every tensor's storage, and where in it the tensor begins, in elements.

    Other code may take memory back from under a tensor, with ``storage.resize_()``, and a smaller storage may then lie
    at the old address.
    """
    sizes = list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, tensors)))
    offsets: list[Any] = list(map(Tensor.storage_offset, tensors))
    return sizes, offsets


def look_at(tensors: Sequence[Tensor]) -> bytes:
    """Which tensors these are, where what is here of them is, of what kind, and in how large a storage, to be compared.

    Raises:
        RuntimeError: One has no memory; or BufferError.
    """
    local = [tensor if type(tensor) in (Tensor, torch.nn.Parameter) else local_part(tensor) for tensor in tensors]
    memory = read_memory(local, len(local))
    identities(memory)[:] = list(map(id, tensors))
    return memory.tobytes() + repr((rooms(local), list(map(Tensor.is_neg, local)))).encode()


def addresses(memory: Memory) -> Memory:
    """Where the tensors begin, ``(count,)``."""
    return memory[:, _ADDRESS]


def formats(memory: Memory) -> Memory:
    """How they are to be read, ``(count,)``."""
    return memory[:, _FORMAT]


def identities(memory: Memory) -> Memory:
    """Which Python objects they are, ``(count,)``."""
    return memory[:, _IDENTITY]


def identities_of(objects: Iterable[object]) -> bytes:
    """Which Python objects these are, to be compared: equal as long as all of them are alive and in this order."""
    return np.fromiter(objects, object).tobytes()


def _format(tensor: Tensor) -> int:
    return hash((tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() != 0)) % 2**64


@cache
def _exchange_api() -> int | None:
    """Address of the table of functions behind DLPack's C exchange API; None where torch has none."""
    capsule: Any = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if type(capsule).__name__ != "PyCapsule":
        return None
    prototype = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)
    return int(prototype(("PyCapsule_GetPointer", ctypes.pythonapi))(capsule, b"dlpack_exchange_api"))
