"""Do launchers train with a learned optimizer if one writes what docs/launchers.md tells to write?

What is written is taken from the page; the optimizer's class, steps, horizon and losses are read in the checkpoint that
the launcher leaves. Each test needs its launcher, and is skipped where it is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import shlex
import string
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from launched_cases import verl_case
from safetensors.torch import load_file
from shared_workers import run_script

from pylo_integrations import create_optimizer
from pylo_integrations.progress import Progress

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PAGE = Path(__file__).parents[2] / "docs" / "launchers.md"
STEPS = 6
WORDS = "the quick brown fox jumps over the lazy dog".split()


def told(launcher: str) -> list[str]:
    """What the page tells to write for a launcher."""
    return re.findall(r"`([^`]+)`", re.search(rf"^\| {launcher}.*?\|(.*)\|$", PAGE.read_text(), re.MULTILINE)[1])


def needs(*modules: str) -> pytest.MarkDecorator:
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}, which is not installed")


PROGRAMS = {
    "python": (),
    "accelerate": ("-m", "accelerate.commands.accelerate_cli"),
    "torchrun": ("-m", "torch.distributed.run"),
}  # what the scripts of these names call, which an environment need not have


def run(command: str, folder: Path) -> None:
    """A command of the page, by this interpreter."""
    program, *arguments = shlex.split(command)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    offline |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, *PROGRAMS[program], *arguments], cwd=folder, env={**os.environ, **offline},
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of two layers that reads letters, and something to learn for it, in the formats of the launchers."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = {letter: i for i, letter in enumerate([*special, *string.printable])}
    words = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(letters), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    chance = random.Random(0)
    pairs = [("say " + " ".join(chance.sample(WORDS, 3)), " ".join(chance.sample(WORDS, 4))) for _ in range(64)]
    alpaca = [{"instruction": asked, "input": "", "output": said} for asked, said in pairs]
    (tmp_path / "alpaca.json").write_text(json.dumps(alpaca))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.json"}}))
    roles = ("user", "assistant")
    chats = [[{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)] for pair in pairs]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return tmp_path


def check(folder: Path, rule: str) -> None:
    """What the checkpoint of a run of a Trainer tells: who stepped, how often, by which horizon, after which losses."""
    [last] = folder.glob(f"out/**/checkpoint-{STEPS}")
    progress, origin = run_in(torch.load(last / "optimizer.pt", weights_only=False))
    assert (origin["rule"], progress.iteration, progress.num_steps) == (rule, STEPS, STEPS)
    before, after = (load_file(path / "model.safetensors") for path in (folder / "model", last))
    assert all((after[name].float() - value).abs().max() > 1e-5 for name, value in before.items())
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    losses = [float(entry["loss"]) for entry in history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < losses[0]
    if rule == "CeloRule":  # which remembers losses; logged ones are rounded
        torch.testing.assert_close(progress.memory["loss_means"], means_after(losses), rtol=1e-3, atol=1e-4)


def run_in(state: dict[str, Any]) -> tuple[Progress, dict[str, Any]]:
    """How far the run is that an optimizer's state is of, and by which rule."""
    return Progress.from_bytes(state["param_groups"][0]["progress"])


def means_after(losses: list[float]) -> torch.Tensor:
    """What ``celo`` remembers of losses."""
    param = torch.nn.Parameter(torch.ones(1))
    optimizer = create_optimizer([param], "celo", num_steps=STEPS)
    for loss in losses:
        param.grad = torch.ones(1)
        optimizer.step(loss=loss)
    return run_in(optimizer.state_dict())[0].memory["loss_means"]


NAMES = pytest.mark.parametrize(("name", "rule", "rate"), [("celo2", "Celo2", "3e-4"), ("celo", "CeloRule", "1.0")])


@needs("llamafactory")
@NAMES
def test_llamafactory(folder, name, rule, rate):
    command, line = told("LLaMA-Factory")
    config = f"""
        model_name_or_path: model
        stage: sft
        do_train: true
        finetuning_type: full
        template: default
        dataset_dir: .
        dataset: tiny
        cutoff_len: 256
        output_dir: out
        per_device_train_batch_size: 4
        max_steps: {STEPS}
        logging_steps: 1
        save_steps: {STEPS}
        report_to: none
        use_cpu: true
        {line.replace("celo2", name)}
    """
    (folder / "config.yaml").write_text(textwrap.dedent(config))
    run(command, folder)
    check(folder, rule)


@needs("axolotl")
@NAMES
def test_axolotl(folder, name, rule, rate):
    command, line = told("axolotl")
    config = f"""
        base_model: model
        datasets: [{{path: alpaca.json, ds_type: json, type: alpaca}}]
        dataset_prepared_path: prepared
        output_dir: out
        sequence_len: 256
        micro_batch_size: 4
        gradient_accumulation_steps: 1
        max_steps: {STEPS}
        logging_steps: 1
        save_steps: {STEPS}
        val_set_size: 0
        lr_scheduler: linear
        learning_rate: {rate}
        bf16: false
        fp16: false
        tf32: false
        attn_implementation: sdpa
        special_tokens: {{pad_token: <pad>}}
        {line.replace("celo2", name)}
    """
    (folder / "config.yaml").write_text(textwrap.dedent(config))
    run(command.replace("accelerate launch", "accelerate launch --cpu"), folder)
    check(folder, rule)


@needs("swift")
@NAMES
def test_ms_swift(folder, name, rule, rate):
    command, _ = told("ms-swift")
    rest = f"""
        --model model --model_type llama --template dummy --dataset messages.jsonl --tuner_type full --output_dir out
        --max_steps {STEPS} --logging_steps 1 --save_steps {STEPS} --per_device_train_batch_size 4 --max_length 512
        --split_dataset_ratio 0 --torch_dtype float32 --use_cpu true --report_to none --gradient_checkpointing false
    """
    run(command.replace("celo2", name).replace("3e-4", rate).replace("...", rest), folder)
    check(folder, rule)


@needs("verl")
@pytest.mark.dist
def test_verl(workers):
    """Its configuration, its maker of optimizers, and steps under FSDP2; its trainer needs GPUs."""
    for end in workers.run(2, verl_case, overrides=told("verl"), timeout=200):
        assert end == {
            "class": "CELO2",
            "lr": 3e-4,
            "iteration": 3,
            "moved": ["0.bias", "0.weight", "2.bias", "2.weight"],
        }


SCRIPT = """
from pathlib import Path

import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}

args, = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
net = Net()
Path(f"process{args.process_index}of{args.world_size}").touch()
Trainer(net, args).save_model("model")
Trainer(net, args, train_dataset=[{"x": torch.ones(3), "labels": torch.zeros(3)}] * 8).train()
"""


@needs("transformers")
@pytest.mark.dist
@pytest.mark.parametrize(("program", "count"), [("accelerate launch", 2), ("torchrun", 1)])
def test_a_script_of_ones_own(tmp_path, program, count):
    [command] = [line for line in told("your own script") if line.startswith(program)]
    # With --cpu, Accelerate starts one process, whatever number it is told.
    ranks = f"--nproc_per_node {count}" if program == "torchrun" else f"--multi_gpu --num_processes {count}"
    command = command.replace(program, f"{program} {ranks}").replace("...", "")
    if "--optim" not in command:
        command += " --optim pace"
    (tmp_path / "train.py").write_text(SCRIPT)
    rest = f"--use_cpu --max_steps {STEPS} --logging_steps 1 --save_steps {STEPS} --report_to none --output_dir out"
    run(f"{command} {rest}", tmp_path)
    assert len(list(tmp_path.glob(f"process*of{count}"))) == count
    check(tmp_path, "Pace")


CLI = """
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI

class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
    def training_step(self, batch, index):
        return self.layer(batch).square().mean()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(12, 3), batch_size=2)

LightningCLI(Net)
"""


@needs("lightning", "jsonargparse")
def test_lightning_cli(tmp_path):
    (tmp_path / "train.py").write_text(CLI)
    [command, *_] = told("Lightning CLI")
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    arguments += "--trainer.accelerator cpu --trainer.max_epochs 1 --trainer.default_root_dir out".split()
    run_script(tmp_path / script, arguments, folder=tmp_path)
    [last] = tmp_path.glob("out/**/*.ckpt")
    progress, origin = run_in(torch.load(last, weights_only=False)["optimizer_states"][0])
    assert (origin["rule"], progress.iteration) == ("Celo2", STEPS)
