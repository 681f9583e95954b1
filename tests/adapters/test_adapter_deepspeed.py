"""Does DeepSpeed's ZeRO take the steps of one process, and do its checkpoints go on?

Ranks divide a batch that one process has as a whole. In float32 that leaves the order in which gradients and sums are
added up: roundings of 6e-8, which normalising enlarges where gradients are small.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from deepspeed_cases import (
    HALF,
    accelerate_case,
    arrive_case,
    come_back_case,
    half_case,
    hf_zero_case,
    leave_case,
    other_size_case,
    overflow_case,
    plain_run,
    refused_case,
    resume_case,
    steps_case,
)
from launched_cases import hf_case
from test_adapters_distributed import LIMIT, check, check_resumed

from pylo_integrations import ShardingError
from pylo_integrations.deepspeed import check_config

# Ranks of their own (`ranks`): DeepSpeed changes the processes that import it.
pytestmark = [
    pytest.mark.dist,
    pytest.mark.timeout(240),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed, which is not installed"),
]

CLOSE = 1e-5  # of the largest element of a tensor
START = {"embedding.weight", "first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}


def distance(got, want) -> float:
    assert got.keys() == want.keys() == START
    return max(float((got[key].float() - want[key].float()).abs().max() / want[key].abs().max()) for key in want)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("name", ["pace", "celo2", "velo", "small_fc_lopt"])
def test_the_steps_are_those_of_one_process(ranks, name, stage):
    want, optimizer, model = plain_run(name, range(4))
    ends = ranks.run(2, steps_case, name=name, stage=stage)
    assert {end["iteration"] for end in ends} == {4} and len({end["digest"] for end in ends}) == 1
    assert {len(shape) for end in ends for shape in end["shapes"]} == {1}, "it was not ZeRO that ran"
    assert distance(ends[0]["params"], want) < CLOSE


@pytest.mark.parametrize("options", [{"state_dtype": "bfloat16"}, {"max_grad_norm": 0.1}, {"reload": True}], ids=str)
def test_so_they_are_with_options(ranks, options):
    of_optimizer = {key: value for key, value in options.items() if key != "reload"}
    want, *_ = plain_run("celo2", range(4), **of_optimizer)
    ends = ranks.run(2, steps_case, name="celo2", stage=2, **options)
    assert distance(ends[0]["params"], want) < CLOSE


def test_alone_the_steps_are_the_same_to_the_bit(ranks):
    want, *_ = plain_run("velo", range(4))
    [end] = ranks.run(1, steps_case, name="velo", stage=2)
    assert distance(end["params"], want) == 0


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_losses_of_micro_batches_are_one(ranks, stage):
    want, *_ = plain_run("velo", range(4))
    ends = ranks.run(2, steps_case, name="velo", stage=stage, accumulate=2)
    assert {end["iteration"] for end in ends} == {4}
    assert distance(ends[0]["params"], want) < CLOSE


@pytest.mark.parametrize(("stage", "dtype"), [(1, "bf16"), (2, "bf16"), (2, "fp16")])
def test_masters_are_stepped_in_float32(ranks, stage, dtype):
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    want, *_ = plain_run("celo2", range(3), half=half)
    ends = ranks.run(2, half_case, name="celo2", stage=stage, dtype=dtype)
    assert {end["iteration"] for end in ends} == {3}
    # A master that is a rounding away may be rounded to the next number of the model's type.
    assert distance(ends[0]["params"], want) <= 2 * torch.finfo(half).eps


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks, accumulate):
    ends = ranks.run(2, overflow_case, name="velo", stage=2, accumulate=accumulate)
    assert all(end["skipped"] and end["reached"] == 1 and end["iteration"] == 2 for end in ends)
    assert len({end["digest"] for end in ends}) == 1
    for end in ends:
        first, last = end["heard"]
        assert last < 2 * first, "a loss of the skipped step was counted with the next"


@pytest.mark.parametrize(("name", "stage"), [("velo", 1), ("celo2", 2)])
def test_checkpoints_go_on(ranks, tmp_path, name, stage):
    ends = ranks.run(2, resume_case, name=name, stage=stage, folder=str(tmp_path))
    for end in ends:
        assert end["whole"]["iteration"] == end["resumed"]["iteration"] == 4
        assert end["whole"]["digest"] == end["resumed"]["digest"], "the resumed run went another way"
    [told] = ranks.run(1, other_size_case, name=name, stage=stage, folder=str(tmp_path))
    assert "DP world size of 2 but the current world size is 1" in told
    # by canonical state: to one process without DeepSpeed; to two ranks; to one for a step, and back to two
    want, (canonical, params) = ends[0]["whole"]["params"], ends[0]["middle"]
    assert distance(plain_run(name, range(2, 4), canonical, params)[0], want) < CLOSE
    for journey in ([(2, range(2, 4))], [(1, range(2, 3)), (2, range(3, 4))]):
        left = canonical, params
        for world, steps in journey:
            options = {"name": name, "stage": stage, "steps": steps, "canonical": left[0], "params": left[1]}
            arrived = ranks.run(world, arrive_case, **options)
            left = arrived[0]["left"]
        assert {end["iteration"] for end in arrived} == {4} and distance(arrived[0]["params"], want) < CLOSE


@pytest.mark.parametrize(
    ("stage", "half"), [(1, {}), (1, {"bf16": HALF["bf16"]}), (2, {"bf16": HALF["bf16"]})], ids=str
)
def test_the_pages_way_to_another_number_of_ranks(ranks, tmp_path, stage, half):
    page = (Path(__file__).parents[2] / "docs" / "deepspeed.md").read_text().replace("runs/zero", str(tmp_path))
    section = page.split("## Another number of ranks")[1].split("\n## ")[0]
    save, load = re.findall(r"```python no-run\n(.*?)```", section, re.DOTALL)
    gone_on = ranks.run(2, leave_case, stage=stage, folder=str(tmp_path), code=save, half=half)
    assert all(end["told"] for end in gone_on), "DeepSpeed converts these states now: tell so on the page"
    close = 2 * torch.finfo(torch.bfloat16).eps if half else CLOSE
    for world in (1, 2):
        for end in ranks.run(world, come_back_case, stage=stage, code=load, half=half):
            assert end["iteration"] == 4 and distance(end["params"], gone_on[0]["params"]) <= close


@pytest.mark.parametrize(("name", "stage", "lr", "stock"), [("velo", 1, 0.7, True), ("celo2", 2, 3e-4, False)])
def test_hf_trainer_goes_on(ranks, tmp_path, name, stage, lr, stock):
    options = {"name": name, "learning_rate": lr, "timeout": LIMIT}
    [want] = ranks.run(1, hf_case, wrapper="ddp", folder=str(tmp_path), per_device_train_batch_size=4, **options)
    folder = str(tmp_path / "divided")
    got = ranks.run(2, hf_zero_case, wrapper=f"zero{stage}", folder=folder, stock=stock, resume=True, **options)
    check_resumed(got)
    check(got, in_float32(want["runs"][0]))


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_hf_trainer_tells_the_loss_of_every_micro_batch_once(ranks, tmp_path, stock):
    """Though the step is taken inside of ``backward``."""
    options = {"name": "velo", "max_steps": 2, "gradient_accumulation_steps": 2, "timeout": LIMIT}
    [want] = ranks.run(1, hf_case, wrapper="ddp", folder=str(tmp_path), per_device_train_batch_size=4, **options)
    wrapper = "zero0" if stock else "zero2"
    got = ranks.run(2, hf_zero_case, wrapper=wrapper, folder=str(tmp_path / "divided"), stock=stock, **options)
    check(got, in_float32(want["runs"][0]))


def in_float32(run):
    return {**run, "params": {key: value.astype(np.float32) for key, value in run["params"].items()}}


@pytest.mark.parametrize(("name", "stage"), [("velo", 2)])
def test_accelerate_goes_on(ranks, tmp_path, name, stage):
    want, *_ = plain_run(name, range(4))
    for end in ranks.run(2, accelerate_case, name=name, stage=stage, folder=str(tmp_path), timeout=LIMIT):
        assert end["whole"]["iteration"] == end["resumed"]["iteration"] == 4
        assert end["whole"]["digest"] == end["resumed"]["digest"]
        assert distance(end["whole"]["params"], want) < CLOSE


def test_what_hides_whole_tensors_is_refused_before_anything_is_written(ranks):
    for told in ranks.run(2, refused_case):
        assert told["stage 3"].startswith("ShardingError: ") and "stage to 2 or 1" in told["stage 3"]
        assert told["unattached"].startswith("ShardingError: ")
        assert "pylo_integrations.deepspeed.attach(engine)" in told["unattached"]
        assert told["with state"].startswith("ValueError: ") and "before its first step" in told["with state"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage 3.*stage to 2 or 1"),
        ({"bf16": {"enabled": True}}, "stage 0 in half precision.*stage to 1"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer.*remove it"),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, "cpu_offload.*remove it"),
        ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zenflow.*remove it"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "round_robin_gradients.*to false"),
        ({"zero_optimization": {"stage": 1, "elastic_checkpoint": True}}, "elastic_checkpoint.*to_canonical"),
        ({"checkpoint": {"load_universal": True}}, "universal checkpoints.*to_canonical"),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "torch_autocast.*use fp16, or bfloat16"),
        ({"tensor_parallel": {"autotp_size": 2}}, "autotp_size.*set it to 1"),
    ],
)
def test_configurations_that_cannot_be_right_are_refused(config, message):
    with pytest.raises(ShardingError, match=message):
        check_config(config)


def test_other_configurations_are_not():
    check_config({})
    check_config(
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "none"}}}
    )
