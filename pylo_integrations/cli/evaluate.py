"""``pylo evaluate``: runs on held-out tasks, and the report of them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.cli.arguments import at_most, counts, natural, positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo evaluate``."""
    parser.add_argument(
        "--optimizers",
        metavar="NAME[:WEIGHTS][@SCHEDULE],...",
        help="learned optimizers; WEIGHTS as for weights=, SCHEDULE constant, cosine or linear "
        "(default: those whose weights are in the package)",
    )
    parser.add_argument("--output", type=Path, default=Path("runs", "evaluation"), help="folder (default: %(default)s)")
    parser.add_argument(
        "--tasks", help="comma-separated names of held-out tasks, NAME:WIDTH at another width (default: all)"
    )
    parser.add_argument("--steps", type=counts, default=[1000], help="comma-separated horizons (default: 1000)")
    parser.add_argument("--seeds", type=at_most(1000), default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--tuning-seeds",
        type=natural,
        help="seeds of the whole grid of the baselines (default: all; 0: no baselines)",
    )
    parser.add_argument("--jobs", type=positive, help="processes of one thread each (default: one a core)")
    parser.add_argument("--report", action="store_true", help="run nothing; only write the report of what has been run")


def run(args: argparse.Namespace) -> int:
    """Run what has not been run yet, and write the report; the exit code is 130 if interrupted."""
    from pylo_integrations import evaluation  # imports metatrain, see there

    names = args.optimizers.split(",") if args.optimizers else None
    try:
        if args.report:
            records = evaluation.RunsFile(args.output / evaluation.RUNS).records
            if not records:
                args.parser.error(f"there are no runs in {args.output}; leave --report out, or give --output")
        else:
            records = evaluation.evaluate(
                evaluation.parse_contenders(_with_builtin_weights() if names is None else names),
                args.output,
                tasks=args.tasks.split(",") if args.tasks else tuple(evaluation.TASKS),
                steps=args.steps,
                seeds=args.seeds,
                tuning_seeds=args.tuning_seeds,
                jobs=args.jobs or os.cpu_count() or 1,
            )
        files = evaluation.write_report(records, args.output, names)
    except evaluation.DataError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("written to", *files)
    return 0


def _with_builtin_weights() -> list[str]:
    """Optimizers whose default weights are in the package."""
    defaults = {name: get_optimizer_info(name).weights for name in list_optimizers()}
    return [name for name, weights in defaults.items() if str(weights).startswith("builtin:")]
