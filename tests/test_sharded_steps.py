"""Does a sharded run take the steps of an unsharded one, with as few collectives as promised?

Only the order of sums may differ between a tensor in pieces and a whole one. In float64 that leaves 1e-12 of the
largest parameter element; in float32, where one rounding is 6e-8 and the network sees ratios of sums, 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sharded_cases import SHAPES, dtensor_case, take_steps

from pylo_integrations import list_optimizers

pytestmark = pytest.mark.dist

NAMES = list_optimizers()
LAYOUTS = ["replicate", "shard0", "shard1", "shard_last", "hsdp", "both_axes", "same_axis_twice"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def unsharded(name, dtype, world, options=None, steps=3):
    trained, _, _ = take_steps(
        lambda t: t, name, dtype, steps, options or {}, lambda step: 1.0 + step + (world - 1) / 2
    )
    return [t.numpy() for t in trained]


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
