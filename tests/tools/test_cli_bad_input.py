"""Does every command of ``pylo`` end with one line and a nonzero exit code, whatever file, number or stdout it gets?"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
import yaml

pytest.importorskip("matplotlib")

from pylo_integrations import cli, list_optimizers, metatrain, plot
from pylo_integrations.bench import steps, tables
from pylo_integrations.cli import catalog, recipe
from pylo_integrations.evaluation.runs import RunsFile
from pylo_integrations.paths import read_text
from pylo_integrations.plot.runs import _panels
from pylo_integrations.weights import Theta, bootstrap, load_theta

pytestmark = pytest.mark.timeout(60)
ROOT = Path(__file__).parents[2]
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
CONFIG = {
    "name": "tiny",
    "optimizer": "small_fc_lopt",
    "train": [{"kind": "teacher", "width": 4}],
    "stages": [{"iterations": 1, "pairs": 1, "horizon": [2, 3], "truncation": 2}],
}


@pytest.fixture
def refused(capfd):
    """Runs ``pylo`` with what it must refuse; returns the line it says."""

    def run(*argv):
        with pytest.raises(SystemExit) as exit_:
            cli.main(list(map(str, argv)))
        out, err = capfd.readouterr()
        assert exit_.value.code == 2 and out == "", out
        assert err.count("\n") == 1 and err.startswith("pylo") and "Traceback" not in err, err
        assert err[:-1].isprintable() and len(err) < 2200
        return err

    return run


# -- files to read ---------------------------------------------------------------------------------------------------


def _config(folder, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


READERS = {
    "weights info": ("x.safetensors", lambda path, to: ["weights", "info", path]),
    "weights convert": ("x.safetensors", lambda path, to: ["weights", "convert", path, to / "out.safetensors"]),
    "weights convert flax": ("theta.state", lambda path, to: ["weights", "convert", path, to / "out.safetensors"]),
    "plot csv": ("metrics.csv", lambda path, to: ["plot", path, "--output", to / "out.png"]),
    "plot json": ("trainer_state.json", lambda path, to: ["plot", path, "--output", to / "out.png"]),
    "metatrain": ("x.yaml", lambda path, to: ["metatrain", path, "--output", to / "out"]),
    "metatrain weights": (
        "x.safetensors",
        lambda path, to: ["metatrain", _config(to, start={"weights": str(path)}), "--output", to / "out"],
    ),
    "metatrain family": (
        "x.py",
        lambda path, to: ["metatrain", _config(to, train=[{"kind": f"{path}:Mine"}]), "--output", to / "out"],
    ),
    "evaluate": (
        "x.safetensors",
        lambda path, to: ["evaluate", "--optimizers", f"celo:{path}", "--output", to / "out", "--tasks", "friedman"],
    ),
    "try": ("x.py", lambda path, to: ["try", f"{path}:train", "--plot", to / "out.png"]),
    "evaluate --report": ("runs.jsonl", lambda path, to: ["evaluate", "--report", "--output", path.parent]),
}


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    listener = socket.socket(socket.AF_UNIX)
    with listener:
        here = os.getcwd()
        os.chdir(path.parent)  # for names that are too long for an address
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


KINDS = {
    "missing": (lambda path: None, ("there is no", "No such file", "there are no runs")),
    "a folder": (Path.mkdir, ("is a folder", "has no theta.state", "holds no numbers")),
    "a fifo": (_fifo, ("is a FIFO",)),
    "a socket": (_socket, ("is a socket",)),
    "a device": (lambda path: path.symlink_to("/dev/zero"), ("is a device",)),
    "a loop": (lambda path: path.symlink_to(path), ("symbolic links", "there is no", "there are no runs")),
    "a dangling link": (lambda path: path.symlink_to("nowhere"), ("there is no", "No such file", "there are no runs")),
    "binary": (lambda path: path.write_bytes(bytes(range(256)) * 40 + b"\n"), None),
    "not utf-8": (lambda path: path.write_bytes(b"name: \xff\xfe\n" * 10), None),
    "escapes": (lambda path: path.write_text("\x1b[2J\x1b]0;title\x07: [\n" * 3), None),
    "empty": (Path.touch, None),
    "deep json": (lambda path: path.write_text("[" * 20_000 + "\n"), None),
    "deep maps": (lambda path: path.write_text('{"a":' * 20_000 + "\n"), None),
    "an overflow": (lambda path: path.write_text("1e999\n" * 3), None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_cannot_be_read_is_told_in_one_line(reader, kind, refused, tmp_path):
    (name, argv), (make, said) = READERS[reader], KINDS[kind]
    if (reader, kind) == ("evaluate --report", "an overflow"):
        said = ("is not a run",)
    path = tmp_path / "given" / name
    path.parent.mkdir()
    make(path)
    line = refused(*argv(path, tmp_path))
    if said is not None:
        assert any(words in line for words in said), line
    else:
        assert path.name in line or "there are no runs" in line, line
    assert not list(tmp_path.glob("out*")), "nothing was begun"


@pytest.mark.parametrize("reader", READERS)
def test_paths_that_no_file_can_have(reader, refused, tmp_path):
    name, argv = READERS[reader]
    for path in (tmp_path / ("x" * 300) / name, tmp_path / "nul\0" / name):
        if "\0" in str(path) and "metatrain " in reader:
            continue  # YAML has its own words for those
        refused(*argv(path, tmp_path))


@pytest.fixture
def open_folder():
    """A folder that any user can reach, as those of pytest are private."""
    folder = Path(tempfile.mkdtemp(prefix="pylo"))
    folder.chmod(0o777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def as_nobody():
    """Runs a function as a user who owns nothing."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no users here")
    if IS_ROOT and not all(folder.stat().st_mode & stat.S_IXOTH for folder in Path(cli.__file__).parents):
        pytest.skip("only its owner may enter the folder of this package")

    def run(function, *args):
        before = os.geteuid()
        if IS_ROOT:
            os.seteuid(65534)
        try:
            return function(*args)
        finally:
            os.seteuid(before)

    return run


@pytest.mark.parametrize("closed", ["the file", "its folder"])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_without_permission_is_not_called_missing(reader, closed, refused, open_folder, as_nobody):
    name, argv = READERS[reader]
    path = open_folder / "given" / name
    path.parent.mkdir()
    path.write_text("{}")
    arguments = argv(path, open_folder)
    (path if closed == "the file" else path.parent).chmod(0)
    try:
        line = as_nobody(refused, *arguments)
    finally:
        path.parent.chmod(0o700)
    assert "ermission denied" in line and "there is no" not in line


def test_theta_says_why_it_cannot_be_read(tmp_path, open_folder, as_nobody):
    path = bootstrap().save(open_folder / "theta.safetensors")
    path.chmod(0)
    for load in (Theta.load, lambda source: load_theta(source, "small_fc_lopt")):
        with pytest.raises(PermissionError, match="theta file .* cannot be read: Permission denied"):
            as_nobody(load, path)
        with pytest.raises(IsADirectoryError, match="is a folder, not a theta file"):
            load(tmp_path)
        with pytest.raises(FileNotFoundError, match="there is no theta file 'celo'; give the path"):
            load("celo")
    with pytest.raises(FileNotFoundError, match="or 'builtin:celo'"):
        load_theta("celo", "celo")


# -- what is inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        "1," + "9" * 200_000,  # longer than the csv module takes
        "1,low",
        "first,1",
        "1e3,1",
        "1" * 5000 + ",1",
        "99999999999999999999,1",
    ],
)
def test_rows_of_a_log_that_are_no_numbers(row, refused, tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(f"step,train_loss\n{row}\n")
    assert "is not what its name says" in refused("plot", path)


@pytest.mark.parametrize("entry", ['{"step": 1e999, "loss": 1}', '{"step": 1, "loss": 1%s}' % ("0" * 400), "3", "[]"])
def test_entries_of_a_state_that_are_no_numbers(entry, refused, tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(f'{{"log_history": [{entry}]}}')
    assert "is not what its name says" in refused("plot", path)


def test_numbers_at_the_edges_of_floats_are_drawn(tmp_path, capsys, recwarn):
    values = ["1e999", "-1e999", "nan", "1e308", "-1e308", "5e-324", "0", "1"]
    columns = ["train_loss", "optim/X/param/a/lr_mult", "optim/X/param/b/update_ratio", "_odd $\\frac$\x1b loss"]
    lines = [
        ",".join(["step", *columns]),
        *(f"{step},{value},{value},{value},{value}" for step, value in enumerate(values)),
    ]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    assert cli.main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert [str(warning.message) for warning in recwarn if issubclass(warning.category, RuntimeWarning)] == []


CONFIGS = {
    "lr: 1e999": "lr='1e999' must be a finite number",
    "lr: .inf": "finite",
    "lr: .nan": "finite",
    "lr: -1": "lr=-1.0 must be positive",
    f"lr: 1{'0' * 400}": "finite",
    "seed: 1e999": "seed='1e999' must be of type int",
    f"seed: {2**64}": "64 bits",
    f"seed: 0x{'f' * 5000}": "64 bits",
    f"seed: {'9' * 5000}": "YAML cannot read",
    "seed: .nan": "seed=nan must be of type int",
    f"threads: {10**15}": "threads=1000000000000000 must be at most",
    "threads: -1": "must be positive",
    "checkpoint_seconds: -.inf": "finite",
    "base_width: 0": "must be positive",
    "device: meta": "device='meta': not usable",
    "device: cuda:99": "device='cuda:99': not usable",
    "device: ''": "device='': not usable",
    "name: 2001-99-99": "YAML cannot read",
    "name: !!int ''": "YAML cannot read",
    "name: !!bool x": "YAML cannot read",
    "name: !!timestamp x": "YAML cannot read",
    "name: !!python/object/apply:os.system [x]": "is not YAML",
    "name: &a [*a]": "name=[[[...]]]",
    "? [1, 2]\n: 3": "is not YAML",
    "? 9.5\n: 3": "unknown entry 9.5",
    f"{'k' * 500}: 3": "unknown entry",
    "start: {hidden: 2147483647}": "must be at most",
    "start: {lstm: -1, hidden: -3}": "start: ",
    "start: {step: -.inf}": "finite",
    "evaluation: {adamw: [-0.1]}": "evaluation.adamw[0]=-0.1 must be positive",
    "evaluation: {seeds: 9999999999}": "must be at most",
    "reparametrisation: {low: 2, high: 1}": "must be at most high",
    "reparametrisation: {low: -999, high: 1}": "within",
    "schedules: [[constant]]": "schedules[0]=['constant'] is unknown",
    "schedules: {constant: 1}": "must be a list",
    "stages: [{iterations: -3}]": "must be positive",
    "stages: [{iterations: 1, horizon: [1, 9999999999]}]": "horizon",
    "stages: [{iterations: 1, sigma: 1e400}]": "finite",
    "stages: [{iterations: 1, average: .nan}]": "finite",
    "stages: [{iterations: 1, scales: {w0: .inf}}]": "finite",
    "stages: [{iterations: 9223372036854775807}]": "must be at most",
    "train: [{kind: teacher, width: .nan}]": "width must be of type int, not float",
    "train: [{kind: teacher, width: -4}]": "width must be from 1 to",
    f"train: [{{kind: teacher, width: {10**30}}}]": "width must be from 1 to",
    f"train: [{{kind: teacher, width: 0x{'f' * 5000}}}]": "not huge",
    "train: [{kind: teacher, width: [{}]}]": "width must be of type int, not dict",
    "train: [{kind: teacher, width: true}]": "width must be of type int, not bool",
    "train: [{kind: teacher, name: 3}]": "name must be a string",
    "train: [{kind: teacher, name: [3]}]": "name must be a string",
}


@pytest.mark.parametrize("lines", CONFIGS, ids=lambda lines: lines[:40])
def test_entries_of_a_config_out_of_range(lines, refused, tmp_path):
    text = yaml.safe_dump({key: value for key, value in CONFIG.items() if not lines.startswith(f"{key}:")})
    path = tmp_path / "x.yaml"
    path.write_text(f"{text}{lines}\n")
    assert CONFIGS[lines] in refused("metatrain", path, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_aliases_that_unfold_to_gigabytes_are_told_shortly(refused, tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]" for level in range(1, 12)]
    path = tmp_path / "x.yaml"
    for use in ("name: *a11", "train: [*a11]", "train: [{kind: teacher, width: *a11}]", "stages: *a11"):
        text = yaml.safe_dump({key: value for key, value in CONFIG.items() if not use.startswith(f"{key}:")})
        path.write_text("\n".join(["start: &s", *(f"  {line}" for line in lines), text, use]))
        assert len(refused("metatrain", path, "--output", tmp_path / "out")) < 1000


@pytest.mark.parametrize(
    "code",
    ["1 +", "import no_such_module_x", "raise RuntimeError('mine')", "Mine = 3", "\0"],
    ids=lambda code: code[:9],
)
def test_a_family_file_that_does_not_run(code, refused, tmp_path):
    (tmp_path / "mine.py").write_text(code)
    assert "mine.py" in refused(
        "metatrain", _config(tmp_path, train=[{"kind": "mine.py:Mine"}]), "--output", tmp_path / "o"
    )


RUN = {
    "suite": None,
    "task": "friedman",
    "name": "adamw lr=0.1",
    "setting": {
        "optimizer": "adamw",
        "schedule": "constant",
        "sha256": "",
        "lr": 0.1,
        "weights": "",
        "base_width": None,
    },
    "steps": 10,
    "seed": 0,
    "diverged": False,
    **dict.fromkeys(("train", "train_best", "batches", "batches_best", "validation", "accuracy"), 1.0),
    **dict.fromkeys(("step_seconds", "optimizer_seconds"), 1.0),
    "train_curve": [[0, 1.0]],
    "validation_curve": [],
}


@pytest.mark.parametrize(
    "change",
    [
        {"suite": "x" * 1000},
        {"suite": ["x"]},
        {"task": 3},
        {"steps": math.inf},
        {"steps": 10**400},
        {"train": "low"},
        {"train": 10**400},
        {"setting": {}},
        {"setting": 3},
        {"train_curve": [[1]]},
        {"train_curve": None},
        {"seed": None},
    ],
    ids=str,
)
def test_runs_of_an_evaluation_that_are_damaged(change, refused, tmp_path):
    (tmp_path / "runs.jsonl").write_text(json.dumps({**RUN, "suite": 1}) + "\n")
    assert len(RunsFile(tmp_path / "runs.jsonl").records) == 1
    (tmp_path / "runs.jsonl").write_text(json.dumps({**RUN, "suite": 1, **change}) + "\n")
    assert "runs" in refused("evaluate", "--report", "--output", tmp_path)


# -- numbers ---------------------------------------------------------------------------------------------------------

COUNTS = [
    ["try", "x.py:train", "--steps"],
    ["try", "x.py:train", "--seed"],
    ["bench", "--threads"],
    ["bench", "--repeats"],
    ["bench", "--distributed", "simulate", "--ranks"],
    ["evaluate", "--steps"],
    ["evaluate", "--seeds"],
    ["evaluate", "--tuning-seeds"],
    ["evaluate", "--jobs"],
    ["metatrain", "tutorial", "--iterations"],
    ["metatrain", "tutorial", "--threads"],
    ["metatrain", "tutorial", "--seed"],
]


@pytest.mark.parametrize("argv", COUNTS, ids=" ".join)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e999", "1.5", "9" * 30, "9" * 5000, "", "\x1b[2J", "0x10"])
def test_counts_that_are_none(argv, value, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if argv[-1] == "--seed" and value == "-1":
        return  # as good a seed as any
    refused(*argv[:-1], f"{argv[-1]}={value}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv",
    [
        ["evaluate", "--tasks", "friedman:99999999"],
        ["evaluate", "--tasks", "friedman:-1"],
        ["evaluate", "--tasks", ","],
        ["evaluate", "--tasks", "\x1b"],
        ["evaluate", "--optimizers", ","],
        ["evaluate", "--optimizers", "celo@@"],
        ["evaluate", "--optimizers", "celo:builtin:"],
        ["evaluate", "--optimizers", "celo:hub:x"],
        ["try", "\0:\x1b"],
        ["try", "x.py:train", "--adamw", "nan"],
        ["try", "x.py:train", "--weight-decay", "nan"],
        ["bench", "--shapes", ""],
        ["bench", "--device", "meta"],
        ["bench", "--device", "\0"],
        ["bench", "--distributed", "simulate", "--ranks", "3000000000"],
        ["info", "\x1b[31m" + "x" * 10_000],
        ["list", "\n\n"],
        ["weights", "info", ""],
        ["weights", "info", "hub:a/b/c"],
        ["weights", "info", "hub:a/..@../.."],
        ["weights", "info", "builtin:../builtin/celo"],
        ["plot", ""],
    ],
    ids=lambda argv: ascii(" ".join(argv))[:50],
)
def test_words_that_mean_nothing(argv, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(*argv)
    assert not list(tmp_path.iterdir())


# -- files to write --------------------------------------------------------------------------------------------------

WRITERS = {
    "plot": lambda to, log: ["plot", log, "--output", to / "x.png"],
    "weights convert": lambda to, log: [
        "weights",
        "convert",
        "--overwrite",
        log.parent / "theta.state",
        to / "x.safetensors",
    ],
    "bench --json": lambda to, log: ["bench", "--json", to / "x.json"],
    "bench --figures": lambda to, log: ["bench", "--figures", "--json", to / "x.json"],
    "bench --plot": lambda to, log: ["bench", "--distributed", "simulate", "--plot", to / "x.png"],
    "try": lambda to, log: ["try", "math:floor", "--plot", to / "x.png"],
    "metatrain": lambda to, log: ["metatrain", _config(log.parent), "--output", to / "x"],
    "evaluate": lambda to, log: ["evaluate", "--output", to / "x", "--tasks", "friedman"],
}


def _in_a_file(to, name):
    to.write_text("")


def _in_no_folder(to, name):
    pass


def _over_a_folder(to, name):
    (to / name / "occupied").mkdir(parents=True)


def _over_a_fifo(to, name):
    to.mkdir()
    os.mkfifo(to / name)


def _over_a_file(to, name):
    to.mkdir()
    (to / name).write_text("")


def _closed(to, name):
    to.mkdir(mode=0o555)


# What a command makes by itself, or replaces, is no obstacle.
OBSTACLES = {
    _in_a_file: set(WRITERS),
    _in_no_folder: {"plot", "try", "bench --json", "bench --figures", "bench --plot"},
    _over_a_folder: {"plot", "try", "weights convert", "bench --json", "bench --figures", "bench --plot"},
    _over_a_fifo: {"plot", "try", "bench --json", "bench --figures", "bench --plot", "metatrain", "evaluate"},
    _over_a_file: {"metatrain", "evaluate"},
    _closed: set(WRITERS),
}


@pytest.mark.parametrize(
    ("obstacle", "writer"),
    [(obstacle, writer) for obstacle, writers in OBSTACLES.items() for writer in sorted(writers)],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_destination_that_cannot_be_written_is_told_before_the_work(
    obstacle, writer, refused, open_folder, as_nobody, monkeypatch
):
    def work(*args, **kwargs):
        raise AssertionError("it was to be found out before")

    monkeypatch.setattr(steps, "run_bench", work)
    monkeypatch.setattr(metatrain.MetaTrainer, "_evaluate", work)
    monkeypatch.setattr("pylo_integrations.evaluation.plan.train_all", work)
    log = open_folder / "metrics.csv"
    log.write_text("step,loss\n1,1.0\n")
    from published_layouts import layouts

    [files] = layouts()["flax_small_fc"]
    (open_folder / "theta.state").write_bytes(files["theta.state"])
    to = open_folder / "to"
    argv = WRITERS[writer](to, log)
    target = next(item for item in argv if isinstance(item, Path) and item.parent == to)
    obstacle(to, target.name)
    for path in (open_folder / "config.yaml", log, open_folder / "theta.state"):
        if path.exists():
            path.chmod(0o644)
    line = as_nobody(refused, *argv)
    assert "to" in line
    shutil.rmtree(to, ignore_errors=True)


def test_a_full_disk_is_told(refused, tmp_path, monkeypatch):
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n")
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "full.png").symlink_to("/dev/full")
    assert "No space left" in refused("plot", tmp_path, "--output", tmp_path / "full.png")


# -- stdout ----------------------------------------------------------------------------------------------------------


class Closed(io.TextIOBase):
    """A stdout whose buffer cannot be written."""

    encoding, errors = "utf-8", "strict"

    def __init__(self, number):
        self.number = number

    def write(self, text):
        return len(text)

    def isatty(self):
        return False

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


TALKING = [
    ["--version"],
    ["--help"],
    ["list"],
    ["info", "celo"],
    ["doctor"],
    ["weights", "list"],
    ["weights", "info", "builtin:celo"],
    ["weights", "info", "builtin:celo", "--json"],
    ["bench"],
    ["bench", "--distributed", "tables"],
]


@pytest.mark.parametrize("argv", TALKING, ids=" ".join)
def test_output_that_nobody_takes(argv, capsys, monkeypatch):
    monkeypatch.setattr(steps, "run_bench", lambda setting, names, repeats: [])
    monkeypatch.setattr(steps, "format_table", lambda records: "TABLE")
    monkeypatch.setattr(tables, "tables", lambda: "TABLE")
    monkeypatch.setattr(sys, "stdout", Closed(errno.ENOSPC))
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.count("\n") == 1 and "cannot write to stdout: No space left on device" in err
    monkeypatch.setattr(sys, "stdout", Closed(errno.EPIPE))
    assert cli.main(argv) == 141
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and "cannot write to stdout: it is closed" in err


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_interpreter_adds_nothing_when_it_exits():
    """As a program, whose exit flushes again."""
    command = '"$0" -m pylo_integrations.cli list'
    script = f'({command}; echo "$?" >&2) | true; {command} > /dev/full; echo "$?" >&2'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    arguments = ["bash", "-c", script, sys.executable]
    run = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = "pylo list: error: cannot write to stdout: No space left on device"
    assert run.stderr.splitlines() == (["141", said, "2"] if Path("/dev/full").exists() else ["141", "0"])


def test_names_that_are_no_text_are_printed(tmp_path, monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    (tmp_path / "metrics.csv").write_text("step,loss\n1,1.0\n")
    assert cli.main(["plot", str(tmp_path), "--output", f"{tmp_path}/\udcff\u00e9.png"]) == 0
    assert rb"\udcff\xe9.png" in written.buffer.getvalue()


def test_a_stranger_s_theta_cannot_steer_the_terminal(tmp_path, capsys):
    theta = bootstrap()
    odd = Theta(
        theta.architecture, theta.arrays, theta.hyper, "\x1b[2J\n", "\x07" * 3, "\r", {"a\x1b": {"b": "\x1b" * 999}}
    )
    assert cli.main(["weights", "info", str(odd.save(tmp_path / "odd.safetensors"))]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() and len(line) < 150 for line in out.splitlines())


# -- what is nobody's fault but ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (OSError(28, "No space left on device", "x.json"), "No space left on device: 'x.json'"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (BrokenExecutor("died"), "was killed"),
    ],
    ids=str,
)
def test_failures_of_the_machine_are_one_line_in_any_command(raised, said, refused, monkeypatch):
    def fail(*args):
        raise raised

    monkeypatch.setattr(catalog, "list_optimizers", fail)
    assert said in refused("list")
    monkeypatch.setattr(steps, "run_bench", fail)
    assert said in refused("bench", "--shapes", "tiny")


def test_a_defect_keeps_its_traceback_and_an_interrupt_has_none(monkeypatch, capsys):
    for raised in (TypeError("a defect"), KeyError("x"), RuntimeError("y")):
        monkeypatch.setattr(catalog, "list_optimizers", lambda *args, raised=raised: (_ for _ in ()).throw(raised))
        with pytest.raises(type(raised)):
            cli.main(["list"])
    monkeypatch.setattr(catalog, "list_optimizers", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_recipe_that_a_signal_ends_has_the_exit_code_of_a_shell(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command: Namespace(returncode=-9))
    monkeypatch.setattr(recipe, "required_by", lambda extra: [])
    assert cli.main(["recipe", "vit"]) == 137


def test_text_may_begin_with_a_mark(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfa")
    assert read_text(path, 10) == "a"
    with pytest.raises(ValueError, match="larger than 3 bytes"):
        read_text(path, 3)


# -- many columns ----------------------------------------------------------------------------------------------------


def test_thousands_of_curves_and_runs_make_a_picture_that_says_what_it_left_out(tmp_path, capsys):
    names = [f"loss_{index}" for index in range(3000)] + ["train_loss", "eval_loss"]
    names += [f"optim/X/param/layers.{index}.weight/lr_mult" for index in range(300)]
    names += [f"optim/X/group{index}/update_ratio" for index in range(100)]
    lines = [",".join(["step", *names]), *(",".join([str(step), *["1"] * len(names)]) for step in range(4))]
    (tmp_path / "metrics.csv").write_text("\n".join(lines))
    runs = plot.read_runs(tmp_path)
    losses, ratios, heat = [axes for axes in plot.draw(runs).axes if axes.get_title()]
    assert losses.get_title() == "loss (20 of 3002 curves)" and len(losses.lines) == 20
    assert {"train_loss", "eval_loss"} <= {line.get_label() for line in losses.lines}
    assert ratios.get_title().endswith("(20 of 100 curves)") and len(heat.get_yticklabels()) <= 60
    assert cli.main(["plot", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "loss: 2982 of 3002 curves left out: loss_" in out and "80 of 100 curves left out" in out
    assert all(len(line) < 400 for line in out.splitlines())


def test_many_runs_and_many_steps_stay_within_a_picture(tmp_path):
    series = {"train_loss": {0: 1.0}, "optim/X/param/a/lr_mult": dict.fromkeys(range(9000), 1.0)}
    panels = _panels([plot.RunLog(f"run{index}", series) for index in range(50)])
    assert len(panels) == 13 and "38 of 50 runs left out: run12" in panels[-1].left_out
    figure = plot.draw([plot.RunLog("run", series)])
    [mesh] = [axes.collections[0] for axes in figure.axes if axes.get_title().startswith("run")]
    assert mesh.get_array().size <= 2000
    assert len(list_optimizers()) > 0
