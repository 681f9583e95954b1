"""Does ``pylo try`` compare a training function's runs fairly, and say what came out in words that are true?"""

from __future__ import annotations

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pylo_integrations import cli, comparison
from pylo_integrations.comparison import Trial, compare, describe, find_function

FUNCTION = """
import torch
from torch.nn.functional import mse_loss

def train(optimizer_of):
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = optimizer_of(model)
    while True:
        inputs = torch.randn(32, 4)
        loss = mse_loss(model(inputs), inputs.prod(-1, keepdim=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        yield loss
"""


def training(seen):
    def train(optimizer_of):
        model = nn.Linear(3, 1)
        optimizer, run = optimizer_of(model), []
        seen.append(run)
        while True:
            inputs = torch.randn(8, 3)
            run.append((model.weight.detach().clone(), inputs, optimizer.param_groups[0]["lr"]))
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss

    return train


def trial(name, losses, seconds=1.0):
    return Trial(name, losses, seconds, is_adamw=name.startswith("adamw"))


def test_every_run_has_the_same_start_and_batches_and_the_schedule_that_suits_it():
    seen = []
    trials = list(compare(training(seen), ["celo2", "pace"], steps=20, adamw_lrs=[1e-3, 1e-2]))
    assert [each.name for each in trials] == ["adamw lr=0.001", "adamw lr=0.01", "celo2", "pace"]
    assert all(len(each.losses) == 20 and each.seconds > 0 for each in trials)
    first, *others = seen
    for other in others:
        torch.testing.assert_close(other[0][0], first[0][0], rtol=0, atol=0)
        for mine, theirs in zip(first, other, strict=True):
            torch.testing.assert_close(mine[1], theirs[1], rtol=0, atol=0)
    rates = [[lr for _, _, lr in run] for run in seen]
    assert rates[0][0] < rates[0][1] == max(rates[0]) == pytest.approx(1e-3, rel=0.01), "warm-up"
    assert rates[0][-1] < 1e-4, "cosine"
    assert rates[2][-1] == pytest.approx(rates[2][0] / 39), "celo2 falls along a line"
    assert len(set(rates[3])) == 1, "pace has a schedule of its own"


def test_where_a_run_ended_and_when_it_was_there_are_means_of_a_twentieth_of_it():
    run = trial("pace", [float(100 - step) for step in range(100)])
    assert run.final == 3.0  # of 5, 4, 3, 2, 1
    assert run.steps_to(3.0) == 100 and run.steps_to(98.0) == 5 and run.steps_to(2.9) is None
    assert run.uncertainty == 0.0, "a trend is no scatter"
    noisy = trial("pace", [1.0 + (-1) ** step for step in range(100)])  # neighbours differ by 2 and -2
    assert noisy.uncertainty == pytest.approx(math.sqrt(4 * 5 / 4) / math.sqrt(2 * 5), rel=0.1)


@pytest.mark.parametrize(
    ("losses", "seconds", "expected"),
    [
        ([1.0] * 20 + [0.25] * 80, 2.0, "won: 0.25 against 0.5 of adamw lr=0.001. It was there after 24 of 100 steps"),
        ([1.0] * 20 + [0.25] * 80, 2.0, "AdamW after 55, and a step took 2.00 times as long: 1.15 times as fast"),
        ([1.0] * 20 + [0.25] * 80, 2.4, "no faster in time"),
        ([1.0] * 100, 1.0, "lost: 1 against 0.5"),
        ([1.0] * 50 + [0.4, 0.6, 0.5, 0.45, 0.55] * 10, 1.0, "ended level"),
        ([1.0, math.nan], 1.0, "diverged"),
    ],
)
def test_the_verdict_is_what_the_losses_say(losses, seconds, expected):
    adamw = trial("adamw lr=0.001", [1.0] * 50 + [0.5] * 50)
    worse = trial("adamw lr=0.1", [2.0] * 100)
    assert expected in describe([worse, adamw, trial("pace", losses, seconds)]).splitlines()[-1]


def test_that_adamw_had_one_rate_only_is_said():
    adamw, pace = [trial(f"adamw lr={lr}", [1.0] * 10) for lr in (0.001, 0.01)], trial("pace", [0.5] * 10)
    assert "AdamW had one learning rate" in describe([adamw[0], pace])
    assert "one learning rate" not in describe([*adamw, pace])


def test_validation_losses_are_told_beside_those_of_training():
    def train(optimizer_of):
        model = nn.Linear(2, 1)
        optimizer = optimizer_of(model)
        for step in itertools.count():
            loss = model(torch.ones(1, 2)).square().mean()
            loss.backward()
            optimizer.step()
            yield loss, torch.tensor(float(step)) if step % 4 == 3 else None

    trials = list(compare(train, ["pace"], steps=10))
    assert [each.validation for each in trials] == [7.0, 7.0]
    table = describe(trials).splitlines()
    assert "validation" in table[0] and table[1].endswith(" 7")
    assert "validation" not in describe([trial("adamw lr=0.1", [1.0] * 10), trial("pace", [1.0] * 10)])


@pytest.mark.parametrize(
    ("mine", "expected"),
    [(0.5, "higher: 0.5 against 0.4 of adamw lr=0.1"), (math.nan, "higher: nan against 0.4"), (0.3, ""), (None, "")],
)
def test_a_validation_loss_above_that_of_the_best_adamw_is_said(mine, expected):
    rates = [Trial(f"adamw lr={lr}", [1.0] * 10, 1.0, True, loss) for lr, loss in ((0.1, 0.4), (0.2, 0.6), (0.3, None))]
    told = describe([*rates, Trial("pace", [0.5] * 10, 1.0, False, mine)])
    assert expected in told and ("Its last validation loss is higher" in told) == bool(expected)


def test_adamw_that_diverges_at_every_rate_is_said():
    told = describe([trial("adamw lr=0.1", [1.0, math.inf]), trial("pace", [1.0] * 10)])
    assert "AdamW diverged at every rate" in told


def test_the_command_prints_a_table_and_draws(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "mine.py").write_text(FUNCTION)
    argv = ["try", f"{tmp_path}/mine.py:train", "--steps", "30", "--adamw", "1e-3,1e-2", "--optimizers", "celo,celo2"]
    assert cli.main([*argv, "--plot", str(tmp_path / "p.png")]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in ("adamw lr=0.001", "adamw lr=0.01", "celo", "celo2", "final loss"))
    assert (tmp_path / "p.png").stat().st_size > 1000


def no_loss(optimizer_of):
    optimizer_of(nn.Linear(1, 1))
    yield from ()


def too_few(optimizer_of):
    optimizer_of(nn.Linear(1, 1)).step()
    yield 1.0


def no_optimizer(optimizer_of):
    yield 1.0


def twice(optimizer_of):
    optimizer_of(nn.Linear(1, 1))
    optimizer_of(nn.Linear(1, 1))
    yield 1.0


def parameters(optimizer_of):
    optimizer_of(nn.Linear(1, 1).parameters())
    yield 1.0


def no_step(optimizer_of):
    optimizer_of(nn.Linear(1, 1))
    yield from [1.0] * 5


def breaks(optimizer_of):
    model = nn.Linear(1, 1)
    optimizer = optimizer_of(model)
    for step in range(5):
        if step == 3 and "Pace" in type(optimizer).__name__:
            raise KeyError("batch 3")
        optimizer.zero_grad()
        loss = model(torch.ones(1, 1)).square().sum()
        loss.backward()
        optimizer.step()
        yield loss


def test_what_the_function_raises_is_told_with_its_place_and_what_ran_is_kept(capsys, tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text(
        inspect.getsource(breaks).replace("def breaks", "import torch\nfrom torch import nn\n\n\ndef train")
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["try", "broken:train", "--steps", "5", "--adamw", "1e-3,1e-2"]) == 1, "a module of this folder"
    out, err = capsys.readouterr()
    assert "broken.py" in err and "KeyError: 'batch 3'" in err and "comparison.py" not in err
    assert "in the run of pace, at step 3, the training function failed" in err
    assert out.count("adamw lr=") == 4, "two runs, and a table of them"


def words(optimizer_of):
    optimizer_of(nn.Linear(1, 1))
    yield "low"


def no_argument():
    yield 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_loss, "yielded no loss"),
        (too_few, "ended after 1 losses, and 5 steps"),
        (no_optimizer, r"before it called optimizer_of\(model\)"),
        (twice, "called twice"),
        (parameters, "takes the model, not generator"),
        (words, "must yield losses.*'low'"),
        (no_argument, "must take optimizer_of"),
        (lambda optimizer_of: [1.0] * 5, "must be a generator: it has to yield every loss"),
        (no_step, "never stepped the optimizer"),
    ],
)
def test_a_function_of_another_form_is_refused_with_what_it_should_do(function, message):
    with pytest.raises(ValueError, match=message):
        list(compare(function, ["pace"], steps=5))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py", "is not MODULE:FUNCTION"),
        ("no_such_module_:train", "cannot be run: ModuleNotFoundError"),
        ("math:nothing", "math has no function 'nothing'"),
        ("math:pi", "math has no function 'pi'"),
    ],
)
def test_a_function_that_is_not_there_is_told(name, message):
    with pytest.raises(ValueError, match=message):
        find_function(name)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*none.py"):
        find_function(f"{tmp_path}/none.py:train")


@pytest.mark.parametrize(
    "wrong",
    [["--steps", "0"], ["--adamw", "0"], ["--adamw", "x"], ["--weight-decay", "-1"], ["--optimizers", "adamw"]],
)
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        cli.main(["try", "math:floor", *wrong])
    assert wrong[0] in capsys.readouterr().err


def test_what_a_function_does_once_does_not_count_as_a_step(monkeypatch):
    now = 0.0
    monkeypatch.setattr(comparison, "time", SimpleNamespace(perf_counter=lambda: now))

    def train(optimizer_of):
        nonlocal now
        model = nn.Linear(2, 1)
        optimizer = optimizer_of(model)
        for step in itertools.count():
            now += 100.0 if step in (0, 3) else 1.0  # a compilation, a validation
            loss = model(torch.ones(1, 2)).square().mean()
            loss.backward()
            optimizer.step()
            yield loss

    assert [trial.seconds for trial in compare(train, ["pace"], steps=20)] == [1.0, 1.0]
