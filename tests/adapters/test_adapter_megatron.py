"""Does Megatron-Core, with tensor parallelism, take the steps of one process, and do its checkpoints go on?

It is the real GPT, DDP, loop, schedule and checkpoints of Megatron, on ranks of gloo that pass for devices (see
megatron_cases.py). The reference is one process with nothing of Megatron's but the model.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from megatron_cases import (
    arrive_case,
    leave_case,
    overflow_case,
    overrides_case,
    plain_case,
    refused_case,
    resume_case,
    steps_case,
)

from pylo_integrations.catalog import get_optimizer_info

# Ranks of their own (`ranks`): their torch passes for one with devices.
pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None, reason="needs megatron-core, which is not installed"
    ),
]

CLOSE = 5e-5  # of the largest element of a tensor: sums in another order, in float32; seen: 1.6e-5
FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
QKV_BIAS = "decoder.layers.0.self_attention.linear_qkv.bias"


def distance(got, want) -> float:
    """Of the largest element, in the tensor that is furthest off.

    Without the biases of keys: attention does not depend on them, so that their gradients are roundings only, which
    rules normalise. (Of each of two heads, Megatron has 6 for queries, keys and values each.)
    """
    assert got.keys() == want.keys() and {FC1, QKV_BIAS} <= want.keys()
    found = []
    for key in want:
        one, other = got[key].float(), want[key].float()
        if key == QKV_BIAS:
            one, other = (bias.view(2, 3, 6)[:, ::2] for bias in (one, other))
        found.append(float((one - other).abs().max() / other.abs().max()))
    return max(found)


@pytest.mark.parametrize("name", ["pace", "celo2", "velo"])
def test_tensor_parallel_steps_are_those_of_one_process(ranks, name):
    [(want, _)] = ranks.run(1, plain_case, name=name, steps=range(3))
    ends = ranks.run(2, steps_case, name=name, parts=2)
    lr = get_optimizer_info(name).lr
    for end in ends:
        assert end["iteration"] == 3 and end["fc1"] == (10, 12) and want[FC1].shape == (20, 12)
        assert end["lrs"] == pytest.approx([lr * 0.73] * len(end["lrs"])), "the schedule did not reach the groups"
        assert end["kind"] == "FP32Optimizer"
        assert distance(end["params"], want) < CLOSE


def test_alone_they_are_the_same_to_the_bit(ranks):
    [(want, _)] = ranks.run(1, plain_case, name="velo", steps=range(3))
    [end] = ranks.run(1, steps_case, name="velo", parts=1)
    assert distance(end["params"], want) == 0


def test_the_losses_of_micro_batches_are_one(ranks):
    [(want, _)] = ranks.run(1, plain_case, name="velo", steps=range(3))
    for parts in (1, 2):
        for end in ranks.run(2, steps_case, name="velo", parts=parts, micro_batches=2):
            assert distance(end["params"], want) < CLOSE


@pytest.mark.parametrize("name", ["pace", "celo2"])
def test_data_parallel_ranks_share_steps(ranks, name):
    [(want, _)] = ranks.run(1, plain_case, name=name, steps=range(3))
    for end in ranks.run(2, steps_case, name=name, parts=1, shard_step=True):
        assert distance(end["params"], want) < CLOSE


def test_overrides_of_megatron_set_rates_and_decay_of_some_parameters(ranks):
    lr = get_optimizer_info("celo2").lr
    override = {"max_lr": 2 * lr, "min_lr": 0.0, "wd_mult": 0.0}
    for settings in ranks.run(2, overrides_case, name="celo2", pattern="*linear_fc1.weight", override=override):
        # After three of ten steps: from the rate to a tenth of it, as the others; from twice the rate to zero.
        assert settings.pop(FC1) == pytest.approx((2 * lr * 0.7, 0.0))
        assert settings and all(others == pytest.approx((lr * 0.73, 0.1)) for others in settings.values())


def test_clipping_is_that_of_whole_gradients(ranks):
    [want] = ranks.run(1, steps_case, name="celo2", parts=1, clip_grad=1e-3)
    for end in ranks.run(2, steps_case, name="celo2", parts=2, clip_grad=1e-3):
        assert distance(end["params"], want["params"]) < CLOSE


def test_masters_of_bfloat16_are_stepped_in_float32(ranks):
    [want] = ranks.run(1, steps_case, name="celo2", parts=1, dtype=torch.bfloat16)
    for end in ranks.run(2, steps_case, name="celo2", parts=2, dtype=torch.bfloat16):
        assert end["kind"] == "Float16OptimizerWithFloat16Params"
        assert {value.dtype for value in end["params"].values()} == {torch.bfloat16}
        assert distance(end["params"], want["params"]) <= 4 * torch.finfo(torch.bfloat16).eps


def test_an_overflow_on_one_rank_skips_the_step_on_both(ranks):
    for end in ranks.run(2, overflow_case, name="velo"):
        assert end["taken"] == [True, False, True] and end["unchanged"]
        assert end["waiting"] is None, "the loss of a skipped step would have been counted with the next"
        assert end["reached"] == 1 and end["iteration"] == 2


@pytest.mark.skipif(importlib.util.find_spec("psutil") is None, reason="needs psutil, as Megatron's checkpoints do")
@pytest.mark.parametrize(("name", "half"), [("velo", False), ("celo2", True)])
def test_checkpoints_of_megatron_go_on(ranks, tmp_path, name, half):
    for end in ranks.run(2, resume_case, name=name, parts=2, folder=str(tmp_path), half=half):
        whole, *resumed = end["ends"]
        assert len(resumed) == 2 and whole["iteration"] == 4
        for run in resumed:
            assert run["iteration"] == 4
            assert distance(run["params"], whole["params"]) == 0, "the resumed run went another way"


@pytest.mark.parametrize("name", ["velo", "celo2"])
def test_canonical_state_moves_to_another_number_of_ranks(ranks, name):
    [first, _] = ranks.run(2, leave_case, name=name, parts=2)
    want, (canonical, params) = first["params"], first["middle"]
    [(_, reference)] = ranks.run(1, plain_case, name=name, steps=range(2))
    assert canonical["state"].keys() == reference["state"].keys()
    fused = canonical["state"][FC1], reference["state"][FC1]
    for what, state in fused[1].items():
        assert torch.allclose(fused[0][what], state, rtol=1e-3, atol=1e-4 * float(state.abs().max())), what
    [(arrived, _)] = ranks.run(1, plain_case, name=name, steps=range(2, 4), canonical=canonical, params=params)
    assert distance(arrived, want) < CLOSE
    for parts in (1, 2):
        [end, *_] = ranks.run(parts, arrive_case, name=name, parts=parts, canonical=canonical, params=params)
        assert end["iteration"] == 4 and distance(end["params"], want) < CLOSE


def test_what_hides_whole_tensors_is_refused_before_anything_is_written(ranks):
    remedies = {
        "distributed": "shard_step=True",
        "offload": "set it to False",
        "precision": "set them to False",
        "pipeline": "use tensor parallelism",
        "experts": "tensor_model_parallel_size to 1",
        "fsdp": "fully_shard()",
    }
    for told in ranks.run(2, refused_case):
        for case, remedy in remedies.items():
            assert told[case].startswith("ShardingError: ") and remedy in told[case]
        assert told["per token"].startswith("ValueError: velo needs the mean loss") and "celo2" in told["per token"]
        assert told["unknown"].startswith("ValueError: ")
