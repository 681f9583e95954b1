"""``pylo metatrain``: train theta, alone or as one of the ranks that torchrun launched."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pylo_integrations.cli import recipe
from pylo_integrations.cli.arguments import natural
from pylo_integrations.paths import check_file


def configs() -> dict[str, Path]:
    """Packaged configs by name."""
    return {path.stem: path for path in sorted(recipe.root().glob("metatrain/*.yaml"))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments of ``pylo metatrain``."""
    parser.add_argument("config", metavar="CONFIG", help=f"a YAML file, or one of {', '.join(configs())}")
    parser.add_argument("--output", type=Path, help="folder of the run; by default runs/metatrain/<CONFIG>")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint, if it has one")
    parser.add_argument("--iterations", type=natural, metavar="N", help="stop after N more")
    parser.add_argument("--seed", type=int, help="in place of the config's")
    parser.add_argument("--device", help="in place of the config's")
    parser.add_argument("--threads", type=int, help="in place of the config's")


def run(args: argparse.Namespace) -> int:
    """Meta-train; the exit code is 130 if interrupted."""
    from pylo_integrations import metatrain  # torch.func is slow to import, and no other command needs it

    packaged = configs()
    path = packaged.get(args.config, Path(args.config))
    output = args.output or Path("runs", "metatrain", path.stem)
    overrides = {name: getattr(args, name) for name in ("seed", "device", "threads")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    try:
        check_file(path, "config")
    except FileNotFoundError:
        args.parser.error(f"{path}: No such file; the configs in the package are {', '.join(packaged)}")
    with _launched_ranks() as leads:
        try:
            config = metatrain.load_config(path, **overrides)
            trainer = metatrain.MetaTrainer(config, output, resume=args.resume)
        except metatrain.ResumeError as error:
            args.parser.error(f"{error} (--resume, --output)")
        try:
            trainer.run(args.iterations)
        except metatrain.DataError as error:
            args.parser.error(str(error))
        except KeyboardInterrupt:
            print(f"interrupted; go on with: pylo metatrain {args.config} --output {output} --resume", file=sys.stderr)
            return 130
    if leads:
        print(f"theta and logs are in {output}")
    return 0


@contextmanager
def _launched_ranks() -> Iterator[bool]:
    """Join the ranks that torchrun launched, if it did; tells whether this process leads."""
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield True
        return
    dist.init_process_group("gloo")  # what is exchanged is small, and on the CPU
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
