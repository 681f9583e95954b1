"""Is a run the same every time, killed or not; does it leave the held-out families alone; are wrong configs told?"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared_workers import forked_process
from thetas import slow_unless, theta_for
from tiny_metatrain import SMALL, TINY, tiny

from pylo_integrations import Theta, cli, create_optimizer
from pylo_integrations.cli.metatrain import configs
from pylo_integrations.metatrain import ConfigError, Family, MetaTrainer, ResumeError, load_config, read_config
from pylo_integrations.metatrain.episodes import Episode, Objective
from pylo_integrations.metatrain.learners import Learner
from pylo_integrations.metatrain.tasks import FAMILIES, Task

ROOT = Path(__file__).parents[2]


def run(folder, **changes):
    trainer = MetaTrainer(tiny(**changes), folder, quiet=True)
    return trainer, trainer.run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to the end: its folder and its theta."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)[1]


def rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


# -- the same every time -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_config_gives_the_same_theta_bit_for_bit(whole, tmp_path):
    again = run(tmp_path)[1]
    assert again.sha256 == whole[1].sha256
    assert Theta.load(tmp_path / "last.safetensors") == Theta.load(whole[0] / "last.safetensors")
    torch.manual_seed(99)  # nor does torch's own generator matter
    assert run(tmp_path / "more", seed=1)[1].sha256 != again.sha256


def run_on_rank(rank, world, folder, iterations=None):
    """One of several ranks; returns the digest of the best theta."""
    return MetaTrainer(tiny(), folder, resume=True, quiet=True).run(iterations).sha256


@pytest.mark.dist
def test_the_number_of_processes_changes_no_bit(workers, whole, tmp_path):
    """Not even in the middle: three ranks begin, two go on, one ends."""
    three = workers.run(3, run_on_rank, folder=tmp_path, iterations=4)
    two = workers.run(2, run_on_rank, folder=tmp_path, iterations=4)
    assert len(set(three)) == len(set(two)) == 1 and not (tmp_path / "report.json").exists()
    assert run_on_rank(0, 1, tmp_path) == whole[1].sha256
    assert Theta.load(tmp_path / "last.safetensors") == Theta.load(whole[0] / "last.safetensors")
    ours, theirs = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path, whole[0]))
    assert ours["families"] == theirs["families"]
    assert [row["step"] for row in rows(tmp_path)] == [row["step"] for row in rows(whole[0])]


@pytest.mark.dist
def test_torchrun_launches_the_command(tmp_path):
    (tmp_path / "tiny.yaml").write_text(json.dumps(TINY))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "pylo_integrations.cli", "metatrain", "tiny.yaml", "--output", "run"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("theta and logs are in run") == 1, "one rank prints"
    assert Theta.load(tmp_path / "run" / "theta.safetensors").training["processes"] == 2


def test_a_run_moves_theta_and_lowers_the_objective(whole):
    start = Theta.load(whole[0] / "last.safetensors")
    assert start.sha256 != MetaTrainer(tiny(), whole[0] / "unused", quiet=True).theta(best=True).sha256


@pytest.mark.parametrize("at", [slow_unless(at == 7, at) for at in (1, 6, 7, 11)])
def test_a_resumed_run_equals_an_uninterrupted_one(whole, tmp_path, at):
    MetaTrainer(tiny(), tmp_path, quiet=True).run(at)
    resumed = MetaTrainer(tiny(), tmp_path, resume=True, quiet=True).run()
    assert resumed.sha256 == whole[1].sha256
    assert Theta.load(tmp_path / "last.safetensors") == Theta.load(whole[0] / "last.safetensors")
    timing = ("cpu_seconds", "steps_per_cpu_second")
    strip = [[{k: v for k, v in row.items() if k not in timing} for row in rows(f)] for f in (tmp_path, whole[0])]
    assert strip[0] == strip[1], "the log has every row once"
    assert resumed.training["curve"] == whole[1].training["curve"]


LONG = {
    "train": TINY["train"][:1],
    "stages": [
        {"space": "linear", "iterations": 60, "pairs": 2, "truncation": 4, "horizon": [6, 20]},
        {"iterations": 60, "pairs": 2, "truncation": 4, "horizon": [6, 20], "sigma": 0.01, "lr": 0.003},
    ],
    "checkpoint_seconds": 0.001,  # after every iteration, so that kills fall into the writing of checkpoints too
    "held_out": [],
    "evaluation": {"every": 50, "horizon": 6, "tasks": 1, "seeds": 1, "adamw": []},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_killed_again_and_again_equals_one_that_was_not(tmp_path):
    import yaml

    config = tmp_path / "long.yaml"
    config.write_text(yaml.safe_dump({**TINY, **LONG}))
    folder = tmp_path / "killed"
    command = ["metatrain", str(config), "--output", str(folder), "--resume"]
    kills = 0
    for delay in (0.0, 0.12):
        process = forked_process(cli.main, command)
        process.start()
        before, deadline = progress(folder), time.monotonic() + 120
        while progress(folder) <= before and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join(30)
    assert kills == 2, "the run is long enough to be killed"
    assert not (folder / "report.json").exists()
    assert cli.main(command) == 0
    _, expected = run(tmp_path / "whole", **LONG)
    assert Theta.load(folder / "theta.safetensors").sha256 == expected.sha256
    assert Theta.load(folder / "last.safetensors") == Theta.load(tmp_path / "whole" / "last.safetensors")


def progress(folder):
    """A mark that moves when a checkpoint is written."""
    path = folder / "checkpoint.safetensors"
    return path.stat().st_mtime_ns if path.exists() else 0


# -- what theta depends on -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_held_out_families_have_no_influence(whole, tmp_path):
    other = [{"kind": "text_rnn", "width": 4, "batch": 2, "length": 4}]
    assert run(tmp_path / "other", held_out=other)[1] == whole[1]
    assert run(tmp_path / "none", held_out=[])[1] == whole[1]


@pytest.mark.slow
def test_selection_families_choose_but_do_not_train(whole, tmp_path):
    other = [{"kind": "regression", "name": "another", **SMALL, "width": 6}]
    run(tmp_path, selection=other)
    assert Theta.load(tmp_path / "last.safetensors") == Theta.load(whole[0] / "last.safetensors")


def test_the_best_theta_by_the_selection_score_is_kept(whole):
    curve = whole[1].training["curve"]
    assert [entry["iteration"] for entry in curve] == [0, 4, 8, 12]
    best = min(curve, key=lambda entry: entry["score"])
    assert whole[1].training["iteration"] == best["iteration"]
    assert Theta.load(whole[0] / "theta.safetensors") == whole[1]


@pytest.mark.slow
def test_the_objective_falls_where_theta_is_trained(tmp_path):
    """A step far too small at the start is grown, and selection and held-out scores, in distribution, show it."""
    stage = {"space": "linear", "iterations": 60, "pairs": 6, "truncation": 10, "horizon": [10, 30], "lr": 0.05}
    trainer, theta = run(
        tmp_path,
        start={"hidden": 4, "step": 1e-4},
        train=[{"kind": "regression", **SMALL}],
        selection=[{"kind": "regression", "name": "other", **SMALL, "width": 5}],
        held_out=[],
        reparametrisation=None,
        stages=[stage],
        evaluation={"every": 20, "horizon": 30, "adamw": []},
    )
    curve = theta.training["curve"]
    assert curve[-1]["score"] < curve[0]["score"] - 0.05
    assert trainer.steps_per_cpu_second() > 0


# -- what a run leaves ---------------------------------------------------------------------------------------------


def test_theta_carries_its_record_and_works_in_the_optimizer(whole):
    theta = Theta.load(whole[0] / "theta.safetensors")
    record = theta.training
    assert record["config"]["train"][0]["kind"] == "teacher" and record["config"]["seed"] == 0
    assert {"package", "commit", "torch", "python", "cpu_seconds", "inner_steps"} <= record.keys()
    assert record["inner_steps"] > 0 and record["cpu_seconds"] > 0
    param = torch.nn.Parameter(torch.ones(3, 2))
    param.grad = torch.ones_like(param)
    create_optimizer([param], "small_fc_lopt", weights=theta).step()
    assert not torch.equal(param, torch.ones(3, 2))


def test_logs_and_report(whole):
    last = rows(whole[0])[-1]
    assert last["step"] == "12" and float(last["loss_teacher"]) < 1 and float(last["steps_per_cpu_second"]) > 0
    assert float(last["selection_loss_other"]) and float(last["held_out_loss_text_mlp"])
    report = json.loads((whole[0] / "report.json").read_text())
    assert [row["family"] for row in report["families"]] == ["teacher", "regression", "other", "text_mlp"]
    assert all(row[who]["objective"] for row in report["families"] for who in ("start", "theta", "adamw"))


def test_other_estimators_and_objectives_run(tmp_path):
    stages = [
        {"iterations": 2, "estimator": "es", "pairs": 2, "horizon": [3, 6]},
        {"iterations": 2, "estimator": "backprop", "pairs": 2, "truncation": 3, "horizon": [3, 6], "clip": 1.0},
    ]
    _, theta = run(tmp_path, stages=stages, objective={"split": "validation"}, base_width=2)
    assert theta.training["inner_steps"] > 0


def test_an_iteration_trains_the_families_that_it_draws(tmp_path):
    stages = [{"iterations": 12, "families": 1, "pairs": 2, "truncation": 3, "horizon": [3, 6]}]
    _, one = run(tmp_path / "one", stages=stages)
    trained = [{name for name in ("teacher", "regression") if row[f"loss_{name}"]} for row in rows(tmp_path / "one")]
    assert set.union(*trained) == {"teacher", "regression"}, "one each time, but not always the same"
    _, both = run(tmp_path / "both", stages=[{**stages[0], "families": None}])
    assert one.training["inner_steps"] < 0.7 * both.training["inner_steps"]


@pytest.mark.parametrize(("split", "share"), [("train", 0.0), ("validation", 1.0), ("both", 0.5)])
def test_the_objective_is_of_the_batches_that_it_names(split, share):
    found = [losses_of_a_constant_network(name) for name in ("train", "validation", split)]
    expected = (1 - share) * found[0] + share * found[1]
    torch.testing.assert_close(found[2], expected, rtol=0, atol=1e-6)


def losses_of_a_constant_network(split):
    """The objective of an episode whose training and validation losses are far apart, and never change."""

    def batches(generator, count, validation):
        return (torch.full((count, 2), 3.0 if validation else 1.0),)

    def loss(model, batch):
        return batch[0].mean() + 0 * model(batch[0][:, None]).sum()

    task = Task(lambda: torch.nn.Linear(1, 1), loss, batches)
    episode = Episode(Learner.adamw(0.0), task, Objective(split), 4, [0])
    episode._now.first = torch.tensor([2.0])
    return episode.unroll({}, 4)


def test_a_published_architecture_can_be_tuned_from_its_weights(tmp_path):
    weights = theta_for("celo").save(tmp_path / "celo.safetensors")
    stage = {"iterations": 2, "pairs": 2, "truncation": 3, "horizon": [4, 8], "scales": {"lstm*": 0.5}}
    _, theta = run(tmp_path / "run", optimizer="celo", start={"weights": str(weights)}, stages=[stage])
    assert theta.architecture == "celo"
    assert Theta.load(tmp_path / "run" / "last.safetensors") != Theta.load(weights)


@pytest.mark.parametrize("optimizer", ["celo", "celo2", "small_fc_lopt"])
def test_members_of_a_smaller_network_than_theta_are_trained_and_then_all_of_theta(tmp_path, optimizer):
    stage = {"iterations": 1, "pairs": 2, "truncation": 3, "horizon": [4, 8]}
    stages = [{**stage, "space": "linear"}, {**stage, "space": "full"}]
    _, theta = run(tmp_path, optimizer=optimizer, start={"hidden": 8}, stages=stages)
    assert theta.training["inner_steps"] > 0
    kept, first = (Theta.load(tmp_path / f"{name}.safetensors") for name in ("last", "theta"))
    assert {n: a.shape for n, a in kept.arrays.items()} == {n: a.shape for n, a in first.arrays.items()}
    assert max(max(a.shape) for name, a in kept.arrays.items() if name.endswith("/w1")) == 8


# -- misuse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimiser": "x"}, r"unknown entry optimiser; did you mean optimizer"),
        ({"optimizer": "adamw"}, r"optimizer: unknown learned optimizer 'adamw'"),
        (
            {"optimizer": "velo"},
            r"start.weights is needed for velo: only a theta of small_fc or celo or celo2 or pace can be constructed",
        ),
        ({"start": {"hidden": 2}}, r"start: hidden=2 must be at least 3"),
        ({"start": {"lstm": 20}}, r"start: .*lstm"),
        ({"start": {"step": 0.0}}, r"start: step=0.0 must be positive"),
        ({"schedules": ["steep"]}, r"schedules\[0\]='steep' is unknown"),
        ({"schedules": []}, r"schedules needs at least one"),
        ({"train": []}, r"train needs at least one family"),
        ({"train": {"kind": "teacher"}}, r"train must be a list"),
        ({"train": [{"kind": "teachers"}]}, r"train\[0\]: task family 'teachers' is unknown; choose one of"),
        ({"train": [{"kind": "teacher", "widht": 3}]}, r"train\[0\]: task family teacher has no option \['widht'\]"),
        ({"train": [{"kind": "teacher", "width": []}]}, r"\['width'\] without a choice"),
        ({"train": [{"kind": "absent.py:Mine"}]}, r"there is no file absent.py"),
        ({"stages": []}, r"stages needs at least one stage"),
        ({"stages": [{}]}, r"entry stages\[0\].iterations is missing"),
        ({"stages": [{"iterations": "many"}]}, r"stages\[0\].iterations='many' must be of type int"),
        ({"stages": [{"iterations": 1, "families": 3}]}, r"stages\[0\].families=3 must be at most those of train, 2"),
        (
            {"train": [{"kind": "teacher", "weight": 0}]},
            r"train\[0\]: task family teacher: weight=0 must be a positive",
        ),
        ({"stages": [{"iterations": 1, "sigma": 0}]}, r"stages\[0\].sigma=0.0 must be positive"),
        ({"stages": [{"iterations": 1, "sigma": ".nan"}]}, r"stages\[0\].sigma='.nan' must be a finite number"),
        ({"stages": [{"iterations": 1, "space": "half"}]}, r"stages\[0\].space='half' is unknown; choose one of"),
        ({"stages": [{"iterations": 1, "horizon": [9, 3]}]}, r"stages\[0\].horizon=\[9, 3\] must be the least"),
        ({"stages": [{"iterations": 1}, {"iterations": 1, "space": "linear"}]}, r"is for the first stage only"),
        ({"lr": 0}, r"lr=0.0 must be positive"),
        ({"threads": True}, r"threads=True must be of type int"),
        ({"device": "abacus"}, r"device='abacus': "),
        ({"held_out": [{"kind": "teacher", **SMALL}]}, r"family teacher is in held_out and as teacher in train: .*"),
        ({"held_out": [{"kind": "teacher", "name": "x", **SMALL, "width": [4, 9]}]}, r"family x is in held_out and"),
        ({"held_out": [{"kind": "teacher", **SMALL, "width": 9}]}, r"two families are called teacher"),
    ],
)
def test_wrong_configs_are_told_by_entry(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny(**changes)


def test_the_learning_rate_is_that_of_the_config(tmp_path):
    first = {}
    for name, changes in {
        "default": {},
        "larger": {"lr": 20.0},
        "larger steps": {"start": {"hidden": 4, "step": 0.1, "step_mult": 0.2}},
    }.items():
        theta = MetaTrainer(tiny(**changes), tmp_path / name, quiet=True).run(0)
        first[name] = theta.training["curve"][0]["score"]
    assert first["larger"] == pytest.approx(first["larger steps"], abs=2e-4)
    assert abs(first["larger"] - first["default"]) > 0.01


def test_numbers_that_yaml_reads_as_strings_are_numbers():
    assert tiny(stages=[{"iterations": 1, "lr": "1e-3"}]).stages[0].lr == 1e-3


def test_a_folder_is_not_overwritten_nor_resumed_with_another_config(tmp_path):
    MetaTrainer(tiny(), tmp_path, quiet=True).run(1)
    with pytest.raises(ResumeError, match="holds a run already"):
        MetaTrainer(tiny(), tmp_path)
    with pytest.raises(ResumeError, match="another config: seed differ"):
        MetaTrainer(tiny(seed=5), tmp_path, resume=True)


def test_the_command_line(tmp_path, capsys, monkeypatch):
    import yaml

    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**TINY, "evaluation": {"every": 1, "horizon": 2, "tasks": 1, "seeds": 1}}))
    other = tmp_path / "other.yaml"
    weights = theta_for("celo").save(tmp_path / "celo.safetensors")
    other.write_text(yaml.safe_dump({**TINY, "start": {"weights": str(weights)}, "stages": [{"iterations": 1}]}))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["metatrain", str(path), "--iterations", "1", "--seed", "3"]) == 0
    assert "iteration 1: selection score" in capsys.readouterr().out
    assert (tmp_path / "runs/metatrain/mine/last.safetensors").exists()
    for arguments, message in (
        ([str(path)], "holds a run already"),
        (["no_such"], "no_such: No such file"),
        ([str(path), "--output", "x", "--threads", "0"], "threads=0 must be positive"),
        ([str(other), "--output", "x"], "start.weights="),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["metatrain", *arguments])
        said = capsys.readouterr().err
        assert exit_.value.code == 2 and message in said and said.count("\n") == 1


@pytest.mark.parametrize("name", sorted(configs()))
def test_packaged_configs_are_valid(name):
    config = load_config(configs()[name])
    assert config.selection and config.held_out and config.licence


def test_packaged_configs_are_found():
    assert {"tutorial", "small_fc_lopt", "mulo"} <= set(configs())


@pytest.mark.slow
def test_the_tutorial_helps_from_its_first_iterations_on(tmp_path):
    pytest.importorskip("sklearn")
    config = load_config(configs()["tutorial"])
    [stage] = config.stages
    short = replace(
        config,
        stages=(replace(stage, iterations=30),),
        evaluation=replace(config.evaluation, every=30, horizon=100, tasks=1, adamw=()),
    )
    theta = MetaTrainer(short, tmp_path, quiet=True).run()
    first, last = theta.training["curve"]
    assert last["score"] < first["score"] - 0.2
    assert last["held_out_loss_digits_conv"] < first["held_out_loss_digits_conv"] - 0.2


# -- families ------------------------------------------------------------------------------------------------------


def test_a_family_of_ones_own_comes_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from pylo_integrations.metatrain import Family, Task\n"
        "class Line(Family):\n"
        "    kind = 'line'\n"
        "    choices = {'slope': (1.0, 2.0)}\n"
        "    def build(self, generator, width_mult, slope):\n"
        "        def draw(generator, count, validation):\n"
        "            x = torch.randn(count, 8, 1, generator=generator)\n"
        "            return x, slope * x\n"
        "        def loss(model, batch):\n"
        "            return (model(batch[0]) - batch[1]).square().mean()\n"
        "        return Task(lambda: torch.nn.Linear(1, 1), loss, draw)\n"
    )
    config = read_config({**TINY, "train": [{"kind": "mine.py:Line", "slope": 3}]}, tmp_path)
    assert config.train[0].name == "line"
    trainer = MetaTrainer(config, tmp_path / "run", quiet=True)
    assert trainer.run(2).training["config"]["train"][0]["slope"] == [3]
    with pytest.raises(ConfigError, match="no subclass of Family named 'Task2'"):
        read_config({**TINY, "train": [{"kind": "mine.py:Task2"}]}, tmp_path)


class Exploding(Family):
    kind = "exploding"
    choices = {}

    def build(self, generator, width_mult):
        def loss(model, batch):
            return (model(batch[0]) / (batch[0].mean() - batch[0].mean())).square().mean()

        return Task(lambda: torch.nn.Linear(1, 1), loss, lambda g, n, v: (torch.randn(n, 2, 1, generator=g),))


def test_losses_that_are_not_finite_leave_theta_finite(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, "exploding", Exploding)
    _, theta = run(tmp_path, train=[{"kind": "exploding"}], stages=[TINY["stages"][0]])
    assert all(array.isfinite().all() for array in theta.arrays.values())
