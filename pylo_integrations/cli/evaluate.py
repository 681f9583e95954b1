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
        metavar="NAME,...",
        help="learned optimizers, each NAME[+split|-split][:WEIGHTS][*FACTOR][@SCHEDULE][+FORMAT]: split= or not, "
        "WEIGHTS as for weights=, FACTOR on the learning rate, SCHEDULE constant, cosine or linear, FORMAT of state "
        "bfloat16 or int8 (default: those whose weights are in the package)",
    )
    parser.add_argument("--output", type=Path, help="folder (default: runs/evaluation, of suite 2 runs/evaluation-2)")
    parser.add_argument("--suite", type=int, choices=(1, 2), default=1, help="of tasks (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        help="comma-separated names of held-out tasks, NAME:WIDTH at another width (default: all of the suite)",
    )
    parser.add_argument(
        "--baselines",
        help="comma-separated: adamw, sgd, muon, nadamw, schedule_free, soap, lion, prodigy (default: of suite 1 the "
        "first three, of suite 2 all; those whose package is not installed are left out)",
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
    output = args.output or Path("runs", "evaluation" if args.suite == 1 else f"evaluation-{args.suite}")
    try:
        if args.report:
            records = evaluation.RunsFile(output / evaluation.RUNS).records
            if not records:
                args.parser.error(f"there are no runs in {output}; leave --report out, or give --output")
        else:
            records = evaluation.evaluate(
                evaluation.parse_contenders(_with_builtin_weights() if names is None else names),
                output,
                tasks=args.tasks.split(",") if args.tasks else tuple(evaluation.SUITES[args.suite]),
                baselines=_baselines(args) if args.tuning_seeds != 0 else (),
                steps=args.steps,
                seeds=args.seeds,
                tuning_seeds=args.tuning_seeds,
                jobs=args.jobs or os.cpu_count() or 1,
            )
        files = evaluation.write_report(records, output, names)
    except evaluation.DataError as error:
        args.parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print("written to", *files)
    return 0


def _baselines(args: argparse.Namespace) -> list[str]:
    """Those asked for, of which those that cannot be run here are left out and told of."""
    from pylo_integrations.evaluation import BASELINES, USUAL, is_available

    names = args.baselines.split(",") if args.baselines else USUAL if args.suite == 1 else BASELINES
    if unknown := [name for name in names if name not in BASELINES]:
        args.parser.error(f"baseline {unknown[0]!r} is unknown; there are {', '.join(BASELINES)}")
    absent = [name for name in names if not is_available(name)]
    for name in absent:
        package = BASELINES[name].package or "a newer torch"
        print(f"{name} is left out: it needs {package} (pip install 'pylo-integrations[evaluation]')", file=sys.stderr)
    return [name for name in names if name not in absent]


def _with_builtin_weights() -> list[str]:
    """Optimizers whose default weights are in the package."""
    defaults = {name: get_optimizer_info(name).weights for name in list_optimizers()}
    return [name for name, weights in defaults.items() if str(weights).startswith("builtin:")]
