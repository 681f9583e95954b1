"""What does one learn of a rank that died or hangs?"""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch.distributed as dist

from pylo_integrations.workers import RankDied


def killed_case(rank: int, world: int) -> int:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return rank


def sleeping_case(rank: int, world: int) -> int:
    if rank == 1:
        time.sleep(100)
    return rank


def answering_case(rank: int, world: int) -> int:
    return rank


@pytest.mark.dist
def test_a_dead_rank_is_told_by_its_exit_code_and_last_call(mortal):
    with pytest.raises(RankDied, match=r"rank 1 of 2: ended with exit code -11\n(?s:.*)in killed_case"):
        mortal.run(2, killed_case)


@pytest.mark.dist
def test_a_hanging_rank_is_told_by_where_it_is_and_others_go_on(mortal):
    with pytest.raises(RuntimeError, match=r"rank 1 of 2: no answer within 2 s\n(?s:.*)in sleeping_case"):
        mortal.run(2, sleeping_case, timeout=2)
    assert mortal.run(2, answering_case) == [0, 1]
