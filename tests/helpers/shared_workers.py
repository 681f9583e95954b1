"""Processes for tests of distributed training and for scripts, with what a dozen files import."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

from pylo_integrations.workers import _IMPORTED, RankDied, Workers

FRAMEWORKS = ["transformers.trainer", "accelerate", "lightning.pytorch", "lightning.fabric"]
"""Imported once, for they take seconds each."""


class SteadyWorkers(Workers):
    """Runs a case in which a rank has died once more, with a warning that says where it was.

    CI once lost one rank of four in a case that passes thousands of times in a row, with no word of why. What always
    ends ranks fails still.
    """

    def run(self, world, function, **kwargs):
        try:
            return super().run(world, function, **kwargs)
        except RankDied as died:
            warnings.warn(f"a rank of {function.__name__} has died, and it is run again:\n{died}", stacklevel=2)
            return super().run(world, function, **kwargs)


def forked_process(function: Callable[..., object], *arguments: object) -> BaseProcess:
    """A process for a function, to be started, with what :class:`Workers` begin with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED, *FRAMEWORKS])
    return context.Process(target=function, args=arguments)


def run_script(script: Path, arguments: Sequence[str] = (), folder: Path | str = ".", ranks: int = 0) -> str:
    """Run a script to its end in new processes, as Python does or as ``torchrun`` does; what it printed and logged.

    The processes are forked from the one that :class:`Workers` are forked from, so nothing is imported anew. Whether
    scripts import what they need, and launchers start them, is for tests that start interpreters.

    Args:
        script: File of the script.
        arguments: Of its command line.
        folder: Where it runs.
        ranks: How many processes, with the variables that ``torchrun`` sets; 0 for one without them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as told_in:
        processes = []
        for rank in range(ranks or 1):
            there = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            there |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
            variables = {name: str(value) for name, value in there.items()} if ranks else {}
            told = Path(told_in) / str(rank)
            task = (str(script), list(map(str, arguments)), str(folder), str(told), variables)
            processes.append(forked_process(_as_a_script, *task))
        for process in processes:
            process.start()
        deadline = time.monotonic() + 200
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = "".join(told.read_text() for told in sorted(Path(told_in).iterdir()))
    assert set(codes) == {0}, f"{script} ended with {codes}\n{said[-6000:]}"
    return said


def _as_a_script(script: str, arguments: list[str], folder: str, told: str, variables: Mapping[str, str]) -> None:
    output = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
