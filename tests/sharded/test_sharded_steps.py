"""Does a sharded run take the steps of an unsharded one, with as few collectives as promised?

With the torch functions in float64 and the native kernels in float32: twenty steps on the same gradients must end where
those of whole tensors in one process do, with the same bits on every rank, and begin with the same bits when they are
taken again. What a layout makes of a tensor and what a rule makes of its pieces meet in few places (sums, rows, the
exchange of whole tensors), so not every rule has to meet every layout: see :func:`cells`.

Only the order of sums may differ between a tensor in pieces and a whole one. In float64 that leaves 1e-12 of what the
parameters moved. In float32 one rounding of a parameter is 6e-8 of it, and 1e-6 of it allows for a few.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from layout_cases import LAYOUTS, SHAPES, dtype_of, layout_case, starts, unsharded
from native_library import library_or_skip
from sharded_cases import promised, wrapper_case
from thetas import distinct_rules

from pylo_integrations import list_optimizers
from pylo_integrations.ops import loader

pytestmark = pytest.mark.dist

TOYS = [("toy_loss", "reference"), ("toy_finish", "reference")]
"""The kernels do not know them."""
SKIPPED = {
    ("fsdp1_hsdp", 2),  # FSDP1 makes NO_SHARD of rows of one rank, and then does not add up their gradients.
    ("fsdp1_hsdp", 3),  # HYBRID_SHARD in several rows needs an even number of ranks.
}


def by_both(*names: str) -> list[tuple[str, str]]:
    return [(name, backend) for name in names for backend in ("reference", "native")]


def cells(layout: str, world: int) -> list[tuple[str, str]]:
    """Names and backends to run under a layout: VeLO everywhere, the others where their sums and exchanges differ."""
    if world == 1:
        return by_both(*list_optimizers()) + TOYS if layout == "mixed" else [("velo", "reference")]
    found = by_both("velo")  # loss, LSTM rows, sums of features
    if world == 4:
        found += by_both("celo2")  # exchanges of whole tensors
    if world == 3 and layout in ("shard0", "mixed", "fsdp1"):  # rows, all kinds in one optimizer, runs of elements
        found += by_both(*(name for name in distinct_rules() if name != "velo")) + TOYS
    return found


CASES = [
    (layout, world, *cell)
    for layout in LAYOUTS
    for world in (1, 2, 3, 4)
    if (layout, world) not in SKIPPED
    for cell in cells(layout, world)
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
ORTHOGONALISED = {"celo2": 5.0, "elo_celo2": 5.0, "pace": 5.0}
"""By how much Newton-Schulz multiplies roundings in float32: 1.7 was seen, 3.4445 ** 5 = 485 is the most possible."""


@functools.cache
def whole(name: str, backend: str) -> list[np.ndarray]:
    return [tensor.numpy() for tensor in unsharded(name, backend)]


@pytest.fixture(scope="module")
def trained(workers):
    """What every rank found of every cell, under a layout: one run of the processes for all of them."""

    @functools.cache
    def run(layout: str, world: int):
        backends = ["reference"] if isinstance(loader.load(), str) else ["reference", "native"]
        possible = [cell for cell in cells(layout, world) if cell[1] in backends]
        return workers.run(world, layout_case, layout=layout, cells=possible)

    return run


@pytest.mark.parametrize(("layout", "world", "name", "backend"), CASES)
def test_steps_are_those_of_whole_tensors(trained, layout, world, name, backend):
    if backend == "native":
        library_or_skip()
    ranks = [rank[name, backend] for rank in trained(layout, world)]
    assert all(rank["native"] == (backend == "native") for rank in ranks)
    assert len({rank["digest"] for rank in ranks}) == 1, "ranks differ"
    assert all(rank["repeated"] for rank in ranks), "not repeatable"
    want, dtype = whole(name, backend), dtype_of(backend)
    moved = [np.abs(b - start.numpy()).max() for b, start in zip(want, starts(dtype), strict=True)]
    assert min(moved[1:]) > 1e-3  # not the scalar, which is all of its mean, and has no other step in toy_finish
    # What rounds: in float64 the sums that steps come from, in float32 the parameter above all.
    scales = moved if dtype == torch.float64 else [np.abs(b).max() for b in want]
    tolerance = TOLERANCE[dtype] * (ORTHOGONALISED.get(name, 1.0) if dtype == torch.float32 else 1.0)
    for shape, got, b, scale in zip(SHAPES, ranks[0]["params"], want, scales, strict=True):
        assert np.abs(got - b).max() <= tolerance * scale, shape
    sharded = layout not in ("local", "ddp", "replicate") and (layout, world) != ("hsdp", 2)
    gathered = ["_allgather_base_"] * (layout in ("shard_step", "mixed") and world > 1)
    for counted in ranks[0]["collectives"]:
        assert counted == promised(name, world, sharded) + gathered


# -- models, trained through their wrappers ----------------------------------------------------------------------------

EXACT = {"lr": 10.0, "max_grad_norm": math.inf}
"""Moves parameters far enough for any difference to show; clipping is tests/sharded/test_sharded_agreement.py's."""
WRAPPERS = [
    ("ddp", 2),
    ("fsdp2", 1),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2_tp", 4),
    ("fsdp1", 1),
    ("fsdp1", 2),
    ("fsdp1", 3),
    ("fsdp1", 4),
    ("fsdp1_hsdp", 4),
    ("fsdp1_no_shard", 2),
]
MODELS = ["velo", "celo2"]
"""One that needs the loss, one that needs whole matrices."""


@pytest.mark.parametrize(("wrapper", "world"), WRAPPERS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_wrapped_models_step_as_plain_ones_do(workers, name, wrapper, world):
    ranks = workers.run(world, wrapper_case, wrapper=wrapper, name=name, options=EXACT)
    assert ranks[0]["moved"] > 1e-6
    # VeLO's LSTM sees logarithms of sums, and passes on what their order changed: 1.6e-12 on four ranks.
    assert max(rank["error"] for rank in ranks) <= 1e-11
    assert len({rank["digest"] for rank in ranks}) == 1
    for counted in ranks[0]["collectives"][1:]:
        assert counted == promised(name, world, sharded=wrapper not in ("ddp", "fsdp1_no_shard"))


@pytest.mark.parametrize(("wrapper", "world"), [("ddp", 2), ("fsdp2", 2), ("fsdp1", 2), ("hsdp", 4), ("tp", 2)])
def test_frozen_parameters_stay_and_do_not_count(workers, wrapper, world):
    ranks = workers.run(world, wrapper_case, wrapper=wrapper, name="velo", options=EXACT, frozen="up")
    assert ranks[0]["moved"] > 1e-6 and ranks[0]["frozen"] == [0, 0]
    assert max(rank["error"] for rank in ranks) <= 1e-11
    assert len({rank["digest"] for rank in ranks}) == 1


@pytest.mark.parametrize(("wrapper", "world"), [("fsdp2", 2), ("tp", 2), ("fsdp2_tp", 4), ("fsdp1", 3)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_native_kernels_step_wrapped_models_as_plain_ones(workers, name, wrapper, world):
    library_or_skip()
    options = {**EXACT, "lr": 1.0, "backend": "native"}
    ranks = workers.run(world, wrapper_case, wrapper=wrapper, name=name, options=options, dtype=torch.float32)
    assert all(rank["native"] for rank in ranks) and ranks[0]["moved"] > 1e-7
    assert max(rank["relative"] for rank in ranks) <= TOLERANCE[torch.float32] * ORTHOGONALISED.get(name, 1.0)
    assert len({rank["digest"] for rank in ranks}) == 1
    for counted in ranks[0]["collectives"][1:]:
        assert counted == promised(name, world, sharded=True)
