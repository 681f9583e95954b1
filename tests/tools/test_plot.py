"""Does ``pylo plot`` draw what runs logged, and say what is wrong when it cannot?"""

from __future__ import annotations

import json
import math
import sys

import numpy
import pytest

pytest.importorskip("matplotlib")

from pylo_integrations import cli, plot

PNG = b"\x89PNG\r\n\x1a\n"


def write_csv(folder, steps, numbers):
    """A log as Lightning's CSVLogger writes it: a column for each name, empty where nothing was logged."""
    folder.mkdir(parents=True)
    lines = [",".join(["epoch", *numbers, "step"])]
    for step in steps:
        cells = [number(step) for number in numbers.values()]
        lines.append(",".join(["0", *("" if cell is None else str(cell) for cell in cells), str(step)]))
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")


def write_state(folder, steps, numbers):
    """A log as the Hugging Face Trainer writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    history = [{"epoch": 0.1, **{name: f(step) for name, f in numbers.items()}, "step": step} for step in steps]
    history += [{"eval_loss": 0.5, "eval_runtime": 1.0, "step": steps[-1]}]
    history += [{"train_runtime": 3.0, "train_loss": 9.0, "step": steps[-1]}]
    state = {"global_step": steps[-1], "log_history": history, "log_level": "info"}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def telemetry(number, rates):
    return {f"optim/VeLO/{owner}/{number}": lambda step, rate=rate: rate * (step + 1) for owner, rate in rates.items()}


PARAMS = {"param/layers.10.weight": 3.0, "param/layers.2.weight": 2.0, "param/layers.2.bias": 1.0}


def mesh_of(axes):
    [mesh] = axes.collections
    return numpy.ma.filled(mesh.get_array(), math.nan).reshape(len(axes.get_yticklabels()), -1)


def names_of(axes):
    return [label.get_text() for label in axes.get_yticklabels()]


def panels_of(path):
    """The axes of the figure, without those of colour bars."""
    return [axes for axes in plot.draw(plot.read_runs(path)).axes if axes.get_title()]


def test_a_heat_map_of_multipliers_a_ratio_and_losses(tmp_path):
    numbers = {
        "train_loss": lambda step: 1 / (step + 1),
        "validation_loss": lambda step: 0.5 if step == 5 else None,
        **telemetry("lr_mult", {**PARAMS, "group0": 7.0}),
        **telemetry("update_ratio", {**PARAMS, "group0": 0.1, "group1": 0.2}),
    }
    write_csv(tmp_path / "velo" / "csv" / "version_0", range(1, 10, 2), numbers)
    losses, ratios, heat = panels = panels_of(tmp_path)
    titles = ["loss", "velo: update norm / parameter norm", "velo: learned multiplier of lr"]
    assert [axes.get_title() for axes in panels] == titles
    assert [line.get_label() for line in losses.lines] == ["train_loss", "validation_loss"]
    assert losses.lines[0].get_xydata() == pytest.approx(numpy.array([[s, 1 / (s + 1)] for s in range(1, 10, 2)]))
    assert losses.lines[1].get_xydata().tolist() == [[5, 0.5]]
    assert [line.get_label() for line in ratios.lines] == ["group0", "group1"]
    assert ratios.lines[1].get_ydata() == pytest.approx([0.2 * (s + 1) for s in range(1, 10, 2)])
    assert names_of(heat) == ["layers.2.bias", "layers.2.weight", "layers.10.weight"]  # not as text is sorted
    assert mesh_of(heat) == pytest.approx(numpy.outer([1, 2, 3], [2, 4, 6, 8, 10]))


def test_signed_multipliers_and_gaps_can_be_drawn(tmp_path):
    series = telemetry("lr_mult", {"param/a": -1.0, "param/b": 1.0})
    series["optim/VeLO/param/c/lr_mult"] = lambda step: None if step < 2 else "nan" if step == 2 else 0.0
    write_csv(tmp_path / "version_0", range(4), series)
    _, heat = panels_of(tmp_path)
    nan = math.nan
    assert mesh_of(heat) == pytest.approx(
        numpy.array([[-1, -2, -3, -4], [1, 2, 3, 4], [nan, nan, nan, 0]]), nan_ok=True
    )


def test_groups_and_the_ratio_stand_in_where_there_is_nothing_better(tmp_path):
    write_csv(tmp_path / "version_0", range(3), telemetry("update_ratio", {"group0": 1.0, "group1": 2.0}))
    _, ratios, heat = panels_of(tmp_path)
    assert ratios.get_title() == heat.get_title() == f"{tmp_path.name}: update norm / parameter norm"
    assert names_of(heat) == ["group0", "group1"]


def test_a_continued_run_is_one_curve_and_a_repeated_one_is_another(tmp_path):
    loss = {"train_loss": lambda step: step + 1}
    write_csv(tmp_path / "run" / "csv" / "version_0", range(0, 30, 10), loss)
    write_csv(tmp_path / "run" / "csv" / "version_1", range(20, 50, 10), {"train_loss": lambda step: -step})
    write_csv(tmp_path / "run" / "csv" / "version_10", range(50, 60, 10), loss)
    runs = plot.read_runs(tmp_path)
    assert [run.name for run in runs] == ["run"]
    assert runs[0].series["train_loss"] == {0: 1, 10: 11, 20: -20, 30: -30, 40: -40, 50: 51}
    write_csv(tmp_path / "run" / "csv" / "version_11", range(0, 30, 10), loss)
    assert [run.name for run in plot.read_runs(tmp_path)] == ["run", "run (2)"]


def test_hugging_face_states_the_last_one_counts(tmp_path):
    numbers = {"loss": lambda step: 1.0 / step, "learning_rate": lambda step: 1.0, **telemetry("lr_mult", PARAMS)}
    for last in (5, 10):
        write_state(tmp_path / "out" / f"checkpoint-{last}", range(1, last + 1), numbers)
    [run] = plot.read_runs(tmp_path)
    assert run.name == "out" and set(run.losses()) == {"loss", "eval_loss"}  # not the summary's
    assert list(run.series["loss"]) == list(range(1, 11)) and run.series["eval_loss"] == {10: 0.5}
    write_state(tmp_path / "out", range(1, 13), numbers)  # trainer.save_state(), after the last checkpoint
    [run] = plot.read_runs(tmp_path)
    assert len(run.series["loss"]) == 12
    [alone] = plot.read_runs(tmp_path / "out" / "checkpoint-5" / "trainer_state.json")
    assert len(alone.series["loss"]) == 5


def test_several_runs_share_the_panel_of_losses(tmp_path):
    for name in ("adamw", "velo"):
        write_csv(tmp_path / name / "csv" / "version_0", range(3), {"train_loss": lambda step: 1.0})
    [losses] = panels_of(tmp_path)
    assert [line.get_label() for line in losses.lines] == ["adamw: train_loss", "velo: train_loss"]


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path):
    write_csv(
        tmp_path / "run" / "version_0", range(3), {"train_loss": lambda step: 1.0, **telemetry("lr_mult", PARAMS)}
    )
    return tmp_path / "run"


def test_the_command_writes_a_picture(run_folder, tmp_path, capsys):
    had_pyplot = "matplotlib.pyplot" in sys.modules  # of another test
    assert cli.main(["plot", str(run_folder)]) == 0
    assert (run_folder / "plot.png").read_bytes().startswith(PNG)
    assert str(run_folder / "plot.png") in capsys.readouterr().out
    assert cli.main(["plot", str(run_folder / "version_0" / "metrics.csv"), "--output", str(tmp_path / "a.svg")]) == 0
    assert "<svg" in (tmp_path / "a.svg").read_text()
    assert ("matplotlib.pyplot" in sys.modules) == had_pyplot


@pytest.fixture
def refused(capsys):
    def run(*argv):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["plot", *map(str, argv)])
        out, err = capsys.readouterr()
        assert exit_.value.code == 2 and out == "" and err.count("\n") == 1
        return err

    return run


def test_misuse_is_refused_in_one_line(run_folder, tmp_path, refused, monkeypatch):
    assert f"there is no file or folder {tmp_path / 'nowhere'}" in refused(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "metrics.csv or trainer_state.json" in refused(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("?")
    assert "is none of metrics.csv, trainer_state.json" in refused(tmp_path / "notes.txt")
    assert "nowhere" in refused(run_folder, "--output", tmp_path / "nowhere" / "a.png")
    assert "xyz" in refused(run_folder, "--output", tmp_path / "a.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refused(run_folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.csv", "epoch,train_loss\n0,1.0\n"),
        ("metrics.csv", "step,train_loss\nfirst,1.0\n"),
        ("metrics.csv", "step,train_loss\n1,low\n"),
        ("trainer_state.json", "{"),
        ("trainer_state.json", "[]"),
        ("trainer_state.json", '{"log_history": [{"loss": 1.0}]}'),
        ("trainer_state.json", '{"log_history": [3]}'),
    ],
)
def test_a_damaged_log_is_named(tmp_path, refused, name, text):
    (tmp_path / name).write_text(text)
    assert f"{name} is not what its name says" in refused(tmp_path)
