"""What other code does to parameters, gradients and states between steps, and a run in which it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from thetas import create
from torch import Tensor, nn

from pylo_integrations import LearnedOptimizer
from pylo_integrations.ops.records import bytes_from

SHAPES = [(6, 5), (5,), (3, 2, 2, 2), ()]

Change = Callable[[list[nn.Parameter], LearnedOptimizer], Any]


class Run:
    """An optimizer that has stepped twice, so that it has planned, and gradients for the next step."""

    def __init__(self, name: str, backend: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.name, self.backend = name, backend
        self._generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(self._random(shape).to(dtype)) for shape in SHAPES]
        self.optimizer = create(named(self.params), name, backend=backend, **options)
        for _ in range(2):
            self.give_gradients()
            self.step()
        self.give_gradients()

    def _random(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def give_gradients(self) -> None:
        for param in self.params:
            param.grad = self._random(param.shape).to(param.dtype)

    def step(self) -> None:
        self.optimizer.step(loss=torch.tensor(1.5))

    def fresh(self) -> Run:
        """One that has the same numbers, and never stepped: it loaded them, and they are nobody else's."""
        twin = object.__new__(Run)
        twin.name, twin.backend = self.name, self.backend
        twin.params = [nn.Parameter(param.detach().clone()) for param in self.params]
        for param, own in zip(twin.params, self.params, strict=True):
            param.grad = own.grad.clone()
        twin.optimizer = create(named(twin.params), self.name, backend=self.backend)
        twin.optimizer.load_state_dict(self.optimizer.state_dict())
        return twin

    def bits(self) -> list[bytes]:
        """Of parameters and states, as far as they are tensors with memory."""
        states = [value for param in self.params for value in self.optimizer.state[param].values()]
        return [bits_of(tensor) for tensor in (*self.params, *states)]


def named(params: Sequence[nn.Parameter]) -> list[tuple[str, nn.Parameter]]:
    return [(f"layer.{index}", param) for index, param in enumerate(params)]


def bits_of(tensor: Any) -> bytes:
    if not isinstance(tensor, Tensor):
        return repr(tensor).encode()
    if tensor.device.type == "meta" or tensor.layout != torch.strided or bytes_from(tensor) < tensor.nbytes:
        return b""
    return tensor.detach().clone().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_equal_runs(run: Run, other: Run) -> None:
    for index, (param, twin) in enumerate(zip(run.params, other.params, strict=True)):
        assert param.isfinite().all()
        assert torch.equal(param, twin), (run.name, index)
        for key, value in other.optimizer.state[twin].items():
            mine = run.optimizer.state[param][key]
            assert mine.dtype == value.dtype and torch.equal(mine, value), (run.name, index, key)
