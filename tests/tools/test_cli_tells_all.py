"""Does ``pylo`` tell all there is, in lines that people can read?"""

from __future__ import annotations

import inspect
import io
import json
import os
import shutil
import sys

import huggingface_hub.constants
import pytest

from pylo_integrations import Theta, cli, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.bench import steps
from pylo_integrations.options import OPTIONS
from pylo_integrations.weights import builtin_names, load_theta


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def told(capsys):
    def run(*argv):
        assert cli.main(argv) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", list_optimizers())
def test_info_has_every_option_with_the_default_that_counts(name, told):
    spec = get_optimizer_info(name)
    found = dict(line.split(maxsplit=1) for line in told("info", name).splitlines() if line.startswith("  "))
    keywords = [p.name for p in inspect.signature(create_optimizer).parameters.values() if p.kind is p.KEYWORD_ONLY]
    taken = {*keywords} - ({"step_mult"} - {*spec.options})  # which pace has not
    assert {*spec.options, *taken, "lr", "weight_decay"} <= set(found)
    assert found["lr"] == repr(spec.lr) and found["weight_decay"] == repr(spec.weight_decay)
    weights = spec.defaults.get("weights", spec.cls.default_weights)
    assert found["weights"] == ("None (needed)" if weights is None else repr(weights))
    assert ("needed" in found["num_steps"]) == spec.needs_horizon
    assert ", ".join(OPTIONS) in told("info", name)


@pytest.mark.parametrize("name", list_optimizers())
def test_info_says_who_wants_a_schedule(name, told):
    assert ("falls to zero" in told("info", name)) == get_optimizer_info(name).wants_schedule
    assert get_optimizer_info("celo2").wants_schedule and not get_optimizer_info("celo").wants_schedule


def test_weights_list_has_those_in_the_package_and_whose_default_they_are(told):
    lines = told("weights", "list").splitlines()
    for name in builtin_names():
        [line] = [line for line in lines if line.split()[0] == f"builtin:{name}"]
        assert load_theta(f"builtin:{name}", name).provenance in line and ("default of" in line or "for " in line)
    for name in list_optimizers():
        default = get_optimizer_info(name).cls.default_weights or ""
        if default.startswith("builtin:"):
            [line] = [line for line in lines if line.split()[0] == default]
            assert name in line.partition("default of ")[2].split(", ")


@pytest.mark.parametrize("name", builtin_names())
def test_weights_info_is_short_for_people_and_whole_for_programs(name, told):
    lines = told("weights", "info", f"builtin:{name}").splitlines()
    assert max(map(len, lines)) < 120
    theta = load_theta(f"builtin:{name}", name)
    record = json.loads(told("weights", "info", f"builtin:{name}", "--json"))
    assert record["training"] == dict(theta.training) and record["hyper"] == dict(theta.hyper)
    assert record["arrays"] == {key: list(array.shape) for key, array in theta.arrays.items()}
    assert all(
        record[key] == getattr(theta, key) for key in ("name", "architecture", "sha256", "provenance", "licence")
    )
    assert isinstance(theta, Theta)


def test_bench_measures_what_is_recommended(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(steps, "run_bench", lambda setting, names, repeats: seen.append(names) or [])
    monkeypatch.setattr(steps, "format_table", lambda records: "TABLE")
    assert cli.main(["bench", "--shapes", "tiny"]) == 0
    assert {"celo2", "celo", "small_fc_lopt"} <= set(seen[0]) <= set(list_optimizers())


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    "argv", [["info", "celo2"], ["weights", "list"], ["weights", "info", "builtin:celo"], ["doctor"]]
)
def test_tables_fit_a_terminal(argv, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(shutil, "get_terminal_size", lambda *args, **kwargs: os.terminal_size((80, 24)))
    assert cli.main(argv) == 0
    assert max(map(len, sys.stdout.getvalue().splitlines())) <= 80


@pytest.mark.parametrize(
    "argv",
    [[], ["bench"], ["plot"], ["try"], ["evaluate"], ["metatrain"], ["weights"], ["info"], ["weights", "convert"]],
    ids=str,
)
def test_help_is_plain_text_of_80_columns(argv, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        cli.main([*argv, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and max(map(len, out.splitlines())) <= 80 and "`" not in out
