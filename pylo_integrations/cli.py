"""``pylo``: what there is, whether it works here, recipes, pictures and benchmarks."""

from __future__ import annotations

import argparse
import inspect
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch
from packaging.requirements import Requirement

import pylo_integrations
from pylo_integrations import bench, bench_distributed, bench_figures, plot
from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.ops.select import native_report
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.options import OPTIONS
from pylo_integrations.paths import check_file
from pylo_integrations.weights import builtin_names, load_theta
from pylo_integrations.weights.convert import OPTIMIZERS, convert
from pylo_integrations.weights.hub import PUBLISHED

DISTRIBUTION = "pylo-integrations"
USER_EXTRAS = ("hf", "lightning", "accelerate", "recipes")
_LONGEST_LINE = 2000
_LONGEST_VALUE = 60  # of an entry of theta's record, in what people read


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pylo``.

    What the machine or a user's files are to blame for ends the program with one line on stderr; a traceback is a
    defect of this package.

    Returns:
        The exit code: 0 for success, 1 if ``doctor`` found a defect or a measurement failed, 2 for misuse and whatever
        else could not be done, 130 if interrupted, 141 if nobody reads the output any more.
    """
    parser = _make_parser()
    try:
        with _writing_to_stdout():
            args = parser.parse_args(argv)
            parser = args.parser
            code: int = args.run(args)
            return code
    except _OutputClosed as closed:
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


class _OutputClosed(Exception):
    """Stdout is closed or full."""


@contextmanager
def _writing_to_stdout() -> Iterator[None]:
    """Raises :class:`_OutputClosed` if what was printed within cannot be written.

    Printing only fills a buffer. The interpreter would flush it when it exits, and print a traceback.
    """
    if sys.stdout is None:
        raise _OutputClosed("it is closed")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        yield
    except BrokenPipeError as error:  # where there is no buffer
        raise _OutputClosed(error.strerror) from error
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:
            if sys.stdout is sys.__stdout__:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise _OutputClosed(error.strerror) from error


def _on_one_line(text: str) -> str:
    """A message in one line, whatever a file or an argument brought into it."""
    line = _printable(" ".join(text.split()))
    return line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..."


def _printable(text: str) -> str:
    """Without what would steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_on_one_line(message)}\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser("pylo", description=pylo_integrations.__doc__)
    parser.add_argument("--version", action="version", version=f"%(prog)s {pylo_integrations.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("list", help="names in the catalogue")
    command.add_argument("filter", nargs="?", default="", help="part of a name, or a pattern with * ? [")
    command.set_defaults(run=_list, parser=command)

    command = commands.add_parser("info", help="all about one optimizer")
    command.add_argument("spec", type=_spec, metavar="NAME")
    command.set_defaults(run=_info, parser=command)

    group = commands.add_parser("weights", help="theta: what is published, what a file holds, other people's files")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("list", help="theta in the package, and those that their authors published")
    action.set_defaults(run=_weights_list, parser=action)
    action = actions.add_parser("info", help="all about one theta")
    action.add_argument("weights", metavar="FILE", help="a file, builtin:<name> or hub:<owner>/<repo>[@revision]")
    action.add_argument("--json", action="store_true", help="print all of it for programs, not some for people")
    action.set_defaults(run=_weights_info, parser=action)
    action = actions.add_parser("convert", help="make a theta of files in a published layout")
    action.add_argument("sources", nargs="+", metavar="SRC", help="a file, a folder or hub:<owner>/<repo>[@revision]")
    action.add_argument("destination", metavar="DST", type=Path, help="the .safetensors file to write")
    action.add_argument(
        "--architecture",
        choices=OPTIMIZERS,
        metavar="NAME",
        help=f"where the arrays do not tell: {', '.join(OPTIMIZERS)}",
    )
    action.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    action.set_defaults(run=_weights_convert, parser=action)

    command = commands.add_parser("doctor", help="versions, backends, weights, devices: does it work here?")
    command.set_defaults(run=_doctor, parser=command)

    command = commands.add_parser("recipe", help="train a real model on real data")
    command.add_argument("name", choices=sorted(_recipes()), help="followed by the recipe's own options")
    command.add_argument("options", nargs=argparse.REMAINDER, help="passed to the recipe, e.g. --help")
    command.set_defaults(run=_recipe, parser=command)

    command = commands.add_parser("metatrain", help="train the weights of a learned optimizer on families of tasks")
    command.add_argument("config", metavar="CONFIG", help=f"a YAML file, or one of {', '.join(_metatrain_configs())}")
    command.add_argument("--output", type=Path, help="folder of the run; by default runs/metatrain/<CONFIG>")
    command.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if it has one")
    command.add_argument("--iterations", type=bench.natural, metavar="N", help="stop after N more")
    command.add_argument("--seed", type=int, help="in place of the config's")
    command.add_argument("--device", help="in place of the config's")
    command.add_argument("--threads", type=int, help="in place of the config's")
    command.set_defaults(run=_metatrain, parser=command)

    command = commands.add_parser("evaluate", help="learned optimizers against tuned ones on held-out tasks")
    command.add_argument(
        "--optimizers",
        metavar="NAME[:WEIGHTS][@SCHEDULE],...",
        help="learned optimizers; WEIGHTS as for weights=, SCHEDULE constant, cosine or linear "
        "(default: those whose weights are in the package)",
    )
    command.add_argument(
        "--output", type=Path, default=Path("runs", "evaluation"), help="folder (default: %(default)s)"
    )
    command.add_argument(
        "--tasks", help="comma-separated names of held-out tasks, NAME:WIDTH at another width (default: all)"
    )
    command.add_argument("--steps", type=bench.counts, default=[1000], help="comma-separated horizons (default: 1000)")
    command.add_argument("--seeds", type=bench.at_most(1000), default=3, help="how many (default: %(default)s)")
    command.add_argument(
        "--tuning-seeds",
        type=bench.natural,
        help="seeds of the whole grid of the baselines (default: all; 0: no baselines)",
    )
    command.add_argument("--jobs", type=bench.positive, help="processes of one thread each (default: one a core)")
    command.add_argument(
        "--report", action="store_true", help="run nothing; only write the report of what has been run"
    )
    command.set_defaults(run=_evaluate, parser=command)

    command = commands.add_parser("plot", help="a picture of what runs logged", description=bench.plain(plot.__doc__))
    command.add_argument("path", type=Path, metavar="RUN", help="folder of one or more runs, or a log file")
    command.add_argument("--output", type=Path, help="picture to write; by default plot.png in the folder")
    command.set_defaults(run=_plot, parser=command)

    command = commands.add_parser(
        "bench", help="time and memory of a step beside AdamW's", description=bench.plain(bench.__doc__)
    )
    bench.add_arguments(command)
    bench_distributed.add_arguments(command)
    bench_figures.add_arguments(command)
    return parser


# -- list, info ----------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    names = list_optimizers(args.filter)
    if not names:
        args.parser.error(f"no optimizer matches {args.filter!r}; there are {', '.join(list_optimizers())}")
    width = max(map(len, names))
    for name in names:
        print(f"{name:{width}}  {get_optimizer_info(name).description}")
    return 0


def _spec(name: str) -> OptimizerSpec:
    try:
        return get_optimizer_info(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _info(args: argparse.Namespace) -> int:
    spec: OptimizerSpec = args.spec
    needs = [need for need, needed in (("the loss", spec.needs_loss), ("num_steps", spec.needs_horizon)) if needed]
    rows = [
        ("name", spec.name),
        ("is", spec.description),
        ("class", f"{spec.cls.__module__}.{spec.cls.__qualname__}"),
        ("needs", " and ".join(needs) or "gradients only"),
    ]
    if spec.wants_schedule:
        rows.append(("wants", "a learning rate that falls to zero over the run: give it a scheduler"))
    rows += _describe_theta(spec)
    rows.append(("options", f"of create_optimizer(model, {spec.name!r}, ...), with their defaults"))
    rows += [(f"  {name}", text) for name, text in _describe_options(spec).items()]
    rows.append(("of a group", ", ".join(OPTIONS)))
    _print_table(rows)
    return 0


def _describe_options(spec: OptimizerSpec) -> dict[str, str]:
    """Every keyword argument that the optimizer can be created with, and its default."""
    own, common = inspect.signature(spec.cls).parameters, inspect.signature(create_optimizer).parameters
    defaults = {name: own[name].default for name in spec.options}
    # Of these the entry tells, where they are not given.
    defaults |= {"lr": spec.lr, "weight_decay": spec.weight_decay, "max_grad_norm": spec.cls.default_max_grad_norm}
    defaults |= {"weights": getattr(spec.cls, "default_weights", None)} | dict(spec.defaults)
    defaults |= {
        name: option.default
        for name, option in common.items()
        if option.kind is option.KEYWORD_ONLY and name not in spec.options
    }
    meanings = {"step_mult": "theta's", "exp_mult": "theta's", "max_grad_norm": "no clipping", "weights": "needed"}
    meanings |= {"num_steps": "needed"} if spec.needs_horizon else {}
    return {
        name: f"None ({meanings[name]})" if default is None and name in meanings else repr(default)
        for name, default in defaults.items()
        if name in own or name == "telemetry"
    }


def _describe_theta(spec: OptimizerSpec) -> list[tuple[str, str]]:
    try:
        theta = _on_one_parameter(spec)[1].theta
    except (_NotDownloaded, FileNotFoundError) as absent:
        return [("weights", str(absent))]
    if theta is None:
        return [("weights", "none")]
    return [
        ("weights", f"{theta.name}, {theta.architecture}, sha256 {theta.sha256[:12]}"),
        ("  from", theta.provenance),
        ("  licence", theta.licence or "unknown"),
    ]


class _NotDownloaded(Exception):
    """The weights of an optimizer would have to be downloaded first, which nobody asked for."""


def _on_one_parameter(spec: OptimizerSpec) -> tuple[torch.Tensor, LearnedOptimizer]:
    """One parameter and an optimizer of it; raises :class:`_NotDownloaded` rather than use the network."""
    weights = spec.defaults.get("weights", getattr(spec.cls, "default_weights", None))
    if isinstance(weights, str) and weights.startswith("hub:"):
        try:
            weights = load_theta(weights, spec.name, local_files_only=True)
        except FileNotFoundError:
            raise _NotDownloaded(f"{weights}, not on this machine; using it downloads it") from None
    param = torch.nn.Parameter(torch.ones(2, 3))
    param.grad = torch.ones_like(param)
    horizon = 1 if spec.needs_horizon else None
    return param, create_optimizer([param], spec.name, weights=weights, num_steps=horizon)


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    """Labels and texts in two columns; on a terminal, long texts are wrapped to its width."""
    width = max(len(label) for label, _ in rows)
    room = shutil.get_terminal_size().columns - width - 2 if sys.stdout.isatty() else 0
    for label, text in rows:
        lines = textwrap.wrap(_printable(text), room, break_on_hyphens=False) if room > 20 else [_printable(text)]
        for first, line in zip([label, *[""] * len(lines)], lines or [""], strict=False):
            print(f"{_printable(first):{width}}  {line}".rstrip())


# -- weights -------------------------------------------------------------------------------------------------------


def _weights_list(args: argparse.Namespace) -> int:
    rows = [("in the package", "")]
    for name in builtin_names():
        theta = load_theta(f"builtin:{name}", name)
        users = [
            user
            for user in list_optimizers()
            if getattr(get_optimizer_info(user).cls, "default_weights", None) == f"builtin:{name}"
        ]
        use = f"default of {', '.join(users)}" if users else f"for {theta.name}"
        rows.append((f"  builtin:{name}", f"{theta.provenance}; {use}"))
    rows.append(("published by their authors", ""))
    for entry in PUBLISHED:
        repositories = " + ".join(f"hub:{part.name}" for part in entry.repositories)
        use = f"for {entry.optimizer}" if entry.optimizer else "no rule here"
        rows.append((f"  {entry.name}", f"{entry.description}; {use}"))
        rows.append(("", f"  {repositories} ({entry.repositories[0].filename})"))
    _print_table(rows)
    return 0


def _weights_info(args: argparse.Namespace) -> int:
    theta = load_theta(args.weights, "")
    if args.json:
        record = {field: getattr(theta, field) for field in ("name", "architecture", "sha256", "provenance", "licence")}
        record |= {"hyper": dict(theta.hyper), "training": dict(theta.training)}
        record["arrays"] = {name: list(array.shape) for name, array in theta.arrays.items()}
        print(json.dumps(record, indent=2))
        return 0
    training = _flat(theta.training)
    _print_table(
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


def _weights_convert(args: argparse.Namespace) -> int:
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


# -- doctor --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    label: str
    text: str
    broken: bool = False


def _doctor(args: argparse.Namespace) -> int:
    findings = [*_versions(), *_devices(), *_builtin_weights(), *_optimizers(), *_extras()]
    _print_table([(finding.label, f"{'BROKEN: ' * finding.broken}{finding.text}") for finding in findings])
    broken = sum(finding.broken for finding in findings)
    print(f"\n{broken} defect{'s' * (broken > 1)} found" if broken else "\neverything works")
    return 1 if broken else 0


def _versions() -> Iterator[_Finding]:
    yield _Finding(DISTRIBUTION, f"{pylo_integrations.__version__} in {Path(__file__).parent}")
    yield _Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield _Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")
    try:
        needed = list(_requirements(""))
    except metadata.PackageNotFoundError:
        yield _Finding("metadata", "none: runs from source without being installed, so extras are unknown")
        return
    for requirement in needed:
        if problem := _problem(requirement):
            yield _Finding(requirement.name, problem, broken=True)


def _devices() -> Iterator[_Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
    yield _Finding("devices", ", ".join(["cpu", *gpus]))
    yield _Finding("backends", "; ".join(("reference: torch on any device", f"native: {native_report()}")))


def _builtin_weights() -> Iterator[_Finding]:
    for name in builtin_names():
        try:
            theta = load_theta(f"builtin:{name}", name)
        except (ValueError, OSError) as error:
            yield _Finding(f"builtin:{name}", str(error), broken=True)
        else:
            yield _Finding(f"builtin:{name}", f"sha256 {theta.sha256[:12]} verified; {theta.provenance}")


def _optimizers() -> Iterator[_Finding]:
    for name in list_optimizers():
        spec = get_optimizer_info(name)
        try:
            param, optimizer = _on_one_parameter(spec)
            before = param.detach().clone()
            optimizer.step(loss=1.0)
            moved = bool(param.isfinite().all()) and not torch.equal(param, before)
        except (_NotDownloaded, FileNotFoundError) as absent:
            yield _Finding(name, f"not tried, for want of weights: {absent}")
        except Exception as error:  # whatever it is, a report of it is what doctor is for
            yield _Finding(name, f"{type(error).__name__}: {error}", broken=True)
        else:
            yield _Finding(name, "takes a step" if moved else "a step does not change a parameter", broken=not moved)


def _extras() -> Iterator[_Finding]:
    try:
        extras = {extra: list(_requirements(extra)) for extra in USER_EXTRAS}
    except metadata.PackageNotFoundError:
        return
    for extra, requirements in extras.items():
        absent = [requirement for requirement in requirements if _version(requirement) is None]
        if absent:
            names = ", ".join(str(requirement.name) for requirement in absent)
            yield _Finding(f"[{extra}]", f"not installed (lacks {names}): {_remedy(extra)}")
        elif problems := [problem for requirement in requirements if (problem := _problem(requirement))]:
            yield _Finding(f"[{extra}]", "; ".join(problems), broken=True)
        else:
            yield _Finding(f"[{extra}]", ", ".join(f"{r.name} {_version(r)}" for r in requirements))


def _requirements(extra: str) -> Iterator[Requirement]:
    """What an extra (or, for ``""``, the package itself) requires beyond the package, from the installed metadata."""
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always if not extra else not always and _applies(requirement, extra):
            if requirement.name == DISTRIBUTION:
                for nested in sorted(requirement.extras):
                    yield from _requirements(nested)
            else:
                yield requirement


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def _version(requirement: Requirement) -> str | None:
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def _problem(requirement: Requirement) -> str:
    version = _version(requirement)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is installed, {requirement.specifier} is needed"
    return ""


def _remedy(extra: str) -> str:
    return f"pip install '{DISTRIBUTION}[{extra}]', or in a clone: pip install -e '.[{extra}]'"


# -- recipe --------------------------------------------------------------------------------------------------------


def _recipes_root() -> Path:
    """The recipes inside an installed wheel, else those beside the package in a clone."""
    package = Path(__file__).parent
    return next((root for root in (package / "_recipes", package.parent / "recipes") if root.is_dir()), package)


def _recipes() -> dict[str, Path]:
    """Scripts by recipe name."""
    return {script.parent.name: script for script in _recipes_root().glob("*/train.py")}


def _recipe(args: argparse.Namespace) -> Any:
    try:
        problems = [problem for requirement in _requirements("recipes") if (problem := _problem(requirement))]
    except metadata.PackageNotFoundError:
        problems = []  # not installed: the recipe's own imports will tell
    if problems:
        args.parser.error(f"recipe {args.name} cannot run: {'; '.join(problems)}. {_remedy('recipes')}")
    # A process of its own, as if the script had been called: recipes fork data loaders and print what they like.
    code = subprocess.run([sys.executable, str(_recipes()[args.name]), *args.options]).returncode
    return code if code >= 0 else 128 - code  # as a shell tells of a signal


# -- metatrain -----------------------------------------------------------------------------------------------------


def _metatrain_configs() -> dict[str, Path]:
    """Packaged configs by name."""
    return {path.stem: path for path in sorted(_recipes_root().glob("metatrain/*.yaml"))}


def _metatrain(args: argparse.Namespace) -> int:
    from pylo_integrations import metatrain  # torch.func is slow to import, and no other command needs it

    configs = _metatrain_configs()
    path = configs.get(args.config, Path(args.config))
    output = args.output or Path("runs", "metatrain", path.stem)
    overrides = {name: getattr(args, name) for name in ("seed", "device", "threads")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    try:
        check_file(path, "config")
    except FileNotFoundError:
        args.parser.error(f"{path}: No such file; the configs in the package are {', '.join(configs)}")
    with _launched_ranks() as leads:
        try:
            config = metatrain.load_config(path, **overrides)
            trainer = metatrain.MetaTrainer(config, output, resume=args.resume)
        except metatrain.ResumeError as error:
            args.parser.error(f"{error} (--resume, --output)")
        try:
            trainer.run(args.iterations)
        except metatrain.DataError as error:
            args.parser.error(str(error))
        except KeyboardInterrupt:
            print(f"interrupted; go on with: pylo metatrain {args.config} --output {output} --resume", file=sys.stderr)
            return 130
    if leads:
        print(f"theta and logs are in {output}")
    return 0


@contextmanager
def _launched_ranks() -> Iterator[bool]:
    """Join the ranks that torchrun launched, if it did; tells whether this process leads."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield True
        return
    dist.init_process_group("gloo")  # what is exchanged is small, and on the CPU
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


# -- evaluate ------------------------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace) -> int:
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
    defaults = {name: getattr(get_optimizer_info(name).cls, "default_weights", None) for name in list_optimizers()}
    return [name for name, weights in defaults.items() if str(weights).startswith("builtin:")]


# -- plot ----------------------------------------------------------------------------------------------------------


def _plot(args: argparse.Namespace) -> int:
    output = args.output or (args.path if args.path.is_dir() else args.path.parent) / "plot.png"
    for note in plot.plot(args.path, output):
        print(note)
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
