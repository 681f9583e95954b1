"""Are slices along an axis, as Megatron's tensor parallelism leaves them, stepped as parts of whole tensors?"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thetas import create, distinct_rules
from torch import Tensor, nn

from pylo_integrations import ShardingError, param_groups
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import AxisSlice, stand_in
from pylo_integrations.state import from_canonical, to_canonical

# Of each parameter: whole shape, divided axis, slices of a rank along it.
DIVIDED = {
    "rows": ((8, 5), 0, 1),
    "columns": ((5, 8), 1, 1),
    "gated": ((8, 3), 0, 2),
    "gated_bias": ((8,), 0, 2),
    "replica": ((3, 4), None, 1),
}


class Sliced(nn.Module):
    """Parameters of which a rank has its slices."""

    def __init__(self, rank: int, parts: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (shape, axis, runs) in DIVIDED.items():
            whole = torch.randn(shape, generator=generator)
            param = nn.Parameter(cut(whole, axis, runs, rank, parts))
            self.register_parameter(name, param)
            divided = parts > 1 and axis is not None
            stand_in(param, param, AxisSlice(name, shape, axis, rank, parts, runs) if divided else None)


def cut(whole: Tensor, axis: int | None, runs: int, rank: int, parts: int) -> Tensor:
    if axis is None or parts == 1:
        return whole.clone()
    return torch.cat(whole.chunk(parts * runs, axis)[rank::parts], axis)


def gradients(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _, _) in DIVIDED.items()}


def optimizer_of(model: nn.Module, name: str, split: bool, **options: Any) -> Any:
    groups = [{"params": list(model.named_parameters())}]
    if split:
        named = dict(model.named_parameters())
        groups = [
            {"params": [("gated", named.pop("gated")), ("gated_bias", named.pop("gated_bias"))], "split": 2},
            {"params": list(named.items())},
        ]
    optimizer = create(groups, name, num_steps=20, **options)
    optimizer.bind_model(model)
    return optimizer


def take(model: nn.Module, optimizer: Any, steps: range, rank: int, parts: int) -> None:
    for step in steps:
        for name, whole in gradients(step).items():
            getattr(model, name).grad = cut(whole, *DIVIDED[name][1:], rank, parts)
        optimizer.step(loss=1.0 / (1 + step))


def sliced_case(
    rank: int, world: int, name: str, split: bool = False, canonical: Any = None, wholes: Any = None, **options: Any
) -> Any:
    """Three steps, or from a canonical state the last one; the state after two, and what is here of parameters."""
    model = Sliced(rank, world)
    optimizer = optimizer_of(model, name, split, **options)
    if canonical is None:
        take(model, optimizer, range(2), rank, world)
    else:
        from_canonical(optimizer, model, canonical)
        with torch.no_grad():
            for key, param in model.named_parameters():
                param.copy_(cut(wholes[key], *DIVIDED[key][1:], rank, world))
    middle = to_canonical(optimizer, model), {key: param.detach().clone() for key, param in model.named_parameters()}
    if canonical is None:  # through a state dict of this rank, into an optimizer made anew
        saved, optimizer = optimizer.state_dict(), optimizer_of(model, name, split, **options)
        optimizer.load_state_dict(saved)
    take(model, optimizer, range(2, 3), rank, world)
    return {key: param.detach() for key, param in model.named_parameters()}, middle


def check(ends, want, tolerance=1e-5) -> None:
    for rank, (got, _) in enumerate(ends):
        for name, whole in want.items():
            mine = cut(whole, *DIVIDED[name][1:], rank, len(ends))
            assert torch.allclose(got[name], mine, rtol=tolerance, atol=tolerance), (name, rank)


@pytest.mark.dist
@pytest.mark.parametrize("name", distinct_rules())
@pytest.mark.parametrize(("split", "backend"), [(False, "auto"), (True, "reference")])
def test_steps_are_those_of_whole_tensors(workers, name, split, backend):
    [(want, _)] = workers.run(1, sliced_case, name=name, split=split)
    check(workers.run(2, sliced_case, name=name, split=split, backend=backend), want)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["velo", "pace"])
def test_canonical_state_is_of_whole_tensors(workers, name):
    [(want, (alone, wholes))] = workers.run(1, sliced_case, name=name)
    divided = workers.run(2, sliced_case, name=name)
    canonical = divided[0][1][0]
    for param, states in alone["state"].items():
        for what, state in states.items():
            assert torch.allclose(canonical["state"][param][what], state, rtol=1e-4, atol=1e-6), (param, what)
    check(workers.run(1, sliced_case, name=name, canonical=canonical, wholes=wholes), want)
    check(workers.run(2, sliced_case, name=name, canonical=alone, wholes=wholes), want)


def test_blocks_of_8_bits_are_refused():
    param = torch.zeros(8, 5)
    holdings = Holdings(flat_slices={param: AxisSlice("gated", (16, 5), 0, 1, 2, 2)})
    with pytest.raises(ShardingError, match="Megatron.*bfloat16"):
        holdings.check_blocks(param)


def test_embeddings_of_megatron_are_recognised():
    class VocabParallelEmbedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 3))

    model = nn.Sequential(VocabParallelEmbedding(), nn.Linear(3, 3))
    first, *_ = param_groups(model, 0.1, adamw=())
    assert [name for name, _ in first["params"]] == ["0.weight"]
    assert first["axes"] == "in_out" and first["rule"] == "adamw" and first["weight_decay"] == 0
