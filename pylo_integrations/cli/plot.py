"""``pylo plot``: a picture of what runs logged."""

from __future__ import annotations

import argparse
from pathlib import Path

from pylo_integrations import plot
from pylo_integrations.cli.output import plain


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo plot``."""
    parser.description = plain(plot.__doc__)
    parser.add_argument("path", type=Path, metavar="RUN", help="folder of one or more runs, or a log file")
    parser.add_argument("--output", type=Path, help="picture to write; by default plot.png in the folder")


def run(args: argparse.Namespace) -> int:
    """Draw the runs, and say what was left out."""
    output = args.output or (args.path if args.path.is_dir() else args.path.parent) / "plot.png"
    for note in plot.plot(args.path, output):
        print(note)
    print(f"written to {output}")
    return 0
