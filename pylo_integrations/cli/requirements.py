"""What the package and its extras require, and whether that is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

DISTRIBUTION = "pylo-integrations"


def required_by(extra: str) -> Iterator[Requirement]:
    """What an extra (or, for ``""``, the package itself) requires beyond the package, from the installed metadata."""
    for line in metadata.requires(DISTRIBUTION) or []:
        requirement = Requirement(line)
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if always if not extra else not always and _applies(requirement, extra):
            if requirement.name == DISTRIBUTION:
                for nested in sorted(requirement.extras):
                    yield from required_by(nested)
            else:
                yield requirement


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is not None and requirement.marker.evaluate({"extra": extra})


def installed_version(requirement: Requirement) -> str | None:
    """The version that is installed; None without one."""
    try:
        return metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None


def problem_with(requirement: Requirement) -> str:
    """Why a requirement is not met, or ""."""
    version = installed_version(requirement)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} {version} is installed, {requirement.specifier} is needed"
    return ""


def remedy(extra: str) -> str:
    """How to install an extra."""
    return f"pip install '{DISTRIBUTION}[{extra}]', or in a clone: pip install -e '.[{extra}]'"
