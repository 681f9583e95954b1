"""Does ``pylo evaluate`` train, tune and count as it says, go on where it was cut off, and tell what is wrong?"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")  # for the digits

from pylo_integrations import cli
from pylo_integrations.evaluation import (
    BASELINES,
    SCHEDULES,
    SUITES,
    TASKS,
    USUAL,
    Run,
    Setting,
    available_baselines,
    evaluate,
    tasks,
    train,
)
from pylo_integrations.evaluation.contenders import default_of, grid_of
from pylo_integrations.evaluation.plan import RUNS
from pylo_integrations.evaluation.report import describe
from pylo_integrations.evaluation.results import Results, ranks_of
from pylo_integrations.evaluation.runs import RunsFile, _spike, train_all
from pylo_integrations.evaluation.tasks import base, first, transfer
from pylo_integrations.metatrain import DataError
from pylo_integrations.mup import mup_param_groups
from pylo_integrations.weights import load_theta

MULO = "mulo:builtin:small_fc_bootstrap"
TOY = ("friedman", "digits_mlp_256")
ARGV = ["evaluate", "--optimizers", f"{MULO},small_fc_lopt@linear", "--tasks", ",".join(TOY), "--steps", "5"]
ARGV += ["--seeds", "2", "--jobs", "1", "--output"]
TIMES = ("step_seconds", "optimizer_seconds", "step_cpu_seconds")
WITHOUT_HIDDEN = ("ratings_factors", "words_skipgram", "fashion_variational", "text_adapters")


def small_grid(monkeypatch):
    for name, whole in list(BASELINES.items()):
        monkeypatch.setitem(BASELINES, name, replace(whole, lrs=whole.lrs[3:5], schedules=whole.schedules[-1:]))
    return sum(len(grid_of(name)) for name in USUAL)


def timeless(record):
    return {name: value for name, value in record.items() if name not in TIMES}


def sorted_records(folder):
    records = map(json.loads, (folder / RUNS).read_text().splitlines())
    return sorted(map(timeless, records), key=lambda r: (r["task"], r["name"], r["seed"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a finished toy evaluation, and how many settings the grid has."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        count = small_grid(monkeypatch)
        assert cli.main([*ARGV, str(folder)]) == 0
    return folder, count


# -- runs --------------------------------------------------------------------------------------------------------------


def test_every_setting_runs_on_every_task_and_seed(whole):
    folder, grid = whole
    records = sorted_records(folder)
    assert len(records) == len(TOY) * 2 * (grid + 2)
    assert {record["seed"] for record in records} == {0, 1} and {record["task"] for record in records} == set(TOY)
    assert {MULO, "small_fc_lopt@linear", "adamw lr=0.003@cosine"} < {record["name"] for record in records}
    for record in records:
        assert (
            [row[0] for row in record["train_curve"]]
            == [0, 1, 2, 3, 4, 5]
            == [r[0] for r in record["validation_curve"]]
        )
        assert (
            record["train"] == record["train_curve"][-1][1]
            and record["validation"] == record["validation_curve"][-1][1]
        )
        assert record["train_best"] == min(loss for _, loss in record["train_curve"])
        assert record["batches_best"] <= record["batches"]
        assert (record["accuracy"] is None) == (record["task"] == "friedman")


def test_all_optimizers_start_alike_and_see_the_same_batches(whole):
    for task in TOY:
        for seed in (0, 1):
            mine = [r for r in sorted_records(whole[0]) if (r["task"], r["seed"]) == (task, seed)]
            # muP divides the outputs, so mulo's network begins elsewhere.
            assert len({r["train_curve"][0][1] for r in mine if r["name"] != MULO}) == 1
            assert len({r["train"] for r in mine}) == len(mine), "they should differ in the end"


def test_a_spike_is_how_far_averaged_losses_rise_after_warming_up():
    falling = [1000 / (10 + step) for step in range(1000)]
    assert _spike(falling) < 1
    assert _spike([1e6, *falling]) < 1, "while warming up it may rise"
    # A hundred batches at three times the loss, at 500, where it is 1000 / 510.
    raised = [loss * (3 if 500 <= step < 600 else 1) for step, loss in enumerate(falling)]
    assert _spike(raised) == pytest.approx(3 * 460 / 560, rel=0.01)
    assert _spike(falling[:100]) is None


def test_a_run_is_the_same_again(whole):
    again = timeless(train(Run("friedman", Setting.learned(MULO), 5, 1)))
    assert json.loads(json.dumps(again)) in sorted_records(whole[0])


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_run_what_one_does(whole):
    runs = [Run("friedman", Setting("adamw", "cosine", 3e-3), 5, seed) for seed in (0, 1)]
    done = sorted(map(timeless, train_all(runs, 2)), key=lambda record: record["seed"])
    assert all(json.loads(json.dumps(record)) in sorted_records(whole[0]) for record in done) and len(done) == 2


def test_an_interrupted_evaluation_goes_on(whole, tmp_path, monkeypatch):
    lines = (whole[0] / RUNS).read_text().splitlines(keepends=True)
    (tmp_path / RUNS).write_text("".join(lines[:-3]) + lines[-3][:50])  # killed while it wrote
    small_grid(monkeypatch)
    assert cli.main([*ARGV, str(tmp_path)]) == 0
    assert len((tmp_path / RUNS).read_text().splitlines()) == len(lines)
    assert sorted_records(tmp_path) == sorted_records(whole[0])
    before = (tmp_path / RUNS).read_bytes()
    assert cli.main([*ARGV, str(tmp_path)]) == 0
    assert (tmp_path / RUNS).read_bytes() == before, "nothing was missing"


def test_only_the_best_settings_run_on_seeds_that_do_not_tune(tmp_path, monkeypatch):
    grid = small_grid(monkeypatch)
    records = evaluate([], tmp_path, tasks=["friedman"], steps=[3], seeds=2, tuning_seeds=1)
    results = Results(records, 3)
    first, second = ({r["name"] for r in records if r["seed"] == seed} for seed in (0, 1))
    assert len(first) == grid
    assert second == {*results.best["friedman"].values(), *results.global_settings.values()}


def test_divergence_is_told_and_is_no_nan(tmp_path):
    record = train(Run("friedman", Setting("sgd", "constant", 1e6), 40, 0))
    assert record["diverged"] and record["train"] is None is record["validation"] and len(record["train_curve"]) < 20
    json.dumps(record, allow_nan=False)
    record = train(Run("friedman", Setting("adamw", "constant", 3.0), 40, 0))
    assert record["diverged"] and record["train"] > 2, "targets have variance 1"


def test_schedules():
    assert [SCHEDULES["linear"](part) for part in (0, 0.5, 1)] == [1, 0.5, 0]
    assert [SCHEDULES["constant"](part) for part in (0, 1)] == [1, 1]
    assert [SCHEDULES["cosine"](part) for part in (0, 0.025, 0.05, 1)] == pytest.approx([0, 0.5, 1, 0])


# -- tasks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def little_pretraining(monkeypatch):
    cached = first._pretrained, transfer._frozen, transfer._taught
    monkeypatch.setattr(base, "PRETRAINING_STEPS", 1)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("little_pretraining")
def test_every_task_can_be_trained_by_every_optimizer(name):
    task = TASKS[name]
    try:
        training, validation = task.samples()
    except DataError as error:
        pytest.skip(str(error))
    assert 0 < len(training.targets) <= 16 * task.batch and 0 < len(validation.targets) <= 32 * task.batch
    model, mup = task.model(3), task.model(3, base_width=16)
    assert all(map(torch.equal, model.state_dict().values(), mup.state_dict().values()))
    inputs, targets = task.data()[0].rows(task.batches(0, 2)[1])
    loss = task.loss(model(inputs), targets)
    loss.backward()
    loss = loss.detach()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert loss.isfinite() and len(targets) == task.batch and all(p.grad is not None for p in parameters.values())
    for baseline in available_baselines():
        optimizers = BASELINES[baseline].make(model, 1e-3)
        stepped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, stepped)) == sorted(map(id, parameters.values()))
    # Hidden matrices, and nothing else, take smaller steps by as much as the network is wider.
    rates = {group["lr"] for group in mup_param_groups(mup, task.base(16))}
    assert rates == ({1.0} if name in WITHOUT_HIDDEN else {1.0, 16 / task.width})
    # Losses are means over examples, so that they can be measured on any number of them.
    if not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()):
        with torch.no_grad():
            halves = [float(task.loss(model(x), y)) for x, y in zip(inputs.chunk(2), targets.chunk(2), strict=True)]
        assert float(loss) == pytest.approx(sum(halves) / 2, rel=1e-4)


def test_a_theta_for_mup_steps_hidden_matrices_less(tmp_path):
    task = TASKS["friedman"]
    assert Setting.learned("small_fc_lopt").base_width is None
    [optimizer] = Setting.learned(MULO).optimizers(task.model(0, 16), task, 5)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0, 16 / task.width}
    replace(load_bootstrap(), training={"config": {"base_width": 25}}).save(tmp_path / "theta.safetensors")
    assert Setting.learned(f"small_fc_lopt:{tmp_path}/theta.safetensors").base_width == 25


def load_bootstrap():
    return load_theta("builtin:small_fc_bootstrap", "small_fc_lopt")


def test_the_docs_describe_every_task():
    page = (Path(__file__).parents[2] / "docs" / "record.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", page.partition("## Baselines")[0], re.MULTILINE) == list(TASKS)


def test_suite_2_is_as_broad_as_it_claims():
    found = SUITES[2].values()
    assert len(found) >= 24 and not SUITES[1].keys() & SUITES[2].keys()
    assert len({task.batch for task in found}) >= 3
    assert min(task.width for task in found) == 32 and max(task.width for task in found) == 512
    assert all(default_of(name) in grid_of(name) for name in BASELINES), "a default is one of the settings that are run"


# -- results -----------------------------------------------------------------------------------------------------------


def record(task, name, seed, train, validation=1.0, reached=()):
    """A run of 100 steps whose training loss is 9 but for ``reached`` and the end."""
    curve = [[step, dict(reached).get(step, 9.0)] for step in range(0, 100, 10)] + [[100, train]]
    optimizer = name.split()[0]
    lr = float(name.partition("=")[2]) if "=" in name else None
    setting = {"optimizer": optimizer if optimizer in BASELINES else "small_fc_lopt", "lr": lr}
    numbers = {"train": train, "train_best": train, "batches": train, "batches_best": train, "validation": validation}
    times = dict.fromkeys(TIMES, 0.001)
    return {
        "suite": 1,
        "task": task,
        "name": name,
        "setting": setting,
        "steps": 100,
        "seed": seed,
        "train_curve": curve,
        "accuracy": None,
        "diverged": train is None,
        **numbers,
        **times,
    }


SYNTHETIC = [
    # By ranks the middle rate is the one for all tasks, though the first is best on two of three.
    *(
        record(task, f"adamw lr={lr:g}", seed, train + seed / 100, validation=2.0)
        for task, of_task in {"a": (0.1, 0.2, 0.3, 0.4), "b": (0.1, 0.2, 0.3, 0.4), "c": (4.0, 0.2, 3.0, 0.3)}.items()
        for lr, train in zip((1e-4, 1e-3, 1e-2, 3e-2), of_task, strict=True)
        for seed in (0, 1, 2)
    ),
    # The target is tuned AdamW's loss with the same seed: 0.10, 0.11, 0.12 on a and b; 0.20, 0.21, 0.22 on c.
    record("a", "new", 0, 0.05, reached={50: 0.1}),
    record("a", "new", 1, 0.05, reached={50: 0.12, 70: 0.11}),
    record("a", "new", 2, 0.05, validation=5.0),
    record("b", "new", 0, 0.15, validation=5.0),
    record("b", "new", 1, 0.11, validation=5.0),
    record("b", "new", 2, 0.15, validation=5.0),
    record("c", "new", 0, 0.2),
    record("c", "new", 1, None, None),
    record("c", "new", 2, 0.22),
]


def test_ranks():
    assert ranks_of({"a": 3.0, "b": 1.0, "c": 3.0, "d": math.inf}) == {"a": 2.5, "b": 1, "c": 2.5, "d": 4}


def test_tuning_and_counting_go_by_the_rules():
    results = Results(SYNTHETIC, 100)
    assert results.titles == ["adamw tuned", "adamw global", "new"]
    assert [results.best[task]["adamw"] for task in "abc"] == ["adamw lr=0.0001", "adamw lr=0.0001", "adamw lr=0.001"]
    assert results.global_setting == "adamw lr=0.001"
    found = {task: results.result(task, "new") for task in "abc"}
    assert found["a"].reach == {0: 50, 1: 70, 2: 100} and found["a"].steps == 70
    assert found["b"].reach == {0: math.inf, 1: 100, 2: math.inf} and found["b"].steps == math.inf
    assert found["c"].reach == {0: 100, 1: math.inf, 2: 100} and found["c"].diverged == 1
    counts = results.counts("new")
    # On c the medians are 0.22 against 0.21, since a run without an end counts as infinite.
    assert (counts.tasks, counts.reaches, counts.diverged) == (3, 2, 1)
    assert (counts.tuned_train, counts.tuned_validation) == (1, 2)
    assert (counts.global_train, counts.global_validation) == (2, 2)
    assert results.at_the_edge() == ["adamw on a", "adamw on b"]
    assert Results(SYNTHETIC, 100, learned=[]).titles == ["adamw tuned", "adamw global"]


def test_the_report_holds_the_results():
    text = describe(Results(SYNTHETIC, 100))
    assert "| new | 2 of 3 | 1 of 3 | 2 of 3 | 2 of 3 | 2 of 3 | 1 of 3 |" in text
    assert "| a | 0.11 | 0.21 | **0.05** |" in text and "| c | 0.21 | **0.21** | 0.22 |" in text
    assert "global setting: `adamw lr=0.001`" in text and "Best at an end of its grid: adamw on a, adamw on b." in text
    assert "0.15 [0.11, 0.15]" in text and "(1 of 3 diverged)" in text
    assert "not reached (1 of 3 seeds)" in text and "| 100 (2 of 3 seeds) |" in text


def test_the_command_reports_what_was_run(whole, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = whole
    assert cli.main(["evaluate", "--report", "--output", str(folder), "--optimizers", MULO]) == 0
    assert "report-5.png" in capsys.readouterr().out
    assert (folder / "report-5.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    text = (folder / "report.md").read_text()
    assert f"| {MULO} | " in text and "small_fc_lopt@linear" not in text
    assert all(f"#### {task}: {TASKS[task].description}" in text for task in TOY)


def test_a_task_at_several_widths(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    narrow, wide = (f"friedman:{width}" for width in (8, 24))
    argv = ["evaluate", "--optimizers", f"{MULO},small_fc_lopt", "--tasks", f"{wide},{narrow}", "--tuning-seeds", "0"]
    assert cli.main([*argv, "--steps", "4", "--seeds", "2", "--jobs", "1", "--output", str(tmp_path)]) == 0
    records = sorted_records(tmp_path)
    assert {(r["task"], r["name"]) for r in records} == set(itertools.product((narrow, wide), (MULO, "small_fc_lopt")))
    assert [len(next(tasks.find_task(name).model(0).parameters())) for name in (narrow, wide)] == [8, 24]
    batches = [tasks.find_task(name).batches(0, 4) for name in (narrow, wide, "friedman")]
    assert torch.equal(batches[0], batches[1]) and torch.equal(batches[0], batches[2])
    text = (tmp_path / "report.md").read_text()
    assert text.index(f"| {narrow} |") < text.index(f"| {wide} |") and "perceptron 100 x 3, at that width" in text
    assert "No setting of AdamW was run on all tasks" in text
    assert {path.name for path in tmp_path.iterdir()} == {RUNS, "report.md", "widths-4.png"}
    assert "widths-4.png" in capsys.readouterr().out


def test_the_docs_say_what_the_recorded_runs_of_the_shipped_weights_say():
    docs = Path(__file__).parents[2] / "docs"
    with gzip.open(docs / "data" / "evaluation-1000.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    results = Results(records, 1000)
    page = "".join((docs / name).read_text() for name in ("evaluation.md", "record.md"))
    for name in ("celo2@linear", "celo"):
        counts = results.counts(name)
        cells = [counts.reaches, counts.tuned_train, counts.tuned_validation]
        cells += [counts.global_train, counts.global_validation, counts.diverged]
        assert f"| `{name}` | " + " | ".join(f"{count} of 13" for count in cells) + " |" in page
        for task in SUITES[1]:
            result = results.result(task, name)
            assert sorted(result.runs) == [0, 1, 2] and f"{result.median('train'):.4g}" in page
            sums = {run["setting"]["sha256"] for run in result.runs.values()}
            assert sums == {Setting.learned(name).sha256}, "weights changed: evaluate them, and tell of it"


# -- misuse ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(capsys, tmp_path):
    def run(*argv):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["evaluate", "--output", str(tmp_path / "out"), *map(str, argv)])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2 and out == "" and err.count("\n") == 1
        return err

    return run


def test_misuse_is_refused_in_one_line(refused, tmp_path, whole):
    assert "'mulp'; did you mean 'mulo'" in refused("--optimizers", "mulp")
    assert "schedule 'cosin'" in refused("--optimizers", "small_fc_lopt@cosin")
    assert "hub:amoudgl/celo2-base" in refused("--optimizers", "celo2_base"), "its weights are not here"
    assert "these weights are for small_fc" in refused("--optimizers", "velo:builtin:small_fc_bootstrap")
    assert "nowhere.safetensors" in refused("--optimizers", f"mulo:{tmp_path}/nowhere.safetensors@linear")
    assert "held-out task 'iris' is unknown; there are digits_mlp_256" in refused("--tasks", "iris")
    assert "width '-8' of held-out task 'friedman:-8'" in refused("--tasks", "friedman:-8")
    assert "fashion_finetune begins with trained weights of width" in refused("--tasks", "fashion_finetune:8")
    assert "'0' is not a positive integer" in refused("--steps", "100,0")
    assert "'-1' is not a positive integer" in refused("--tuning-seeds", "-1")
    assert "there are no runs in" in refused("--report")
    assert not (tmp_path / "out").exists()
    out = tmp_path / "other"
    out.mkdir()
    (out / RUNS).write_text("step,loss\n")
    assert "line 1 of" in refused("--report", "--output", out)
    (out / RUNS).write_text(json.dumps({"suite": 0}) + "\n")
    assert "runs of suite 0, and there are 1, 2" in refused("--report", "--output", out)
    assert "factor 'x' of 'mulo*x@linear'" in refused("--optimizers", "mulo*x@linear")
    assert "baseline 'adam' is unknown; there are adamw, sgd" in refused("--baselines", "adamw,adam")
    (out / RUNS).write_text((whole[0] / RUNS).read_text().splitlines()[0] + "\n")
    assert "would hold runs of suites 1 and 2" in refused(
        *"--suite 2 --tasks cancer_gated --baselines adamw --output".split(), out
    )


def test_another_theta_of_the_same_name_is_refused(tmp_path):
    path = tmp_path / "theta.safetensors"
    load_bootstrap().save(path)
    setting = Setting.learned(f"small_fc_lopt:{path}")
    file = RunsFile(tmp_path / RUNS)
    file.add(train(Run("friedman", setting, 2, 0)))
    assert not file.missing([Run("friedman", setting, 2, 0)])
    theta = load_bootstrap()
    replace(theta, hyper={**theta.hyper, "step_mult": 0.5}).save(path, overwrite=True)
    other = Setting.learned(f"small_fc_lopt:{path}")
    with pytest.raises(ValueError, match="with another theta, sha256"):
        RunsFile(tmp_path / RUNS).missing([Run("friedman", other, 2, 0)])
    with pytest.raises(ValueError, match="changed while it was evaluated"):
        train(Run("friedman", setting, 2, 0))


def test_a_picture_needs_matplotlib(whole, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused("--report", "--output", whole[0])


@pytest.mark.parametrize(
    ("name", "parts"), [("pace", {1, 3}), ("pace-split", {1}), ("celo2", {1}), ("celo2+split", {1, 3})]
)
def test_queries_keys_and_values_are_divided_as_the_optimizer_divides_those_of_gpt2(name, parts):
    task = TASKS["impedance_attention"]
    [optimizer] = Setting.learned(name).optimizers(task.network(task.width, 1.0), task, 10)
    assert {group.get("split", 1) for group in optimizer.param_groups} == parts


def test_adapters_of_queries_keys_and_values_are_not_divided():
    task = TASKS["text_adapters"]
    [optimizer] = Setting.learned("pace").optimizers(task.network(task.width, 1.0), task, 10)
    assert {group.get("split", 1) for group in optimizer.param_groups} == {1}
