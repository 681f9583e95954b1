"""The ledger: what there is to know of every parameter of an optimizer, in one place.

Steps, checkpoints and canonical states ask it for a parameter's whole shape, what is here of it, the rule that steps it
and the state that this rule keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pylo_integrations.formats import BFLOAT16, FLOAT32, INT8, Format, Stored, format_of, stored_parts, wanted_format
from pylo_integrations.rules.accumulators import SECOND_MOMENTS
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.agreement import may_step
from pylo_integrations.sharding.components import Component, components_of, joint_shapes
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.sharding.pieces import FlatSlice, Held, ShardingError, is_sharded

Groups = Sequence[Mapping[str, Any]]
"""Parameter groups of an optimizer."""

States = Mapping[Tensor, dict[str, Any]]
"""State of an optimizer, by parameter."""


def state_dtype(param: Tensor) -> torch.dtype:
    """Dtype of state and arithmetic: float64 for float64 parameters, float32 for all others."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Entry:
    """A parameter.

    Attributes:
        param: As the optimizer has it.
        name: In the model that FSDP1 wraps, or as the optimizer was given it; None if it was not.
        layout: Of the whole parameter; without elements if it has no shape yet, as those of lazy modules.
        held: What is here of it.
        rule: Who steps it.
        shapes: Of its whole states, by name; None for "shaped, and sharded, like the parameter".
        dtype: Of arithmetic, and of states that are stored as they are.
        is_slice: Whether it is a 1-D slice made by FSDP1 or ZeRO.
        form: How states are stored that are shaped like the parameter.
        components: The tensors that share it, which the rule steps; none if it is one tensor.
    """

    param: Tensor
    name: str | None
    layout: TensorLayout
    held: Held
    rule: Rule
    shapes: Mapping[str, tuple[int, ...] | None]
    dtype: torch.dtype
    is_slice: bool
    form: Format
    components: tuple[Component, ...] = ()

    @cached_property
    def parts(self) -> dict[str, dict[str, Stored]]:
        """For every state, the tensors that hold it."""
        return self.parts_in(self.form)

    @cached_property
    def stored(self) -> dict[str, Stored]:
        """All tensors that hold its states, by the name that they have in ``optimizer.state[p]``."""
        return {name: stored for parts in self.parts.values() for name, stored in parts.items()}

    @cached_property
    def unread(self) -> frozenset[str]:
        """Names, in any format, of states that its rule would keep with other weights."""
        parts = stored_parts(dict.fromkeys(self.rule.unread), (), INT8, self.dtype)
        return frozenset(self.rule.unread).union(*parts.values())

    def parts_in(self, form: Format) -> dict[str, dict[str, Stored]]:
        """:attr:`parts`, if states were stored in another format."""
        return stored_parts(self.shapes, SECOND_MOMENTS, form, self.dtype)

    def parts_of(self, component: Component) -> dict[str, dict[str, Stored]]:
        """:attr:`parts` of one of the tensors that share it."""
        return stored_parts(self.rule.state_shapes(component.layout), SECOND_MOMENTS, self.form, self.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self.layout.shape


class Ledger:
    """Knows the parameters of an optimizer.

    Args:
        rule: Of the optimizer; it says which rule steps what.
        holdings: What is here of parameters.

    Attributes:
        rule: As given.
        holdings: As given.
        names: That states of the optimizer have, whoever's; what has others is other code's.
        memory_shapes: Of what the rule remembers of the run, by name.
    """

    def __init__(self, rule: Rule, holdings: Holdings) -> None:
        self.rule = rule
        self.holdings = holdings
        every = stored_parts(dict.fromkeys(rule.state_names), (), INT8, torch.float32)
        self.names = rule.state_names.union(*every.values())
        self.memory_shapes = {name: tuple(value.shape) for name, value in rule.initial_memory().items()}

    def entry(self, param: Tensor, group: Mapping[str, Any], name: str | None = None) -> Entry:
        """A parameter of a group, by the name that it was given.

        Raises:
            ShardingError: The whole tensor cannot be seen from here, or is divided otherwise than its format can be.
            ValueError: ``split`` or ``stacked`` of the group do not fit its shape.
        """
        dtype = state_dtype(param)
        if is_lazy(param):
            nothing = TensorLayout.whole((0,), group["axes"])
            return Entry(param, name, nothing, Held(()), self.rule, {}, dtype, False, FLOAT32)
        self.holdings.check_home(param)
        shape, held = self.holdings.locate(param)
        layout = TensorLayout.whole(shape, group["axes"])
        components = components_of(shape, group)
        rule = self.rule.rule_for(components[0].layout if components else layout, group)
        shapes = rule.state_shapes(layout)
        if components:
            _check_alike(self.rule, components, group)
            shapes = joint_shapes([rule.state_shapes(component.layout) for component in components])
        flat = self.holdings.flat_slices.get(param)
        name = flat.name if flat else name
        form = format_of(wanted_format(group), shape, dtype)
        if form.per_block and not all(component.keeps_rows(shape) for component in components):
            form = BFLOAT16  # scales are of rows of the parameter
        if form.per_block:
            self.holdings.check_blocks(param)
        return Entry(param, name, layout, held, rule, shapes, dtype, isinstance(flat, FlatSlice), form, components)

    def entries(self, groups: Groups, options: Groups | None = None) -> list[Entry]:
        """All parameters, in the order of torch's state dicts.

        Args:
            groups: Of the optimizer.
            options: Groups whose options count in place of theirs.
        """
        return [
            self.entry(param, chosen, name)
            for group, chosen in zip(groups, options or groups, strict=True)
            for param, name in zip(
                group["params"], group.get("param_names") or [None] * len(group["params"]), strict=True
            )
        ]

    def complete(self, entries: Sequence[Entry], state: States) -> dict[int, dict[str, Any]]:
        """States that have all that their rule keeps, by the number of the parameter."""
        known = {i: state[entry.param] for i, entry in enumerate(entries) if entry.param in state}
        return {i: own for i, own in known.items() if entries[i].stored.keys() <= own.keys()}

    def has_state(self, param: Tensor, state: States) -> bool:
        """Whether a parameter has state of ours: others may have made an empty entry, or keep something there."""
        return not self.names.isdisjoint(state.get(param) or ())

    def fresh_state(self, entry: Entry) -> dict[str, Tensor]:
        """What a rule keeps of a parameter before the first step."""
        state = {name: self.zeros(entry, stored) for name, stored in entry.stored.items()}
        for name, value in entry.rule.initial_state().items():
            state[name].copy_(value)
        return state

    def zeros(self, entry: Entry, stored: Stored) -> Tensor:
        """Zeros for a tensor that holds a state, or a part of it."""
        if stored.per_block:
            return self.holdings.zero_scales(entry.param, entry.held)
        if stored.shape is None:
            return self.holdings.zero_state(entry.param, entry.held, stored.dtype)
        return torch.zeros(stored.shape, dtype=stored.dtype, device=self.holdings.home(entry.param))

    def new_states(
        self, groups: Groups, state: States, born: Sequence[Sequence[int]]
    ) -> dict[Tensor, dict[str, Tensor]]:
        """States of the parameters that may be stepped and have none yet.

        Args:
            groups: Of the optimizer.
            state: Of the optimizer.
            born: Number of axes of every parameter as it was given to the optimizer, by group.

        Raises:
            ShardingError: A parameter is distributed in a way that hides whole tensors.
        """
        made: dict[Tensor, dict[str, Tensor]] = {}
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                if may_step(param) and not self.has_state(param, state):
                    _check_flattening(group["params"], born[index] if index < len(born) else (), index, position)
                    made[param] = self.fresh_state(self.entry(param, group))
        return made


def _check_alike(rule: Rule, components: Sequence[Component], group: Mapping[str, Any]) -> None:
    """Raise ValueError unless one rule steps all tensors that share a parameter."""
    if len({rule.rule_for(component.layout, group) for component in components}) > 1:
        raise ValueError(
            f"split={group.get('split')!r} leaves tensors that different rules step, as one of them is no matrix: "
            f"{sorted({component.layout.shape for component in components})}; divide the parameter otherwise"
        )


def _check_flattening(params: Sequence[Tensor], born: Sequence[int], index: int, position: int) -> None:
    """Raise ShardingError if a 1-D tensor has taken the place of the parameters that a group was given."""
    param, is_alone = params[position], len(params) == 1 < len(born)
    replaced = is_alone or (len(params) == len(born) and born[position] != 1)
    # Of several vectors one may be left, but hardly as a tensor that is no parameter of a module.
    tells = max(born, default=0) > 1 or (is_alone and not isinstance(param, torch.nn.Parameter))
    if replaced and param.dim() == 1 and tells and not is_sharded(param):
        raise ShardingError(
            f"group {index} was given {len(born)} parameters of up to {max(born)} axes, but now has a flattened one of "
            f"{param.numel()} elements in their place, as DeepSpeed ZeRO makes: learned optimizers need whole "
            "tensors; call pylo_integrations.deepspeed.attach(engine) after deepspeed.initialize(), or use torch's "
            "fully_shard() (FSDP2) or DistributedDataParallel"
        )
