"""Does training go on from a checkpoint as if it had never stopped, on as many ranks as there are now?

Whoever loads is compared with a run on one device that was not interrupted, in float64.
"""

from __future__ import annotations

import pytest
from sharded_cases import load_case, save_case
from thetas import distinct_rules

pytestmark = pytest.mark.dist

NAMES = [*distinct_rules(), "toy_loss"]
MANY = ["small_fc_lopt", "velo"]
EXACT = 1e-12  # of the largest element of a tensor: the order of sums

RANKS = [(2, 3), (3, 2), (1, 4), (4, 1), (3, 4)]
"""More and fewer, from one and to one."""

FSDP2 = [
    *((name, "dcp", 2, 3) for name in NAMES if name not in MANY),
    *((name, "dcp", *ranks) for name in MANY for ranks in RANKS),
    *((name, "async", 2, 3) for name in MANY),
    # A full state dict does not know how many ranks wrote it.
    *((name, how, *ranks) for name in MANY for how in ("full", "broadcast") for ranks in ((2, 3), (2, 1))),
]


@pytest.mark.parametrize(("name", "how", "before", "after"), FSDP2)
def test_fsdp2_goes_on_with_other_ranks(workers, tmp_path, name, how, before, after):
    case = {"wrapper": "fsdp2", "name": name, "folder": str(tmp_path), "how": how}
    workers.run(before, save_case, **case)
    assert max(workers.run(after, load_case, **case)) <= EXACT


@pytest.mark.parametrize("name", MANY)
def test_hsdp_and_fsdp2_share_checkpoints(workers, tmp_path, name):
    case = {"name": name, "folder": str(tmp_path), "how": "dcp"}
    workers.run(4, save_case, wrapper="hsdp", **case)
    assert max(workers.run(2, load_case, wrapper="fsdp2", **case)) <= EXACT


@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1"])
def test_ranks_may_save_for_themselves(workers, tmp_path, wrapper):
    case = {"wrapper": wrapper, "name": MANY[0], "folder": str(tmp_path), "how": "local"}
    workers.run(2, save_case, **case)
    assert max(workers.run(2, load_case, **case)) <= EXACT


FSDP1 = [
    *((name, "dcp", 2, 3) for name in NAMES if name not in MANY),
    # Not on four ranks, on which torch 2.14 cannot load this model, with its own AdamW neither.
    *((name, "dcp", *ranks) for name in MANY for ranks in ((2, 3), (3, 2), (1, 3), (3, 1))),
    *((name, "fsdp1", *ranks) for name in MANY for ranks in ((2, 2), (3, 2), (2, 1))),
]


@pytest.mark.parametrize(("name", "how", "before", "after"), FSDP1)
def test_fsdp1_goes_on_with_other_ranks(workers, tmp_path, name, how, before, after):
    case = {"wrapper": "fsdp1", "name": name, "folder": str(tmp_path), "how": how}
    workers.run(before, save_case, **case)
    assert max(workers.run(after, load_case, **case)) <= EXACT
