"""Do ranks decide alike, whatever each of them sees alone?"""

from __future__ import annotations

import pytest
from native_library import library_or_skip
from sharded_cases import (
    absence_case,
    auto_agreement_case,
    clipping_case,
    disagreement_case,
    kernel_agreement_case,
    nonfinite_case,
    pending_case,
    probe_case,
    scaler_case,
    two_trainings_case,
)

pytestmark = pytest.mark.dist

# Of the largest element, the order of sums: in float64 by the reference, in float32 by the kernels.
EXACT = 1e-12
BACKENDS = pytest.mark.parametrize(("backend", "bound"), [("reference", EXACT), ("native", 1e-6)])


@pytest.fixture(autouse=True)
def library(request):
    if "backend" in request.fixturenames and request.getfixturevalue("backend") == "native":
        library_or_skip()


@BACKENDS
@pytest.mark.parametrize(
    ("policy", "second"),
    [
        ("skip", ["allreduce_"]),
        ("error", ["allreduce_", "NonFiniteError"]),
        ("zero", ["allreduce_"] * 3),  # they find out, collect again, and describe
    ],
)
def test_a_nonfinite_gradient_on_one_rank_is_everyones(workers, policy, second, backend, bound):
    for rank in workers.run(3, nonfinite_case, policy=policy, backend=backend):
        assert rank["steps"] == rank["reference"] == ((3, 1) if policy == "zero" else (2, 1))
        assert rank["error"] <= bound
        # Before the first step they agree on what they will do, and that all of them come to it.
        assert [names for names in rank["collectives"]] == [["allreduce_"] * 4, second, ["allreduce_"] * 2]


@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp2"])
def test_a_grad_scaler_skips_on_all_ranks_when_one_overflows(workers, wrapper):
    ranks = workers.run(2, scaler_case, wrapper=wrapper)
    for rank in ranks:
        assert rank["steps"] == (3, 0) and rank["scales"] == [1024, 512, 512, 512]
        assert len(rank["seen"]) == 3 and rank["seen"] == ranks[0]["seen"]
    assert ranks[0]["digest"] == ranks[1]["digest"]


@BACKENDS
@pytest.mark.parametrize("layout", ["shard0", "hsdp", "replicate"])
def test_the_norm_is_that_of_all_shards_and_costs_no_round(workers, layout, backend, bound):
    options = {"backend": backend}
    for rank in workers.run(4, clipping_case, layout=layout, name="small_fc_lopt", options=options):
        assert rank["error"] <= bound < rank["effect"]
        rounds = [0, 0, 0] if layout == "replicate" else [4, 2, 2]
        assert rank["collectives"] == [["allreduce_"] * number for number in rounds]


@BACKENDS
def test_sums_that_do_not_scale_are_collected_again_when_clipped(workers, backend, bound):
    options = {"weight_decay": 0.1, "weight_decay_policy": "l2", "backend": backend}
    for rank in workers.run(2, clipping_case, layout="shard0", name="small_fc_lopt", options=options):
        assert rank["error"] <= bound < rank["effect"]
        rounds = [2 + clipped + 2 * (step == 0) for step, clipped in enumerate(rank["clipped"])]
        assert rank["collectives"] == [["allreduce_"] * number for number in rounds]
        assert any(rank["clipped"])


@BACKENDS
def test_tensors_without_a_gradient_are_left_out_everywhere_or_nowhere(workers, backend, bound):
    for rank in workers.run(3, absence_case, backend=backend):
        assert rank["error"] <= bound
        assert rank["iterations"] == (4, 4)
        # Whenever the set of stepped tensors changes, ranks notice in the first round and collect once more.
        assert [len(names) for names in rank["collectives"]] == [5, 3, 3, 2, 3]


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo2_base"])
def test_kernels_run_on_every_rank_or_on_none(workers, name):
    library_or_skip()
    for rank in workers.run(3, disagreement_case, name=name):
        assert rank["native"] == [True, False, False, True, True]
        finishing = 2 if name == "celo2_base" else 0
        # The first step with tensors that owners finish also tells everyone who holds what.
        assert [len(names) - finishing for names in rank["collectives"][1:]] == [3, 2, 3, 2]
        assert rank["error"] <= 1e-4  # rounding of parameters and of backends, in units of what they moved


def test_ranks_tell_a_probe_from_a_step_together(workers):
    assert workers.run(3, probe_case) == [(True, True)] * 3


def test_gradients_that_are_pending_sums_are_summed(workers):
    assert max(workers.run(2, pending_case)) <= EXACT


def test_groups_of_ranks_train_independently(workers):
    results = workers.run(4, two_trainings_case)
    assert max(error for _, error, _ in results) <= EXACT
    assert len({(half, digest) for half, _, digest in results}) == 2


@pytest.mark.parametrize(("say", "answer"), [("yyy", True), ("yny", False), ("nnn", False)])
def test_all_ranks_use_kernels_or_none(workers, say, answer):
    assert workers.run(3, kernel_agreement_case, say=say) == [[answer, answer]] * 3


def test_a_rank_that_never_asks_hangs_nobody_and_hears_the_same_when_it_does(workers):
    assert workers.run(3, kernel_agreement_case, say="yyy", late=1, patience=1) == [[False, False]] * 3


@pytest.mark.parametrize("say", ["yy", "ny"])
def test_replicas_take_the_kernels_of_their_devices_together(workers, say):
    """Though they exchange nothing in a step: the verdict on one device counts for all."""
    ranks = workers.run(2, auto_agreement_case, say=say)
    if say == "yy":
        assert ranks == [([0], []), ([0], [])]
    else:
        assert [able for able, _ in ranks] == [[], []]
        assert ["matrices: WRONG" in said[0] for _, said in ranks] == [True, False]
        assert "not all ranks that train together can use them" in ranks[1][1][0]
