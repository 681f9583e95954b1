"""Whether CUDA kernels are right on a device that they may never have run on: a child process finds out, once.

The child compares them with the reference (:mod:`pylo_integrations.kernel_check`). Whatever happens to it, a crash,
an error that makes its context unusable, or wrong numbers, does not happen to the training. Its verdict is kept in a
file (:mod:`pylo_integrations.ops.cache`), by everything that it depends on. What circumstances may have caused, such as
memory that was in use or a device that admits one process only, is no verdict: it holds for this process, and the next
one asks again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from pylo_integrations.ops import cache as kept
from pylo_integrations.ops import cubins, cuda, driver, loader, nvrtc
from pylo_integrations.rules.base import Rule
from pylo_integrations.rules.kernel_spec import NetworkSpec
from pylo_integrations.sharding.rounds import Ranks

logger = logging.getLogger(__name__)

SWITCH = "PYLO_NATIVE"
"""Environment variable: with 0, ``backend="auto"`` takes no kernels, with 1 it takes those for CUDA without a check."""

PATIENCE = 180.0
"""Seconds that a check may take, compiling included, and that ranks wait for each other's."""

DETAILS = "`pylo doctor --device cuda` shows details"

_COARSE = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Environment variables that make the reference as coarse as no setting of torch could forbid."""

_CRASHES = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")}


class Verdict(NamedTuple):
    """Whether kernels are right.

    Attributes:
        right: Whether they may be used.
        why: What was found, in words.
        final: Whether it is kept: circumstances have not caused it.
    """

    right: bool
    why: str
    final: bool = True


class Subject(NamedTuple):
    """Kernels to be checked: those for a rule with a network.

    Attributes:
        kind: Of the rule.
        widths: Of the layers of its network.
    """

    kind: str
    widths: tuple[int, ...]

    @classmethod
    def of(cls, rule: Rule) -> Subject:
        """The kernels for a rule."""
        step = rule.kernel_spec.step if rule.kernel_spec is not None else None
        return cls(rule.kind, step.widths if isinstance(step, NetworkSpec) else ())


def switch() -> bool | None:
    """What :data:`SWITCH` says; None if nothing.

    Raises:
        ValueError: It says something else than 0 or 1.
    """
    value = os.environ.get(SWITCH, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"the environment variable {SWITCH} is {value!r}; set it to 0 or 1, or leave it out")
    return {"0": False, "1": True}.get(value)


def reluctance(rule: Rule, device: torch.device, ranks: Ranks) -> str | None:
    """Why the kernels on a CUDA device are not taken unasked, on any rank; None if they are. Said once in the log.

    Raises:
        ValueError: See :func:`switch`.
    """
    subject, decided = Subject.of(rule), switch()
    mine = verdict(device, subject) if decided is None else Verdict(decided, f"{SWITCH} is {int(decided)}")
    if ranks.agree(f"kernels for {subject}", mine.right, PATIENCE):
        return None
    why = "not all ranks that train together can use them" if mine.right else mine.why
    _tell(f"the CUDA kernels for {subject.kind} are not used on {device}, torch's functions are: {why}; {DETAILS}")
    return why


@cache
def _tell(message: str) -> None:
    logger.warning(message)


@cache
def verdict(device: torch.device, subject: Subject) -> Verdict:
    """The verdict on a device of this machine, which is asked for once in a process."""
    if isinstance(library := cuda.load(device), str):
        return Verdict(False, library, final=False)
    return judge(facts_of(device, subject), command_for(device, subject))


def command_for(device: torch.device, subject: Subject) -> list[str]:
    """What a child process has to run to check the kernels."""
    program = "from pylo_integrations import kernel_check; kernel_check.main()"
    return [sys.executable or "python", "-c", program, str(device), subject.kind, ",".join(map(str, subject.widths))]


def facts_of(device: torch.device, subject: Subject) -> dict[str, str]:
    """All that a verdict depends on."""
    library, compiler, found = loader.load(), nvrtc.load(), driver.load()
    properties = torch.cuda.get_device_properties(device)
    return {
        "kernels": f"{subject.kind} {subject.widths} {cubins.digest()}",
        "library": "" if isinstance(library, str) else hashlib.sha256(library.path.read_bytes()).hexdigest(),
        "device": f"{properties.name} {properties.major}.{properties.minor}",
        "driver": found if isinstance(found, str) else f"{found.version} {_driver_build()}",
        "NVRTC": str(compiler),
        "torch": torch.__version__,
    }


def _driver_build() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""


def file_name(facts: Mapping[str, str]) -> str:
    """Under which a verdict is kept."""
    return f"verdict-{kept.key_of(sorted(facts.items()))}.json"


def known(facts: Mapping[str, str]) -> Verdict | None:
    """The verdict that is kept, if there is one."""
    return _read(kept.read(file_name(facts)) or b"")


def judge(facts: Mapping[str, str], command: Sequence[str], patience: float = PATIENCE) -> Verdict:
    """The verdict that is kept; without one, that of a child process, which one of the processes that ask starts.

    Args:
        facts: What it depends on.
        command: Checks the kernels, and prints a verdict as :func:`spoken` does on its last line.
        patience: Seconds that it may take.
    """
    found: list[Verdict] = []

    def ask() -> bytes | None:
        logger.warning(
            "checking once whether the CUDA kernels are right on such a device; later runs go by the verdict"
        )
        found.append(ask_child(command, patience))
        return spoken(found[0]).encode() if found[0].final else None

    contents = kept.make_once(file_name(facts), ask, patience)
    return found[0] if found else _read(contents or b"") or ask_child(command, patience)


def judge_anew(
    facts: Mapping[str, str], command: Sequence[str], tell: Callable[[str], object], patience: float = PATIENCE
) -> Verdict:
    """As :func:`judge`, whatever is kept, which is replaced; ``tell`` gets every line that the child prints before."""
    verdict = ask_child(command, patience, tell)
    if verdict.final:
        kept.write(file_name(facts), spoken(verdict).encode())
    return verdict


def spoken(verdict: Verdict) -> str:
    """A verdict as one line of text."""
    return json.dumps(verdict._asdict())


def _read(text: bytes) -> Verdict | None:
    try:
        told = json.loads(text)
        right, why, final = told["right"], told["why"], told["final"]
    except (ValueError, KeyError, TypeError):
        return None
    is_one = isinstance(right, bool) and isinstance(why, str) and isinstance(final, bool)
    return Verdict(right, why, final) if is_one else None


def ask_child(command: Sequence[str], patience: float, tell: Callable[[str], object] = lambda line: None) -> Verdict:
    """Run a check, and hear its verdict, or what its end tells; ``tell`` gets the lines that it prints before."""
    environment = {name: value for name, value in os.environ.items() if name not in _COARSE}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    try:
        child = subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe, env=environment)
    except OSError as error:
        return Verdict(False, f"the check could not be started: {error}", final=False)
    try:
        out, err = child.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a device may not even end then
            child.communicate(timeout=5)
        return Verdict(False, f"the check took more than {patience:.0f} s", final=False)
    finally:
        child.kill()
    said = out.decode(errors="replace").splitlines()
    told = next((found for line in reversed(said) if (found := _read(line.encode()))), None)
    for line in said:
        if _read(line.encode()) is None:
            tell(line)
    errors = err.decode(errors="replace").strip().splitlines()
    last = f": {errors[-1][:300]}" if errors else ""
    if child.returncode < 0:
        by = -child.returncode
        return Verdict(False, f"the check was killed by signal {by}{last}", final=by in _CRASHES)
    if child.returncode:
        return Verdict(False, f"the check ended with status {child.returncode}{last}")
    return told or Verdict(False, f"the check gave no verdict{last}")
