"""``pylo recipe``: the recipes, and where they are."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pylo_integrations
from pylo_integrations.cli.requirements import problem_with, remedy, required_by


def root() -> Path:
    """The recipes inside an installed wheel, else those beside the package in a clone."""
    package = Path(pylo_integrations.__file__).parent
    return next((root for root in (package / "_recipes", package.parent / "recipes") if root.is_dir()), package)


def scripts() -> dict[str, Path]:
    """Scripts by recipe name."""
    return {script.parent.name: script for script in root().glob("*/train.py")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo recipe``."""
    parser.add_argument("name", choices=sorted(scripts()), help="followed by the recipe's own options")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="passed to the recipe, e.g. --help")


def run(args: argparse.Namespace) -> int:
    """Run a recipe; returns its exit code."""
    try:
        problems = [problem for requirement in required_by("recipes") if (problem := problem_with(requirement))]
    except metadata.PackageNotFoundError:
        problems = []  # not installed: the recipe's own imports will tell
    if problems:
        args.parser.error(f"recipe {args.name} cannot run: {'; '.join(problems)}. {remedy('recipes')}")
    # A process of its own, as if the script had been called: recipes fork data loaders and print what they like.
    code = subprocess.run([sys.executable, str(scripts()[args.name]), *args.options]).returncode
    return code if code >= 0 else 128 - code  # as a shell tells of a signal
