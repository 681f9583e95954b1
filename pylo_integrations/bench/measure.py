"""Time and memory of steps."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from pylo_integrations.bench.contenders import Setting, Together, make_contender
from pylo_integrations.sharding.pieces import local_part

P = ParamSpec("P")
T = TypeVar("T")

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


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """What ``function`` returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


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


def paired_ratio(samples: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """How many times as long as ``base`` a step of ``name`` takes: the median over the rounds."""
    return statistics.median(mine / theirs for mine, theirs in zip(samples[name], samples[base], strict=True))


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


def state_bytes(optimizer: Optimizer | Together) -> int:
    """Bytes that this process holds of an optimizer's state tensors, each once."""
    values = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    with torch.no_grad():
        parts = {id(part): part for value in values for part in _plain_parts(local_part(value))}
        return sum(part.numel() * part.element_size() for part in parts.values())


def _plain_parts(value: Tensor) -> list[Tensor]:
    """The tensors that others' subclasses, such as those for quantised numbers, are made of."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        return [value]
    return [part for name in flatten()[0] for part in _plain_parts(getattr(value, name))]


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
