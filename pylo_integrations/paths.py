"""Files that users name: what cannot be read or written says why, before it is opened or anything is computed."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

LARGEST_CONFIG = 1 << 20
"""Bytes of a file that people write by hand."""
LARGEST_THETA = 256 << 20
"""Bytes. The largest published theta has about 20 MB; more is a mistaken or a hostile file."""
LARGEST_LOG = 1 << 30
"""Bytes of what a run logged."""

_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: Path, what: str = "file") -> None:
    """Whether a file can be read.

    Args:
        path: Its path.
        what: What to call it.

    Raises:
        FileNotFoundError: There is none.
        PermissionError: It, or a folder on the way to it, is closed to this user.
        IsADirectoryError: It is a folder.
        OSError: It is a FIFO, which would be waited for, a socket or a device; or the path cannot be followed.
        ValueError: The path holds a null character.
    """
    mode = _mode(path, what)
    if mode is None:
        raise FileNotFoundError(f"there is no {what} {str(path)!r}")
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a {what}")
    if not stat.S_ISREG(mode):
        raise OSError(f"{str(path)!r} is {_kind(mode)}, not a {what}; copy what it gives into a regular file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise type(error)(f"the {what} {str(path)!r} cannot be read: {error.strerror}") from None


def check_destination(path: Path, what: str = "file") -> None:
    """Whether a file can be written in a folder that exists; to be asked before the work that it is to hold.

    Raises:
        FileNotFoundError: Its folder does not exist.
        PermissionError: The file or its folder is not this user's to change, or is on a read-only file system.
        IsADirectoryError: There is a folder in its place.
        OSError: There is a FIFO or a socket, whose reader would be waited for; or the path cannot be followed.
        ValueError: The path holds a null character.
    """
    mode, folder = _mode(path, what), path.parent
    if mode is None:
        if not folder.is_dir():
            raise FileNotFoundError(f"cannot write {str(path)!r}: folder {str(folder)!r} does not exist")
    elif stat.S_ISDIR(mode):
        raise IsADirectoryError(f"cannot write {str(path)!r}: it is a folder; name a {what} in it")
    elif not (stat.S_ISREG(mode) or stat.S_ISCHR(mode)):  # /dev/stdout is a device
        raise OSError(f"cannot write {str(path)!r}: it is {_kind(mode)}, not a {what}")
    effective = os.access in os.supports_effective_ids
    if not os.access(folder if mode is None else path, os.W_OK, effective_ids=effective):
        raise PermissionError(f"cannot write {str(path)!r}: no permission")


def read_bytes(path: Path, largest: int, what: str = "file") -> bytes:
    """The contents of a file.

    Args:
        path: Its path.
        largest: Bytes that it may have.
        what: What to call it.

    Raises:
        OSError: As :func:`check_file`.
        ValueError: It has more bytes.
    """
    check_file(path, what)
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"the {what} {str(path)!r} is larger than {largest} bytes")
    return data


def read_text(path: Path, largest: int, what: str = "file") -> str:
    """The contents of a text file; arguments and errors as :func:`read_bytes`, and not UTF-8 is a ValueError."""
    try:
        return read_bytes(path, largest, what).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the {what} {str(path)!r} is not text in UTF-8: {error.reason} at byte {error.start}"
        ) from None


def _mode(path: Path, what: str) -> int | None:
    """What there is, links followed; None if nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise type(error)(f"cannot look at the {what} {str(path)!r:.300}: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"the path {str(path)!r} of a {what} holds a null character") from None


def _kind(mode: int) -> str:
    return next((name for matches, name in _KINDS if matches(mode)), "no regular file")
