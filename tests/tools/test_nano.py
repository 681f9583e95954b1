"""Does the nano track run one file of an optimizer after the other alike, and judge by its rule?"""

from __future__ import annotations

import json

import pytest
import torch
from recipe_cases import RECIPES, loaded


@pytest.fixture
def nano():
    with loaded("nano/train.py") as module:
        yield module


@pytest.mark.parametrize("count", [2, 4, 10])
def test_the_rule_is_the_one_sided_t_test(nano, count):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    losses = (1.6 + 0.01 * torch.randn(count, generator=generator)).tolist()
    edge = next(target for step in range(1000) if nano.is_below(losses, target := 1.5 + 0.002 * step))
    assert stats.ttest_1samp(losses, edge, alternative="less").pvalue < 0.01
    assert stats.ttest_1samp(losses, edge - 0.002, alternative="less").pvalue > 0.01


def test_one_run_and_one_that_diverged_reach_nothing(nano):
    assert not nano.is_below([1.0], 1.6) and not nano.is_below([1.0, float("nan")], 1.6)
    assert nano.is_below([1.0, 1.0], 1.6)


def test_the_model_has_one_to_three_million_parameters_and_looks_back_only(nano):
    model = nano.GPT()
    assert 1e6 < sum(param.numel() for param in model.parameters()) < 3e6
    before = torch.randint(48, (1, nano.LENGTH))
    after = before.clone()
    after[:, -1] = (after[:, -1] + 1) % 48
    torch.testing.assert_close(model(before)[:, :-1], model(after)[:, :-1])


@pytest.mark.slow
def test_every_file_of_an_optimizer_trains_from_the_same_start(nano, tmp_path, capsys):
    files = sorted(path for path in (RECIPES / "nano").glob("*.py") if path.name != "train.py")
    assert {"adamw", "muon", "pace"} <= {path.stem for path in files}
    for file in files:
        if file.stem == "muon" and not hasattr(torch.optim, "Muon"):
            continue
        for _ in range(2):  # the second finds the log
            nano.main([file.name, "--steps", "8", "--seeds", "1", "--output", str(tmp_path)])
        lines = [json.loads(line) for line in (tmp_path / f"{file.stem}-8-0.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 8] and lines[1]["loss"] < lines[0]["loss"] - 0.1
    starts = {json.loads(log.read_text().splitlines()[0])["loss"] for log in tmp_path.glob("*.jsonl")}
    assert len(starts) == 1
    assert "| adamw | 8 | 1 | " in capsys.readouterr().out


def test_the_table_is_what_the_logs_say(nano, tmp_path):
    for seed, end in enumerate((1.5, 1.5, 1.52)):
        lines = [{"step": 0, "loss": 4.0}, {"step": 50, "loss": nano.TARGET}, {"step": 100, "loss": end}]
        (tmp_path / f"mine-100-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "| mine | 100 | 3 | 1.5067 ± 0.0115 | 50 | yes |" in nano.table(tmp_path)


def test_a_file_that_is_not_there_is_named(nano, tmp_path):
    with pytest.raises(SystemExit, match=r"there is no .*nothing\.py; an optimizer is a \.py file"):
        nano.main([str(tmp_path / "nothing.py"), "--output", str(tmp_path)])
