"""The error of all converters, and the guard that every foreign file passes first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pylo_integrations.paths import LARGEST_THETA, check_file

_PICKLE_SUFFIXES = {".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt", ".joblib", ".npz"}
_MAGIC = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))  # torch.save's zip; pickle protocols


class ConversionError(ValueError):
    """A foreign file is damaged, of an unknown layout, or for an optimizer that this package has no rule for."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what is raised inside."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(f"{path}: {error}") from error


def read_bytes(path: Path, largest: int = LARGEST_THETA) -> bytes:
    """The contents of a file that is neither too large nor a pickle.

    Raises:
        OSError: As :func:`~pylo_integrations.paths.check_file`.
        ConversionError: Too large, or a pickle.
    """
    check_file(path)
    with path.open("rb") as file:
        data = file.read(largest + 1)
    # Magic is looked for under every name, and names count too: text pickles (protocol 0) have no magic.
    if path.suffix.lower() in _PICKLE_SUFFIXES or data.startswith(_MAGIC):
        raise ConversionError(
            "is a pickle, or an archive that may hold one. Loading a pickle runs whatever code its author put in, so "
            "it is never opened here. If you trust where it is from, load it in a process of your own and hand its "
            "arrays to Theta.from_arrays(name, arrays)"
        )
    if len(data) > largest:
        raise ConversionError(f"is larger than {largest} bytes; that is no theta")
    return data
