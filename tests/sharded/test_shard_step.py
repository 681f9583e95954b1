"""Do replicas that share their steps take those of one device, at a fraction of the work and state each?

The steps themselves, of every optimizer, are tests/sharded/test_sharded_steps.py's.
"""

from __future__ import annotations

import pytest
import torch
from layout_cases import LAYOUTS, STEPS, Run
from sharded_cases import load_case, make, promised, save_case, wrapper_case
from share_cases import (
    absent_case,
    clip_case,
    collection_case,
    copy_case,
    cost_case,
    group_case,
    late_case,
    lightning_case,
    message_case,
    pickle_case,
    policy_case,
    rounding_case,
    scaler_case,
    telemetry_case,
    views_case,
)
from test_sharded_steps import EXACT, MODELS
from thetas import distinct_rules

from pylo_integrations import get_optimizer_info, list_optimizers

pytestmark = pytest.mark.dist

GATHER = "_allgather_base_"
MEASURED = ["small_fc_lopt", "velo", "celo2_base"]


def test_shares_are_rounded_stochastically_as_one_device_rounds(workers):
    """But for elements whose sums, in another order, lie on the other side of the noise."""
    first, second = workers.run(2, rounding_case)
    (alone,) = workers.run(1, rounding_case)
    assert sum((mine != one).sum() for mine, one in zip(first, alone, strict=True)) < 0.02 * sum(t.size for t in alone)
    assert all((mine == other).all() for mine, other in zip(first, second, strict=True))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_a_ddp_model_steps_as_a_plain_one(workers, name, world):
    ranks = workers.run(world, wrapper_case, wrapper="ddp", name=name, options=EXACT, shard_step=True)
    assert ranks[0]["moved"] > 1e-6
    assert max(rank["error"] for rank in ranks) <= 1e-11  # as in test_sharded_steps
    assert len({rank["digest"] for rank in ranks}) == 1
    # Two rounds, two exchanges where owners finish whole tensors, and one message with all new parameters.
    for counted in ranks[0]["collectives"][1:]:
        assert counted == [*promised(name, world, sharded=True), GATHER]


@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1"])
def test_sharded_parameters_have_nothing_to_share(workers, wrapper):
    ranks = workers.run(2, wrapper_case, wrapper=wrapper, name="small_fc_lopt", options=EXACT, shard_step=True)
    assert max(rank["error"] for rank in ranks) <= 1e-11
    for counted in ranks[0]["collectives"][1:]:
        assert counted == promised("small_fc_lopt", 2, sharded=True)


@pytest.mark.parametrize(("name", "world"), [*((name, 2) for name in MEASURED), ("small_fc_lopt", 4)])
def test_state_and_work_are_divided(workers, name, world):
    (alone,) = workers.run(1, cost_case, name=name, shard_step=True)
    ranks = workers.run(world, cost_case, name=name, shard_step=True)
    assert alone["elements"] == alone["all"] == sum(rank["elements"] for rank in ranks)
    assert max(rank["elements"] for rank in ranks) < 1.1 * alone["all"] / world
    # Row and column statistics, and rows of an LSTM, are on every rank.
    like_params = 4 * 4 * alone["all"]
    shared = alone["bytes"] - like_params
    assert 0 < shared < 0.5 * alone["bytes"]
    assert max(rank["bytes"] for rank in ranks) - shared < 1.1 * like_params / world
    replicas = workers.run(world, cost_case, name=name, shard_step=False)
    assert replicas == [alone] * world


@pytest.mark.parametrize(
    ("policy", "second"),
    [
        ("skip", ["allreduce_"]),
        ("error", ["allreduce_", "NonFiniteError"]),
        ("zero", ["allreduce_"] * 3 + [GATHER]),
    ],
)
def test_nonfinite_gradients(workers, policy, second):
    for rank in workers.run(3, policy_case, policy=policy):
        assert rank["steps"] == rank["reference"] == ((3, 1) if policy == "zero" else (2, 1))
        assert rank["error"] <= 1e-12
        usual = ["allreduce_", "allreduce_", GATHER]
        assert rank["collectives"] == [["allreduce_"] * 3 + usual, second, usual]


@pytest.mark.parametrize("name", ["small_fc_lopt", "celo2"])
def test_clipping_sees_the_norm_of_all_shares_once(workers, name):
    for rank in workers.run(2, clip_case, name=name):
        assert rank["error"] <= 1e-12 < rank["effect"]
        assert rank["collectives"][1:] == [[*promised(name, 2, sharded=True), GATHER]] * 2


def test_tensors_without_a_gradient(workers):
    ranks = workers.run(3, absent_case)
    for rank in ranks:
        assert rank["error"] <= 1e-12
        assert rank["iterations"] == (4, 4)
    assert len({rank["digest"] for rank in ranks}) == 1


@pytest.mark.parametrize("world", [2, 3, 4])
def test_all_rows_arrive_in_messages_of_any_size(workers, world):
    for rank in workers.run(world, collection_case):
        assert all(complete for complete, _ in rank)
        counts = [messages for _, messages in rank]
        assert counts == sorted(counts, reverse=True) and counts[-1] == 1 < counts[-2]
        rows = [7, 3, 2, 40, 1, 9, 5, 1]
        assert counts[0] == sum(-(-extent // world) for extent in rows)  # one row of each rank at a time


@pytest.mark.parametrize(("chunk_bytes", "least", "most"), [(2**28, 1, 1), (2**14, 2, 15)])
def test_messages_are_as_few_as_their_size_allows(workers, chunk_bytes, least, most):
    ranks = workers.run(3, message_case, chunk_bytes=chunk_bytes)
    for rank in ranks:
        assert rank["ulps"] <= 1
        assert least <= rank["gathers"] <= most
    assert len({rank["digest"] for rank in ranks}) == 1


def test_parameters_may_move(workers):
    assert max(workers.run(2, views_case)) <= 1e-12


def test_amp_with_a_scaler(workers):
    ranks = workers.run(2, scaler_case)
    for rank in ranks:
        assert rank["error"] <= 1e-6
        assert rank["iterations"] == (2, 2)
    assert len({rank["digest"] for rank in ranks}) == 1


def test_telemetry_is_of_whole_tensors(workers):
    for shared, plain in workers.run(3, telemetry_case):
        assert shared.keys() == plain.keys() and len(shared) > 30
        for key, value in plain.items():
            assert shared[key] == pytest.approx(value, rel=1e-9, nan_ok=True), key


def test_pairs_of_ranks_share_among_themselves(workers):
    results = workers.run(4, group_case)
    assert max(error for error, _ in results) <= 1e-12
    digests = [digest for _, digest in results]
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_state_of_other_ranks_is_refused(workers):
    for message in workers.run(4, late_case):
        assert "other ranks" in message and "checkpoint" in message


# -- checkpoints -------------------------------------------------------------------------------------------------------

SAVED = [
    *((name, "dcp", ("shard_step", 2), ("shard_step", 3)) for name in [*distinct_rules(), "toy_loss"]),
    *(
        ("velo", "dcp", *pair)
        for pair in (
            (("shard_step", 2), ("shard_step", 1)),
            (("shard_step", 2), ("shard_step", 2)),
            (("shard_step", 3), ("ddp", 2)),
            (("ddp", 2), ("shard_step", 3)),
            (("shard_step", 2), ("plain", 1)),
            (("plain", 1), ("shard_step", 4)),
            (("fsdp2", 2), ("shard_step", 2)),
            (("shard_step", 2), ("fsdp2", 3)),
        )
    ),
    *(
        ("velo", "consolidated", *pair)
        for pair in (
            (("shard_step", 2), ("shard_step", 3)),
            (("shard_step", 3), ("ddp", 2)),
            (("shard_step", 2), ("plain", 1)),
            (("ddp", 2), ("shard_step", 2)),
        )
    ),
    ("celo2", "dcp", ("fsdp2", 2), ("shard_step", 2)),
    ("celo2", "dcp", ("shard_step", 2), ("fsdp2", 3)),
    ("celo2", "consolidated", ("shard_step", 2), ("shard_step", 3)),
    *(
        ("small_fc_lopt", how, *pair)
        for how in ("full", "broadcast")
        for pair in ((("shard_step", 2), ("shard_step", 3)), (("shard_step", 2), ("ddp", 2)))
    ),
]


@pytest.mark.parametrize(("name", "how", "before", "after"), SAVED, ids=str)
def test_checkpoints_move_between_ranks_and_in_and_out(workers, tmp_path, name, how, before, after):
    case = {"name": name, "folder": str(tmp_path), "how": how}
    workers.run(before[1], save_case, wrapper=before[0], **case)
    assert max(workers.run(after[1], load_case, wrapper=after[0], **case)) <= 1e-12


def test_a_share_is_not_saved_as_if_it_were_the_whole(workers):
    for message in workers.run(2, pickle_case):
        for remedy in ("consolidate_state_dict", "torch.distributed.checkpoint", "to_canonical"):
            assert remedy in message


def test_lightning_checkpoints_are_whole(workers):
    pytest.importorskip("lightning")
    results = workers.run(2, lightning_case)
    assert results == [(8, True), (0, True)]


def test_a_deep_copy_goes_on(workers):
    assert max(workers.run(2, copy_case)) == 0


def test_alone_it_changes_nothing():
    runs = [Run(LAYOUTS[layout](1, torch.float32), "small_fc_lopt", "reference") for layout in ("shard_step", "local")]
    assert runs[0].step_to(STEPS) == runs[1].step_to(STEPS)
    shared, plain = (run.optimizer for run in runs)
    assert shared.shard_step and not plain.shard_step
    assert shared.state_dict()["param_groups"] == plain.state_dict()["param_groups"]


@pytest.mark.parametrize("name", list_optimizers())
def test_every_entry_has_the_option(name):
    assert "shard_step" in get_optimizer_info(name).options
    assert make(name, [torch.nn.Parameter(torch.zeros(3, 2))], shard_step=True).shard_step
