"""What a command of ``pylo`` is, and the parser that a table of commands makes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

import pylo_integrations
from pylo_integrations.cli.output import on_one_line


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        help: What it is for, in a line.
        run: Does it, and returns the exit code. It gets the arguments, and as ``parser`` who tells errors in them.
        add_arguments: Defines the arguments.
    """

    help: str
    run: Callable[[argparse.Namespace], int]
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None


@dataclass(frozen=True)
class Family:
    """Commands under one name.

    Attributes:
        help: What they are about, in a line.
        commands: By name.
    """

    help: str
    commands: Mapping[str, Command]


_FIRST = "First: pylo doctor. Then pylo recipe vit, or pylo try train.py:train on a training function of your own."


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {on_one_line(message)}\n")


def make_parser(commands: Mapping[str, Command | Family]) -> argparse.ArgumentParser:
    """A parser whose result has the ``run`` of the command that was given, and its ``parser``."""
    parser = _Parser("pylo", description=pylo_integrations.__doc__, epilog=_FIRST)
    parser.add_argument("--version", action="version", version=f"%(prog)s {pylo_integrations.__version__}")
    _add(commands, parser, "COMMAND")
    return parser


def _add(commands: Mapping[str, Command | Family], parser: argparse.ArgumentParser, metavar: str) -> None:
    subparsers = parser.add_subparsers(required=True, metavar=metavar)
    for name, command in commands.items():
        own = subparsers.add_parser(name, help=command.help)
        if isinstance(command, Family):
            _add(command.commands, own, "ACTION")
        else:
            command.add_arguments(own)
            own.set_defaults(run=command.run, parser=own)
