"""Does a sharded run take the steps of an unsharded one, with as few collectives as promised?

Only the order of sums may differ between a tensor in pieces and a whole one. In float64 that leaves 1e-12 of the
largest parameter element; in float32, where one rounding is 6e-8 and the network sees ratios of sums, 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sharded_cases import SHAPES, dtensor_case, make, take_steps, wrapper_case

from pylo_integrations import list_optimizers

pytestmark = pytest.mark.dist

NAMES = [*list_optimizers(), "toy_loss", "toy_finish"]
LAYOUTS = ["replicate", "shard0", "shard1", "shard_last", "hsdp", "both_axes", "same_axis_twice"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def unsharded(name, dtype, world, options=None, steps=3):
    trained, _, _ = take_steps(
        lambda t: t, name, dtype, steps, options or {}, lambda step: 1.0 + step + (world - 1) / 2
    )
    return [t.numpy() for t in trained]


def promised(name: str, world: int, sharded: bool) -> list[str]:
    """The collectives of a step."""
    rule = make(name, [torch.nn.Parameter(torch.zeros(3, 2))]).rule
    if world == 1:
        return []
    if not sharded:
        return ["allreduce_"] * rule.needs_loss
    rounds = 1 if name.startswith("toy") else 2  # the toys need no sums of features
    return ["allreduce_"] * rounds + ["alltoall_base_"] * (2 * rule.finishes)


def assert_same(got, want, tolerance) -> None:
    for shape, a, b in zip(SHAPES, got, want, strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), shape


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_dtensors_step_as_whole_tensors_do(workers, name, world, dtype):
    layouts = [layout for layout in LAYOUTS if world != 3 or layout in ("replicate", "shard0", "shard1", "shard_last")]
    ranks = workers.run(world, dtensor_case, layouts=layouts, name=name, dtype=dtype)
    want = unsharded(name, dtype, world)
    for layout in layouts:
        results = [rank[layout] for rank in ranks]
        assert len({result["digest"] for result in results}) == 1, f"{layout}: ranks differ"
        assert_same(results[0]["params"], want, TOLERANCE[dtype])
        # The first step with tensors that owners finish also tells everyone who holds what.
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


@pytest.mark.parametrize(("wrapper", "world"), WRAPPERS, ids=lambda value: str(value))
@pytest.mark.parametrize("name", NAMES)
def test_wrapped_models_step_as_plain_ones_do(workers, name, wrapper, world):
    ranks = workers.run(world, wrapper_case, wrapper=wrapper, name=name)
    assert ranks[0]["moved"] > 0
    assert max(rank["error"] for rank in ranks) <= 1e-12
    assert len({rank["digest"] for rank in ranks}) == 1
    for counted in ranks[0]["collectives"][1:]:
        assert counted == promised(name, world, sharded=wrapper not in ("ddp", "fsdp1_no_shard"))
