"""Who steps the networks of a task: a rule whose theta differs between members, or a plain one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from pylo_integrations.catalog import get_optimizer_info
from pylo_integrations.groups import param_groups
from pylo_integrations.mup import mup_param_groups
from pylo_integrations.profiles import ARCHITECTURES, architecture_of
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.base import Local, Rule, as_written

Arrays = Mapping[str, Tensor]
"""Theta's arrays by name; with a leading axis over members where several are meant."""


@dataclass(frozen=True)
class Learner:
    """An optimizer, as meta-training sees it.

    Attributes:
        rule: The rule; of a learned one only the geometry counts, its theta comes with every call.
        make_rule: The rule of a theta; None if nothing is learned.
        lr: As the optimizer's.
        groups: Parameter groups of a model.
        local: Who runs the rule's local functions.
    """

    rule: Rule
    make_rule: Callable[[Arrays], Rule] | None
    lr: float
    groups: Callable[[nn.Module], list[dict[str, Any]]]
    local: Local = field(default=as_written)

    @classmethod
    def learned(
        cls,
        optimizer: str,
        arrays: Arrays,
        hyper: Mapping[str, Any],
        lr: float | None = None,
        local: Local = as_written,
    ) -> Learner:
        """A catalogue entry.

        Args:
            optimizer: Its name.
            arrays: Any theta of the right shapes.
            hyper: Constants that belong to theta.
            lr: By default that of the entry.
            local: Who runs the rule's local functions.

        Raises:
            ValueError: Unknown name; arrays or constants that do not fit.
        """
        spec = get_optimizer_info(optimizer)
        architecture = ARCHITECTURES[architecture_of(optimizer)]
        constants = {**hyper, **getattr(spec.cls, "constants", {})}

        def make_rule(arrays: Arrays) -> Rule:
            return architecture.from_arrays(arrays, **constants)

        return cls(make_rule(arrays), make_rule, spec.lr if lr is None else lr, spec.param_groups, local)

    @classmethod
    def adamw(cls, lr: float) -> Learner:
        """AdamW without decay, to compare with."""
        return cls(AdamWRule((0.9, 0.999)), None, lr, param_groups)

    def shaped_as(self, arrays: Arrays) -> Learner:
        """The same, of the geometry of ``arrays``, as a space's members may have a smaller network than its theta."""
        return self if self.make_rule is None else replace(self, rule=self.make_rule(arrays))

    def param_groups(self, model: nn.Module, base: nn.Module | None) -> list[dict[str, Any]]:
        """Groups with every option that a step reads; with ``base``, those of muP."""
        groups = self.groups(model) if base is None else mup_param_groups(model, base, lr=self.lr)
        defaults = {"lr": self.lr, "weight_decay": 0.0, "weight_decay_policy": "before", "maximize": False}
        return [{**defaults, **group} for group in groups]

    def constants(
        self,
        arrays: Arrays,
        device: torch.device,
        dtype: torch.dtype,
        of: Callable[[Rule], Rule] = lambda rule: rule,
    ) -> dict[str, Tensor]:
        """:meth:`Rule.constants` of every member's theta, with a leading axis over members.

        Args:
            arrays: Theta of every member.
            device: Where.
            dtype: Of floating-point constants.
            of: Which of the rules that a rule leaves tensors to; by default itself.
        """
        make_rule = self.make_rule
        if make_rule is None:
            return of(self.rule).constants(device, dtype)
        constants: dict[str, Tensor] = torch.func.vmap(lambda mine: of(make_rule(mine)).constants(device, dtype))(
            dict(arrays)
        )
        return constants

    def initial_state(self, arrays: Arrays) -> dict[str, Tensor]:
        """:meth:`Rule.initial_state` of every member's theta, with a leading axis over members."""
        make_rule = self.make_rule
        if make_rule is None or not self.rule.initial_state():
            return {}
        initial: dict[str, Tensor] = torch.func.vmap(lambda mine: dict(make_rule(mine).initial_state()))(dict(arrays))
        return initial
