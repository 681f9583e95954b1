"""Reading the golden trajectories (tests/golden/README.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


class Golden:
    """One golden file: arrays by name, in torch layout on request."""

    def __init__(self, case: str) -> None:
        with safe_open(str(GOLDEN / f"{case}.safetensors"), "pt") as file:
            self.metadata = file.metadata()
            self.arrays = {name: file.get_tensor(name) for name in file.keys()}

    @property
    def hyper(self) -> dict:
        return json.loads(self.metadata["hyper"])

    @property
    def theta(self) -> dict[str, Tensor]:
        return {name.removeprefix("theta/"): a for name, a in self.arrays.items() if name.startswith("theta/")}

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> Tensor:
        return self.arrays[name]

    def below(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """(rest of the name, array) of everything under a prefix."""
        for name, array in self.arrays.items():
            if name.startswith(prefix):
                yield name.removeprefix(prefix), array


def to_torch(array: Tensor, *, leading: int = 0, trailing: int = 0) -> Tensor:
    """A JAX-layout array ``(*kernel, in, out)`` as ``(out, in, *kernel)``; extra leading or trailing axes stay put."""
    rank = array.dim() - leading - trailing
    kernel = list(range(leading, leading + rank))
    if rank >= 2:
        kernel = [kernel[-1], kernel[-2], *kernel[:-2]]
    head, tail = range(leading), range(leading + rank, array.dim())
    return array.permute([*head, *kernel, *tail]).clone(memory_format=torch.contiguous_format)


INPUTS = Golden("inputs")
NAMES: list[str] = json.loads(INPUTS.metadata["names"])
TRAJECTORIES = ("wild", "smooth")
STEPS = 12
