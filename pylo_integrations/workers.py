"""A few processes that stay alive and run functions together, as ranks of gloo groups of any size up to theirs.

Starting a process costs seconds, joining another process group milliseconds; so whoever needs several groups in turn
shares the processes. Nothing waits longer than its timeout: whoever hangs or dies is reported, and all are replaced.
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

MOST = 4
"""How many processes there are, unless said otherwise."""


def _serve(rank: int, connection: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    joined: str | None = None
    while True:
        task = connection.recv()
        if task is None:
            return
        function, kwargs, world, rendezvous, timeout = task
        # As torchrun sets them; nobody connects to that address.
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        try:
            if joined != rendezvous:
                if joined is not None:
                    dist.destroy_process_group()
                joined = rendezvous
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
        most: How many; the largest group that they can form.
    """

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._processes: list[Any] = []
        self._connections: list[Any] = []
        self._folder = tempfile.TemporaryDirectory(prefix="pylo-")
        self._joined: tuple[int, str] = (0, "")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        for rank in range(self._most):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, world: int, function: Callable[..., T], *, timeout: float = 120, **kwargs: Any) -> list[T]:
        """Call ``function(rank, world, **kwargs)`` on ``world`` processes at once; what each returned.

        Raises:
            RuntimeError: One of them raised, died or took longer than ``timeout`` seconds.
        """
        if not self._processes:
            self._start()
        if self._joined[0] != world:
            self._joined = (world, str(Path(self._folder.name) / f"rendezvous{time.monotonic_ns()}"))
        deadline = time.monotonic() + timeout
        results: list[T] = []
        trouble: list[str] = []
        for connection in self._connections[:world]:
            connection.send((function, kwargs, world, self._joined[1], timeout))
        for rank, connection in enumerate(self._connections[:world]):
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
            self.close()
            raise RuntimeError("\n".join(trouble))
        return results

    def close(self) -> None:
        """End the processes; the next :meth:`run` starts new ones."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections, self._joined = [], [], (0, "")
