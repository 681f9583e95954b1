"""Is a tensor that shares a parameter stepped as on one device, however ranks cut through it?"""

from __future__ import annotations

import pytest
from fused_cases import layout_case, refusal_case, wrapper_case

from pylo_integrations.ops import loader

CUTS = [
    ("shard0", "equal"),
    ("shard0", "unequal"),
    ("shard1", "in_out"),
    ("shard0", "experts"),
    ("shard1", "gates of experts"),
    ("both_axes", "in_out"),
    ("shard_step", "equal"),
    ("shard_step", "experts in_out"),
]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pace", "celo2", "velo"])
@pytest.mark.parametrize(("layout", "kind"), CUTS)
def test_ranks_may_cut_anywhere_through_tensors_that_share_a_parameter(workers, layout, kind, name):
    for rank in workers.run(2, layout_case, layout=layout, kind=kind, name=name, backend="reference"):
        assert rank["moved"] > 1e-4 and rank["error"] < 1e-11


@pytest.mark.dist
@pytest.mark.skipif(isinstance(loader.load(), str), reason="needs the native kernels")
@pytest.mark.parametrize(("layout", "kind"), [("shard0", "equal"), ("shard0", "experts"), ("shard_step", "unequal")])
def test_kernels_do_so_too(workers, layout, kind):
    for rank in workers.run(2, layout_case, layout=layout, kind=kind, name="celo2", backend="native"):
        assert rank["moved"] > 1e-4 and rank["error"] < 2e-6
        assert rank["shapes"]["momentum_0"] == tuple(rank["shapes"]["rms"])


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pace", "celo2"])
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2"])
def test_a_wrapped_model_trains_as_a_plain_one(workers, wrapper, name):
    for rank in workers.run(2, wrapper_case, wrapper=wrapper, name=name):
        assert rank["error"] < 1e-11 and rank["differs"] > 1e-4


@pytest.mark.dist
def test_slices_in_which_parts_lie_scattered_are_refused_with_the_remedy(workers):
    for said in workers.run(2, refusal_case):
        assert "fully_shard" in said and "split" in said
