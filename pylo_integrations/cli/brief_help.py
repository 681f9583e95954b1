"""Help for parsers with hundreds of options, most of them a framework's: first those that matter, all on request."""

from __future__ import annotations

import argparse
from collections.abc import Container, Mapping
from typing import Any

_MOST_CHOICES = 6


class _HelpAll(argparse.Action):
    """Like ``--help``, with what that leaves out."""

    def __init__(self, option_strings: list[str], hidden: Mapping[argparse.Action, str | None], **kwargs: Any) -> None:
        super().__init__(
            option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=kwargs["help"]
        )
        self.hidden = hidden

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        for action, text in self.hidden.items():
            action.help = text
        parser.print_help()
        parser.exit()


def shorten_help(parser: argparse.ArgumentParser, shown: Container[str]) -> None:
    """Leave in ``--help`` only the options in ``shown``, by ``dest``; a new option, ``--help-all``, shows all."""
    hidden = {
        action: action.help for action in parser._actions if action.dest not in {"help"} and action.dest not in shown
    }
    for action in parser._actions:
        if action in hidden:
            action.help = argparse.SUPPRESS
        elif action.choices is not None and action.metavar is None and len(list(action.choices)) > _MOST_CHOICES:
            action.metavar = "NAME"
    parser.add_argument(
        "--help-all", action=_HelpAll, hidden=hidden, help=f"tell of the other {len(hidden)} options too"
    )
