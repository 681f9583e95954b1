"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform == "win32":
    fcntl = None
else:
    import fcntl


def write_whole(path: Path, write: Callable[[Path], object], *, overwrite: bool = True) -> None:
    """Write a file beside its place, and move it there when it is whole and on disk; what was there stays until then.

    Until then it is in a hidden folder beside its place. Folders that killed writers have left are removed.

    Args:
        path: Its place, in a folder that exists.
        write: Writes the contents into the file whose path it is given.
        overwrite: Whether to replace what is there when the file is whole. If not, of several writers one succeeds.

    Raises:
        FileExistsError: With ``overwrite=False``, there is something; it was not changed.
    """
    if not overwrite and os.path.lexists(path):
        raise FileExistsError(f"{path} exists")
    _remove_abandoned(path)
    with _folder_beside(path) as folder:
        temporary = folder / path.name
        # Those who may read the user's other files may read this one; safetensors 0.8 would have it private.
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(temporary, path)
        else:
            _move_to_free_place(temporary, path)


def _move_to_free_place(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise FileExistsError(f"{path} exists") from None
    except OSError:  # a file system without links: reserve the place first
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.replace(temporary, path)


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A folder for the contents of ``path`` until they are whole, locked as long as this process writes there."""
    lock = None
    while lock is None:  # another writer may take it for abandoned before it is locked
        folder = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        folder.mkdir()
        lock = try_lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        unlock(lock)


def _remove_abandoned(path: Path) -> None:
    """Remove what writers of ``path`` have left that no longer live: the system drops the locks of those."""
    name = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}")
    try:
        found = [entry for entry in path.parent.iterdir() if name.fullmatch(entry.name)]
    except PermissionError:  # a folder to write into, but not to look at
        return
    for entry in found:
        lock = try_lock(entry)
        if lock is None or lock == NO_LOCKS:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:  # of version 0.1.0, which wrote files beside the place
            entry.unlink(missing_ok=True)
        unlock(lock)


NO_LOCKS = -1
"""What stands for a lock where there are none."""


def try_lock(path: Path) -> int | None:
    """A lock of a file or folder, which ends with this process at the latest.

    Returns:
        A descriptor that holds it; None if it is somebody else's, or gone; :data:`NO_LOCKS` where there are none.
    """
    if fcntl is None:
        return NO_LOCKS
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    except OSError:
        return NO_LOCKS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # a file system without locks
        os.close(descriptor)
        return NO_LOCKS
    os.close(descriptor)
    return None


def unlock(lock: int) -> None:
    """Give back what :func:`try_lock` returned."""
    if lock != NO_LOCKS:
        os.close(lock)
