"""A few processes that stay alive and run functions together, as ranks of a gloo group.

Starting a process costs seconds, so whoever needs groups in turn shares the processes, and on Linux they are forked
from one that has imported torch. Each size of group has processes of its own: torch keeps device meshes, and with them
their process groups, in caches that outlive a group. Nothing waits longer than its timeout: whoever hangs or dies is
reported, and the group is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_IMPORTED = ["torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"]
"""What ranks would import one by one, in seconds each. Nothing in it starts threads, so what has it may be forked."""


def _serve(rank: int, world: int, rendezvous: str, connection: Any) -> None:
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
    """Processes of one thread each to run functions on, started when first needed."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pylo-")
        self._groups: dict[int, list[tuple[Any, Any]]] = {}  # by size: processes, and our ends of pipes to them

    def _start(self, world: int) -> list[tuple[Any, Any]]:
        context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(_IMPORTED)
        rendezvous = str(Path(self._folder.name) / f"rendezvous{time.monotonic_ns()}")
        group = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            group.append((process, ours))
        return group

    def run(self, world: int, function: Callable[..., T], *, timeout: float = 120, **kwargs: Any) -> list[T]:
        """Call ``function(rank, world, **kwargs)`` on ``world`` processes at once; what each returned.

        Raises:
            RuntimeError: One of them raised, died or took longer than ``timeout`` seconds.
        """
        if world not in self._groups:
            self._groups[world] = self._start(world)
        connections = [connection for _, connection in self._groups[world]]
        deadline = time.monotonic() + timeout
        results: list[T] = []
        trouble: list[str] = []
        for connection in connections:
            connection.send((function, kwargs, timeout))
        for rank, connection in enumerate(connections):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic()) if not trouble else 5.0):
                    raise EOFError
                ok, value = connection.recv()
            except (EOFError, ConnectionError):
                ok, value = False, f"no answer within {timeout} s"
            if ok:
                results.append(value)
            else:
                trouble.append(f"rank {rank} of {world}: {value}")
        if trouble:
            self._end(world)
            raise RuntimeError("\n".join(trouble))
        return results

    def _end(self, world: int) -> None:
        for process, _ in self._groups.pop(world):
            process.kill()
            process.join()

    def close(self) -> None:
        """End the processes; the next :meth:`run` starts new ones."""
        for world in list(self._groups):
            self._end(world)
