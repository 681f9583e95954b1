"""Are matrices of zeros told, once and by name, where the rule steps in proportion to them, as LoRA's B would be?"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from thetas import create, slow_unless
from torch import nn

from pylo_integrations import list_optimizers

PROPORTIONAL = {"velo", "celo"}


class Factors(nn.Module):
    """A low-rank correction of a frozen layer, one factor of which starts at zero, as LoRA has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(8, 6)
        self.base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, 8) / 3)
        self.b = nn.Parameter(torch.zeros(6, 2))
        self.bias = nn.Parameter(torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T + self.bias


def train(model, optimizer, steps=3):
    """Texts of the warnings about zeros."""
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            x = torch.randn(16, 8)
            loss = (model(x) - x[:, :6]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss.detach())
    return [str(one.message) for one in caught if "matrices are zero" in str(one.message)]


@pytest.mark.parametrize("name", [slow_unless(name in {*PROPORTIONAL, "celo2"}, name) for name in list_optimizers()])
def test_zeros_are_told_once_and_only_of_rules_that_they_hinder(name):
    model = Factors()
    told = train(model, create(model, name))
    moved = float(model.b.detach().square().mean().sqrt())
    if name not in PROPORTIONAL:
        assert told == [] and moved > 2e-4
        return
    (text,) = told
    assert moved < 1e-5
    assert text.startswith("1 of 2 matrices are zero and will hardly move: 'b' of group ")
    assert "celo2" in text and "init_lora_weights" in text


def test_what_is_not_zero_not_stepped_or_no_matrix_is_not_told():
    model = Factors()
    with torch.no_grad():
        model.b[3, 1] = 1e-3
    assert train(model, create(model, "celo")) == []
    model = Factors()
    model.b.requires_grad_(False)
    assert train(model, create(model.parameters(), "celo")) == []


def test_a_run_that_goes_on_is_not_told():
    model = Factors()
    optimizer = create(model, "celo")
    with torch.no_grad():
        model.b.fill_(1.0)
    assert train(model, optimizer) == []
    resumed = create(model, "celo")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        model.b.zero_()
    assert train(model, resumed) == []


def test_a_warning_that_is_an_error_comes_after_the_step():
    model = Factors()
    optimizer = create(model, "celo")
    (model(torch.ones(1, 8)) ** 2).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="matrices are zero"):
            optimizer.step(loss=1.0)
        assert optimizer.iteration == 1
        optimizer.step(loss=1.0)


def ranks_case(rank: int, world: int, wrapper: str) -> list[str]:
    from torch.distributed.fsdp import fully_shard

    model = Factors()
    wrapped = nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else fully_shard(model)
    optimizer = create(wrapped.named_parameters(), "celo", num_steps=100)
    optimizer.bind_model(wrapped)
    return train(wrapped, optimizer, 2)


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_each_rank_is_told_once(workers, wrapper):
    for told in workers.run(2, ranks_case, wrapper=wrapper):
        (text,) = told
        assert text.startswith("1 of 3 matrices are zero and will hardly move: ") and "b' of group 0" in text
