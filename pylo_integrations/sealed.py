"""Tensors and a record in one safetensors file or string, with a digest of both: damage is noticed.

The record is a JSON object under one key of the metadata, whose name says whether a digest is due: damage can hardly
turn it into the name under which version 0.1.0 kept a bare record. Those can be read too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pylo_integrations.files import write_whole
from pylo_integrations.paths import check_file

_DIGEST = "sha256"
_SEALED = f"+{_DIGEST}"  # ends the names of records with a digest


class DamageError(ValueError):
    """Bytes that are not what was written; the message says what is wrong with them, not where they are from."""


_UNREADABLE = (KeyError, TypeError, ValueError, RecursionError, MemoryError, safetensors.SafetensorError)


def digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hexadecimal digits, of JSON-serialisable values and of the names, types, shapes and bytes of tensors.

    Args:
        record: As it will be read, with strings as keys.
        tensors: On any device.
    """
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def to_bytes(key: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """Serialise; the result is the same for equal contents."""
    stored = _stored(tensors)
    return safetensors.torch.save(stored, _metadata(key, record, stored))


def from_bytes(key: str, blob: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors of :func:`to_bytes`.

    Raises:
        DamageError: The bytes are others.
    """
    if not isinstance(blob, bytes):
        raise DamageError(f"it is {type(blob).__name__}, not bytes")
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        tensors = safetensors.torch.load(blob)
        metadata = header.get("__metadata__", {key: "{}"})  # version 0.1.0 wrote some without
        return _unsealed(key, metadata, tensors), tensors
    except DamageError:
        raise
    except _UNREADABLE as error:
        raise DamageError(f"{type(error).__name__}: {error!s:.200}") from error


def save(path: str | os.PathLike[str], key: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a file, which appears when it is whole, in place of one that was there."""
    stored = _stored(tensors)
    metadata = _metadata(key, record, stored)
    write_whole(Path(path), lambda temporary: safetensors.torch.save_file(stored, str(temporary), metadata))


def load(path: str | os.PathLike[str], key: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record and the tensors of a file that :func:`save` wrote, on the CPU.

    Raises:
        OSError: There is no such file, or it cannot be read.
        DamageError: It holds something else.
    """
    check_file(Path(path))
    try:
        with safetensors.safe_open(os.fspath(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 # not a mapping
            return _unsealed(key, file.metadata() or {}, tensors), tensors
    except DamageError:
        raise
    except _UNREADABLE as error:
        raise DamageError(f"{type(error).__name__}: {error!s:.200}") from error


def _stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As safetensors wants them: none shares memory with another."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        stored[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return stored


def _metadata(key: str, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    # One entry: safetensors writes several in any order.
    plain = json.loads(json.dumps(record))
    return {key + _SEALED: json.dumps({"record": plain, _DIGEST: digest(plain, tensors)})}


def _unsealed(key: str, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The record under a key, once it is known to be what was written with these tensors."""
    if key + _SEALED in metadata:
        found = json.loads(metadata[key + _SEALED])
        if found[_DIGEST] != (actual := digest(record := found["record"], tensors)):
            raise DamageError(f"its contents have the sha256 {actual[:12]}, its record says {found[_DIGEST]!s:.12}")
    else:
        record = json.loads(metadata[key])
    if not isinstance(record, dict):
        raise DamageError(f"its record is {type(record).__name__}, not an object")
    return record
