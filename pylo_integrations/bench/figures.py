"""What the native CPU kernels are held to, measured in one run.

Every figure comes with the bound that it must keep and the one that it aims at, and is measured beside whatever it is
compared with: steps in turn in one process, and so is the loop that tells the peak of a core.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pylo_integrations.bench import measure, text
from pylo_integrations.bench.accuracy import random_theta, update_error
from pylo_integrations.bench.contenders import BASELINES, Setting, make_contender
from pylo_integrations.bench.measure import (
    in_fresh_process,
    measure_memory,
    paired_ratio,
    sample_in_turn,
    sample_step_seconds,
)
from pylo_integrations.bench.naive import NaiveSmallFC
from pylo_integrations.bench.shapes import SHAPES, numel
from pylo_integrations.ops import loader
from pylo_integrations.profiles import ARCHITECTURES, PROFILES
from pylo_integrations.rules.small_fc import SmallFCRule

MULTIPLY_ADDS = 16 * 32 + 32 * 32 + 32 * 2
"""Of a parameter in small_fc_lopt's network, once what is constant along an axis or in a step is folded."""

PEAK_ROUNDS = 1_000_000
NATIVE, REFERENCE, NAIVE, PEAK = "small_fc_lopt:native", "small_fc_lopt:reference", "naive", "peak"

METHOD = {
    "naive": "small_fc_lopt as its formulas read, tensor by tensor in eager torch: bench/naive.py",
    "rates": "every rule in a process of its own",
    "share of the peak": f"{MULTIPLY_ADDS} multiply-adds a parameter over the time of a whole step, to the rate of a "
    "loop of independent multiply-adds in registers, sampled in the same rounds",
    "error": "largest difference to the update in float64 from the same float32 numbers, after three steps, to the "
    "largest update, taken with a learning rate that makes it much larger than the parameters",
    "scaling": "medians of processes of their own, one for each number of threads",
} | measure.METHOD


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


def sample_kernel(names: Sequence[str], repeats: int) -> dict[str, list[float]]:
    """Seconds of a step on ``matrix`` of contenders, the naive code and the peak loop among them; on one thread."""
    torch.set_num_threads(1)
    parameters = Setting("matrix", "float32", "cpu", 1).parameters()

    def contender(name: str) -> Callable[[], Any]:
        if name == PEAK:
            library = _library()
            return lambda: library.multiply_adds(PEAK_ROUNDS)
        if name == NAIVE:
            theta = random_theta()
            rule = SmallFCRule.from_arrays(theta.arrays, **theta.hyper)
            return NaiveSmallFC([param for param, _ in parameters], rule, 1e-4).step
        return make_contender(name, parameters)[1]

    return sample_in_turn({name: contender(name) for name in names}, repeats, lambda: None)


def kernel(repeats: int) -> list[Figure]:
    """One matrix on one thread: against other code, the core's peak and float64."""
    others, peak = (
        in_fresh_process(sample_kernel, [NATIVE, *names], repeats) for names in ((REFERENCE, NAIVE), (PEAK,))
    )
    made = _library().multiply_adds(1) * PEAK_ROUNDS

    share = MULTIPLY_ADDS * numel(SHAPES["matrix"]()) / made * paired_ratio(peak, PEAK, NATIVE)
    return [
        Figure("small_fc_lopt, 768 x 3072, 1 thread", 1e3 * statistics.median(peak[NATIVE]), "ms"),
        Figure("  the reference backend takes", paired_ratio(others, REFERENCE, NATIVE), "times as long"),
        Figure("  naive eager code takes", paired_ratio(others, NAIVE, NATIVE), "times as long", 20, 25),
        Figure("  a core's peak", 2e-9 * made / statistics.median(peak[PEAK]), "GFLOP/s"),
        Figure("  share of it, whole step", 100 * share, "%", 70, 85),
        Figure("  error of an update", in_fresh_process(update_error), "of the largest", 1e-6, at_most=True),
    ]


RATES: Mapping[str, tuple[float, float]] = {"velo": (100, 180)}
"""Bounds on the rates of rules, in millions of parameters a second, where there are any."""


def rules(repeats: int) -> list[Figure]:
    """Rates of the other rules on one core."""
    figures = []
    others = [name for name in PROFILES if name in ARCHITECTURES]  # one optimizer a rule, and small_fc has its own
    # The time of those that orthogonalise is that of torch's matrix products, whole models of which would take minutes.
    for shapes, rules_ in (("matrix", others), ("vit_b16", [rule for rule in others if rule not in ("celo2", "pace")])):
        for rule in rules_:
            rate = 1e-6 * numel(SHAPES[shapes]()) / _step_seconds(shapes, f"{rule}:native", repeats)
            figures.append(Figure(f"{rule}, {shapes}, 1 thread", rate, "Mparam/s", *RATES.get(rule, ())))
    return figures


def models(repeats: int) -> list[Figure]:
    """Whole models on one thread and on two."""
    figures = []
    for shapes in ("vit_b16", "gpt2"):
        one, two = (_step_seconds(shapes, NATIVE, repeats, threads) for threads in (1, 2))
        figures += [
            Figure(f"small_fc_lopt, {shapes}, 1 thread(s)", one, "s"),
            Figure(f"small_fc_lopt, {shapes}, 2 thread(s)", two, "s"),
            Figure("  speed-up on 2 threads", one / two, "times", 1.8, 1.95),
        ]
    return figures


def many(repeats: int) -> list[Figure]:
    """Many small tensors."""
    setting, names = Setting("many", "float32", "cpu", 1), [NATIVE, *BASELINES]
    samples = in_fresh_process(sample_step_seconds, setting, names, repeats)
    ratio = paired_ratio(samples, NATIVE, "adamw_foreach")
    return [
        Figure("small_fc_lopt, 10 000 tensors of 64, 1 thread", 1e3 * statistics.median(samples[NATIVE]), "ms"),
        Figure("  AdamW, foreach", 1e3 * statistics.median(samples["adamw_foreach"]), "ms"),
        Figure("  AdamW, fused", 1e3 * statistics.median(samples["adamw_fused"]), "ms"),
        Figure("  to AdamW, foreach", ratio, "times", 10, 3, at_most=True),
    ]


def orthogonal(repeats: int) -> list[Figure]:
    """Orthogonalised steps beside torch's Muon, in turn with it, on one thread."""
    figures = []
    for shapes in ("matrix", "vit_block", "vit_ti", "mlp_512"):
        setting, names = Setting(shapes, "float32", "cpu", 1), ["celo2", "pace", "muon"]
        samples = in_fresh_process(sample_step_seconds, setting, names, repeats)
        figures.append(Figure(f"Muon, {shapes}", 1e3 * statistics.median(samples["muon"]), "ms"))
        for name in ("celo2", "pace"):
            ratio = paired_ratio(samples, name, "muon")
            figures.append(Figure(f"  {name} takes", ratio, "times as long", 1.3, 1.0, at_most=True))
    return figures


def memory(repeats: int) -> list[Figure]:
    """Peak temporaries of a step."""
    figures = []
    for name, shapes in (("small_fc_lopt", "matrix"), ("small_fc_lopt", "vit_b16"), ("velo", "vit_b16")):
        setting = Setting(shapes, "float32", "cpu", 1)
        _, peak = in_fresh_process(measure_memory, setting, f"{name}:native")
        value = None if peak is None else peak / 2**20
        figures.append(Figure(f"{name}, {shapes}, peak temporaries", value, "MiB", 64, at_most=True))
    return figures


SECTIONS: Mapping[str, Callable[[int], list[Figure]]] = {
    "kernel": kernel,
    "rules": rules,
    "models": models,
    "many": many,
    **({"orthogonal": orthogonal} if "muon" in BASELINES else {}),
    "memory": memory,
}
"""Measurements by the name that ``--figures`` takes."""


def _step_seconds(shapes: str, name: str, repeats: int, threads: int = 1) -> float:
    """Of one contender in a process of its own."""
    setting = Setting(shapes, "float32", "cpu", threads)
    return statistics.median(in_fresh_process(sample_step_seconds, setting, [name], repeats)[name])


def _library() -> loader.Library:
    library = loader.load()
    if isinstance(library, str):
        raise RuntimeError(f"the figures are those of the native kernels: {library}")
    return library


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

    header = ("figure", "measured", "unit", "must", "aim", "")
    rows = [(f.name, number(f.value), f.unit, number(f.must), number(f.aim), verdict(f)) for f in figures]
    return text.table(header, rows)
