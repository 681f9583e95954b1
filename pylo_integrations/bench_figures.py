"""``pylo bench --figures``: what the native CPU kernels are held to, measured in one run.

Every figure comes with the bound that it must keep and the one that it aims at, and is measured beside whatever it is
compared with: steps in turn in one process, and so is the loop that tells the peak of a core.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from pylo_integrations import bench, bench_distributed
from pylo_integrations.bench import Setting, make_contender
from pylo_integrations.bench_naive import NaiveSmallFC
from pylo_integrations.ops import loader
from pylo_integrations.optimizers import SmallFCLOpt
from pylo_integrations.rules.small_fc import SmallFC
from pylo_integrations.weights.theta import Theta

MULTIPLY_ADDS = 16 * 32 + 32 * 32 + 32 * 2
"""Of a parameter in small_fc_lopt's network, once what is constant along an axis or in a step is folded."""

PEAK_ROUNDS = 1_000_000
NATIVE, REFERENCE, NAIVE, PEAK = "small_fc_lopt:native", "small_fc_lopt:reference", "naive", "peak"

METHOD = {
    "naive": "small_fc_lopt as its formulas read, tensor by tensor in eager torch: bench_naive.py",
    "rates": "every rule in a process of its own",
    "share of the peak": f"{MULTIPLY_ADDS} multiply-adds a parameter over the time of a whole step, to the rate of a "
    "loop of independent multiply-adds in registers, sampled in the same rounds",
    "error": "largest difference to the update in float64 from the same float32 numbers, after three steps, to the "
    "largest update, taken with a learning rate that makes it much larger than the parameters",
    "scaling": "medians of processes of their own, one for each number of threads",
} | bench.METHOD


@dataclass(frozen=True)
class Figure:
    """Something measured, and its bounds.

    Attributes:
        name: What it is.
        value: As measured; None if it cannot be told here.
        unit: Of the value and the bounds.
        must: The bound; None for a figure that has none.
        aim: What would be better yet.
        at_most: Whether the bounds are from above.
    """

    name: str
    value: float | None
    unit: str
    must: float | None = None
    aim: float | None = None
    at_most: bool = False

    def keeps(self, bound: float | None) -> bool | None:
        """Whether the value is on the right side of a bound; None without either."""
        if bound is None or self.value is None:
            return None
        return self.value <= bound if self.at_most else self.value >= bound


# -- measurements ------------------------------------------------------------------------------------------------------


def sample_kernel(names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step on ``matrix`` of contenders, the naive code and the peak loop among them; on one thread."""
    torch.set_num_threads(1)
    parameters = Setting("matrix", "float32", "cpu", 1).parameters()

    def contender(name: str) -> Callable[[], Any]:
        if name == PEAK:
            library = _library()
            return lambda: library.multiply_adds(PEAK_ROUNDS)
        if name == NAIVE:
            return NaiveSmallFC([param for param, _ in parameters], small_fc_rule(_theta()), 1e-4).step
        return make_contender(name, parameters)[1]

    return bench.sample_in_turn({name: contender(name) for name in names}, repeats, lambda: None)


def kernel(repeats: int) -> list[Figure]:
    """One matrix on one thread: against other code, the core's peak and float64."""
    others, peak = (
        bench.in_fresh_process(sample_kernel, [NATIVE, *names], repeats) for names in ((REFERENCE, NAIVE), (PEAK,))
    )
    made = _library().multiply_adds(1) * PEAK_ROUNDS

    def ratio(samples: Mapping[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(samples[name], samples[NATIVE], strict=True))

    share = MULTIPLY_ADDS * _numel("matrix") / made * ratio(peak, PEAK)
    return [
        Figure("small_fc_lopt, 768 x 3072, 1 thread", 1e3 * statistics.median(peak[NATIVE]), "ms"),
        Figure("  the reference backend takes", ratio(others, REFERENCE), "times as long"),
        Figure("  naive eager code takes", ratio(others, NAIVE), "times as long", 20, 25),
        Figure("  a core's peak", 2e-9 * made / statistics.median(peak[PEAK]), "GFLOP/s"),
        Figure("  share of it, whole step", 100 * share, "%", 70, 85),
        Figure("  error of an update", bench.in_fresh_process(update_error), "of the largest", 1e-6, at_most=True),
    ]


RATES: Mapping[str, tuple[float | None, float | None]] = {
    "velo": (100, 180),
    "celo": (None, None),
    "celo_adam": (None, None),
    "celo2": (None, None),
}
"""Bounds on the rates of rules, in millions of parameters a second."""


def rules(repeats: int) -> list[Figure]:
    """Rates of the other rules on one core."""
    figures = []
    # celo2's time is that of torch's matrix products, whole models of which would take minutes.
    for shapes, rules_ in (("matrix", list(RATES)), ("vit_b16", ["velo", "celo", "celo_adam"])):
        setting = Setting(shapes, "float32", "cpu", 1)
        for rule in rules_:
            name = f"{rule}:native"
            samples = bench.in_fresh_process(bench.sample_step_seconds, setting, [name], repeats)
            rate = 1e-6 * _numel(shapes) / statistics.median(samples[name])
            figures.append(Figure(f"{rule}, {shapes}, 1 thread", rate, "Mparam/s", *RATES[rule]))
    return figures


def models(repeats: int) -> list[Figure]:
    """Whole models on one thread and on two."""
    figures = []
    for shapes in ("vit_b16", "gpt2"):
        seconds = []
        for threads in (1, 2):
            setting = Setting(shapes, "float32", "cpu", threads)
            samples = bench.in_fresh_process(bench.sample_step_seconds, setting, [NATIVE], repeats)
            seconds.append(statistics.median(samples[NATIVE]))
            figures.append(Figure(f"small_fc_lopt, {shapes}, {threads} thread(s)", seconds[-1], "s"))
        figures.append(Figure("  speed-up on 2 threads", seconds[0] / seconds[1], "times", 1.8, 1.95))
    return figures


def many(repeats: int) -> list[Figure]:
    """Many small tensors."""
    setting, names = Setting("many", "float32", "cpu", 1), [NATIVE, *bench.BASELINES]
    samples = bench.in_fresh_process(bench.sample_step_seconds, setting, names, repeats)
    pairs = zip(samples[NATIVE], samples["adamw_foreach"], strict=True)
    return [
        Figure("small_fc_lopt, 10 000 tensors of 64, 1 thread", 1e3 * statistics.median(samples[NATIVE]), "ms"),
        Figure("  AdamW, foreach", 1e3 * statistics.median(samples["adamw_foreach"]), "ms"),
        Figure("  AdamW, fused", 1e3 * statistics.median(samples["adamw_fused"]), "ms"),
        Figure("  to AdamW, foreach", statistics.median(a / b for a, b in pairs), "times", 10, 3, at_most=True),
    ]


def memory(repeats: int) -> list[Figure]:
    """Peak temporaries of a step."""
    figures = []
    for name, shapes in (("small_fc_lopt", "matrix"), ("small_fc_lopt", "vit_b16"), ("velo", "vit_b16")):
        setting = Setting(shapes, "float32", "cpu", 1)
        _, peak = bench.in_fresh_process(bench.measure_memory, setting, f"{name}:native")
        value = None if peak is None else peak / 2**20
        figures.append(Figure(f"{name}, {shapes}, peak temporaries", value, "MiB", 64, at_most=True))
    return figures


SECTIONS: Mapping[str, Callable[[int], list[Figure]]] = {
    "kernel": kernel,
    "rules": rules,
    "models": models,
    "many": many,
    "memory": memory,
}
"""Measurements by the name that ``--figures`` takes."""


def update_error(shape: Sequence[int] = (768, 3072), warm_up: int = 3) -> float:
    """How far an update of the kernels is from float64's, of the largest element, from the same float32 numbers."""
    theta, generator = _theta(), torch.Generator().manual_seed(2)
    param = nn.Parameter(0.1 * torch.randn(*shape, generator=generator))
    warm = SmallFCLOpt([param], weights=theta, backend="reference", lr=1.0)
    for _ in range(warm_up):
        param.grad = _uneven(param, generator)
        warm.step()
    twin = nn.Parameter(param.detach().double())
    exact, native = (
        SmallFCLOpt([p], weights=theta, backend=backend, lr=1.0)  # type: ignore[arg-type]
        for p, backend in ((twin, "reference"), (param, "native"))
    )
    # Decays as float32 has them, so that only the arithmetic of the step differs.
    decays = exact.rule.decays  # type: ignore[attr-defined]
    weights = decays.weights(torch.device("cpu"), torch.float32).values()
    rounded = (tuple((1 - weight.double()).tolist()) for weight in weights)
    object.__setattr__(exact.rule, "decays", type(decays)(*rounded))
    saved = warm.state_dict()
    for optimizer in (exact, native):
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 1e3  # or the parameters' own rounding would hide that of the update
    before = twin.detach().clone()
    param.grad = _uneven(param, generator)
    twin.grad = param.grad.double()
    for optimizer in (exact, native):
        optimizer.step()
    want = twin.detach() - before
    return ((param.detach().double() - twin.detach()).abs().max() / want.abs().max()).item()


def _uneven(param: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient whose rows and columns differ in size by a factor of 30."""
    grad = torch.randn(*param.shape, generator=generator)
    for axis, extent in enumerate(param.shape):
        grad *= (10 ** -torch.linspace(0, 1.5, extent)).view(-1, *(1,) * (param.dim() - axis - 1))
    return grad


def _theta() -> Theta:
    """Random weights, large enough for every feature to matter."""
    generator = torch.Generator().manual_seed(1)
    arrays, inputs = {}, 39
    for layer, outputs in enumerate((32, 32, 2)):
        arrays[f"nn/~/w{layer}"] = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
        arrays[f"nn/~/b{layer}"] = torch.randn(outputs, generator=generator) * 0.1
        inputs = outputs
    return Theta.from_arrays("small_fc_lopt", arrays, {"step_mult": 1e-2, "exp_mult": 1e-1})


def small_fc_rule(theta: Theta) -> SmallFC:
    """The rule of ``theta``."""
    return cast(SmallFC, SmallFCLOpt([nn.Parameter(torch.zeros(1))], weights=theta).rule)


def _numel(shapes: str) -> int:
    return sum(math.prod(shape) for shape, *_ in bench.SHAPES[shapes]())


def _library() -> loader.Library:
    library = loader.load()
    if isinstance(library, str):
        raise RuntimeError(f"the figures are those of the native kernels: {library}")
    return library


# -- the command -------------------------------------------------------------------------------------------------------


def format_figures(figures: Sequence[Figure]) -> str:
    """Figures as a table for people."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}"

    def verdict(figure: Figure) -> str:
        if figure.value is None:
            return "unknown"
        if figure.must is None:
            return ""
        return "missed" if not figure.keeps(figure.must) else "aim" if figure.keeps(figure.aim) else "kept"

    rows = [("figure", "measured", "unit", "must", "aim", "")]
    rows += [(f.name, number(f.value), f.unit, number(f.must), number(f.aim), verdict(f)) for f in figures]
    return "\n".join(bench.align(rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the option of ``pylo bench`` that measures figures."""
    parser.add_argument(
        "--figures",
        nargs="?",
        const=list(SECTIONS),
        type=bench.names_of("figure", lambda: list(SECTIONS)),
        help=f"what the native kernels are held to instead; comma-separated, of {', '.join(SECTIONS)} (default: all)",
    )
    parser.set_defaults(run=main, parser=parser)


def main(args: argparse.Namespace) -> int:
    """Run what the options ask for; returns the exit code."""
    if args.figures is None:
        return bench_distributed.main(args)
    if args.distributed is not None:
        args.parser.error("--figures means nothing with --distributed")
    sections = args.figures
    args = bench.resolve(args, {"repeats": 5, "json": None}, "with --figures")
    report = bench.Report(METHOD)
    for section in sections:
        figures = SECTIONS[section](args.repeats)
        report.add([{"section": section, **asdict(figure)} for figure in figures], format_figures(figures))
    report.write(args.json)
    return 0
