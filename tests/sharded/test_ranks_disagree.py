"""If one rank differs from the others, do all of them say so, and has none changed anything?"""

from __future__ import annotations

import pytest
from disagreement_cases import (
    BUILT,
    LAYOUTS,
    RAISING,
    RULES,
    SPOILT,
    allowed_case,
    built_case,
    gradient_case,
    is_allowed,
    lost_case,
    raising_case,
    spoilt_case,
    without,
)

from pylo_integrations import get_optimizer_info
from pylo_integrations.workers import RankDied

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

WAIT = 100  # on a busy machine ranks take long to start


def alike(results, steps):
    """The messages of ranks that went on together."""
    told, iterations, digests = zip(*results, strict=True)
    assert set(iterations) == {steps} and len(set(digests)) == 1
    return told


def check(told, said, world=2):
    assert len(set(told)) == 1
    assert told[0].startswith("DisagreementError") and f"on rank {world - 1}" in told[0]
    for words in said:
        assert words in told[0]


@pytest.mark.parametrize("what", BUILT)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_optimizers_that_were_built_otherwise(workers, layout, what):
    if without(layout, what):
        pytest.skip("no such difference")
    results = workers.run(2, built_case, layout=layout, what=what, timeout=WAIT)
    check(alike(results, 2), BUILT[what].said)


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [True, False])
def test_optimizers_that_were_changed(workers, layout, what, first):
    told = alike(workers.run(2, spoilt_case, layout=layout, what=what, first=first, timeout=WAIT), 1 if first else 3)
    if is_allowed(layout, what):
        assert set(told) == {"it stepped"}
    else:
        check(told, SPOILT[what][1])


def test_what_ranks_may_do_differently_or_change_together(workers):
    """Replicas that exchange nothing never talk; where a rule runs and in what chunks is each rank's own affair."""
    first, second = workers.run(2, allowed_case, timeout=WAIT)
    assert first[0] == [[]] and second[0] == [[], []]
    assert first[1:] == second[1:]
    assert first[1] == 5  # steps without anything to step do not count


def test_ranks_that_agree_among_themselves_are_told_together(workers):
    case = {"layout": "fsdp2", "what": "lr", "first": False, "timeout": WAIT}
    told = alike(workers.run(3, spoilt_case, **case), 3)
    check(told, ["lr of group 0: 1.0 on ranks 0 to 1; 0.75 on rank 2"], world=3)


@pytest.mark.parametrize("what", RAISING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_raises_tells_the_others(workers, layout, what, first):
    if what == "sparse gradient" and layout.startswith("fsdp"):
        pytest.skip("shards are dense")
    if what == "no horizon" and not get_optimizer_info(RULES[layout]).needs_horizon:
        pytest.skip("needs none")
    if what == "memory" and not get_optimizer_info(RULES[layout]).needs_loss:
        pytest.skip("remembers nothing")
    results = workers.run(2, raising_case, layout=layout, what=what, first=first, timeout=WAIT)
    *others, own = alike(results, 1 if first else 3)
    assert RAISING[what][1] in own and not own.startswith("RankError")
    assert all(told.startswith("RankError") and f"rank 1: {own}" in told for told in others)


def test_gradients_of_replicas_that_share_their_steps_are_alike(workers):
    """Each rank would step its rows by its own; and tensors of equal values have no other mark."""
    for what in ("apart", "swapped"):
        told = workers.run(2, gradient_case, what=what, timeout=WAIT)
        assert len(set(told)) == 1 and "norm of the gradient of parameter 0 of group 0" in told[0]
    assert workers.run(2, gradient_case, what="alike", timeout=WAIT) == ["it stepped"] * 2


@pytest.mark.parametrize("how", ["killed", "exited"])
def test_the_others_are_told_what_is_likely_behind_a_lost_connection(mortal, how):
    with pytest.raises(RankDied) as failed:
        mortal.run(2, lost_case, how=how, timeout=WAIT)
    told = str(failed.value)
    assert "RankError: rank 0 could not exchange anything with the other rank" in told
    for hint in ("another rank raised, was killed", "look for the first error in the logs", "last checkpoint"):
        assert hint in told
    assert "direct cause" in told  # what the backend says
