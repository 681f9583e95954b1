"""Does torchtitan train with learned optimizers, by name, and do its checkpoints bring a run back bit by bit?"""

from __future__ import annotations

import pytest

pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")
from titan_cases import BREAK, STEPS, built, part, resume_case  # noqa: E402
from torchtitan.components.optimizer import ParamGroupConfig  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402

from pylo_integrations import torchtitan as ours  # noqa: E402

pytestmark = pytest.mark.timeout(300)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["pace", "celo2"])
def test_a_run_resumes_bit_by_bit_from_its_flat_state_and_equals_one_process(workers, tmp_path, name):
    for rank in workers.run(2, resume_case, timeout=200, name=name, folder=str(tmp_path / name)):
        assert rank["equal"] and rank["error"] < 1e-5
        assert rank["resumed_at"] == BREAK and rank["num_steps"] == STEPS
        assert "state.layers.0.weight.momentum_0" in rank["flat"]


def test_its_schedule_is_for_those_that_want_one():
    for name, last in (("pace", [1.0] * STEPS), ("celo2", [1.0, 1.0, 2 / 3, 1 / 3])):
        optimizers, schedulers = built(name, part(shards=False))
        found = []
        for _ in range(STEPS):
            (learned,) = optimizers
            found.append(learned.param_groups[0]["lr"] / learned.default_lr)
            optimizers.step()
            schedulers.step()
        assert found == pytest.approx(last)


def parse(*args: str):
    return ConfigManager().parse_args(["--module", "pylo_integrations.torchtitan", *args])


def test_the_command_line_takes_the_name_of_an_optimizer_with_any_of_its_configs():
    config = parse("--config", "llama3_debugmodel", "--optimizer.name", "pace", "--optimizer.lr", "0.5")
    assert isinstance(config.optimizer, ours.LearnedOptimizers.Config)
    assert (config.optimizer.name, config.optimizer.lr) == ("pace", 0.5)
    assert isinstance(config.lr_scheduler, ours.LearnedSchedule.Config)
    assert config.lr_scheduler.warmup_steps == 2  # as torchtitan's has it
    with pytest.raises(ValueError, match="llama9"):
        parse("--config", "llama9_debugmodel")


def test_options_reach_the_optimizer():
    config = ours.learned(parse("--config", "llama3_debugmodel"), "celo2", weight_decay=0.1, state_dtype="bfloat16")
    (optimizer,) = config.optimizer.build(model_parts=[part(shards=False)])
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert optimizer.param_groups[0]["state_dtype"] == "bfloat16"
    assert optimizer.param_groups[0]["param_names"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"name": "velo"}, "needs the loss"),
        ({"name": "adamw"}, "unknown learned optimizer"),
        ({"param_groups": [ParamGroupConfig(pattern=".*", optimizer_name="AdamW")]}, "param_groups"),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_remedy(options, named):
    with pytest.raises(ValueError, match=named):
        ours.LearnedOptimizers.Config(**options).build(model_parts=[part(shards=False)])


def test_parts_of_a_pipeline_are_refused():
    with pytest.raises(ValueError, match="pipeline_parallel_degree"):
        ours.LearnedOptimizers.Config().build(model_parts=[part(shards=False), part(shards=False)])
