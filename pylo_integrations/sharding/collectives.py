"""What ranks send each other, counted where torch's dispatcher sees it, whoever starts it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Collective:
    """One operation of all ranks.

    Attributes:
        name: As the dispatcher has it, such as ``"allreduce_"`` or ``"alltoall_base_"``.
        bytes: What this rank puts in. How much of that travels, and how often, is the backend's affair: a ring
            all-reduce among ``n`` ranks sends ``2 * (n - 1) / n`` times as much.
    """

    name: str
    bytes: int

    @property
    def kind(self) -> str:
        """The name in other words, such as ``"all_reduce"``."""
        return _KINDS.get(self.name, self.name.strip("_"))


_KINDS = {
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "broadcast_": "broadcast",
}


class Collectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, notes every collective of this thread, in order.

    Attributes:
        seen: What was noted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Collective] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_collective(func):
            self.note(func, args, kwargs)
        return func(*args, **kwargs)

    def note(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note a call of a collective."""
        self.seen.append(Collective(func.__name__.split(".")[0], _payload(func, args, kwargs)))


def is_collective(func: Any) -> bool:
    """Whether an operator of the dispatcher is a collective; waiting for one is none."""
    return func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__


def _payload(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Bytes of the tensors among the arguments that are not there to be filled."""
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | {**kwargs}
    given = [value for name, value in named.items() if not name.startswith("output")]
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
