"""The one place that reads ``backend``."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, cast, get_args

import torch

from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops import cuda, loader, self_check
from pylo_integrations.ops.compiled import CompiledLocal, check_compiler
from pylo_integrations.ops.loader import NativeLibrary
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.obstacles import entangled_buckets, local_obstacle, obstacle
from pylo_integrations.rules.base import Local, Rule, as_written
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.rounds import Ranks

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "native", "compile"]
"""What computes a step.

``"reference"`` runs a rule's own torch functions on any device; ``"native"`` the compiled kernels, and raises where
they cannot step a tensor; ``"auto"`` takes them for the tensors which they can step (float32, bfloat16 and float16, on
a CPU or a CUDA device) and the reference for the others. On CUDA it takes them once a check has found them right on
such a device (:mod:`pylo_integrations.ops.self_check`); the environment variable ``PYLO_NATIVE`` makes it take them
unchecked (1), or take none anywhere (0).
``"compile"`` runs the reference through ``torch.compile``, each function once for every shape of its arguments. State
is the same, so the backend may change in the middle of a run.
"""


def check_backend(backend: str) -> None:
    """Raise unless ``backend`` can be had.

    Raises:
        ValueError: Unknown backend.
        RuntimeError: The native library was asked for and is missing; the message says why.
    """
    if backend not in get_args(Backend):
        choices = ", ".join(map(repr, get_args(Backend)))
        raise ValueError(f"backend={backend!r} is not available; choose one of {choices}")
    if backend == "native" and isinstance(reason := loader.load(), str):
        raise RuntimeError(f"backend='native' is not available: {reason}")


def native_report() -> str:
    """The native kernels in words: what they run on, or why there are none."""
    library = loader.load()
    if isinstance(library, str):
        return f"missing; {library}"
    return f"CPU kernels for {', '.join(library.isas())}, of which {library.isa} is used"


def select_local(backend: Backend) -> Local:
    """Who runs the local functions of rules."""
    return CompiledLocal() if backend == "compile" else as_written


def find_native(
    backend: Backend, rules: Sequence[Rule], buckets: Sequence[Bucket], ranks: Ranks
) -> tuple[list[int], list[int]]:
    """Which buckets are for the native kernels.

    Args:
        backend: What computes a step.
        rules: Of each bucket.
        buckets: To be stepped.
        ranks: Who agrees on whether kernels are taken unasked.

    Returns:
        The indices of those that they can step here, and of those that they could step but for what may differ between
        processes: whether there is a library, and how a tensor lies in memory.

    Raises:
        RuntimeError: ``backend`` is ``"native"`` and a bucket is not for it, or ``"compile"`` and nothing compiles
            on the device of a bucket.
        ValueError: The environment variable ``PYLO_NATIVE`` is neither 0 nor 1.
    """
    if backend == "compile":
        for device in {bucket.device for bucket in buckets}:
            check_compiler(device)
    able: list[int] = []
    unable: list[int] = []
    if backend in ("reference", "compile"):
        return able, unable
    entangled = entangled_buckets(buckets)
    none_wanted = backend == "auto" and self_check.switch() is False
    for index, (rule, bucket) in enumerate(zip(rules, buckets, strict=True)):
        common = obstacle(rule, bucket)
        if common is None and backend == "auto" and bucket.device.type == "cuda":
            common = self_check.reluctance(rule, bucket.device, ranks)
        reason = common or _why_no_library(bucket.device) or local_obstacle(rule, bucket)
        if reason is None and none_wanted:
            reason = f"{self_check.SWITCH} is 0"
        if reason is None and index in entangled:
            reason = "it shares memory with another parameter, or was given twice"
        if reason is not None and bucket.form is not FLOAT32:
            _tell_fallback(reason)
        if reason is None:
            able.append(index)
        elif backend == "native":
            raise RuntimeError(
                f"backend='native' cannot step a tensor of shape {bucket.layout.shape}: {reason}; use backend='auto'"
            )
        elif common is None:
            unable.append(index)
    return able, unable


def library_for(device: torch.device) -> NativeLibrary | str:
    """The kernels for a device, or the reason why there are none, in words."""
    return cuda.load(device) if device.type == "cuda" else loader.load()


@cache
def _tell_fallback(reason: str) -> None:
    """Leave a line in the log, once for every reason, where torch's functions decode and encode state."""
    logger.info("some tensors with state_dtype set are stepped by the reference, not by kernels: %s", reason)


def _why_no_library(device: torch.device) -> str | None:
    library = library_for(device)
    return library if isinstance(library, str) else None


def native_stages(
    rules: Sequence[Rule], buckets: Sequence[Bucket], indices: Iterable[int]
) -> dict[tuple[int, ...], NativeStages]:
    """Native stages of those buckets, out of what :func:`find_native` found, by the buckets that each steps.

    Rules on one device share theirs, so that what they have in common, reading gradients above all, is done once.
    """
    together: dict[torch.device, list[int]] = {}
    for index in indices:
        together.setdefault(buckets[index].device, []).append(index)
    return {
        tuple(mine): NativeStages(
            cast(NativeLibrary, library_for(device)), [rules[i] for i in mine], [buckets[i] for i in mine]
        )
        for device, mine in together.items()
    }
