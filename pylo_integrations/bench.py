"""``pylo bench``: what a step of a learned optimizer costs beside AdamW's, measured in one run.

Only the optimizer runs: parameters have the shapes of a model, gradients are random and constant. Times of all
contenders are taken in turn in one process, so that a busy machine slows all of them; ratios are medians over the
rounds. Memory is measured in a fresh process for each contender. No model library is needed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

import pylo_integrations
from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.ops.select import Backend
from pylo_integrations.optimizers import ThetaOptimizer
from pylo_integrations.paths import check_destination
from pylo_integrations.rules.base import RuleChoice
from pylo_integrations.sharding.layout import AxisOrder
from pylo_integrations.sharding.pieces import local_part
from pylo_integrations.weights.stand_in import stand_in

P = ParamSpec("P")
T = TypeVar("T")

BASELINES: Mapping[str, dict[str, Any]] = {"adamw_fused": {"fused": True}, "adamw_foreach": {"foreach": True}}
"""Options of ``torch.optim.AdamW`` by the name that results give it."""

# No float16: torch's AdamW divides by zero in it, its epsilon being below the smallest float16.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
MOST_THREADS = 1024
SAMPLE_SECONDS = 0.05
"""A sample repeats steps for about this long, so that the clock's resolution does not matter."""

METHOD = {
    "time": "perf_counter around steps of all contenders in turn, in alternating order, after one warm-up step each; "
    "medians over the rounds, ratios from samples of the same round",
    "threads": "torch.set_num_threads before any other work of a fresh process",
    "peak_temporaries (cpu)": "growth of the peak resident set over the resident set before a step, after a warm-up "
    "step and malloc_trim, in a fresh process per contender (Linux); parameters, gradients and state are not in it",
    "peak_temporaries (cuda)": "torch.cuda.max_memory_allocated over memory_allocated before a step",
}


class ParamShape(NamedTuple):
    """Shape of a parameter, which of its axes is the input, and whether it is an embedding."""

    shape: tuple[int, ...]
    axes: AxisOrder = "out_in"
    embeds: bool = False

    def rule_of(self, spec: OptimizerSpec) -> RuleChoice:
        """Who steps it, where the optimizer groups the parameters of a model."""
        return "adamw" if self.embeds and spec.cls.adamw_embeddings else "learned"


def vit_shapes(
    width: int, depth: int = 12, *, patch: int = 16, image: int = 224, classes: int = 1000
) -> list[ParamShape]:
    """Parameters of a vision transformer as in timm, class token and learned positions included."""
    block = [
        *_vectors(width, 2),
        *_linear(width, 3 * width),
        *_linear(width, width),
        *_vectors(width, 2),
        *_linear(width, 4 * width),
        *_linear(4 * width, width),
    ]
    tokens = (image // patch) ** 2 + 1
    return [
        ParamShape((1, 1, width)),
        ParamShape((1, tokens, width)),
        ParamShape((width, 3, patch, patch)),
        *_vectors(width, 1),
        *(block * depth),
        *_vectors(width, 2),
        *_linear(width, classes),
    ]


def gpt2_shapes(width: int = 768, depth: int = 12, *, vocabulary: int = 50257, context: int = 1024) -> list[ParamShape]:
    """Parameters of GPT-2 as in transformers: Conv1D stores (in, out), the output layer is the token embedding."""
    block = [
        *_vectors(width, 2),
        *_linear(width, 3 * width, "in_out"),
        *_linear(width, width, "in_out"),
        *_vectors(width, 2),
        *_linear(width, 4 * width, "in_out"),
        *_linear(4 * width, width, "in_out"),
    ]
    embeddings = [ParamShape((vocabulary, width), "in_out", True), ParamShape((context, width), "in_out", True)]
    return [*embeddings, *(block * depth), *_vectors(width, 2)]


def llama_shapes(width: int, depth: int, hidden: int, *, vocabulary: int = 32_000) -> list[ParamShape]:
    """Parameters of LLaMA as in transformers: no biases, and an output layer of its own."""
    block = [
        *_vectors(width, 1),
        *[ParamShape((width, width))] * 4,
        *_vectors(width, 1),
        *[ParamShape((hidden, width))] * 2,
        ParamShape((width, hidden)),
    ]
    embedding = ParamShape((vocabulary, width), "in_out", True)
    return [embedding, *(block * depth), *_vectors(width, 1), ParamShape((vocabulary, width))]


def _vectors(width: int, count: int) -> list[ParamShape]:
    return [ParamShape((width,))] * count


def _linear(inputs: int, outputs: int, axes: AxisOrder = "out_in") -> list[ParamShape]:
    weight = (outputs, inputs) if axes == "out_in" else (inputs, outputs)
    return [ParamShape(weight, axes), ParamShape((outputs,))]


SHAPES: Mapping[str, Callable[[], list[ParamShape]]] = {
    "vit_ti": lambda: vit_shapes(192),
    "vit_b16": lambda: vit_shapes(768),
    "gpt2": gpt2_shapes,
    "matrix": lambda: [ParamShape((768, 3072))],
    "many": lambda: [ParamShape((64,))] * 10_000,
    "tiny": lambda: vit_shapes(16, 1, patch=4, image=8, classes=10),
    "llama_1b": lambda: llama_shapes(2048, 22, 5504),
    "llama_7b": lambda: llama_shapes(4096, 32, 11_008),
    "llama_13b": lambda: llama_shapes(5120, 40, 13_824),
    "llama_65b": lambda: llama_shapes(8192, 80, 22_016),
}
"""Parameter shapes by the name that ``--shapes`` takes; ``matrix`` is one layer of a transformer, ``many`` are small
vectors, ``tiny`` is for trying things out. Those of LLaMA (Touvron et al., 2023; 1b is ours) are there to be
simulated."""

DEFAULTS: Mapping[str, Any] = {
    "shapes": ("vit_ti", "vit_b16", "gpt2"),
    "optimizers": ("celo2", "celo", "small_fc_lopt"),
    "threads": (torch.get_num_threads(),),
    "repeats": 5,
    "dtype": "float32",
    "device": "cpu",
    "json": None,
}
"""Options of the benchmark, and what they are if not given."""


def fresh_parameter(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    """A parameter of plausible size."""
    return torch.nn.Parameter(_random(torch.empty(*shape, dtype=dtype, device=device), 0.02))


def fresh_gradient(like: Tensor) -> Tensor:
    """A gradient of plausible size for a plain tensor."""
    return _random(torch.empty_like(like, requires_grad=False), 0.01)


def _random(tensor: Tensor, size: float) -> Tensor:
    return tensor if tensor.is_meta else tensor.normal_(0, size)


@dataclass(frozen=True)
class Setting:
    """What all contenders of a table share; names only, so that it travels between processes."""

    shapes: str
    dtype: str
    device: str
    threads: int

    def parameters(self) -> list[tuple[Tensor, ParamShape]]:
        """Fresh parameters with gradients."""
        torch.manual_seed(0)
        made: list[tuple[Tensor, ParamShape]] = []
        for kind in SHAPES[self.shapes]():
            param = fresh_parameter(kind.shape, DTYPES[self.dtype], self.device)
            param.grad = fresh_gradient(param)
            made.append((param, kind))
        return made

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def make_contender(
    name: str, parameters: Sequence[tuple[Tensor, ParamShape]], **options: Any
) -> tuple[Optimizer, Callable[[], Any]]:
    """An optimizer over ``parameters`` and the call that steps it.

    Args:
        name: A key of :data:`BASELINES` or a catalogue name, which may be followed by a colon and a backend.
        parameters: With gradients; contenders may share them, as no step's cost depends on values.
        **options: Of learned optimizers.
    """
    if name in BASELINES:
        baseline = AdamW([param for param, _ in parameters], lr=1e-4, **BASELINES[name])
        return baseline, baseline.step
    name, _, backend = name.partition(":")
    spec = get_optimizer_info(name)
    members: dict[tuple[AxisOrder, RuleChoice], list[Tensor]] = {}
    for param, kind in parameters:
        members.setdefault((kind.axes, kind.rule_of(spec)), []).append(param)
    groups = [{"params": params, "axes": axes, "rule": rule} for (axes, rule), params in members.items()]
    num_steps = 1_000_000 if spec.needs_horizon else None
    chosen = cast(Backend, backend or "auto")
    # Published weights may not be at hand, and no step's cost depends on their values.
    weights = stand_in(spec.cls.architecture) if issubclass(spec.cls, ThetaOptimizer) else None
    small = spec.lr / 10  # so that parameters stay as they are
    optimizer = create_optimizer(groups, name, small, num_steps=num_steps, backend=chosen, weights=weights, **options)
    loss = torch.ones((), device=parameters[0][0].device) if optimizer.needs_loss else None
    return optimizer, lambda: optimizer.step(loss=loss)


def sample_step_seconds(setting: Setting, names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds per step of every contender, one sample a round; runs in this process."""
    torch.set_num_threads(setting.threads)
    parameters = setting.parameters()
    steps = {name: make_contender(name, parameters)[1] for name in names}
    return sample_in_turn(steps, repeats, setting.synchronize)


def sample_in_turn(
    steps: Mapping[str, Callable[[], Any]],
    repeats: int,
    synchronize: Callable[[], Any],
    agree: Callable[[int], int] = lambda count: count,
) -> dict[str, list[float]]:
    """Seconds of each of ``steps``, one sample a round, in alternating order.

    Args:
        steps: By name.
        repeats: Rounds.
        synchronize: Waits for whatever a step may have left unfinished.
        agree: Makes of the number of steps that a sample should have the number that it gets: the same on every rank.
    """

    def seconds(step: Callable[[], Any], count: int) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronize()
        return (time.perf_counter() - start) / count

    for step in steps.values():
        seconds(step, 1)  # creates state and caches
    lengths = {name: agree(max(1, math.ceil(SAMPLE_SECONDS / seconds(step, 1)))) for name, step in steps.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats):
        for name in steps if round_ % 2 == 0 else reversed(list(steps)):
            samples[name].append(seconds(steps[name], lengths[name]))
    return samples


def measure_memory(setting: Setting, name: str) -> tuple[float, int | None]:
    """``(state bytes per parameter, peak bytes of a step's temporaries or None if unknown here)``.

    Call it in a fresh process: what other work left in the heap would hide temporaries.
    """
    torch.set_num_threads(setting.threads)
    parameters = setting.parameters()
    optimizer, step = make_contender(name, parameters)
    step()
    peak = peak_growth(step, setting.device)
    return state_bytes(optimizer) / sum(param.numel() for param, _ in parameters), peak


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes that this process holds of an optimizer's state tensors."""
    values = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    with torch.no_grad():
        return sum(part.numel() * part.element_size() for part in map(local_part, values))


def peak_growth(work: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes by which memory in use peaks during ``work`` above what it was before; None where that is unknown."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Freed memory that malloc keeps would be reused without raising the resident set.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, proc(5)
    except (OSError, AttributeError, TypeError):  # not Linux, not glibc, or not permitted
        return None
    before = _resident("VmRSS")
    work()
    return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def run_bench(setting: Setting, optimizers: Sequence[str], repeats: int) -> list[dict[str, Any]]:
    """Measure ``optimizers`` and the baselines; one record each, JSON-serialisable, the ratios being paired."""
    names = [*optimizers, *BASELINES]
    samples = in_fresh_process(sample_step_seconds, setting, names, repeats)
    shapes = [shape for shape, *_ in SHAPES[setting.shapes]()]
    numel = sum(math.prod(shape) for shape in shapes)
    records = []
    for name in names:
        state_bytes, peak = in_fresh_process(measure_memory, setting, name)
        median = statistics.median(samples[name])
        ratios = {
            f"times_{base}": statistics.median(a / b for a, b in zip(samples[name], samples[base], strict=True))
            for base in BASELINES
        }
        records.append(
            {
                **asdict(setting),
                "optimizer": name,
                "parameters": numel,
                "tensors": len(shapes),
                "step_seconds": median,
                "step_seconds_samples": samples[name],
                "parameters_per_second": numel / median,
                "ns_per_parameter": 1e9 * median / numel,
                **ratios,
                "peak_temporaries_bytes": peak,
                "state_bytes_per_parameter": state_bytes,
            }
        )
    return records


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The records of one setting as a table for people."""
    first = records[0]
    threads = f"{first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    title = (
        f"{first['shapes']}: {first['parameters']:,} parameters in {first['tensors']} tensors, {first['dtype']}, "
        f"{first['device']}, {threads}, median of {len(first['step_seconds_samples'])}"
    )
    header = (
        "optimizer",
        "ms/step",
        "min..max",
        "Mparam/s",
        "ns/param",
        "x fused",
        "x foreach",
        "peak MiB",
        "state B/p",
    )
    return "\n".join([title, *align([header, *(_row(record) for record in records)])])


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    milliseconds = [1e3 * sample for sample in record["step_seconds_samples"]]
    peak = record["peak_temporaries_bytes"]
    return (
        record["optimizer"],
        f"{1e3 * record['step_seconds']:.4g}",
        f"{min(milliseconds):.4g}..{max(milliseconds):.4g}",
        f"{record['parameters_per_second'] / 1e6:.4g}",
        f"{record['ns_per_parameter']:.3g}",
        f"{record['times_adamw_fused']:.3g}",
        f"{record['times_adamw_foreach']:.3g}",
        "unknown" if peak is None else f"{peak / 2**20:.1f}",
        f"{record['state_bytes_per_parameter']:.4g}",
    )


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware and versions, as far as they can be told."""
    processor = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = models[0] if models else processor
    machine: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pylo_integrations": pylo_integrations.__version__,
    }
    if device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``pylo bench``."""
    parser.add_argument(
        "--shapes",
        type=names_of("shapes", lambda: list(SHAPES)),
        help=f"comma-separated, of {', '.join(SHAPES)} (default: vit_ti,vit_b16,gpt2)",
    )
    parser.add_argument(
        "--optimizers",
        type=names_of("optimizer", _contenders),
        help="comma-separated catalogue names, with :reference, :native or :compile for one backend (default: "
        f"{','.join(DEFAULTS['optimizers'])}; with --distributed small_fc_lopt); AdamW always runs beside them",
    )
    parser.add_argument(
        "--threads",
        type=thread_counts,
        help=f"comma-separated CPU thread counts (default: {torch.get_num_threads()}), each in its own process",
    )
    parser.add_argument("--repeats", type=positive, help="rounds (default: 5)")
    parser.add_argument("--dtype", choices=DTYPES, help="of parameters and gradients (default: float32)")
    parser.add_argument("--device", type=_device, help="cpu or cuda[:index] (default: cpu)")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write everything measured to FILE")


def main(args: argparse.Namespace) -> int:
    """Run the benchmark that the options of :func:`add_arguments` describe."""
    args = resolve(args, DEFAULTS, "without --distributed")
    report = Report(METHOD, args.device)
    for shapes in args.shapes:
        for threads in args.threads:
            records = run_bench(Setting(shapes, args.dtype, args.device, threads), args.optimizers, args.repeats)
            report.add(records, format_table(records))
    report.write(args.json)
    return 0


def resolve(args: argparse.Namespace, defaults: Mapping[str, Any], case: str) -> argparse.Namespace:
    """``args`` with ``defaults`` for what was not given; an option that has none means nothing in this ``case``."""
    own = {"run", "parser", "distributed", "figures"}
    for name, value in vars(args).items():
        if value is not None and name not in own | defaults.keys():
            args.parser.error(f"--{name} means nothing {case}")
    given = {name: value for name, value in vars(args).items() if value is not None}
    return argparse.Namespace(**{**defaults, **given})


class Report:
    """What was found, printed as it comes, and where and how, for those who want it in a file.

    Args:
        method: What the numbers mean, by name.
        device: Where they come from.
    """

    def __init__(self, method: Mapping[str, str], device: str = "cpu") -> None:
        self._content: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["pylo", *sys.argv[1:]]),
            "machine": describe_machine(device),
            "method": dict(method),
            "load_average": {"before": _load_average()},
        }
        self.results: list[Mapping[str, Any]] = []

    def add(self, records: Sequence[Mapping[str, Any]], table: str) -> None:
        """Keep JSON-serialisable records, and print them as a table."""
        self.results += records
        print(table, end="\n\n", flush=True)

    def write(self, path: Path | None) -> None:
        """Write all records to ``path``, if there is one."""
        self._content["load_average"]["after"] = _load_average()
        if path:
            path.write_text(json.dumps({**self._content, "results": self.results}, indent=2) + "\n")
            print(f"written to {path}")


def _load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _contenders() -> list[str]:
    names = list_optimizers()
    backends = [backend for backend in get_args(Backend) if backend != "auto"]
    return names + [f"{name}:{backend}" for name in names for backend in backends]


def names_of(kind: str, known: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """Parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        if unknown := [name for name in names if name not in known()]:
            raise argparse.ArgumentTypeError(f"unknown {kind} {unknown[0]!r}; available: {', '.join(known())}")
        return names

    return parse


def plain(doc: str | None) -> str:
    """A docstring for a terminal, without markup."""
    return re.sub(r"(:\w+:)?(``?)~?(.*?)\2", r"\3", doc or "")


def at_most(most: int) -> Callable[[str], int]:
    """Parser of a positive integer that has an upper bound."""

    def parse(text: str) -> int:
        if not text.isdecimal() or len(text) > 20 or not 1 <= int(text) <= most:
            bound = f" up to {most}" if text.isdecimal() and text.strip("0") else ""
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a positive integer{bound}")
        return int(text)

    return parse


positive = at_most(2**31 - 1)
"""Parse a positive integer."""


def natural(text: str) -> int:
    """Parse a positive integer or 0."""
    return 0 if text == "0" else positive(text)


def counts(text: str, most: int = 2**31 - 1) -> list[int]:
    """Parse comma-separated positive integers."""
    return list(dict.fromkeys(map(at_most(most), text.split(","))))


def thread_counts(text: str) -> list[int]:
    """Parse comma-separated numbers of threads."""
    return counts(text, MOST_THREADS)


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable here: {str(error).splitlines()[0]}") from None
    if not text.startswith(("cpu", "cuda")):
        raise argparse.ArgumentTypeError(f"{text!r}: only cpu and cuda are measured")
    return text


def new_file(text: str) -> Path:
    """Parse the path of a file that can be written; measuring takes long."""
    try:
        check_destination(Path(text))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)
