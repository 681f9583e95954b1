"""Several processes of one meta-training: who does what, and how all come to know it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Processes:
    """The processes that meta-train together; this one is number ``rank`` of ``size``.

    Work is divided by position in a list that all ranks have, and results are put in the order of that list, so the
    number of ranks changes no bit of them.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> Processes:
        """Those of the default process group, or this process alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    def mine(self, keys: Sequence[_Key]) -> list[_Key]:
        """Every ``size``-th of some keys."""
        return list(keys[self.rank :: self.size])

    def all_of(self, keys: Sequence[_Key], work: Callable[[_Key], _Value]) -> dict[_Key, _Value]:
        """Do the work of all keys, each on one rank; every rank gets all results, in the order of ``keys``."""
        found = self.everyones({key: work(key) for key in self.mine(keys)})
        return {key: found[key] for key in keys}

    def everyones(self, mine: Mapping[_Key, _Value]) -> dict[_Key, _Value]:
        """Join the mappings of all ranks, whose keys differ."""
        return {key: value for theirs in self._gathered(dict(mine)) for key, value in theirs.items()}

    def sum(self, value: float) -> float:
        """Over all ranks."""
        return float(sum(self._gathered(value)))

    def leaders(self, value: Any) -> Any:
        """What the leading rank has."""
        return self._gathered(value if self.leads else None)[0]

    def _gathered(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, value)
        return everyones


def device_of_rank(device: str) -> torch.device:
    """The device of this rank: where a config says ``cuda``, that of the local rank."""
    found = torch.device(device)
    if found.type == "cuda" and found.index is None and dist.is_available() and dist.is_initialized():
        return torch.device("cuda", dist.get_node_local_rank(0))
    return found
