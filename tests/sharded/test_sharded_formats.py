"""Is state that is stored in few bits, bit by bit, that of one device, and does it move between numbers of ranks?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from format_cases import layout_case, load_case, refusal_case, save_case
from torch import nn

from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import FlatSlice, ShardingError

KINDS = {
    "bfloat16": ["torch.bfloat16", "torch.float32"],
    "int8": ["torch.float32", "torch.int8", "torch.uint8"],
}


@pytest.mark.dist
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["shard_step", "shard0", "same_axis_twice", "shard1"])
def test_state_does_not_depend_on_who_holds_what(workers, layout, kind):
    for rank in workers.run(2, layout_case, layout=layout, name="celo2", kind=kind):
        assert rank["all"] and not rank["other"]
        assert rank["kinds"] == KINDS[kind]


@pytest.mark.dist
def test_rows_that_are_cut_within_a_block_are_refused_with_the_remedy(workers):
    for said in workers.run(2, refusal_case):
        assert said.startswith("ShardingError: state_dtype='int8'") and "state_dtype='bfloat16'" in said


@pytest.mark.dist
def test_distributed_checkpoints_bring_codes_to_other_ranks(workers, tmp_path):
    saved = workers.run(2, save_case, folder=str(tmp_path))[0]
    for loaded in workers.run(3, load_case, folder=str(tmp_path)):
        assert saved.keys() == loaded.keys() and len(saved) > 8
        assert all(np.array_equal(saved[key], loaded[key]) for key in saved)


def test_slices_of_fsdp1_are_refused_with_the_remedy():
    param = nn.Parameter(torch.zeros(5000))
    holdings = Holdings(flat_slices={param: FlatSlice("w", (100, 100), 0, 2)})
    with pytest.raises(ShardingError, match=r"state_dtype='int8'.*fully_shard.*bfloat16"):
        holdings.check_blocks(param)
