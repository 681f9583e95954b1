"""Do the snippets of the README and the docs run as printed, page by page?"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from forked import Forked
from shared_workers import run_script

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
FENCE = re.compile(r"^```(.*)$")
ADAPTERS = {"hf": "transformers", "lightning": "lightning", "accelerate": "accelerate", "timm": "timm"}


def python_of(page: Path) -> str:
    """A page's snippets as one script, each line where it stands on the page, all else blank; or a notebook's cells."""
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    language, script = None, []
    for line in page.read_text().splitlines():
        fence = FENCE.match(line)
        script.append(line if language == "python" and not fence else "")
        if fence:
            language = fence[1].strip() if language is None else None
    assert language is None, f"{page.name}: a code fence is not closed"
    return "\n".join(script)


def absent_modules(script: str) -> set[str]:
    """Packages that a script imports, itself or through our adapters, and that are not installed."""
    imported = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    roots = {name.split(".")[0] for name in imported}
    parts = [name.split(".") for name in imported]
    roots |= {
        ADAPTERS[part[1]] for part in parts if part[0] == "pylo_integrations" and part[1:2] and part[1] in ADAPTERS
    }
    return {root for root in roots if importlib.util.find_spec(root) is None}


SNIPPETS = [page for page in [*PAGES, *NOTEBOOKS] if python_of(page).strip()]


@pytest.fixture(scope="module")
def interpreter():
    """Pages patch frameworks, seed generators and write files: each has a copy of this process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    slow = [name for name in ("torch", *ADAPTERS.values()) if importlib.util.find_spec(name) is not None]
    forked = Forked(*slow, environment=environment, options=("-W", "error::DeprecationWarning:__main__"))
    yield forked
    forked.close()


@pytest.mark.slow  # a process that imports all frameworks; their adapters' own tests are in the smoke run
@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run_in_order(page, interpreter, tmp_path):
    script = python_of(page)
    if absent := absent_modules(script):
        pytest.skip(f"{page.name} needs {', '.join(sorted(absent))}")
    run = interpreter.run(script, tmp_path)
    assert run.returncode == 0, f"{page.name} (line numbers are the page's)\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"


@pytest.mark.slow
@pytest.mark.dist
def test_the_script_for_two_processes_trains(tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text()
    command, script = re.search(
        r"`torchrun (--nproc-per-node=2 \S+)`.*?```python no-run\n(.*?)```", page, re.DOTALL
    ).groups()
    file = tmp_path / command.split()[-1]
    file.write_text(script)
    said = run_script(file, folder=tmp_path, ranks=2)
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (.+)$", said, re.MULTILINE)]
    assert len(losses) == 4 and losses[-1] < losses[0] / 3, said


def test_code_fits_the_column_of_the_site():
    wide = []
    for page in PAGES[1:]:
        inside = False
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if FENCE.match(line):
                inside = not inside
            elif inside and len(line) > 120:
                wide.append(f"{page.name}:{number}")
    assert not wide, "longer than docs/site.css has room for, 120 characters"


def test_links_of_the_readme_lead_to_files():
    # mkdocs --strict checks those of docs/.
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", PAGES[0].read_text())
    assert targets and not [target for target in targets if not (ROOT / target).exists()]


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / ".mkdocs.yml").read_text()
    assert {page.name for page in PAGES[1:]} == set(re.findall(r": ([\w-]+\.md)$", navigation, re.MULTILINE))


def test_a_snippet_keeps_its_line_numbers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "text\n```python\na = 1\n```\n```python no-run\nboom\n```\n```bash\nls\n```\n```python\nb = a\n```\n"
    )
    lines = python_of(page).splitlines()
    assert lines[2] == "a = 1" and lines[11] == "b = a"
    assert "".join(lines).replace(" ", "") == "a=1b=a"


def test_a_page_with_an_absent_framework_is_recognised(monkeypatch):
    assert absent_modules("import torch, no_such_package_x.y") == {"no_such_package_x"}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    assert absent_modules("from pylo_integrations.hf import Trainer") == {"transformers"}
    assert absent_modules("from pylo_integrations import hf") == {"transformers"}
    assert absent_modules("from pylo_integrations import create_optimizer") == set()
