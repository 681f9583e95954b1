"""Names of parameters: torch wants all groups to have them, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def name_all(groups: Sequence[dict[str, Any]], known: Mapping[Tensor, str]) -> list[dict[str, Any]]:
    """Give names to all groups if some have them: those that are ``known``, else such as ``group1.0``.

    Returns:
        The groups that had none.
    """
    named = ["param_names" in group or any(isinstance(p, tuple) for p in group["params"]) for group in groups]
    if all(named) or not any(named):
        return []
    for index, group in enumerate(groups):
        if not named[index]:
            group["param_names"] = [
                known.get(param, f"group{index}.{position}") for position, param in enumerate(group["params"])
            ]
    return [group for group, has_names in zip(groups, named, strict=True) if not has_names]
