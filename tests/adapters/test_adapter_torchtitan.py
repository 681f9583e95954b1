"""Does torchtitan train with learned optimizers, by name, and do its checkpoints bring a run back bit by bit?"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")
from titan_cases import BREAK, STEPS, built, part, resume_case  # noqa: E402
from torchtitan.components.optimizer import ParamGroupConfig  # noqa: E402
from torchtitan.config import ConfigManager  # noqa: E402

from pylo_integrations import torchtitan as ours  # noqa: E402

pytestmark = pytest.mark.timeout(300)

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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


@pytest.mark.slow
@pytest.mark.dist
def test_its_trainer_resumes_the_debug_model_bit_by_bit_on_two_ranks(tmp_path):
    """By the command of the page: ``fully_shard``, its loss, loop, schedule, clipping and checkpoints."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    for folder in ("tokenizer", "c4_test"):
        (tmp_path / "tests" / "assets" / folder).mkdir(parents=True)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    letters = {letter: i for i, letter in enumerate([*special.values(), "?", *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(tmp_path / "tests/assets/tokenizer/tokenizer.json"))
    (tmp_path / "tests/assets/tokenizer/tokenizer_config.json").write_text(json.dumps(special))
    pages = [page.read_text() for page in sorted(DOCS.glob("*.md"))]
    rows = "".join(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n" for text in pages)
    (tmp_path / "tests/assets/c4_test/data.json").write_text(rows)

    command = re.search(r"```bash\n(torchrun.*?)```", (DOCS / "torchtitan.md").read_text(), re.DOTALL)[1]
    command = command.replace("\\\n", " ").replace("-m torchtitan.train", str(HERE / "titan_on_cpu.py"))
    _, *arguments = shlex.split(
        command.replace("--nproc_per_node 8", f"--nproc_per_node 2 --master_port {free_port()}")
    )
    sizes = {"training.steps": STEPS, "training.seq_len": 64, "training.local_batch_size": 2}
    sizes |= {"checkpoint.interval": BREAK, "dump_folder": "out"}
    arguments += [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    arguments += ["--checkpoint.enable", "--checkpoint.keep_latest_k", "0"]
    saved = tmp_path / "out" / "checkpoint"
    ends = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *arguments], cwd=tmp_path, capture_output=True, text=True,
            timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        torch_save = tmp_path / f"end{len(ends)}.pt"
        dcp_to_torch_save(saved / f"step-{STEPS}", torch_save)
        ends.append(torch.load(torch_save, weights_only=False))
        shutil.rmtree(saved / f"step-{STEPS}")  # so that the second run begins after the break
    assert f"Training starts at step {BREAK + 1}" in done.stderr + done.stdout
    first, second = (tensors_of(end) for end in ends)
    assert len(first) > 200 and first.keys() == second.keys()
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert {int(value) for key, value in first.items() if key.endswith(("run_num_steps", "run_iteration"))} == {STEPS}


def tensors_of(saved: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those of the model, and of the optimizer's flat state."""
    everything = {**saved, **saved["optimizer"]}
    return {key: value for key, value in everything.items() if isinstance(value, torch.Tensor)}
