"""``pylo weights``: theta, what is published, what a file holds, and other people's files."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.cli.output import print_table
from pylo_integrations.weights import builtin_names, load_theta
from pylo_integrations.weights.convert import OPTIMIZERS, convert
from pylo_integrations.weights.hub import PUBLISHED

_LONGEST_VALUE = 60  # of an entry of theta's record, in what people read


def run_list(args: argparse.Namespace) -> int:
    """Print theta in the package, with whose default each is, and published ones."""
    rows = [("in the package", "")]
    for name in builtin_names():
        theta = load_theta(f"builtin:{name}", name)
        users = [user for user in list_optimizers() if get_optimizer_info(user).weights == f"builtin:{name}"]
        use = f"default of {', '.join(users)}" if users else f"for {theta.name}"
        rows.append((f"  builtin:{name}", f"{theta.provenance}; {use}"))
    rows.append(("published by their authors", ""))
    for entry in PUBLISHED:
        repositories = " + ".join(f"hub:{part.name}" for part in entry.repositories)
        use = f"for {entry.optimizer}" if entry.optimizer else "no rule here"
        rows.append((f"  {entry.name}", f"{entry.description}; {use}"))
        rows.append(("", f"  {repositories} ({entry.repositories[0].filename})"))
    print_table(rows)
    return 0


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo weights info``."""
    parser.add_argument("weights", metavar="FILE", help="a file, builtin:<name> or hub:<owner>/<repo>[@revision]")
    parser.add_argument("--json", action="store_true", help="print all of it for programs, not some for people")


def run_info(args: argparse.Namespace) -> int:
    """Print all about one theta."""
    theta = load_theta(args.weights, "")
    if args.json:
        record = {field: getattr(theta, field) for field in ("name", "architecture", "sha256", "provenance", "licence")}
        record |= {"hyper": dict(theta.hyper), "training": dict(theta.training)}
        record["arrays"] = {name: list(array.shape) for name, array in theta.arrays.items()}
        print(json.dumps(record, indent=2))
        return 0
    training = _flat(theta.training)
    print_table(
        [
            ("name", theta.name or "none"),
            ("architecture", theta.architecture),
            ("sha256", theta.sha256),
            ("from", theta.provenance or "unknown"),
            ("licence", theta.licence or "unknown"),
            ("training", "all of it with --json" if training else "no record"),
            *((f"  {name}", value) for name, value in training.items()),
            ("constants", ""),
            *((f"  {name}", repr(value)) for name, value in sorted(theta.hyper.items())),
            ("arrays", f"{sum(array.numel() for array in theta.arrays.values())} numbers"),
            *((f"  {name}", " x ".join(map(str, array.shape))) for name, array in theta.arrays.items()),
        ]
    )
    return 0


def _flat(record: Mapping[str, Any]) -> dict[str, str]:
    """Entries of a record and those of the mappings in it as short texts."""
    texts: dict[str, str] = {}
    for key, value in sorted(record.items()):
        inner = {f"{key}.{name}": part for name, part in value.items()} if isinstance(value, Mapping) else {key: value}
        for name, part in inner.items():
            text = json.dumps(part, sort_keys=True)
            shortened = text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."
            texts[name[:_LONGEST_VALUE]] = shortened
    return texts


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo weights convert``."""
    parser.add_argument("sources", nargs="+", metavar="SRC", help="a file, a folder or hub:<owner>/<repo>[@revision]")
    parser.add_argument("destination", metavar="DST", type=Path, help="the .safetensors file to write")
    parser.add_argument(
        "--architecture",
        choices=OPTIMIZERS,
        metavar="NAME",
        help=f"where the arrays do not tell: {', '.join(OPTIMIZERS)}",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")


def run_convert(args: argparse.Namespace) -> int:
    """Write a theta made of other people's files."""
    sources, destination = args.sources, args.destination
    if destination.suffix != ".safetensors":
        args.parser.error(f"DST must end in .safetensors, not {str(destination)!r}")
    if destination.exists() and not args.overwrite:
        args.parser.error(f"{destination} exists; give --overwrite to replace it")
    if from_hub := any(source.startswith("hub:") for source in sources):
        if len(sources) > 1 or args.architecture:
            args.parser.error("a theta from the hub is one SRC, without --architecture")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theta = load_theta(sources[0], "") if from_hub else convert(*sources, architecture=args.architecture)
    for warning in caught:
        print(f"{args.parser.prog}: {warning.message}", file=sys.stderr)
    theta.save(destination, overwrite=args.overwrite)
    print(f"{destination}: {theta!r} for {theta.architecture}")
    return 0
