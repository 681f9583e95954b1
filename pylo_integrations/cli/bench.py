"""``pylo bench``: what a step of a learned optimizer costs beside AdamW's, measured in one run.

Only the optimizer runs: parameters have the shapes of a model, gradients are random and constant. Times of all
contenders are taken in turn in one process, so that a busy machine slows all of them; ratios are medians over the
rounds. Memory is measured in a fresh process for each contender. No model library is needed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from pylo_integrations.bench import figures, measure, memory, ranks, simulation, steps, tables
from pylo_integrations.bench.contenders import DTYPES, Setting
from pylo_integrations.bench.report import Report
from pylo_integrations.bench.shapes import SHAPES
from pylo_integrations.bench.strategies import SIMULABLE, STRATEGIES
from pylo_integrations.catalog import list_optimizers
from pylo_integrations.cli.arguments import counts, names_of, new_file, positive
from pylo_integrations.cli.output import plain
from pylo_integrations.formats import FORMATS
from pylo_integrations.ops.select import Backend
from pylo_integrations.plot import PlotError
from pylo_integrations.workers import Workers

MOST_THREADS = 1024

DISTRIBUTED = """\
pylo bench --distributed: what a step of a learned optimizer costs where many ranks train together. measure steps on
real processes of this machine, joined by gloo, one thread each. simulate makes dry runs of any size on one process.
tables writes memory and traffic of well-known models as Markdown, memory their state in every format; both are
computed, nothing is timed.
"""


@dataclass(frozen=True)
class Mode:
    """Something that ``pylo bench`` does.

    Attributes:
        run: Does it, with all its options; returns the exit code.
        case: In which case of the command line, for errors.
        defaults: Its options, and what they are if not given; the others mean nothing.
    """

    run: Callable[[argparse.Namespace], int]
    case: str
    defaults: Mapping[str, Any]

    def resolve(self, args: argparse.Namespace) -> argparse.Namespace:
        """``args`` with defaults for what was not given; an error for what means nothing here."""
        chosen = {"run", "parser", "distributed", "figures"}
        given = {name: value for name, value in vars(args).items() if value is not None}
        for name in given:
            if name not in chosen | self.defaults.keys():
                args.parser.error(f"--{name} means nothing {self.case}")
        return argparse.Namespace(**{**self.defaults, **given})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of all modes."""
    parser.description = plain(__doc__)
    parser.add_argument(
        "--shapes",
        type=names_of("shapes", lambda: list(SHAPES)),
        help=f"comma-separated, of {', '.join(SHAPES)} (default: vit_ti,vit_b16,gpt2)",
    )
    parser.add_argument(
        "--optimizers",
        type=names_of("optimizer", _contenders),
        help="comma-separated catalogue names, with :reference, :native or :compile for one backend, or :bfloat16 or "
        f":int8 for state stored so (default: {','.join(STEPS.defaults['optimizers'])}; with --distributed "
        "small_fc_lopt); AdamW always runs beside them, and beside such states AdamW8bit of torchao and bitsandbytes, "
        "where they are installed",
    )
    parser.add_argument(
        "--threads",
        type=_thread_counts,
        help=f"comma-separated CPU thread counts (default: {torch.get_num_threads()}), each in its own process",
    )
    parser.add_argument("--repeats", type=positive, help="rounds (default: 5)")
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters and gradients (default: float32)")
    parser.add_argument("--device", type=_device, help="cpu or cuda[:index] (default: cpu)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write everything measured to FILE")
    group = parser.add_argument_group("where many ranks train together", description=DISTRIBUTED)
    group.add_argument("--distributed", nargs="?", const="measure", choices=RANKS, help="by default measure")
    group.add_argument(
        "--strategies",
        type=names_of("strategy", lambda: list(STRATEGIES)),
        help=f"comma-separated, of {', '.join(STRATEGIES)} (default: all; simulated: fsdp2)",
    )
    group.add_argument("--ranks", type=counts, help="comma-separated (default: 1,2,4; simulated: 8,64,256,1024)")
    group.add_argument("--plot", type=new_file, metavar="FILE", help="also draw what was simulated into FILE")
    parser.add_argument(
        "--figures",
        nargs="?",
        const=list(figures.SECTIONS),
        type=names_of("figure", lambda: list(figures.SECTIONS)),
        help="what the native kernels are held to instead; comma-separated, of "
        f"{', '.join(figures.SECTIONS)} (default: all)",
    )


def _contenders() -> list[str]:
    names = list_optimizers()
    backends = [backend for backend in get_args(Backend) if backend != "auto"]
    formats = [kind for kind in FORMATS if kind != "float32"]
    return names + [f"{name}:{choice}" for name in names for choice in (*backends, *formats)]


def _thread_counts(text: str) -> list[int]:
    return counts(text, MOST_THREADS)


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable here: {str(error).splitlines()[0]}") from None
    if not text.startswith(("cpu", "cuda")):
        raise argparse.ArgumentTypeError(f"{text!r}: only cpu and cuda are measured")
    return text


def run(args: argparse.Namespace) -> int:
    """Run the mode that the options ask for; the exit code is 1 if a measurement failed."""
    if args.figures is not None and args.distributed is not None:
        args.parser.error("--figures means nothing with --distributed")
    mode = FIGURES if args.figures is not None else RANKS.get(args.distributed, STEPS)
    return mode.run(mode.resolve(args))


def _steps(args: argparse.Namespace) -> int:
    report = Report(measure.METHOD, args.device)
    for reason in steps.compared(args.optimizers)[1]:
        print(reason, file=sys.stderr)
    for shapes, threads in itertools.product(args.shapes, args.threads):
        setting = Setting(shapes, args.dtype, args.device, threads)
        records = steps.run_bench(setting, args.optimizers, args.repeats)
        report.add(records, steps.format_table(records))
    report.write(args.json)
    return 0


def _measure(args: argparse.Namespace) -> int:
    cases = _cases(args)
    report, failed = Report(ranks.MEASURED), False
    workers = Workers()
    try:
        for shapes, strategy, world in cases:
            try:
                records = ranks.measure(workers, shapes, args.dtype, strategy, world, args.optimizers, args.repeats)
            except RuntimeError as error:
                failed = True
                print(f"{shapes}, {strategy} on {world} ranks failed: {error}", file=sys.stderr)
            else:
                report.add(records, ranks.format_measured(records))
    finally:
        workers.close()
    report.write(args.json)
    return int(failed)


def _simulate(args: argparse.Namespace) -> int:
    cases = _cases(args)
    if unknown := [name for name in args.strategies if name not in SIMULABLE]:
        args.parser.error(f"strategy {unknown[0]!r} can be measured, but not simulated")
    if chosen := [name for name in args.optimizers if ":" in name]:
        args.parser.error(
            f"{chosen[0]!r} names a backend or a format of state, but a simulation has neither: leave it out"
        )
    report = Report(simulation.SIMULATED)
    found = [
        record
        for shapes, strategy, world in cases
        for record in simulation.simulate(shapes, args.dtype, strategy, world, args.optimizers)
    ]
    for optimizer, strategy in itertools.product(args.optimizers, args.strategies):
        if records := [each for each in found if (each["optimizer"], each["strategy"]) == (optimizer, strategy)]:
            report.add(records, simulation.format_simulated(records))
    report.write(args.json)
    if args.plot:
        try:
            simulation.draw(report.results, args.plot)
        except PlotError as error:
            args.parser.error(str(error))
        print(f"written to {args.plot}")
    return 0


def _cases(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """Shapes, strategy and number of ranks of all that is asked for and makes sense."""
    cases = [
        (shapes, strategy, world)
        for shapes, strategy, world in itertools.product(args.shapes, args.strategies, args.ranks)
        if STRATEGIES[strategy].allows(world)
    ]
    if not cases:
        args.parser.error(
            f"none of the strategies {', '.join(args.strategies)} is for {' or '.join(map(str, args.ranks))} ranks"
        )
    return cases


def _tables(args: argparse.Namespace) -> int:
    print(tables.tables(), end="")
    return 0


def _memory(args: argparse.Namespace) -> int:
    print(memory.memory_tables(), end="")
    return 0


def _figures(args: argparse.Namespace) -> int:
    report = Report(figures.METHOD)
    for section in args.figures:
        found = figures.SECTIONS[section](args.repeats)
        report.add([{"section": section, **asdict(figure)} for figure in found], figures.format_figures(found))
    report.write(args.json)
    return 0


STEPS = Mode(
    _steps,
    "without --distributed",
    {
        "shapes": ("vit_ti", "vit_b16", "gpt2"),
        "optimizers": ("celo2", "celo", "small_fc_lopt"),
        "threads": (torch.get_num_threads(),),
        "repeats": 5,
        "dtype": "float32",
        "device": "cpu",
        "json": None,
    },
)
FIGURES = Mode(_figures, "with --figures", {"repeats": 5, "json": None})
RANKS = {
    "measure": Mode(
        _measure,
        "with --distributed measure",
        {
            "shapes": ("vit_ti",),
            "optimizers": ("small_fc_lopt",),
            "strategies": tuple(STRATEGIES),
            "ranks": (1, 2, 4),
            "repeats": 5,
            "dtype": "float32",
            "json": None,
        },
    ),
    "simulate": Mode(
        _simulate,
        "with --distributed simulate",
        {
            "shapes": ("llama_1b", "llama_7b", "llama_13b", "llama_65b"),
            "optimizers": ("small_fc_lopt",),
            "strategies": ("fsdp2",),
            "ranks": (8, 64, 256, 1024),
            "dtype": "float32",
            "json": None,
            "plot": None,
        },
    ),
    "tables": Mode(_tables, "with --distributed tables", {}),
    "memory": Mode(_memory, "with --distributed memory", {}),
}
"""What ``--distributed`` takes."""
