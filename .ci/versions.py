#!/usr/bin/env python3
"""Whether a wheel works with the oldest versions that pyproject.toml allows, and with the newest that there are.

    .ci/versions.py WHEEL [oldest|newest ...] [--python PYTHON]

Makes build/versions/<set>, installs the wheel and the frameworks into it, runs .ci/check_wheel there, and prints a row
of the table in docs/contributing.md. The oldest are those of each requirement by itself: `transformers>=5.0` is tested
at 5.0. What others forbid at its floor (LEFT) is left to pip.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SHOWN = ("torch", "transformers", "lightning", "accelerate", "numpy", "safetensors", "huggingface_hub")
# Frameworks and what they bring ask for newer ones than we do; pinned, pip tries every version of all that does.
LEFT = {"huggingface_hub", "packaging", "typing_extensions"}
TESTS = "tests/adapters tests/contract tests/weights tests/golden"


def floors() -> dict[str, str]:
    """The least versions that the package and its extras for frameworks ask for, from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    part = text[text.index("dependencies = [") : text.index("recipes = [")]
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', part))


def check(name: str, wheel: Path, python: str) -> bool:
    """Make an environment, test the wheel in it, and print its row."""
    folder = ROOT / "build" / "versions" / name
    if not (folder / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", folder], check=True)
    constraints = folder / "constraints.txt"
    pins = {key: value for key, value in floors().items() if key not in LEFT} if name == "oldest" else {}
    constraints.write_text("".join(f"{key}=={value}.*\n" for key, value in pins.items()))
    tools = ["pytest", "pytest-timeout", "expecttest", "jsonargparse[signatures]"]
    pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--upgrade", "-c", constraints]
    subprocess.run([*pip, f"{wheel}[hf,lightning,accelerate]", *tools], check=True)
    tell = (
        "import sys; from importlib.metadata import version; print(sys.version.split()[0], *map(version, sys.argv[1:]))"
    )
    found = subprocess.run([folder / "bin" / "python", "-c", tell, *SHOWN], capture_output=True, text=True, check=True)
    environment = {
        "PYLO_CHECK_TESTS": TESTS,
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "PIP_NO_INDEX": "1",
    }
    run = subprocess.run(["bash", ROOT / ".ci" / "check_wheel", ROOT], env=environment, capture_output=True, text=True)
    (folder / "output.txt").write_text(run.stdout + run.stderr)
    verdict = run.stdout.strip().splitlines()[-1] if run.stdout.strip() else "did not start"
    print(f"| {name} | {' | '.join(found.stdout.split())} | {verdict.strip('= ')} |", flush=True)
    return run.returncode == 0


def main() -> int:
    """Check the sets that were asked for; the exit code is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("sets", nargs="*", choices=["oldest", "newest"], default=["oldest", "newest"])
    parser.add_argument("--python", default=sys.executable)
    args = parser.parse_args()
    print(
        f"| | Python | {' | '.join(SHOWN)} | smoke run of {TESTS.replace('tests/', '')} |\n|{'---|' * (len(SHOWN) + 3)}"
    )
    return 0 if all([check(name, args.wheel.absolute(), args.python) for name in args.sets]) else 1


if __name__ == "__main__":
    sys.exit(main())
