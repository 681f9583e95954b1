"""Run a program of Hugging Face's Trainer in which ``optim`` may be the name of a learned optimizer.

    python -m pylo_integrations.hf train.py --optim celo2 ...
    python -m pylo_integrations.hf -m llamafactory.cli train config.yaml
    accelerate launch -m pylo_integrations.hf train.py ...

The same as a first line ``pylo_integrations.hf.install()`` in the program, for those that one does not write.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from pylo_integrations.hf.stock import install

_USAGE = "usage: python -m pylo_integrations.hf [-m MODULE | FILE.py] [arguments of the program]"


def main() -> None:
    """Run what the command line names, as ``python`` would, with the names of the catalogue known to transformers."""
    arguments = sys.argv[1:]
    is_module = arguments[:1] == ["-m"]
    program = arguments[is_module : is_module + 1]
    if not program or program[0].startswith("-"):
        raise SystemExit(_USAGE)
    install()
    sys.argv = arguments[is_module:]
    if is_module:
        runpy.run_module(program[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(program[0]).resolve().parent)
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
