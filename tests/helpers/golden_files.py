"""Reading the golden trajectories (tests/golden/README.md)."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"

# Files with the authors' meta-trained weights are not ours to ship: they lie beside the repository, or nowhere.
SHARED = Path(os.environ.get("PYLO_SHARED", Path(__file__).parents[3] / "shared"))
PUBLISHED = SHARED / "golden" / "published"
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"no authors' weights in {PUBLISHED.name}; PYLO_SHARED names the folder above golden"
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

    def num_steps(self, trajectory: str) -> int:
        """How many steps the run of a trajectory was told to have."""
        return json.loads(self.metadata["num_steps"])[trajectory]

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

PRECISIONS = {torch.float32: "f32", torch.float64: "f64"}
BY_EITHER_BACKEND = pytest.mark.parametrize(
    ("dtype", "auto_backend"),
    [(torch.float32, "native"), (torch.float32, "reference"), (torch.float64, "reference")],
    ids=str,
    indirect=["auto_backend"],
)
"""The kernels leave float64 to the reference."""


def slow_in_chunks(chunk_bytes: int) -> pytest.MarkDecorator:
    """Both trajectories by either backend, and one by the reference in chunks, which the kernels know none of."""
    whole = list(itertools.product(TRAJECTORIES, ("native", "reference"), [2**28]))
    chunked = pytest.param("wild", "reference", chunk_bytes, marks=pytest.mark.slow)
    return pytest.mark.parametrize(
        ("trajectory", "auto_backend", "chunk_bytes"),
        [*whole, chunked],
        ids=[*(f"{trajectory}-{backend}" for trajectory, backend, _ in whole), "wild-chunked"],
        indirect=["auto_backend"],
    )


def initial_params(trajectory: str, dtype: torch.dtype) -> dict[str, torch.nn.Parameter]:
    return {n: torch.nn.Parameter(to_torch(INPUTS[f"{trajectory}/params0/{n}"]).to(dtype)) for n in NAMES}


def feed(params: dict[str, Tensor], trajectory: str, step: int) -> None:
    for name, param in params.items():
        param.grad = to_torch(INPUTS[f"{trajectory}/grads/{name}"][step]).to(param.dtype)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def assert_update(
    name: str, step: int, before: Tensor, after: Tensor, ref_before: Tensor, ref: Tensor, tolerance: float = 2e-4
) -> None:
    got, want = after - before, ref - ref_before
    bound = tolerance * largest(want) + 3e-7 * largest(ref)
    assert largest(got - want) <= bound, f"{name} step {step}: off by {largest(got - want)}, allowed {bound}"


def replay_float32(
    golden: Golden, trajectory: str, params: dict[str, Tensor], optimizer, *, skip=(), tolerance: float = 2e-4
) -> None:
    """Take all steps; every update of every tensor but those in ``skip`` is the reference's."""
    reference = {name: param.detach().clone() for name, param in params.items()}
    for step in range(STEPS):
        before = {name: param.detach().clone() for name, param in params.items()}
        feed(params, trajectory, step)
        optimizer.step(loss=INPUTS[f"{trajectory}/loss"][step])
        for name, param in params.items():
            if name not in skip:
                ref = to_torch(golden[f"f32/{trajectory}/params/{name}"][step])
                assert_update(name, step, before[name], param.detach(), reference[name], ref, tolerance)
                reference[name] = ref


def replay_float64(golden: Golden, trajectory: str, params: dict[str, Tensor], optimizer) -> None:
    """Take all steps; after the first and the last, every parameter is where the reference's is."""
    start = {name: param.detach().clone() for name, param in params.items()}
    for step in range(STEPS):
        feed(params, trajectory, step)
        optimizer.step(loss=INPUTS[f"{trajectory}/loss"][step])
        if step + 1 in (1, STEPS):
            for name, param in params.items():
                ref = to_torch(golden[f"f64/{trajectory}/params/{name}"][int(step > 0)])
                bound = 1e-9 * max(largest(ref - start[name]), largest(ref) * 1e-6)
                assert largest(param.detach() - ref) <= bound, (name, step, largest(param.detach() - ref) / bound)


def expected_state(golden: Golden, prefix: str, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """The reference's accumulators of one tensor under our names and axes."""
    state = {}
    if f"{prefix}/m/{name}" in golden:
        for i, momentum in enumerate(golden[f"{prefix}/m/{name}"].unbind(-1)):
            state[f"momentum_{i}"] = to_torch(momentum)
        state["rms"] = to_torch(golden[f"{prefix}/rms/{name}"][..., 0])
    if not any(f"{prefix}/v_{kind}/{name}" in golden for kind in ("diag", "row")):
        return state
    if len(shape) < 2:
        for i, second in enumerate(golden[f"{prefix}/v_diag/{name}"].unbind(-1)):
            state[f"diagonal_{i}"] = second.reshape(shape)
        return state
    jax_shape = to_jax_shape(shape)
    ranked = sorted(range(len(jax_shape)), key=lambda axis: jax_shape[axis])
    for key, axis in (("row", ranked[-1]), ("col", ranked[-2])):
        statistic = golden[f"{prefix}/v_{key}/{name}"].movedim(-1, 0).unsqueeze(axis + 1)
        state[key] = to_torch(statistic, leading=1)
    return state


def to_jax_shape(shape: torch.Size) -> tuple[int, ...]:
    return tuple(shape) if len(shape) < 2 else (*shape[2:], shape[1], shape[0])
