"""Recipes run in this process, where the frameworks are imported once, or in the ranks of pylo_integrations.workers."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

RECIPES = Path(__file__).parents[2] / "recipes"


@contextlib.contextmanager
def loaded(script: str) -> Iterator[ModuleType]:
    """A module of a recipe, with its folder on the path; afterwards the modules of recipes are forgotten again."""
    file = RECIPES / script
    sys.path.insert(0, str(file.parent))
    try:
        spec = importlib.util.spec_from_file_location(f"recipe_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(file.parent))
        forget_recipes()


def forget_recipes() -> None:
    ours = [name for name, module in sys.modules.items() if str(RECIPES) in (getattr(module, "__file__", None) or "")]
    for name in ours:
        del sys.modules[name]


def run_here(script: str, *options: Any) -> str:
    """Runs a recipe as a script, with one thread; returns what it printed."""
    argv, threads, said = sys.argv, torch.get_num_threads(), io.StringIO()
    sys.argv = [script, *map(str, options)]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(said), fresh_frameworks(), loaded(script) as module:
            if hasattr(module, "main"):  # else it has done its work while it was loaded
                module.main()
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return said.getvalue()


@contextlib.contextmanager
def fresh_frameworks() -> Iterator[None]:
    """Without what Accelerate and our own install() keep for the life of a process."""
    from accelerate.state import AcceleratorState, GradientState

    from pylo_integrations import hf

    def reset() -> None:
        hf.uninstall()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    reset()
    try:
        yield
    finally:
        reset()


def recipe_case(rank: int, world: int, script: str, options: Sequence[str]) -> str:
    return run_here(script, *options)


def main() -> None:
    """Recipes one after another on ranks that a launcher has started, each of which costs seconds of imports.

    The arguments are JSON with the command line of each run by its name, and the folder for what every rank printed.
    """
    tasks, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    for name, (script, *options) in tasks.items():
        said = run_here(script, *options)
        (folder / f"{name}.rank{os.environ['RANK']}").write_text(said)


if __name__ == "__main__":
    main()
