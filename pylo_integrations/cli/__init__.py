"""``pylo``: what there is, whether it works here, recipes, pictures and benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor

import torch

from pylo_integrations.cli import bench, catalog, comparison, doctor, evaluate, metatrain, plot, recipe, weights
from pylo_integrations.cli.output import OutputClosed, writing_to_stdout
from pylo_integrations.cli.parser import Command, Family, make_parser

COMMANDS: Mapping[str, Command | Family] = {
    "list": Command("names in the catalogue", catalog.run_list, catalog.add_list_arguments),
    "info": Command("all about one optimizer", catalog.run_info, catalog.add_info_arguments),
    "weights": Family(
        "theta: what is published, what a file holds, other people's files",
        {
            "list": Command("theta in the package, and those that their authors published", weights.run_list),
            "info": Command("all about one theta", weights.run_info, weights.add_info_arguments),
            "convert": Command(
                "make a theta of files in a published layout", weights.run_convert, weights.add_convert_arguments
            ),
        },
    ),
    "doctor": Command("versions, backends, weights, devices: does it work here?", doctor.run, doctor.add_arguments),
    "try": Command(
        "your own training function, with AdamW and with learned optimizers", comparison.run, comparison.add_arguments
    ),
    "recipe": Command("train a real model on real data", recipe.run, recipe.add_arguments),
    "metatrain": Command(
        "train the weights of a learned optimizer on families of tasks", metatrain.run, metatrain.add_arguments
    ),
    "evaluate": Command(
        "learned optimizers against tuned ones on held-out tasks", evaluate.run, evaluate.add_arguments
    ),
    "plot": Command("a picture of what runs logged", plot.run, plot.add_arguments),
    "bench": Command("time and memory of a step beside AdamW's", bench.run, bench.add_arguments),
}
"""By name, in the order of the program's help."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pylo``.

    What the machine or a user's files are to blame for ends the program with one line on stderr; a traceback is a
    defect of this package.

    Returns:
        The exit code: 0 for success, 1 if ``doctor`` found a defect or a measurement failed, 2 for misuse and whatever
        else could not be done, 130 if interrupted, 141 if nobody reads the output any more.
    """
    parser = make_parser(COMMANDS)
    try:
        with writing_to_stdout():
            args = parser.parse_args(argv)
            parser = args.parser
            code: int = args.run(args)
            return code
    except OutputClosed as closed:
        if isinstance(closed.__cause__, BrokenPipeError):  # as of `pylo list | head`, which is nothing to report
            return 141
        parser.error(f"cannot write to stdout: {closed}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if (explanation := _explain(error)) is None:
            raise
        parser.error(explanation)


def _explain(error: Exception) -> str | None:
    """What a user can do something about; None for a defect of this package."""
    if isinstance(error, BrokenExecutor):
        return "a process that this one had started was killed, perhaps for want of memory"
    # torch's allocator for the CPU raises a bare RuntimeError.
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"not enough memory: {error}"
    return str(error) if isinstance(error, (OSError, ValueError)) else None
