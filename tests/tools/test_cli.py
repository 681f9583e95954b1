"""Does ``pylo`` answer what it is asked, find defects, and refuse misuse in one line?"""

from __future__ import annotations

import json
import re
import runpy
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from published_layouts import MetaMLP, VeLO_MLP, VeLO_RNN, module_files, random_arrays, write
from thetas import theta_for

import pylo_integrations
from pylo_integrations import Theta, cli, get_optimizer_info, kernel_check, list_optimizers
from pylo_integrations.bench import steps
from pylo_integrations.cli import doctor, trial
from pylo_integrations.cli.recipe import scripts
from pylo_integrations.ops import cache, cuda, kernels, loader, nvrtc, self_check
from pylo_integrations.weights import bootstrap, builtin_names, load_theta
from pylo_integrations.weights.hub import PUBLISHED

ROOT = Path(__file__).parents[2]


def requires(*lines):
    return lambda distribution: list(lines)


@pytest.fixture
def misuse(capsys):
    """Runs ``pylo`` with arguments that it must refuse; returns the line it says."""

    def run(*argv):
        with pytest.raises(SystemExit) as exit_:
            cli.main(argv)
        assert exit_.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        return err

    return run


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """As on a machine that never downloaded anything."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_list_shows_every_name_or_those_that_match(capsys, toy_loss):
    assert cli.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list_optimizers()
    assert cli.main(["list", "toy_*"]) == 0
    assert capsys.readouterr().out.split()[0] == toy_loss.name


@pytest.mark.parametrize("module", ["pylo_integrations", "pylo_integrations.cli"])
def test_the_program_is_there_without_its_script(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pylo", "list", "pace"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert exit_.value.code == 0 and capsys.readouterr().out.split()[0] == "pace"


@pytest.mark.parametrize("name", list_optimizers())
def test_info_tells_options_and_weights(capsys, name):
    assert cli.main(["info", name]) == 0
    out = capsys.readouterr().out
    spec = get_optimizer_info(name)
    assert spec.description in out
    assert [option for option in spec.options if f"  {option} " not in out] == []
    if spec.cls.default_weights is None:
        assert "weights= is needed" in out
    elif spec.cls.default_weights.startswith("builtin:"):
        theta = load_theta(spec.cls.default_weights, name)
        assert theta.sha256[:12] in out and theta.provenance in out
    else:
        assert f"{spec.cls.default_weights}, not on this machine" in out


def test_info_of_downloaded_weights_tells_all_about_them(capsys, small_thetas):
    assert cli.main(["info", "velo"]) == 0
    out = capsys.readouterr().out
    assert theta_for("velo").sha256[:12] in out and "tests/helpers/thetas.py" in out
    assert "the loss and num_steps" in out


def test_info_tells_the_defaults_of_the_entry(capsys):
    cli.main(["info", "elo_celo2"])
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["lr", "0.0003"] in found and ["weight_decay", "0.1"] in found and ["max_grad_norm", "1.0"] in found


def test_info_tells_what_an_optimizer_needs(capsys, toy_loss):
    cli.main(["info", toy_loss.name])
    assert "the loss and num_steps" in capsys.readouterr().out
    cli.main(["info", "small_fc_lopt"])
    assert "gradients only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["info", "small_fc_lop"], "did you mean 'small_fc_lopt'"),
        (["list", "zzz"], "no optimizer matches 'zzz'; there are"),
        (["recipe", "no_such_recipe"], "invalid choice"),
        (["bench", "--shapes", "vit_ti,nope"], "unknown shapes 'nope'; available: vit_ti"),
        (["bench", "--optimizers", "adam"], "unknown optimizer 'adam'; available: "),
        (["bench", "--threads", "1,0"], "'0' is not a positive integer"),
        (["bench", "--repeats", "-1"], "--repeats"),
        (["bench", "--dtype", "int8"], "--dtype"),
        (["bench", "--device", "tpu:3"], "'tpu:3' is not usable here"),
        (["bench", "--json", "no/such/folder/x.json"], "does not exist"),
        (["weights"], "ACTION"),
        (["weights", "info", "no/such/file"], "there is no theta file 'no/such/file'"),
        (["weights", "info", "builtin:nothing"], "is not shipped"),
        (["weights", "info", "hub:nothing"], "must read 'hub:<owner>/<repo>'"),
        (["weights", "convert", "theta.state"], "DST"),
        (["weights", "convert", "no/such/file", "x.safetensors"], "there is no file 'no/such/file'"),
        (["weights", "convert", "theta.state", "x.pt"], "DST must end in .safetensors"),
        (["weights", "convert", "theta.state", "x.safetensors", "--architecture", "adam"], "invalid choice: 'adam'"),
        (["weights", "convert", "hub:a/b", "hub:c/d", "x.safetensors"], "one SRC"),
        (["weights", "convert", "hub:a/b", "x.safetensors", "--architecture", "velo"], "without --architecture"),
        ([], "COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_misuse_is_one_line_and_exit_code_2(misuse, argv, said):
    assert said in misuse(*argv)


# -- weights -------------------------------------------------------------------------------------------------------


def test_weights_list_shows_where_they_are_and_what_for(capsys):
    assert cli.main(["weights", "list"]) == 0
    out = capsys.readouterr().out
    for entry in PUBLISHED:
        assert entry.name in out and entry.description in out
        assert all(f"hub:{part.name}" in out for part in entry.repositories)
    assert out.count("no rule here") == 1


@pytest.mark.parametrize("weights", ["builtin:small_fc_bootstrap", "a file"])
def test_weights_info_tells_all_about_one(capsys, weights, tmp_path):
    theta = bootstrap()
    if weights == "a file":
        weights = str(theta.save(tmp_path / "theta.safetensors"))
    assert cli.main(["weights", "info", weights]) == 0
    out = capsys.readouterr().out
    assert theta.sha256 in out and theta.provenance in out and theta.licence in out
    assert re.search(r"nn/~/w0 +39 x 32\n", out) and re.search(r"step_mult +0\.01\n", out) and "no record" in out


def test_weights_convert_writes_a_theta_once(capsys, misuse, tmp_path):
    folder = write(tmp_path / "elo", module_files(MetaMLP(random_arrays("elo"))))
    target = tmp_path / "new" / "elo.safetensors"
    assert cli.main(["weights", "convert", str(folder), str(target), "--architecture", "elo"]) == 0
    out, err = capsys.readouterr()
    assert Theta.load(target) == Theta.from_arrays("elo", random_arrays("elo"))
    assert out.startswith(f"{target}: Theta('elo'") and err == ""
    assert "--overwrite" in misuse("weights", "convert", str(folder), str(target))
    assert cli.main(["weights", "convert", "--overwrite", str(folder), str(target)]) == 0
    out, err = capsys.readouterr()
    assert Theta.load(target).name == "mulo" and "taken for MuLO's" in err and err.count("\n") == 1


def test_weights_convert_takes_two_sources(capsys, misuse, tmp_path):
    arrays = random_arrays("velo")
    folders = [str(write(tmp_path / module.__name__, module_files(module(arrays)))) for module in (VeLO_RNN, VeLO_MLP)]
    target = tmp_path / "velo.safetensors"
    assert cli.main(["weights", "convert", *folders, str(target)]) == 0
    assert Theta.load(target) == Theta.from_arrays("velo", arrays)
    capsys.readouterr()
    said = misuse("weights", "convert", folders[0], str(tmp_path / "half.safetensors"))
    assert "VeLO_RNN does not make one theta" in said


# -- doctor --------------------------------------------------------------------------------------------------------


def test_doctor_finds_nothing_wrong_here(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert pylo_integrations.__version__ in out and torch.__version__ in out
    assert "BROKEN" not in out and "everything works" in out
    assert bootstrap().sha256[:12] in out
    assert "small_fc_lopt" in out and "takes a step" in out


def test_weights_that_were_not_downloaded_are_no_defect_and_are_not_downloaded(capsys, empty_cache, monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("doctor used the network")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert cli.main(["doctor"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line]
    found = {line[0]: line[1] for line in lines if len(line) == 2}
    assert (
        found["velo"]
        == "not tried, for want of weights: hub:amoudgl/velo-4000, not on this machine; using it downloads it"
    )


def test_doctor_steps_optimizers_whose_weights_are_here(capsys, small_thetas):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not tried" not in out
    assert out.count("takes a step") == len(list_optimizers())


def test_doctor_steps_optimizers_that_need_loss_and_horizon(capsys, toy_loss):
    assert cli.main(["doctor"]) == 0
    assert f"{toy_loss.name} " in capsys.readouterr().out


def test_doctor_tells_why_there_are_no_kernels(capsys, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda: "nothing was compiled")
    assert cli.main(["doctor"]) == 0
    assert "native: missing; nothing was compiled" in capsys.readouterr().out


# CUDA devices that are not there, with kernels of which something is known.


@pytest.fixture
def devices(monkeypatch, tmp_path):
    """Two devices and no driver; what is known of their kernels is kept in a folder of the test."""
    monkeypatch.setenv("PYLO_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(cuda, "load", lambda device: "there is no NVRTC" if device.index else SimpleNamespace())
    monkeypatch.setattr(kernels, "origin", lambda index: "3 of 13 compiled for sm_90")
    monkeypatch.setattr(self_check, "facts_of", lambda device, subject: {"kernels": f"{device} {subject}"})


def doctor_lines(capsys, *argv: str, code: int = 0) -> list[str]:
    assert cli.main(["doctor", *argv]) == code
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_doctor_tells_what_becomes_of_kernels_on_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc, "load", lambda: SimpleNamespace(architectures=lambda: [75, 80, 90]))
    (line,) = (line for line in doctor_lines(capsys) if line.startswith("CUDA kernels"))
    assert "no device here; on one, NVRTC" in line and "(for compute capability 8.0, 9.0)" in line
    monkeypatch.setattr(nvrtc, "load", lambda: "there is no NVRTC")
    assert "CUDA kernels no device here; on one, torch's functions run: there is no NVRTC" in doctor_lines(capsys)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f"CUDA kernels none: torch {torch.__version__} is not built for CUDA" in doctor_lines(capsys)


@pytest.mark.usefixtures("devices")
def test_doctor_tells_what_is_known_of_the_kernels_on_every_device(capsys):
    small_fc, velo, *others = kernel_check.standard_subjects()
    for subject, verdict in ((small_fc, (True, "error 0.1")), (velo, (False, "vectors: WRONG"))):
        facts = self_check.facts_of(torch.device("cuda", 0), subject)
        cache.write(self_check.file_name(facts), self_check.spoken(self_check.Verdict(*verdict)).encode())
    lines = doctor_lines(capsys)
    first = lines.index("CUDA kernels cuda:0: 3 of 13 compiled for sm_90")
    unknown = 'not checked yet; the first step with backend="auto" does, or pylo doctor --device cuda'
    assert lines[first + 1 : first + 4 + len(others)] == [
        "cuda:0, SmallFC: verified: error 0.1",
        "cuda:0, VeLORule: not used: vectors: WRONG",
        *(f"cuda:0, {subject.kind}: {unknown}" for subject in others),
        "CUDA kernels cuda:1: none, torch's functions run: there is no NVRTC",
    ]


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize("right", [True, False])
def test_doctor_checks_the_kernels_on_a_device_and_shows_how(capsys, monkeypatch, right):
    verdict = self_check.Verdict(right, "the last line")
    said = f"vectors: right\n{self_check.spoken(verdict)}"
    monkeypatch.setattr(self_check, "command_for", lambda *about: [sys.executable, "-S", "-c", f"print({said!r})"])
    lines = doctor_lines(capsys, "--device", "cuda:0", code=not right)
    assert lines[:3] == ["cuda:0 H100", "SmallFC vectors: right", f"{'BROKEN: ' * (not right)}the last line"]
    for subject in kernel_check.standard_subjects():
        assert self_check.known(self_check.facts_of(torch.device("cuda", 0), subject)) == verdict


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("device", "line"),
    [
        ("cuda:1", "kernels BROKEN: there is no NVRTC"),
        ("cuda:2", "cuda:2 BROKEN: only 2 CUDA devices are here"),
    ],
)
def test_doctor_tells_why_kernels_cannot_be_checked(capsys, device, line):
    assert line in doctor_lines(capsys, "--device", device, code=1)


def test_doctor_checks_no_kernels_without_a_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line, *_ = doctor_lines(capsys, "--device", "cuda", code=1)
    assert line.startswith("cuda:0 BROKEN: no CUDA device is here; on one, ")


def test_doctor_reports_damaged_weights(capsys, monkeypatch):
    def damaged(weights, name, local_files_only=False):
        if not weights.startswith("builtin:"):
            raise FileNotFoundError
        raise ValueError(f"{weights} is damaged: its sha256 is 0, its record says 1")

    for module in (doctor, trial):
        monkeypatch.setattr(module, "load_theta", damaged)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN: builtin:small_fc_bootstrap is damaged" in out and f"{len(builtin_names())} defects found" in out


def test_doctor_reports_an_optimizer_that_does_not_move(capsys, monkeypatch):
    monkeypatch.setattr(pylo_integrations.LearnedOptimizer, "_step", lambda self, loss, result: None)
    assert cli.main(["doctor"]) == 1
    assert "BROKEN: a step does not change a parameter" in capsys.readouterr().out


def test_doctor_reports_an_optimizer_that_raises(capsys, monkeypatch):
    def step(self, loss, result):
        raise OSError("no kernel")

    monkeypatch.setattr(pylo_integrations.LearnedOptimizer, "_step", step)
    assert cli.main(["doctor"]) == 1
    assert "BROKEN: OSError: no kernel" in capsys.readouterr().out


def test_doctor_tells_missing_extras_from_old_packages(capsys, monkeypatch):
    lines = [
        "torch>=2.6",
        'no-such-package>=1; extra == "hf"',
        'torch>=999; extra == "lightning"',
        'numpy; extra == "accelerate"',
        'pylo-integrations[accelerate]; extra == "recipes"',
        'ruff; extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", requires(*lines))
    assert cli.main(["doctor"]) == 1
    found = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("[")}
    assert set(found) == {"[hf]", "[lightning]", "[accelerate]", "[recipes]"}
    assert "not installed (lacks no-such-package)" in found["[hf]"] and "'.[hf]'" in found["[hf]"]
    assert "BROKEN: torch" in found["[lightning]"] and ">=999 is needed" in found["[lightning]"]
    assert found["[recipes]"].split()[1:] == found["[accelerate]"].split()[1:] == ["numpy", metadata.version("numpy")]


def test_doctor_reports_a_core_dependency_that_is_too_old(capsys, monkeypatch):
    monkeypatch.setattr(metadata, "requires", requires("torch>=999"))
    assert cli.main(["doctor"]) == 1
    assert ">=999 is needed" in capsys.readouterr().out


def test_doctor_works_without_being_installed(capsys, monkeypatch):
    def absent(distribution):
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(metadata, "requires", absent)
    assert cli.main(["doctor"]) == 0
    assert "without being installed" in capsys.readouterr().out


# -- recipe --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe that writes its arguments into a file and exits with code 7, in a clone of its own."""
    package = tmp_path / "pylo_integrations"
    package.mkdir()
    folder = tmp_path / "recipes" / "mini"
    folder.mkdir(parents=True)
    (folder / "beside.py").write_text("CODE = 7")
    script = "import json, sys, pathlib, beside\npathlib.Path('seen.json').write_text(json.dumps(sys.argv[1:]))\n"
    (folder / "train.py").write_text(script + "sys.exit(beside.CODE)\n")
    monkeypatch.setattr(pylo_integrations, "__file__", str(package / "__init__.py"))
    monkeypatch.setattr(metadata, "requires", requires('torch; extra == "recipes"'))
    monkeypatch.chdir(tmp_path)
    return folder


def test_a_recipe_gets_its_options_and_returns_its_exit_code(recipe, tmp_path):
    options = ["--help", "fit", "--trainer.max_steps", "3", "--", "-x"]
    assert cli.main(["recipe", "mini", *options]) == 7
    assert json.loads((tmp_path / "seen.json").read_text()) == options


def test_recipes_inside_an_installed_package_are_found(recipe, tmp_path):
    recipe.parent.rename(tmp_path / "pylo_integrations" / "_recipes")
    assert cli.main(["recipe", "mini"]) == 7


def test_a_recipe_without_its_extra_says_what_to_install(recipe, misuse, monkeypatch, tmp_path):
    monkeypatch.setattr(metadata, "requires", requires('no-such-package>=2; extra == "recipes"'))
    said = misuse("recipe", "mini")
    assert "no-such-package is not installed" in said and "pip install -e '.[recipes]'" in said
    assert not (tmp_path / "seen.json").exists()


def test_this_repository_has_the_recipes_that_the_readme_names():
    assert {"vit", "gpt2"} <= set(scripts())


# -- as a program --------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_the_program_imports_no_framework():
    script = (
        "import sys; from pylo_integrations import cli; cli.main(['list'])\n"
        "print([m for m in ('transformers', 'lightning', 'accelerate', 'timm', 'torchmetrics') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]" and run.stderr == ""


def test_bench_is_reached_with_its_defaults(monkeypatch, capsys):
    seen = []

    def run_bench(setting, optimizers, repeats):
        seen.append((setting, optimizers, repeats))
        return []

    monkeypatch.setattr(steps, "run_bench", run_bench)
    monkeypatch.setattr(steps, "format_table", lambda records: "TABLE")
    assert cli.main(["bench", "--threads", "1,2"]) == 0
    threads = torch.get_num_threads()
    assert [(s.shapes, s.threads) for s, _, _ in seen] == [
        (shapes, count) for shapes in ("vit_ti", "vit_b16", "gpt2") for count in (1, 2)
    ]
    assert torch.get_num_threads() == threads  # set in the processes that measure, not here
    assert capsys.readouterr().out.count("TABLE") == 6
