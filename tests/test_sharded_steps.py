"""Does a sharded run take the steps of an unsharded one, with as few collectives as promised?

Only the order of sums may differ between a tensor in pieces and a whole one. In float64 that leaves 1e-12 of what the
parameters moved. In float32 one rounding of a parameter is 6e-8 of it, and 1e-6 of it allows for a few.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from native_library import library_or_skip
from sharded_cases import SHAPES, dtensor_case, make, random, take_steps, wrapper_case

from pylo_integrations import list_optimizers

pytestmark = pytest.mark.dist

NAMES = [*list_optimizers(), "toy_loss", "toy_finish"]
MANY = ["small_fc_lopt", "velo", "celo2", "toy_finish"]
"""One of each kind; the others take the same paths and are tried on two ranks."""
LAYOUTS = ["replicate", "shard0", "shard1", "shard_last", "hsdp", "both_axes", "same_axis_twice"]
EXACT = {"lr": 10.0, "max_grad_norm": math.inf}
"""Moves parameters far enough for any difference to show; clipping is tests/test_sharded_agreement.py's."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
ORTHOGONALISED = {"celo2": 485.0, "elo_celo2": 485.0}
"""By how much Newton-Schulz multiplies rounding errors at most: 3.4445 ** 5."""


def unsharded(name, dtype, world, steps, options):
    trained, _, _ = take_steps(lambda t: t, name, dtype, steps, options, lambda step: 1.0 + step + (world - 1) / 2)
    return [t.numpy() for t in trained]


def promised(name: str, world: int, sharded: bool) -> list[str]:
    """The collectives of a step."""
    rule = make(name, [torch.nn.Parameter(torch.zeros(3, 2))]).rule
    if world == 1:
        return []
    if not sharded:
        return ["allreduce_"] * rule.needs_loss
    rounds = 1 if name.startswith("toy") or name == "celo_adam" else 2  # those need no sums of features
    return ["allreduce_"] * rounds + ["alltoall_base_"] * (2 * rule.finishes)


def assert_same(got, want, dtype, factor: float = 1.0) -> None:
    starts = [random(shape, i, dtype).numpy() for i, shape in enumerate(SHAPES)]
    assert max(np.abs(b - start).max() for b, start in zip(want, starts, strict=True)) > 1e-3
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        moved = b - starts[i]
        reference = moved if dtype == torch.float64 else b
        assert np.abs(a - b).max() <= factor * TOLERANCE[dtype] * np.abs(reference).max(), SHAPES[i]


CASES = [
    *((name, 2, torch.float64) for name in NAMES),
    *((name, world, torch.float64) for name in MANY for world in (1, 3, 4)),
]


@pytest.mark.parametrize(("name", "world", "dtype"), CASES, ids=str)
def test_dtensors_step_as_whole_tensors_do(workers, name, world, dtype):
    layouts = LAYOUTS if name in MANY else ["shard0", "both_axes"]
    if world == 3:
        layouts = ["replicate", "shard0", "shard1", "shard_last"]  # a mesh of two axes needs an even number
    ranks = workers.run(world, dtensor_case, layouts=layouts, name=name, dtype=dtype, steps=3, options=EXACT)
    want = unsharded(name, dtype, world, 3, EXACT)
    for layout in layouts:
        results = [rank[layout] for rank in ranks]
        assert len({result["digest"] for result in results}) == 1, f"{layout}: ranks differ"
        assert_same(results[0]["params"], want, dtype)
        # The first step with tensors that owners finish also tells everyone who holds what.
        for counted in results[0]["collectives"][1:]:
            assert counted == promised(name, world, sharded=layout != "replicate" and (layout, world) != ("hsdp", 2)), (
                layout
            )


KERNELS = [name for name in NAMES if not name.startswith("toy")]


@pytest.mark.parametrize(
    ("name", "world"),
    [*((name, 2) for name in KERNELS), *((name, world) for name in ("velo", "celo2") for world in (1, 3, 4))],
    ids=str,
)
def test_native_kernels_step_dtensors_as_whole_tensors(workers, name, world):
    library_or_skip()
    layouts = ["replicate", "shard0", "shard1", "shard_last"] if world == 3 else LAYOUTS
    options = {**EXACT, "backend": "native"}
    steps = 10 if world == 2 else 3
    case = {"layouts": layouts, "name": name, "dtype": torch.float32, "steps": steps, "options": options}
    ranks = workers.run(world, dtensor_case, **case)
    want = unsharded(name, torch.float32, world, steps, options)
    for layout in layouts:
        results = [rank[layout] for rank in ranks]
        assert all(result["native"] for result in results)
        assert len({result["digest"] for result in results}) == 1, f"{layout}: ranks differ"
        assert_same(results[0]["params"], want, torch.float32, ORTHOGONALISED.get(name, 1.0))
        for counted in results[0]["collectives"][1:]:
            assert counted == promised(name, world, sharded=layout != "replicate" and (layout, world) != ("hsdp", 2)), (
                layout
            )


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


ON_TWO = [(name, wrapper, 2) for name in NAMES for wrapper in ("ddp", "fsdp2", "fsdp1")]
OTHERS = [(name, *case) for name in MANY for case in WRAPPERS if (name, *case) not in ON_TWO]


@pytest.mark.parametrize(("name", "wrapper", "world"), [*ON_TWO, *OTHERS], ids=str)
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


@pytest.mark.parametrize(
    ("name", "wrapper", "world"),
    [
        *((name, wrapper, 2) for name in KERNELS for wrapper in ("fsdp2", "fsdp1")),
        *((name, *case) for name in ("velo", "celo2") for case in WRAPPERS if case[1] != 2 or case[0] == "tp"),
    ],
    ids=str,
)
def test_native_kernels_step_wrapped_models_as_plain_ones(workers, name, wrapper, world):
    library_or_skip()
    options = {**EXACT, "lr": 1.0, "backend": "native"}
    ranks = workers.run(world, wrapper_case, wrapper=wrapper, name=name, options=options, dtype=torch.float32)
    assert all(rank["native"] for rank in ranks) and ranks[0]["moved"] > 1e-7
    assert max(rank["relative"] for rank in ranks) <= TOLERANCE[torch.float32] * ORTHOGONALISED.get(name, 1.0)
    assert len({rank["digest"] for rank in ranks}) == 1
    for counted in ranks[0]["collectives"][1:]:
        assert counted == promised(name, world, sharded=wrapper not in ("ddp", "fsdp1_no_shard"))
