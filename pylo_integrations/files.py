"""Files that appear whole, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, and move it there when it is whole and on disk; what was there stays until then.

    Args:
        path: Its place, in a folder that exists.
        write: Writes the contents into the file whose path it is given.
    """
    # Made by the writer, so that it may be read by those who may read the user's other files.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
