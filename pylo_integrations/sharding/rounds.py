"""Rounds: the points of a step at which partial sums become sums over whole tensors.

All tensors travel in one flat buffer, so a round is one ``all_reduce`` however many tensors there are. Its result has
the same bits on every rank, and so has everything that is decided from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class RankError(RuntimeError):
    """This process cannot go on, since another rank that trains with it raised, stopped, or was killed."""


class Ranks:
    """The processes that train a model together: the default process group, or one given; alone if there is none."""

    def __init__(self) -> None:
        self._group: Any = None
        self._mesh: tuple[Any, DeviceMesh] | None = None
        self._answers: dict[str, tuple[Any, bool]] = {}

    def bind(self, group: Any) -> None:
        """Let ``group`` be the ranks that train together; None leaves them as they are, which is all at first.

        Raises:
            ValueError: This process is not a member.
        """
        if group is None:  # of an adapter, perhaps, after the user has named a group
            return
        if dist.get_rank(group) < 0:
            raise ValueError("process_group must contain the process that passes it")
        self._group = group

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_group": None,
            "_mesh": None,
            "_answers": {},
        }  # process groups cannot be pickled, nor do they outlive their process

    @property
    def size(self) -> int:
        """Number of ranks."""
        return dist.get_world_size(self._group) if dist.is_available() and dist.is_initialized() else 1

    @property
    def rank(self) -> int:
        """Number of this process among them."""
        return dist.get_rank(self._group) if self.size > 1 else 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The process group; None if there is none."""
        return self._process_group if self.size > 1 else None

    def meets_on(self, kind: str) -> bool:
        """Whether they can exchange tensors on devices of a kind."""
        return any(device.type == kind for device in self._process_group._device_types)

    @property
    def _process_group(self) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, self._group or dist.group.WORLD)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Say what is behind it if a collective fails: backends tell of sockets and sizes of messages."""
        try:
            yield
        except RuntimeError as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            others = "other rank that trains" if self.size == 2 else f"{self.size - 1} other ranks that train"
            raise RankError(
                f"rank {self.rank} could not exchange anything with the {others} with it ({first}). Most likely "
                "another rank raised, was killed (by the system when memory ran out, for instance), or did not take "
                "the same step: look for the first error in the logs of all ranks. What a step had written by then may "
                "be incomplete; restart all ranks from the last checkpoint"
            ) from error

    def mesh(self, device_type: str) -> DeviceMesh:
        """The ranks in one row."""
        group = self._process_group
        if self._mesh is None or self._mesh[0] != (group, device_type):
            from torch.distributed.device_mesh import DeviceMesh

            self._mesh = (group, device_type), DeviceMesh.from_group(group, device_type)
        return self._mesh[1]

    def sum_(self, tensor: Tensor) -> None:
        """Add up ``tensor`` over the ranks, in place."""
        with self._waiting():
            dist.all_reduce(tensor, group=self._group)

    def gather(self, value: Any) -> list[Any]:
        """A picklable value of every rank, in their order."""
        values: list[Any] = [None] * self.size
        with self._waiting():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast(self, value: Any) -> Any:
        """A picklable value of the first rank."""
        values = [value]
        if self.size > 1:
            with self._waiting():
                dist.broadcast_object_list(values, dist.get_global_rank(self._process_group, 0), self._group)
        return values[0]

    def agree(self, question: str, yes: bool, patience: float) -> bool:
        """Whether all ranks say yes to a question; all of them get the same answer, for good.

        No collective: replicas may not talk otherwise, and some may never ask, which would hang one. Ranks leave their
        words in the store of the process group. After ``patience`` seconds without those of all, the answer is no.
        """
        group = self.group
        if group is None:
            return yes
        asked, answer = self._answers.get(question, (None, False))
        if asked is not group:
            answer = self._ask_store(f"pylo_integrations/{group.group_name}/{question}", yes, patience)
            self._answers[question] = group, answer
        return answer

    def _ask_store(self, key: str, yes: bool, patience: float) -> bool:
        store = dist.distributed_c10d._get_default_store()
        words = [f"{key}/{rank}" for rank in range(self.size)]
        end = time.monotonic() + patience
        with self._waiting():
            store.set(words[self.rank], "yes" if yes else "no")
            while not (complete := store.check(words)) and time.monotonic() < end:
                time.sleep(0.05)
            mine = complete and all(store.get(word) == b"yes" for word in words)
            # The first answer counts, so that one who lost patience and one who came last have the same.
            return bool(store.compare_set(f"{key}/answer", "", "yes" if mine else "no") == b"yes")

    def all_gather(self, received: Tensor, sent: Tensor) -> None:
        """Fill ``received``, ``(ranks, n)``, with what every rank sends, ``(n,)``."""
        # Renamed in newer versions of torch.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self._waiting():
            gather(received.view(-1), sent, group=self._group)

    def all_to_all(self, outgoing: Sequence[Sequence[Tensor]], sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Exchange flat tensors, in one collective.

        Args:
            outgoing: For each rank, what it gets.
            sizes: Of each rank, how many elements come.
            like: Its dtype and device are those of the exchange.

        Returns:
            Of each rank, what came.
        """
        flat = torch.cat([like.new_empty(0), *(tensor.to(like) for tensors in outgoing for tensor in tensors)])
        received = like.new_empty(sum(sizes))
        splits = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        with self._waiting():
            dist.all_to_all_single(received, flat, list(sizes), splits, group=self._group)
        return list(torch.split(received, list(sizes)))


def sum_over_ranks_(shares: Sequence[tuple[Tensor, int]], ranks: Ranks) -> None:
    """Complete partial sums in place, all of them in one exchange; without any, there is none.

    Args:
        shares: Tensors, in the same order and of the same shapes on every rank, each with its number of copies: how
            many ranks have the same share. With as many copies as ranks the result is the mean.
        ranks: Who takes part.
    """
    if not shares:
        return
    tensors = [tensor for tensor, _ in shares]
    # Always float64: ranks must agree on a type, and the kernels' sums are wider than the reference's.
    flat = torch.cat([tensor.reshape(-1).to(tensors[0].device, torch.float64) for tensor in tensors])
    ranks.sum_(flat)
    for (tensor, copies), total in zip(shares, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        total = total.view(tensor.shape)
        tensor.copy_(total / copies if copies > 1 else total)
