"""Flax checkpoints: ``theta.state`` of the Celo family and the ``params`` of Google's VeLO.

A msgpack map of maps whose leaves are extension values: msgpack again, ``(shape, dtype name, little-endian bytes)``.
The keys along the way to a leaf, joined by ``/``, are the tree-path names of the reference implementations, which this
package uses too; weights are (inputs, outputs). A tuple is a map with keys ``"0"``, ``"1"``...; Google's checkpoints
are tuples that begin with theta. Neither JAX nor Flax is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pylo_integrations.weights.convert import msgpack
from pylo_integrations.weights.convert.errors import ConversionError

MOST_AXES = 8
_ARRAY, _SCALAR = 1, 3  # Flax's codes of an array and of a numpy scalar; both have the same payload
_DTYPES = {
    "bfloat16": "<u2",  # numpy has none; see _tensor
    "float16": "<f2",
    "float32": "<f4",
    "float64": "<f8",
    "int32": "<i4",
    "int64": "<i8",
    "uint32": "<u4",
}


def read_flax(data: bytes) -> dict[str, Tensor]:
    """The arrays of theta by tree-path name.

    Raises:
        ConversionError: Not such a file, damaged, or hostile.
    """
    tree = msgpack.unpack(data)
    if isinstance(tree, dict) and "0" in tree and all(key.isdecimal() for key in tree):
        tree = tree["0"]
    if not isinstance(tree, dict):
        raise ConversionError(f"is no Flax checkpoint: it holds {_kind(tree)} where a map of arrays belongs")
    arrays: dict[str, Tensor] = {}
    for name, leaf in _leaves(tree, ""):
        if not isinstance(leaf, msgpack.Extension) or leaf.code not in (_ARRAY, _SCALAR):
            raise ConversionError(f"{name[:80]!r} is {_kind(leaf)}, not an array")
        if name in arrays:
            raise ConversionError(f"{name[:80]!r} is there twice")
        arrays[name] = _tensor(name[:80], leaf.payload)
    return arrays


def _leaves(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _kind(value: Any) -> str:
    code = f" {value.code}" if isinstance(value, msgpack.Extension) else ""
    return f"msgpack {type(value).__name__.lower()}{code}"


def _tensor(name: str, payload: memoryview) -> Tensor:
    fields = msgpack.unpack(payload, most=4 + MOST_AXES)
    if not isinstance(fields, list) or len(fields) != 3:
        raise ConversionError(f"array {name!r} is not (shape, dtype, bytes)")
    shape, dtype, data = fields
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ConversionError(f"array {name!r} has dtype {repr(dtype)[:40]}; known: {', '.join(_DTYPES)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MOST_AXES
        or not all(type(size) is int and size >= 0 for size in shape)
        or not isinstance(data, memoryview)
        or math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize != len(data)
    ):
        size = len(data) if isinstance(data, memoryview) else 0
        raise ConversionError(f"array {name!r}: {size} bytes do not make {dtype} of shape {repr(shape)[:60]}")
    values = np.frombuffer(data, _DTYPES[dtype])
    if dtype == "bfloat16":  # the upper half of a float32
        values = (values.astype(np.uint32) << 16).view(np.float32)
    # A copy: torch wants native byte order and memory that it may write to.
    return torch.from_numpy(values.astype(values.dtype.newbyteorder("="))).reshape(shape)
