#!/usr/bin/env python
"""The nano track: how many steps does an optimizer need to bring a small GPT to a fixed loss?

    python train.py pace.py                        # four seeds of 600 steps
    python train.py my_optimizer.py --steps 450 --seeds 8
    python train.py --table                        # what all logs in the folder say

Model, data, batches, initial weights and the loss to reach are the same for all. An optimizer is a file with a function
`build(model, steps)` that returns what steps the model: pairs of an optimizer and a function from the part of the run
that is over, in [0, 1), to a factor on its learning rate. Nothing else may differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pylo_integrations import LearnedOptimizer
from pylo_integrations.evaluation.figures import steps_to
from pylo_integrations.metatrain import data

TARGET = 2.28  # nats per character of validation text: about where 600 steps of adamw.py end
WIDTH, DEPTH, HEADS, LENGTH, BATCH = 144, 4, 4, 64, 8  # 1.0 million parameters
EVERY, WINDOWS = 25, 64  # how often validation loss is measured, and on how many windows

# Student's t, 99 % one-sided, by degrees of freedom from 1 to 9; those beyond are taken for 9.
T99 = (31.821, 6.965, 4.541, 3.747, 3.365, 3.143, 2.998, 2.896, 2.821)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query_key_value, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        joined = self.query_key_value(self.norms[0](hidden)).unflatten(-1, (3, HEADS, -1))
        query, key, value = joined.permute(2, 0, 3, 1, 4).unbind()
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.out(seen.transpose(1, 2).flatten(-2))
        return hidden + self.mlp(self.norms[1](hidden))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(data.VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, data.VOCABULARY)
        for name, param in self.named_parameters():
            if param.dim() == 2:
                scale = (2 * DEPTH) ** -0.5 if name.endswith(("out.weight", "mlp.2.weight")) else 1.0
                nn.init.normal_(param, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(param)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.characters(characters) + self.positions.weight)))


def windows(characters: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    rows = characters[starts.unsqueeze(1) + torch.arange(LENGTH + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def train(build: Callable[[nn.Module, int], Sequence], steps: int, seed: int, log: Path) -> None:
    """One run, one log: a JSON line for every measurement."""
    training, validation = data.text()
    held_out = windows(validation, torch.arange(WINDOWS) * (len(validation) // (WINDOWS + 1)))
    torch.manual_seed(seed)
    model = GPT()
    batches = torch.Generator().manual_seed(seed)
    pairs = build(model, steps)
    bases = [[group["lr"] for group in optimizer.param_groups] for optimizer, _ in pairs]
    modes = [model, *(optimizer for optimizer, _ in pairs if hasattr(optimizer, "eval"))]  # Schedule-Free has modes
    began, lines = time.process_time(), []
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            for each in modes:
                each.eval()
            with torch.no_grad():
                lines.append({"step": step, "loss": float(loss_of(model, held_out))})
            lines[-1]["cpu_seconds"] = round(time.process_time() - began, 2)
            for each in modes:
                each.train()
            if step == steps:
                break
        loss = loss_of(model, windows(training, torch.randint(len(training) - LENGTH, (BATCH,), generator=batches)))
        model.zero_grad()
        loss.backward()
        for (optimizer, factor), lrs in zip(pairs, bases, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor(step / steps)
            optimizer.step(**({"loss": loss.detach()} if isinstance(optimizer, LearnedOptimizer) else {}))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))


def is_below(losses: Sequence[float], target: float) -> bool:
    """Whether the mean behind losses is below a target: one-sided t-test, p < 0.01, two runs at least."""
    if len(losses) < 2 or not all(map(math.isfinite, losses)):
        return False
    bound = T99[min(len(losses) - 1, len(T99)) - 1] * stdev(losses) / math.sqrt(len(losses))
    return fmean(losses) + bound < target


def table(folder: Path) -> str:
    """All logs of a folder in Markdown, a line for an optimizer and a number of steps."""
    runs: dict[tuple[str, int], list[list[tuple[float, float]]]] = {}
    for log in sorted(folder.glob("*-*-*.jsonl")):
        name, steps, _ = log.stem.rsplit("-", 2)
        lines = map(json.loads, log.read_text().splitlines())
        runs.setdefault((name, int(steps)), []).append([(line["step"], line["loss"]) for line in lines])
    rows = ["| optimizer | steps of a run | seeds | final loss | steps to the target | reached |", "|---" * 6 + "|"]
    for (name, steps), curves in runs.items():
        ends, reached = [curve[-1][1] for curve in curves], [steps_to(curve, TARGET) for curve in curves]
        spread = f" ± {stdev(ends):.4f}" if len(ends) > 1 else ""
        mean = f"{fmean(reached):.0f}" if all(map(math.isfinite, reached)) else "not by all"
        verdict = "yes" if is_below(ends, TARGET) else "no"
        rows.append(f"| {name} | {steps} | {len(ends)} | {fmean(ends):.4f}{spread} | {mean} | {verdict} |")
    return "\n".join(rows)


def load(path: Path) -> ModuleType:
    """The file of an optimizer: one here by its name, or any path."""
    path = path if path.is_file() else Path(__file__).with_name(path.name)
    spec = importlib.util.spec_from_file_location(f"nano_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"there is no {path}; an optimizer is a .py file with build(model, steps)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer", type=Path, nargs="?", help="a file with build(model, steps)")
    parser.add_argument("--steps", type=int, default=600, help="of a run (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs", "nano"), help="folder of logs (default: %(default)s)"
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if args.optimizer and not args.table:
        build = load(args.optimizer).build
        for seed in range(args.seeds):
            log = args.output / f"{args.optimizer.stem}-{args.steps}-{seed}.jsonl"
            if not log.exists():
                train(build, args.steps, seed, log)
    elif not args.table:
        parser.error("give the file of an optimizer, or --table")
    print(table(args.output))


if __name__ == "__main__":
    main()
