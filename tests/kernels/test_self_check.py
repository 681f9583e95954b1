"""Is it found out whether CUDA kernels are right, whatever becomes of the process that tries them?

There is no device: the process is a few lines that do what a check might, and leave a mark for every time they ran.
What a check compares is run by the emulation of csrc/shim, with kernels that are right and with others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_shim import Shim
from thetas import create, slow_unless
from torch import nn

from pylo_integrations import kernel_check
from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops import cache, cuda, loader, select, self_check
from pylo_integrations.ops.driver import Driver
from pylo_integrations.ops.self_check import Subject, Verdict, judge, judge_anew
from pylo_integrations.rules.small_fc import SmallFCRule
from pylo_integrations.sharding.rounds import Ranks
from pylo_integrations.weights.bootstrap import bootstrap
from pylo_integrations.weights.stand_in import stand_in
from pylo_integrations.weights.theta import ARCHITECTURES

FACTS = {"device": "H100 9.0", "driver": "(13, 0) 580.65", "torch": "2.14.1"}
MARK = "import os; open(os.environ['TALLY'], 'a').write('x');"


def child(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", MARK + code]


def saying(verdict: Verdict, before: str = "") -> list[str]:
    return child(f"print({before + self_check.spoken(verdict)!r})")


RIGHT = Verdict(True, "largest error 0.1 of what is allowed")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("PYLO_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TALLY", str(tmp_path / "tally"))
    monkeypatch.delenv(self_check.SWITCH, raising=False)
    self_check._tell.cache_clear()


def times_asked() -> int:
    tally = Path(os.environ["TALLY"])
    return len(tally.read_text()) if tally.exists() else 0


# -- what the process does --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "right", "why", "is_kept"),
    [
        (saying(RIGHT), True, "largest error 0.1", True),
        (saying(RIGHT, "tensors: right\n"), True, "largest error 0.1", True),
        (saying(Verdict(False, "vectors: WRONG, error 7")), False, "vectors: WRONG", True),
        (saying(Verdict(False, "OutOfMemoryError: CUDA out of memory", final=False)), False, "out of memory", False),
        (saying(Verdict(False, "devices are busy or unavailable", final=False)), False, "busy", False),
        (child("print('garbage')"), False, "gave no verdict", True),
        (child(""), False, "gave no verdict", True),
        (child("print('[1]')"), False, "gave no verdict", True),
        (child("os.write(1, bytes(range(256)))"), False, "gave no verdict", True),
        (child("os.kill(os.getpid(), 11)"), False, "killed by signal 11", True),
        (child("os.abort()"), False, "killed by signal 6", True),
        (child("os.kill(os.getpid(), 9)"), False, "killed by signal 9", False),  # by the system, for want of memory
        (child("raise SystemExit('an illegal memory access')"), False, "status 1: an illegal memory access", True),
        (child(f"print({self_check.spoken(RIGHT)!r}, flush=True); os._exit(3)"), False, "status 3", True),
        (child("import time; time.sleep(60)"), False, "took more than 1 s", False),
        (["/nonexistent/python"], False, "could not be started", False),
    ],
    ids=lambda value: None,
)
def test_a_verdict_is_found_and_kept_unless_circumstances_caused_it(command, right, why, is_kept):
    patience = 1 if "took more than" in why else 60
    for _ in range(2):
        verdict = judge(FACTS, command, patience)
        assert verdict.right is right and why in verdict.why and verdict.final is is_kept
    if command[0] == sys.executable:
        assert times_asked() == (1 if is_kept else 2)
    assert (self_check.known(FACTS) == verdict) is is_kept


@pytest.mark.parametrize("fact", FACTS)
def test_another_driver_device_or_torch_is_asked_again(fact):
    judge(FACTS, saying(RIGHT))
    judge(FACTS | {fact: "another"}, saying(RIGHT))
    assert times_asked() == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"right": 1}', b'{"right": true}'])
@pytest.mark.parametrize("is_sealed", [True, False])
def test_a_damaged_file_is_asked_again(content, is_sealed):
    name = self_check.file_name(FACTS)
    if is_sealed:
        path = cache.write(name, content)
    else:
        path = cache.write(name, b"")
        path.write_bytes(content)
    assert self_check.known(FACTS) is None
    assert judge(FACTS, saying(RIGHT)) == RIGHT and times_asked() == 1


def test_without_a_place_to_write_every_process_asks(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cache, "folders", lambda: iter([tmp_path / "file" / "below"]))
    assert judge(FACTS, saying(RIGHT)) == RIGHT and judge(FACTS, saying(RIGHT)) == RIGHT
    assert times_asked() == 2


@pytest.mark.slow
def test_processes_at_once_ask_once():
    slow = child(f"import time; time.sleep(1); print({self_check.spoken(RIGHT)!r})")
    program = f"from pylo_integrations.ops.self_check import judge; print(judge({FACTS!r}, {slow!r}))"
    started = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=200)[0].strip() for process in started] == [str(RIGHT)] * 2
    assert times_asked() == 1


def test_it_is_said_that_the_first_process_takes_its_time(caplog):
    for _ in range(2):
        judge(FACTS, saying(RIGHT))
    (line,) = caplog.messages
    assert "checking once whether the CUDA kernels are right" in line


def test_who_wants_to_know_anew_is_told_all_and_replaces_what_is_kept():
    judge(FACTS, saying(Verdict(False, "it crashed")))
    lines: list[str] = []
    assert judge_anew(FACTS, saying(RIGHT, "vectors: right\nmatrices: right\n"), lines.append) == RIGHT
    assert lines == ["vectors: right", "matrices: right"]
    assert judge(FACTS, saying(Verdict(False, "not asked"))) == RIGHT


def test_the_process_finds_the_package_and_its_arguments(monkeypatch):
    """As it is started for a device, but that there is none: it says so by itself, in a verdict."""
    command = self_check.command_for(torch.device("cuda", 0), Subject("SmallFC", (32, 32, 2)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    verdict = self_check.ask_child(command, 120)
    assert not verdict.right and "verdict" not in verdict.why and "status" not in verdict.why


# -- what is made of it -----------------------------------------------------------------------------------------------

DEVICE = torch.device("cuda", 0)


def rule() -> SmallFCRule:
    return bootstrap().rule()


def bucket() -> SimpleNamespace:
    return SimpleNamespace(device=DEVICE, layout=SimpleNamespace(shape=(3, 2)), form=FLOAT32)


@pytest.fixture
def device_kernels(monkeypatch):
    """A device on which the kernels can step everything, as far as can be told without one."""
    for name in ("obstacle", "local_obstacle"):
        monkeypatch.setattr(select, name, lambda rule, bucket: None)
    monkeypatch.setattr(select, "entangled_buckets", lambda buckets: set())
    monkeypatch.setattr(cuda, "load", lambda device: SimpleNamespace())


def verdict_is(monkeypatch, verdict: Verdict) -> list[Subject]:
    asked: list[Subject] = []
    monkeypatch.setattr(self_check, "verdict", lambda device, subject: asked.append(subject) or verdict)
    return asked


@pytest.mark.usefixtures("device_kernels")
def test_auto_takes_kernels_that_are_right(monkeypatch, caplog):
    asked = verdict_is(monkeypatch, RIGHT)
    assert select.find_native("auto", [rule()], [bucket()], Ranks()) == ([0], [])
    assert asked == [Subject("SmallFC", (32, 32, 2))] and not caplog.records


@pytest.mark.usefixtures("device_kernels")
def test_auto_leaves_others_to_the_reference_and_says_so_once(monkeypatch, caplog):
    verdict_is(monkeypatch, Verdict(False, "vectors: WRONG, error 7"))
    for _ in range(3):
        assert select.find_native("auto", [rule()], [bucket()], Ranks()) == ([], [])
    assert caplog.messages == [
        "the CUDA kernels for SmallFC are not used on cuda:0, torch's functions are: vectors: WRONG, error 7; "
        "`pylo doctor --device cuda` shows details"
    ]


@pytest.mark.usefixtures("device_kernels")
@pytest.mark.parametrize("backend", ["native", "reference", "compile"])
def test_who_names_a_backend_gets_it_unchecked(monkeypatch, backend):
    asked = verdict_is(monkeypatch, Verdict(False, "wrong"))
    monkeypatch.setattr(select, "check_compiler", lambda device: None)
    able = [0] if backend == "native" else []
    assert select.find_native(backend, [rule()], [bucket()], Ranks()) == (able, [])
    assert not asked


@pytest.mark.usefixtures("device_kernels")
@pytest.mark.parametrize(("value", "able"), [("1", [0]), ("0", [])])
def test_the_switch_decides_without_a_check(monkeypatch, value, able):
    asked = verdict_is(monkeypatch, Verdict(value == "0", "the opposite"))
    monkeypatch.setenv(self_check.SWITCH, value)
    assert select.find_native("auto", [rule()], [bucket()], Ranks()) == (able, [])
    assert not asked


def test_the_switch_is_also_that_of_the_cpu(monkeypatch):
    from native_library import library_or_skip
    from plans import is_native

    library_or_skip()
    for value, expected in (("0", False), ("1", True), ("", True)):
        monkeypatch.setenv(self_check.SWITCH, value)
        param = nn.Parameter(torch.ones(3, 2))
        optimizer = create([param], "small_fc_lopt")
        param.grad = torch.ones(3, 2)
        optimizer.step()
        assert is_native(optimizer) is expected


def test_another_value_of_the_switch_is_an_error_before_anything_changes(monkeypatch):
    monkeypatch.setenv(self_check.SWITCH, "off")
    param = nn.Parameter(torch.ones(3, 2))
    optimizer = create([param], "small_fc_lopt")
    param.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match="PYLO_NATIVE is 'off'; set it to 0 or 1, or leave it out"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, 2))


# -- what it compares -------------------------------------------------------------------------------------------------


@pytest.fixture
def emulation(compiled_kernels, monkeypatch) -> Shim:
    library = Shim(compiled_kernels)
    monkeypatch.setattr(loader, "load", lambda: library)
    return library


CPU = torch.device("cpu")


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(Subject("SmallFC", (32, 32, 2)), marks=pytest.mark.slow),
        pytest.param(Subject("SmallFC", (16, 2)), marks=pytest.mark.slow),
        pytest.param(Subject("CeloRule", (8, 8, 2)), marks=pytest.mark.slow),
        pytest.param(Subject("VeLORule", (4, 4, 2)), marks=pytest.mark.slow),
        pytest.param(Subject("CeloRule", (4, 4, 2)), marks=pytest.mark.slow),
        Subject("CeloAdamRule", ()),
        Subject("AdamW", ()),
        pytest.param(Subject("Celo2", (8, 8, 3)), marks=pytest.mark.slow),
        Subject("Celo2", (3,)),
        Subject("Pace", ()),
        Subject("PacedAdam", ()),
    ],
    ids=str,
)
def test_kernels_that_are_right_are_found_so(subject):
    told: list[kernel_check.Finding] = []
    verdict = kernel_check.check(CPU, subject, told.append)
    assert verdict.right and verdict.final, verdict
    assert len(told) == (16 if subject.widths == (3,) else 15) and all(finding.is_right for finding in told)


def test_every_rule_with_kernels_for_cuda_can_be_checked():
    assert kernel_check.standard_subjects() == [
        Subject("SmallFC", (32, 32, 2)),
        Subject("VeLORule", (4, 4, 2)),
        Subject("CeloRule", (4, 4, 2)),
        Subject("CeloAdamRule", ()),
        Subject("Celo2", (8, 8, 3)),
        Subject("Pace", ()),
        Subject("Celo2", (3,)),
        Subject("AdamW", ()),
        Subject("PacedAdam", ()),
    ]
    specs = {rule.kind: stand_in(name).rule().kernel_spec for name, rule in ARCHITECTURES.items()}
    with_kernels = {kind for kind, spec in specs.items() if spec is not None and spec.has_cuda}
    assert with_kernels == set(kernel_check.OPTIMIZERS)
    assert all(kernel_check._rule_of_vectors(kind).kernel_spec.has_cuda for kind in kernel_check.VECTORS)


SMALL = Subject("CeloRule", (4, 4, 2))


ADAM, PACE = Subject("AdamW", ()), Subject("Pace", ())
CELO2, LINEAR = Subject("Celo2", (8, 8, 3)), Subject("Celo2", (3,))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    ("kernel", "subject"),
    [
        *((kernel, SMALL) for kernel in ("collect", "prepare", "apply_4_plain")),
        *(slow_unless(False, kernel, SMALL) for kernel in ("merge", "describe", "describe_plain", "apply_4")),
        ("update", ADAM),
        slow_unless(False, "apply_8", CELO2),
        *(slow_unless(False, kernel, LINEAR) for kernel in ("apply_linear", "apply_linear_plain", "update")),
        *((kernel, PACE) for kernel in ("apply_nesterov", "apply_nesterov_plain")),
    ],
)
def test_a_kernel_that_does_nothing_is_found(monkeypatch, emulation, kernel, subject):
    """So every kernel is looked at."""
    original = Driver.launch

    def launch(self, function, *rest):
        if function is not emulation._kernels._functions[kernel.encode()]:
            original(self, function, *rest)

    monkeypatch.setattr(Driver, "launch", launch)
    verdict = kernel_check.check(CPU, subject, lambda finding: None)
    assert not verdict.right and "WRONG" in verdict.why and verdict.final


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (lambda param: param.mul_(1 + 1e-3), "tensors of all shapes"),
        (lambda param: param.view(-1)[-1:].fill_(torch.nan), "tensors of all shapes"),
        (lambda param: param.view(-1)[:1].mul_(1 + 1e-5 * torch.rand(())), "bit by bit"),
    ],
)
def test_numbers_that_are_a_little_off_are_found(monkeypatch, spoil, what):
    original = kernel_check._Runs._train

    def train(self, backend, *args, **options):
        params = original(self, backend, *args, **options)
        if backend == "native":
            spoil(params[4])
        return params

    monkeypatch.setattr(kernel_check._Runs, "_train", train)
    verdict = kernel_check.check(CPU, SMALL, lambda finding: None)
    assert not verdict.right and what in verdict.why


@pytest.mark.parametrize(
    ("error", "final"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), False),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
    ],
)
def test_an_error_is_a_verdict_unless_circumstances_caused_it(monkeypatch, error, final):
    def fail(*args):
        raise error

    monkeypatch.setattr(kernel_check, "findings", fail)
    verdict = kernel_check.check(CPU, SMALL, print)
    assert not verdict.right and verdict.final is final and str(error)[:20] in verdict.why


def test_a_verdict_comes_last_on_stdout(monkeypatch, capsys):
    monkeypatch.setattr(kernel_check, "findings", lambda device, subject: [kernel_check.Finding("vectors", 0.5)])
    monkeypatch.setattr(sys, "argv", ["-c", "cpu", "SmallFC", "32,32,2"])
    kernel_check.main()
    first, last = capsys.readouterr().out.splitlines()
    assert first == "vectors: right, error 0.5 of what is allowed"
    assert json.loads(last) == {"right": True, "why": "largest error 0.5 of what is allowed", "final": True}
