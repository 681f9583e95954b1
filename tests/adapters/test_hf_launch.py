"""Does a program that one has not written train with a learned optimizer by name, and is it run as Python runs it?"""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

SCRIPT = """
import sys
import torch
from transformers import HfArgumentParser, Trainer, TrainingArguments
from beside import Net

args, rest = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(return_remaining_strings=True)
data = [{"x": torch.ones(3), "labels": torch.zeros(3)} for _ in range(8)]
trainer = Trainer(Net(), args, train_dataset=data)
if __name__ == "__main__":
    trainer.train()
    learned = trainer.optimizer.optimizer
    print("ran", sys.argv[0][-8:], rest, type(learned).__name__, learned.iteration)
"""
BESIDE = """
import torch
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}
"""
OPTIONS = ["--optim", "pace", "--use_cpu", "--max_steps", "3", "--report_to", "none", "--disable_tqdm", "true", "--own"]


@pytest.mark.slow
def test_a_program_trains_with_the_name_that_it_was_given(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "beside.py").write_text(BESIDE)
    output = ["--output_dir", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-m", "pylo_integrations.hf", "train.py", *OPTIONS, *output],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert "ran train.py ['--own'] Pace 3" in run.stdout, run.stdout[-2000:] + run.stderr[-2000:]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-m"]])
def test_a_command_line_without_a_program_is_told_what_to_name(arguments, monkeypatch):
    from pylo_integrations.hf.__main__ import main

    monkeypatch.setattr(sys, "argv", ["pylo_integrations.hf", *arguments])
    with pytest.raises(SystemExit, match="MODULE"):
        main()


@pytest.mark.parametrize("program", [["told.py"], ["-m", "told"]], ids=" ".join)
def test_a_file_and_a_module_are_run_as_python_runs_them(tmp_path, program, monkeypatch, capsys):
    from pylo_integrations.hf import __main__ as launch

    (tmp_path / "told.py").write_text("import sys\nprint(__name__, sys.argv[0][-7:], sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["pylo_integrations.hf", *program, "--own", "1"])
    monkeypatch.setattr(launch, "install", lambda: None)
    launch.main()
    assert capsys.readouterr().out.split("\n")[0] == "__main__ told.py ['--own', '1']"
