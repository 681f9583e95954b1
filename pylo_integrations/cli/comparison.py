"""``pylo try``: a user's own training, with AdamW and with learned optimizers."""

from __future__ import annotations

import argparse
import math
import sys
import traceback
from collections.abc import Sequence
from statistics import fmean

from pylo_integrations.catalog import list_optimizers
from pylo_integrations.cli.arguments import names_of, natural, new_file, positive, rates

_SMOOTHED = 50
"""Points of a curve in the picture, each a mean."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo try``."""
    parser.add_argument(
        "function",
        metavar="MODULE:FUNCTION",
        help="a generator in a module or file.py that takes optimizer_of, calls it with a model, and yields every loss",
    )
    parser.add_argument("--steps", type=positive, default=300, help="of every run (default: 300)")
    parser.add_argument(
        "--optimizers",
        type=names_of("optimizer", list_optimizers),
        default=["pace"],
        metavar="NAME,...",
        help="learned optimizers, as they come (default: pace)",
    )
    parser.add_argument(
        "--adamw",
        type=rates,
        default=[1e-3],
        metavar="LR,...",
        help="AdamW's learning rates, a run for each (default: 0.001)",
    )
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of all optimizers (default: 0.01)")
    parser.add_argument("--seed", type=natural, default=0, help="of every run (default: 0)")
    parser.add_argument("--plot", type=new_file, metavar="FILE", help="also draw the losses")


def run(args: argparse.Namespace) -> int:
    """Run, print the comparison and draw it; the exit code is 0 whoever won, 1 if the function failed."""
    from pylo_integrations import comparison, plot
    from pylo_integrations.plot.axes import check_output

    if not 0 <= args.weight_decay < math.inf:
        args.parser.error(f"--weight-decay={args.weight_decay:g} must be at least 0")
    if args.plot is not None:
        check_output(args.plot)  # not after the runs
    train = comparison.find_function(args.function)
    trials: list[comparison.Trial] = []
    options = {"steps": args.steps, "adamw_lrs": args.adamw, "weight_decay": args.weight_decay, "seed": args.seed}
    failed = False
    try:
        for trial in comparison.compare(train, args.optimizers, **options):
            print(f"{trial.name}: {len(trial.losses)} steps, {trial.seconds * len(trial.losses):.0f} s", flush=True)
            trials.append(trial)
    except comparison.RunFailed as error:
        failed, cause = True, error.__cause__
        assert cause is not None and cause.__traceback__ is not None, "it is raised from another"
        traceback.print_exception(cause.with_traceback(cause.__traceback__.tb_next))  # of their code, without ours
        print(f"{error}: {type(cause).__name__}", file=sys.stderr)
    if trials:
        print(f"\n{comparison.describe(trials)}")
    if args.plot is not None and trials:
        curves = {trial.name: _smoothed(trial.losses) for trial in trials}
        plot.plot_curves([("training loss", "step", curves)], args.plot)
        print(f"picture: {args.plot}")
    return int(failed)


def _smoothed(losses: Sequence[float]) -> dict[int, float]:
    width = max(1, len(losses) // _SMOOTHED)
    return {start + width: fmean(losses[start : start + width]) for start in range(0, len(losses) - width + 1, width)}
