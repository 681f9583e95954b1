"""Do the pages show what the program prints?"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from pylo_integrations import cli

ROOT = Path(__file__).parents[2]
SESSIONS = [
    (page, *block.split("\n", 1))
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for block in re.findall(r"^```console\n\$ (.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]


def test_the_pages_show_some_output():
    assert [page.name for page, command, _ in SESSIONS if command == "pylo list"] == ["cli.md", "optimizers.md"]


@pytest.mark.parametrize(("page", "command", "shown"), SESSIONS, ids=[f"{p.name}-{c}" for p, c, _ in SESSIONS])
def test_output_on_a_page_is_the_program_s(page, command, shown, capsys):
    program, *argv = shlex.split(command)
    assert program == "pylo", "what else a page shows is to be tested here, too"
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == shown
