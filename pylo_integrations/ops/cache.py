"""What is made once on a machine and kept in files: by whichever process comes first, for all that come later.

Files are in the first of these folders that can be written to: the one that the environment variable ``PYLO_CACHE``
names, ``pylo_integrations`` in the user's cache folder, one in the folder for temporary files. Where there is none,
every process makes things for itself. Files hold a digest of what is in them, and appear whole; damaged ones are made
again.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pylo_integrations.files import try_lock, unlock, write_whole

LARGEST = 64 << 20
"""Bytes of a file that is read."""


def key_of(*facts: object) -> str:
    """A name for what depends on these facts."""
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def folders() -> Iterator[Path]:
    """Where files may be, the first choice first; they need not exist."""
    if named := os.environ.get("PYLO_CACHE"):
        yield Path(named)
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    if home.is_absolute():  # it is not where nobody knows a home
        yield home / "pylo_integrations"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    yield Path(tempfile.gettempdir()) / f"pylo_integrations-{user}"


def read(name: str) -> bytes | None:
    """The contents of a file; None if there is none, or it is damaged."""
    for folder in folders():
        try:
            if not _is_ours(folder):
                continue
            with (folder / name).open("rb") as file:
                data = file.read(LARGEST)
        except OSError:
            continue
        digest, contents = data[:32], data[32:]
        if hashlib.sha256(contents).digest() == digest:
            return contents
    return None


def write(name: str, contents: bytes) -> Path | None:
    """Keep contents in a file; where that is not possible, returns None and nobody minds."""
    data = hashlib.sha256(contents).digest() + contents
    for folder in folders():
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if _is_ours(folder):
                write_whole(path, lambda place: place.write_bytes(data))
                return path
        except OSError:
            continue
    return None


def make_once(name: str, make: Callable[[], bytes | None], patience: float) -> bytes | None:
    """What is kept under a name; if it is not there, one of the processes that ask makes it and the others wait.

    Args:
        name: Of the file.
        make: Makes the contents; None if there is nothing to be kept.
        patience: Seconds that others are waited for, before this process makes it as well.
    """
    if (contents := read(name)) is not None:
        return contents
    with _alone(name, patience):
        if (contents := read(name)) is None and (contents := make()) is not None:
            write(name, contents)
    return contents


@contextmanager
def _alone(name: str, patience: float) -> Iterator[None]:
    """Hold the lock of a file; go on without it where there is no place for one, or after ``patience`` seconds."""
    lock = None
    for folder in folders():
        path = folder / f"{name}.lock"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not _is_ours(folder):
                continue
            path.touch()
        except OSError:
            continue
        end = time.monotonic() + patience
        while (lock := try_lock(path)) is None and time.monotonic() < end:
            time.sleep(0.05)
        break
    try:
        yield
    finally:
        if lock is not None:
            unlock(lock)


def _is_ours(folder: Path) -> bool:
    """Whether a folder is this user's: anybody may have made one in a shared place, and files are run from here."""
    return not hasattr(os, "getuid") or folder.stat().st_uid == os.getuid()
