"""Reading the golden trajectories (tests/golden/README.md)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pylo_integrations import LearnedOptimizer

GOLDEN = Path(__file__).parent / "golden"

# Files with the authors' meta-trained weights, which are not ours to ship, lie beside the repository or nowhere.
SHARED = Path(os.environ.get("PYLO_SHARED", GOLDEN.parent.parent.parent / "shared"))
PUBLISHED = SHARED / "golden" / "published"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason="the authors' weights are not in ../shared/golden/published (or under $PYLO_SHARED)"
)


class Golden:
    """One golden file: arrays by name, in torch layout on request."""

    def __init__(self, case: str, folder: Path = GOLDEN) -> None:
        with safe_open(str(folder / f"{case}.safetensors"), "pt") as file:
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


Build = Callable[..., LearnedOptimizer]
"""Called as ``build(params, num_steps=...)``."""


def horizon(golden: Golden, trajectory: str) -> int:
    """Number of steps that the run of a trajectory was told to have."""
    return json.loads(golden.metadata["num_steps"])[trajectory]


def initial_params(trajectory: str, dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    return {n: torch.nn.Parameter(to_torch(INPUTS[f"{trajectory}/params0/{n}"]).to(dtype)) for n in NAMES}


def replay(optimizer: LearnedOptimizer, params: Mapping[str, Tensor], trajectory: str) -> Iterator[int]:
    """Take the recorded steps; yields the number of each, from 0, after it was taken."""
    for step in range(STEPS):
        for name, param in params.items():
            param.grad = to_torch(INPUTS[f"{trajectory}/grads/{name}"][step]).to(param.dtype)
        optimizer.step(loss=INPUTS[f"{trajectory}/loss"][step])
        yield step


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def assert_float32_updates(golden: Golden, trajectory: str, build: Build) -> None:
    """Every update within 2e-4 of its largest element plus 3e-7 of the largest parameter."""
    params = initial_params(trajectory, torch.float32)
    optimizer = build(list(params.values()), num_steps=horizon(golden, trajectory))
    old = {name: param.detach().clone() for name, param in params.items()}
    old_reference = dict(old)
    for step in replay(optimizer, params, trajectory):
        for name, param in params.items():
            reference = to_torch(golden[f"f32/{trajectory}/params/{name}"][step])
            got, want = param.detach() - old[name], reference - old_reference[name]
            bound = 2e-4 * largest(want) + 3e-7 * largest(reference)
            assert largest(got - want) <= bound, f"{name} step {step}: off by {largest(got - want)}, allowed {bound}"
            old[name], old_reference[name] = param.detach().clone(), reference
    assert optimizer.iteration == STEPS


def assert_float64_parameters(golden: Golden, trajectory: str, build: Build) -> None:
    """Parameters after the first and the last step within 1e-9 of what they moved."""
    params = initial_params(trajectory, torch.float64)
    start = {name: param.detach().clone() for name, param in params.items()}
    optimizer = build(list(params.values()), num_steps=horizon(golden, trajectory))
    for step in replay(optimizer, params, trajectory):
        if step + 1 in (1, STEPS):
            for name, param in params.items():
                reference = to_torch(golden[f"f64/{trajectory}/params/{name}"][int(step > 0)])
                bound = 1e-9 * max(largest(reference - start[name]), largest(reference) * 1e-6)
                assert largest(param.detach() - reference) <= bound, (name, step)


def expected_state(golden: Golden, prefix: str, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """The reference's accumulators of one tensor under our names and axes."""
    state = {}
    if f"{prefix}/m/{name}" in golden:
        for i, momentum in enumerate(golden[f"{prefix}/m/{name}"].unbind(-1)):
            state[f"momentum_{i}"] = to_torch(momentum)
        state["rms"] = to_torch(golden[f"{prefix}/rms/{name}"][..., 0])
    if len(shape) < 2:
        if f"{prefix}/v_diag/{name}" in golden:
            for i, second in enumerate(golden[f"{prefix}/v_diag/{name}"].unbind(-1)):
                state[f"diagonal_{i}"] = second.reshape(shape)
        return state
    jax_shape = to_jax_shape(shape)
    ranked = sorted(range(len(jax_shape)), key=lambda axis: jax_shape[axis])
    for key, axis in (("row", ranked[-1]), ("col", ranked[-2])):
        if f"{prefix}/v_{key}/{name}" in golden:
            statistic = golden[f"{prefix}/v_{key}/{name}"].movedim(-1, 0).unsqueeze(axis + 1)
            state[key] = to_torch(statistic, leading=1)
    return state


def to_jax_shape(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape) if len(shape) < 2 else (*shape[2:], shape[1], shape[0])


def assert_accumulators(golden: Golden, trajectory: str, build: Build) -> int:
    """Accumulators after the first and the last step; returns how many were compared."""
    params = initial_params(trajectory, torch.float32)
    optimizer = build(list(params.values()), num_steps=horizon(golden, trajectory))
    compared = 0
    for step in replay(optimizer, params, trajectory):
        if step + 1 not in (1, STEPS):
            continue
        prefix = f"f32/{trajectory}/step{step + 1:02}/state"
        assert golden[f"{prefix}/iteration"].item() == optimizer.iteration
        for name, param in params.items():
            for key, want in expected_state(golden, prefix, name, param.shape).items():
                if key not in optimizer.state[param]:
                    continue
                got = optimizer.state[param][key]
                # One ulp of a decay of 0.999 is 6e-5 of its complement, hence the bound.
                assert got.shape == want.shape
                assert largest(got - want) <= 1e-4 * largest(want), (name, key, step)
                compared += 1
    return compared
