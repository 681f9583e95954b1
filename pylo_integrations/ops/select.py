"""The one place that reads ``backend``."""

from __future__ import annotations

from typing import Literal, get_args

from pylo_integrations.rules.base import Rule

Backend = Literal["auto", "reference"]
"""``"reference"`` runs a rule's own torch functions on any device; ``"auto"`` picks the fastest one available."""


def select_stages(rule: Rule, backend: Backend) -> Rule:
    """The implementation of ``rule``'s stages that ``backend`` names.

    Raises:
        ValueError: Unknown backend.
    """
    if backend not in get_args(Backend):
        choices = ", ".join(map(repr, get_args(Backend)))
        raise ValueError(f"backend={backend!r} is not available; choose one of {choices}")
    return rule
