"""What ``pylo`` prints: in lines that a terminal can show, and to a stdout that may be closed or full."""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LONGEST_LINE = 2000


class OutputClosed(Exception):
    """Stdout is closed or full."""


@contextmanager
def writing_to_stdout() -> Iterator[None]:
    """Raises :class:`OutputClosed` if what was printed within cannot be written.

    Printing only fills a buffer. The interpreter would flush it when it exits, and print a traceback.
    """
    if sys.stdout is None:
        raise OutputClosed("it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        yield
    except BrokenPipeError as error:  # where there is no buffer
        raise OutputClosed(error.strerror) from error
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            if sys.stdout is sys.__stdout__:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise OutputClosed(error.strerror) from error


def on_one_line(text: str) -> str:
    """A message in one line, whatever a file or an argument brought into it."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."


def printable(text: str) -> str:
    """Without what would steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def plain(doc: str | None) -> str:
    """A docstring for a terminal, without markup."""
    return re.sub(r"(:\w+:)?(``?)~?(.*?)\2", r"\3", doc or "")


def print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Labels and texts in two columns; on a terminal, long texts are wrapped to its width."""
    width = max(len(label) for label, _ in rows)
    room = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else 0
    for label, text in rows:
        lines = textwrap.wrap(printable(text), room, break_on_hyphens=False) if room > 20 else [printable(text)]
        for first, line in zip([label, *[""] * len(lines)], lines or [""], strict=False):
            print(f"{printable(first):{width}}  {line}".rstrip())
