"""Does ``pylo bench --figures`` compare what it says? Formulas and bounds; never speed."""

from __future__ import annotations

import json

import pytest
import torch
from native_library import library_or_skip
from torch import nn

from pylo_integrations import cli
from pylo_integrations.bench import figures
from pylo_integrations.bench.accuracy import random_theta, update_error
from pylo_integrations.bench.figures import NAIVE, NATIVE, PEAK, REFERENCE, Figure
from pylo_integrations.bench.naive import NaiveSmallFC
from pylo_integrations.optimizers import SmallFCLOpt
from pylo_integrations.rules.small_fc import SmallFCRule


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (6, 6), (4, 3, 5), (7,)])
def test_the_naive_code_takes_the_same_steps(shape):
    theta = random_theta()
    generator = torch.Generator().manual_seed(0)
    naive, reference = (nn.Parameter(torch.full(shape, 0.1)) for _ in range(2))
    contenders = [
        (naive, NaiveSmallFC([naive], SmallFCRule.from_arrays(theta.arrays, **theta.hyper), lr=1.0)),
        (reference, SmallFCLOpt([reference], weights=theta, backend="reference", lr=1.0)),
    ]
    for _ in range(3):
        grad = 0.01 * torch.randn(shape, generator=generator)
        for param, optimizer in contenders:
            param.grad = grad.clone()
            optimizer.step()
    moved = (reference - 0.1).abs().max()
    assert moved > 1e-3 and (naive - reference).abs().max() <= 5e-6 * moved


def test_an_update_is_measured_to_be_within_its_bound():
    library_or_skip()
    assert 0 < update_error((24, 20)) < 1e-6


def test_a_loop_makes_as_many_multiply_adds_as_it_was_asked_for():
    library = library_or_skip()
    once = library.multiply_adds(1)
    assert once > 0 and library.multiply_adds(1000) == 1000 * once


def test_ratios_and_the_share_of_the_peak_are_paired(monkeypatch):
    class Library:
        def multiply_adds(self, rounds):
            return 16 * rounds

    # The second round is twice as slow for everyone.
    seconds = {NATIVE: [0.5, 1.0], REFERENCE: [2.0, 4.0], NAIVE: [12.5, 25.0], PEAK: [0.001, 0.002]}

    def answer(function, *args):
        return 3e-7 if function is update_error else {name: seconds[name] for name in args[0]}

    monkeypatch.setattr(figures, "in_fresh_process", answer)
    monkeypatch.setattr(figures, "_library", Library)
    found = {figure.name.strip(): figure for figure in figures.kernel(2)}
    assert found["naive eager code takes"].value == 25 and found["the reference backend takes"].value == 4
    # 1600 multiply-adds of each of 768 * 3072 parameters in half a second; the loop makes 16 million in a thousandth.
    expected = 100 * (1600 * 768 * 3072 / 0.5) / (16e6 / 0.001)
    assert found["share of it, whole step"].value == pytest.approx(expected)
    assert found["error of an update"].keeps(1e-6)


def test_bounds_are_from_one_side():
    table = figures.format_figures(
        [
            Figure("rate", 150.0, "Mparam/s", 100, 180),
            Figure("rate", 200.0, "Mparam/s", 100, 180),
            Figure("peak", 65.0, "MiB", 64, at_most=True),
            Figure("peak", None, "MiB", 64, at_most=True),
            Figure("time", 1.0, "s"),
        ]
    ).split("\n")
    assert [line.split()[-1] for line in table[1:]] == ["kept", "aim", "missed", "unknown", "s"]


def test_the_command_measures_what_it_is_asked_for(monkeypatch, capsys, tmp_path):
    asked = []

    def section(name):
        return lambda repeats: asked.append((name, repeats)) or [Figure(name, 1.0, "s")]

    monkeypatch.setattr(figures, "SECTIONS", {name: section(name) for name in figures.SECTIONS})
    path = tmp_path / "figures.json"
    assert cli.main(["bench", "--figures", "many,kernel", "--repeats", "2", "--json", str(path)]) == 0
    assert asked == [("many", 2), ("kernel", 2)]
    assert [record["section"] for record in json.loads(path.read_text())["results"]] == ["many", "kernel"]
    assert cli.main(["bench", "--figures"]) == 0
    assert [name for name, _ in asked[2:]] == list(figures.SECTIONS)
    with pytest.raises(SystemExit):
        cli.main(["bench", "--figures", "--threads", "2"])
    with pytest.raises(SystemExit):
        cli.main(["bench", "--figures", "--distributed"])
    assert "--threads means nothing with --figures" in capsys.readouterr().err
