"""Values of arguments: parsers that say what is wrong with one, for several commands."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from pylo_integrations.paths import check_destination


def names_of(kind: str, known: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """Parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known()]:
            raise argparse.ArgumentTypeError(f"unknown {kind} {unknown[0]!r}; available: {', '.join(known())}")
        return names

    return parse


def at_most(most: int) -> Callable[[str], int]:
    """Parser of a positive integer that has an upper bound."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not 1 <= int(text) <= most:
            bound = f" up to {most}" if text.isdecimal() and text.strip("0") else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive integer{bound}")
        return int(text)

    return parse


positive = at_most(2**31 - 1)
"""Parse a positive integer."""


def natural(text: str) -> int:
    """Parse a positive integer or 0."""
    return 0 if text == "0" else positive(text)


def counts(text: str, most: int = 2**31 - 1) -> list[int]:
    """Parse comma-separated positive integers."""
    return list(dict.fromkeys(map(at_most(most), text.split(","))))


def rates(text: str) -> list[float]:
    """Parse comma-separated positive numbers."""
    try:
        found = list(dict.fromkeys(map(float, text.split(","))))
    except ValueError:
        found = []
    if not found or not all(0 < rate < math.inf for rate in found):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a comma-separated list of positive numbers")
    return found


def new_file(text: str) -> Path:
    """Parse the path of a file that can be written; what goes into it takes long to find."""
    try:
        check_destination(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)
