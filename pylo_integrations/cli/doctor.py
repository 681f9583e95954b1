"""``pylo doctor``: versions, backends, weights, devices: does it work here?"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

import pylo_integrations
from pylo_integrations import kernel_check
from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.cli.output import print_table
from pylo_integrations.cli.requirements import DISTRIBUTION, installed_version, problem_with, remedy, required_by
from pylo_integrations.cli.trial import NotDownloaded, on_one_parameter
from pylo_integrations.ops import cubins, cuda, kernels, loader, nvrtc, self_check
from pylo_integrations.ops.select import native_report
from pylo_integrations.weights import builtin_names, load_theta

USER_EXTRAS = ("hf", "lightning", "accelerate", "recipes")


@dataclass(frozen=True)
class _Finding:
    label: str
    text: str
    broken: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo doctor``."""
    parser.add_argument(
        "--device",
        metavar="cuda[:N]",
        help="compare the kernels for CUDA with the reference on this device, and show how that ends",
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; the exit code is 1 if something is broken."""
    if args.device is not None:
        findings = list(_check_kernels(args))
    else:
        parts = (_versions(), _devices(), _cuda_kernels(), _builtin_weights(), _optimizers(), _extras())
        findings = [finding for part in parts for finding in part]
    print_table([(finding.label, f"{'BROKEN: ' * finding.broken}{finding.text}") for finding in findings])
    broken = sum(finding.broken for finding in findings)
    print(f"\n{broken} defect{'s' * (broken > 1)} found" if broken else "\neverything works")
    return 1 if broken else 0


def _versions() -> Iterator[_Finding]:
    yield _Finding(DISTRIBUTION, f"{pylo_integrations.__version__} in {Path(pylo_integrations.__file__).parent}")
    yield _Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield _Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} CPU threads")
    try:
        needed = list(required_by(""))
    except metadata.PackageNotFoundError:
        yield _Finding("metadata", "none: runs from source without being installed, so extras are unknown")
        return
    for requirement in needed:
        if problem := problem_with(requirement):
            yield _Finding(requirement.name, problem, broken=True)


def _devices() -> Iterator[_Finding]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [f"cuda:{index} {torch.cuda.get_device_name(index)}" for index in range(count)]
    yield _Finding("devices", ", ".join(["cpu", *gpus]))
    yield _Finding("backends", "; ".join(("reference: torch on any device", f"native: {native_report()}")))


def _cuda_kernels() -> Iterator[_Finding]:
    """What becomes of the kernels for CUDA on the devices here, or on one that there may be some day."""
    label = "CUDA kernels"
    if torch.version.cuda is None:
        yield _Finding(label, f"none: torch {torch.__version__} is not built for CUDA")
        return
    if not torch.cuda.is_available():
        yield _Finding(label, f"no device here; on one, {_forecast()}")
        return
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        if isinstance(library := cuda.load(device), str):
            yield _Finding(label, f"{device}: none, torch's functions run: {library}")
            continue
        yield _Finding(label, f"{device}: {kernels.origin(index)}")
        for subject in kernel_check.standard_subjects():
            verdict = self_check.known(self_check.facts_of(device, subject))
            if verdict is None:
                text = 'not checked yet; the first step with backend="auto" does, or pylo doctor --device cuda'
            else:
                text = f"{'verified' if verdict.right else 'not used'}: {verdict.why}"
            yield _Finding("", f"{device}, {subject.kind}: {text}")


def _forecast() -> str:
    compiler = nvrtc.load()
    if isinstance(reason := loader.load(), str):
        return f"torch's functions run: {reason}"
    if cubins.prebuilt() is None and isinstance(compiler, str):
        return f"torch's functions run: {compiler}"
    if isinstance(compiler, str):
        how = "they are there, compiled with the package"
    else:
        numbers = [each for each in compiler.architectures() if each >= cubins.OLDEST_ARCHITECTURE]
        listed = ", ".join(f"{number // 10}.{number % 10}" for number in numbers)
        how = f"NVRTC {compiler} compiles them when they are first needed (for compute capability {listed})"
    return f'{how}, and backend="auto" takes them once a check has found them right'


def _check_kernels(args: argparse.Namespace) -> Iterator[_Finding]:
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = torch.device("cpu")
    if device.type != "cuda":
        args.parser.error(f"--device {args.device}: only kernels for CUDA are checked; write cuda, or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", device.index or 0)
    if device.index >= count:
        there = f"only {count} CUDA devices are here" if count else f"no CUDA device is here; on one, {_forecast()}"
        yield _Finding(str(device), there, broken=True)
        return
    yield _Finding(str(device), torch.cuda.get_device_name(device))
    if isinstance(library := cuda.load(device), str):
        yield _Finding("kernels", library, broken=True)
        return
    for subject in kernel_check.standard_subjects():
        lines: list[str] = []
        command = self_check.command_for(device, subject)
        verdict = self_check.judge_anew(self_check.facts_of(device, subject), command, lines.append)
        yield from (_Finding(subject.kind if number == 0 else "", line) for number, line in enumerate(lines))
        yield _Finding("" if lines else subject.kind, verdict.why, broken=not verdict.right)


def _builtin_weights() -> Iterator[_Finding]:
    for name in builtin_names():
        try:
            theta = load_theta(f"builtin:{name}", name)
        except (ValueError, OSError) as error:
            yield _Finding(f"builtin:{name}", str(error), broken=True)
        else:
            yield _Finding(f"builtin:{name}", f"sha256 {theta.sha256[:12]} verified; {theta.provenance}")


def _optimizers() -> Iterator[_Finding]:
    for name in list_optimizers():
        spec = get_optimizer_info(name)
        try:
            param, optimizer = on_one_parameter(spec)
            before = param.detach().clone()
            optimizer.step(loss=1.0)
            moved = bool(param.isfinite().all()) and not torch.equal(param, before)
        except (NotDownloaded, FileNotFoundError) as absent:
            yield _Finding(name, f"not tried, for want of weights: {absent}")
        except Exception as error:  # whatever it is, a report of it is what doctor is for
            yield _Finding(name, f"{type(error).__name__}: {error}", broken=True)
        else:
            yield _Finding(name, "takes a step" if moved else "a step does not change a parameter", broken=not moved)


def _extras() -> Iterator[_Finding]:
    try:
        extras = {extra: list(required_by(extra)) for extra in USER_EXTRAS}
    except metadata.PackageNotFoundError:
        return
    for extra, requirements in extras.items():
        absent = [requirement for requirement in requirements if installed_version(requirement) is None]
        if absent:
            names = ", ".join(str(requirement.name) for requirement in absent)
            yield _Finding(f"[{extra}]", f"not installed (lacks {names}): {remedy(extra)}")
        elif problems := [problem for requirement in requirements if (problem := problem_with(requirement))]:
            yield _Finding(f"[{extra}]", "; ".join(problems), broken=True)
        else:
            yield _Finding(f"[{extra}]", ", ".join(f"{r.name} {installed_version(r)}" for r in requirements))
