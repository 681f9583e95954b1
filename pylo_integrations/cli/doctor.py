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
from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.cli.output import print_table
from pylo_integrations.cli.requirements import DISTRIBUTION, installed_version, problem_with, remedy, required_by
from pylo_integrations.cli.trial import NotDownloaded, on_one_parameter
from pylo_integrations.ops.select import native_report
from pylo_integrations.weights import builtin_names, load_theta

USER_EXTRAS = ("hf", "lightning", "accelerate", "recipes")


@dataclass(frozen=True)
class _Finding:
    label: str
    text: str
    broken: bool = False


def run(args: argparse.Namespace) -> int:
    """Print what was found; the exit code is 1 if something is broken."""
    findings = [*_versions(), *_devices(), *_builtin_weights(), *_optimizers(), *_extras()]
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
