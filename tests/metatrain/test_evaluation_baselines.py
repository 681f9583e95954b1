"""Does every baseline train, in its own modes, and is one that is not here left out?"""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn")  # for the digits

from pylo_integrations import cli
from pylo_integrations.evaluation import BASELINES, Run, Setting, baselines, is_available, train


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_lowers_the_loss(name):
    if not is_available(name):
        pytest.skip(f"{BASELINES[name].package or 'a newer torch'} is not installed")
    found = BASELINES[name]
    lr = sorted(found.lrs)[len(found.lrs) // 2]
    record = train(Run("blobs_experts", Setting(name, found.schedules[-1], lr), 60, 0))
    assert not record["diverged"] and record["suite"] == 2
    assert record["train"] < 0.97 * record["train_curve"][0][1]


def test_schedule_free_is_measured_at_its_averages():
    pytest.importorskip("schedulefree")
    seen = []

    class Watched(baselines.BASELINES["schedule_free"].make(_model(), 0.01)[0].__class__):
        def eval(self):
            seen.append("eval")
            super().eval()

        def train(self):
            seen.append("train")
            super().train()

        def step(self, closure=None):
            assert seen[-1] == "train"
            return super().step(closure)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("schedulefree.AdamWScheduleFree", Watched)
        train(Run("blobs_experts", Setting("schedule_free", "constant", 0.01), 3, 0))
    assert seen.count("eval") == seen.count("train") == 8  # two samples at the start and after each step


def _model():
    import torch

    return torch.nn.Linear(2, 2)


def test_a_baseline_without_its_package_is_left_out_with_a_line(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(baselines, "find_spec", lambda name: None)
    argv = [
        "evaluate",
        "--suite",
        "2",
        "--tasks",
        "blobs_experts",
        "--baselines",
        "adamw,soap",
        "--optimizers",
        "mulo*2",
    ]
    assert cli.main([*argv, "--steps", "2", "--jobs", "1", "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "soap is left out: it needs pytorch_optimizer (pip install 'pylo-integrations[evaluation]')" in err
    text = (tmp_path / "runs.jsonl").read_text()
    assert "soap" not in text and '"name": "mulo*2"' in text and '"factor": 2.0' in text


def test_a_factor_multiplies_the_learning_rate():
    from pylo_integrations.evaluation import find_task

    task = find_task("blobs_experts")
    for name in ("pace", "celo2@linear", "mulo:builtin:mulo"):
        head, at, schedule = name.partition("@")
        setting, more = Setting.learned(name), Setting.learned(f"{head}*4{at}{schedule}")
        assert more.name == f"{head}*4{at}{schedule}" and more.schedule == setting.schedule
        one, four = (
            [group["lr"] for group in each.optimizers(task.model(0), task, 10)[0].param_groups]
            for each in (setting, more)
        )
        assert four == pytest.approx([4 * lr for lr in one])


@pytest.mark.parametrize("name", ["celo2@linear+int8", "pace+bfloat16", "mulo:builtin:mulo*2@cosine+int8"])
def test_a_format_of_state_is_part_of_a_contender(name):
    from pylo_integrations.evaluation import find_task

    setting = Setting.learned(name)
    assert setting.name == name and setting.state_dtype == name.rpartition("+")[2]
    assert Setting.learned(name.rpartition("+")[0]).state_dtype == "float32"
    task = find_task("blobs_experts")
    [optimizer] = setting.optimizers(task.model(0), task, 10)
    assert {group["state_dtype"] for group in optimizer.param_groups} == {setting.state_dtype}


def test_a_plus_that_names_no_format_is_of_a_path(tmp_path):
    from pylo_integrations.weights.sources import load_theta

    load_theta("builtin:celo2", "celo2").save(tmp_path / "a+b.safetensors")
    setting = Setting.learned(f"celo2:{tmp_path}/a+b.safetensors")
    assert setting.weights.endswith("a+b.safetensors") and setting.state_dtype == "float32"
