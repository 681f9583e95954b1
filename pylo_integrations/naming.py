"""Names of parameters: torch wants all groups to have them, or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from pylo_integrations.sharding.pieces import parameter_names


def name_new(
    group: dict[str, Any], others: Sequence[dict[str, Any]], models: Iterable[nn.Module]
) -> list[dict[str, Any]]:
    """Give names to a new group and the others, if some have them: those in the models, else such as ``group1.0``.

    Returns:
        The groups that had none.
    """
    if not isinstance(group, dict) or "params" not in group:
        return []  # for torch to refuse
    params = group["params"]
    params = group["params"] = [params] if isinstance(params, Tensor) else params
    if not isinstance(params, set):  # which torch refuses
        group["params"] = list(params)
    known = {param: name for model in models for param, name in parameter_names(model).items()}
    return name_all([*others, group], known)


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
