"""A few processes that stay alive and run functions together, as ranks of a gloo group.

Starting a process costs seconds, so whoever needs groups in turn shares the processes, and on Linux they are forked
from one that has imported torch. Each size of group has processes of its own: torch keeps device meshes, and with them
their process groups, in caches that outlive a group. Nothing waits longer than its timeout: whoever hangs or dies is
reported, with the place where it hung, and the group is replaced.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

_IMPORTED = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
"""What ranks would import one by one, in seconds each. Nothing in it starts threads, so what has it may be forked."""


_TELL = getattr(signal, "SIGUSR1", None)
"""What asks a rank where it is; Windows has no such signal."""


class RankDied(RuntimeError):
    """A process has ended that should have answered."""


class _Rank(NamedTuple):
    process: Any
    connection: Any
    told: Path  # where the process writes what its threads are doing, when asked

    def account(self, waited: float) -> str:
        """Of one that does not answer: how it ended, or where it is."""
        self.process.join(1.0)
        if not self.process.is_alive():
            what = f"ended with exit code {self.process.exitcode}"
        else:
            what = f"no answer within {waited} s"
            if _TELL is not None:
                os.kill(self.process.pid, _TELL)
                # On a busy machine it writes for seconds: until what is there stays.
                deadline, seen, now = time.monotonic() + 5.0, None, ""
                while time.monotonic() < deadline and (seen != now or not now):
                    time.sleep(0.2)
                    seen, now = now, self._told()
        return f"{what}\n{self._told()}"

    def _told(self) -> str:
        return self.told.read_text() if self.told.exists() else ""


def _serve(rank: int, world: int, rendezvous: str, told: Path, connection: Any) -> None:
    account = told.open("w")
    faulthandler.enable(account)
    if _TELL is not None:
        faulthandler.register(_TELL, account)
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        function, kwargs, timeout = task
        # As torchrun sets them; nobody connects to that address.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        try:
            if not dist.is_initialized():
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{rendezvous}",
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=timeout),
                )
            connection.send((True, function(rank, world, **kwargs)))
        except BaseException:
            connection.send((False, traceback.format_exc()))


class Workers:
    """Processes of one thread each to run functions on, started when first needed.

    Args:
        imports: Modules beside torch's that processes begin with on Linux, where they are installed, instead of each
            importing them by itself. Those of whoever starts processes first count, and none may start threads.
    """

    def __init__(self, imports: Sequence[str] = ()) -> None:
        self._imports = [*_IMPORTED, *imports]
        self._folder = tempfile.TemporaryDirectory(prefix="pylo-")
        self._groups: dict[int, list[_Rank]] = {}  # by size

    def _start(self, world: int) -> list[_Rank]:
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(self._imports)
        rendezvous = str(Path(self._folder.name) / f"rendezvous{time.monotonic_ns()}")
        group = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            told = Path(f"{rendezvous}-rank{rank}")
            process = context.Process(target=_serve, args=(rank, world, rendezvous, told, theirs), daemon=True)
            process.start()
            theirs.close()
            group.append(_Rank(process, ours, told))
        return group

    def run(self, world: int, function: Callable[..., T], *, timeout: float = 120, **kwargs: Any) -> list[T]:
        """Call ``function(rank, world, **kwargs)`` on ``world`` processes at once; what each returned.

        Raises:
            RankDied: One of them was ended, by a signal or by itself.
            RuntimeError: One of them raised or took longer than ``timeout`` seconds.
        """
        if world not in self._groups:
            self._groups[world] = self._start(world)
        ranks = self._groups[world]
        for rank in ranks:
            with suppress(BrokenPipeError):  # it is told below
                rank.connection.send((function, kwargs, timeout))
        results: dict[int, Any] = {}
        trouble: dict[int, Any] = {}
        waiting: dict[Any, int] = {rank.connection: number for number, rank in enumerate(ranks)}
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                number = waiting.pop(connection)
                try:
                    ok, value = ranks[number].connection.recv()
                except (EOFError, ConnectionError):
                    ok, value = False, ranks[number].account(timeout)
                (results if ok else trouble)[number] = value
                if not ok:  # others may wait for this one
                    deadline = min(deadline, time.monotonic() + 5.0)
        if waiting or trouble:
            trouble |= {number: ranks[number].account(timeout) for number in waiting.values()}
            died = any(not rank.process.is_alive() for rank in ranks)
            self._end(world)
            lines = [f"rank {number} of {world}: {trouble[number]}" for number in sorted(trouble)]
            raise (RankDied if died else RuntimeError)("\n".join(lines))
        return [results[number] for number in range(world)]

    def _end(self, world: int) -> None:
        for rank in self._groups.pop(world):
            rank.process.kill()
            rank.process.join()

    def close(self) -> None:
        """End the processes; the next :meth:`run` starts new ones."""
        for world in list(self._groups):
            self._end(world)
