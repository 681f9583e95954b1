"""Scripts run as if each had an interpreter of its own: by copies of one that has imported what is slow to import."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = """
import gc, importlib, json, os, runpy, sys, traceback

for name in sys.argv[1:]:
    importlib.import_module(name)
gc.freeze()
print("ready", flush=True)
for line in sys.stdin:
    script, folder = json.loads(line)
    child = os.fork()
    if child == 0:
        failed = 1
        try:
            os.chdir(folder)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(script + "." + name, os.O_WRONLY | os.O_CREAT, 0o600), stream)
            sys.argv = [script]
            runpy.run_path(script, run_name="__main__")
            failed = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(failed)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forked:
    """A process that waits for scripts, and runs each in a copy of itself.

    Args:
        imports: Modules that the copies begin with. None of them may start threads.
        environment: Of the process.
        options: Of the interpreter.
    """

    def __init__(self, *imports: str, environment: Mapping[str, str], options: tuple[str, ...] = ()) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, *options, "-c", SERVER, *imports],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None and self._process.stdout.readline() == "ready\n"

    def run(self, code: str, folder: Path | str = ".") -> subprocess.CompletedProcess[str]:
        """Run a script in a folder; what it printed, and its exit code."""
        script = Path(self._folder.name) / f"script{self._count}.py"
        self._count += 1
        script.write_text(code)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(script), str(folder)]) + "\n")
        self._process.stdin.flush()
        code_of_exit = int(self._process.stdout.readline())
        stdout, stderr = (Path(f"{script}.{name}").read_text() for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess([str(script)], code_of_exit, stdout, stderr)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()
