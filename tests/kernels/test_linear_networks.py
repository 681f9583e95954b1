"""Is a network whose ReLUs cancel stepped as the linear map that it is, and no other network?"""

from __future__ import annotations

import pytest
import torch
from native_library import library_or_skip
from thetas import theta_for
from torch import nn

from pylo_integrations import LearnedOptimizer
from pylo_integrations.rules.networks import linear_form, mlp
from pylo_integrations.weights.sources import load_theta

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def paired() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Pairs ``relu(z) - relu(-z)``, units that nothing reads, and a layer through which pairs merely pass."""
    row, bias = normal(2, 5), normal(2)
    first = torch.cat([row, -row, normal(3, 5)])
    through = torch.zeros(5, 7)
    through[:4, :4] = torch.diag(torch.tensor([2.0, 3.0, 2.0, 3.0]))
    through[4] = normal(7)  # read by nobody
    last = torch.tensor([[1.0, -0.5, -1.0, 0.5, 0.0], [0.0, 2.0, 0.0, -2.0, 0.0]])
    return [first, through, last], [torch.cat([bias, -bias, normal(3)]), torch.zeros(5), normal(2)]


def test_pairs_of_units_are_one_linear_map():
    weights, biases = paired()
    found = linear_form(weights, biases)
    assert found is not None
    inputs = 10 * normal(1, 5, 1000)
    got, want = mlp(inputs, [found[0]], [found[1]]), mlp(inputs, weights, biases)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pairs_that_almost_cancel_are_not(layer):
    weights, biases = paired()
    weights[layer][0, 0] *= 1 + 1e-6
    assert linear_form(weights, biases) is None


def test_a_bias_within_the_network_is_no_pair():
    weights, biases = paired()
    biases[1][0] = -0.1  # relu(relu(z) - 0.1)
    assert linear_form(weights, biases) is None


def test_the_builtin_celo2_is_linear_and_random_weights_are_not():
    rule = load_theta("builtin:celo2", "celo2").rule()
    assert [tuple(weight.shape) for weight in rule.weights] == [(3, 15)]
    assert set(rule.reads).isdisjoint({"param", "rms", "row", "col", "inverse_row"})
    other = theta_for("celo2").rule()
    assert len(other.weights) > 1 and other.reads == type(other).features


class WithoutKnowing(LearnedOptimizer):
    """A rule as theta has it, all of its layers and features."""

    def __init__(self, params, rule, **options):
        super().__init__(params, rule, lr=3e-4, **options)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("orthogonalise", ["float32", "never"])
def test_steps_are_those_of_the_network(backend, orthogonalise):
    """The linear map adds the same products in another order, and orthogonalisation multiplies what that rounds off."""
    if backend == "native":
        library_or_skip()
    theta = load_theta("builtin:celo2", "celo2")
    plain = type(theta.rule()).from_arrays(theta.arrays, **theta.hyper, orthogonalise=orthogonalise)
    reduced = plain.reduced()
    assert len(plain.weights) == 3 and len(reduced.weights) == 1
    shapes = [(24, 16), (16, 24), (8, 4, 3, 3), (7,), (1, 9), ()]
    starts = [normal(*shape) for shape in shapes]
    runs = {}
    for rule in (plain, reduced):
        params = [nn.Parameter(start.clone()) for start in starts]
        optimizer = WithoutKnowing(params, rule, backend=backend)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        runs[rule] = [p.detach() - start for p, start in zip(params, starts, strict=True)]
    for got, want in zip(runs[reduced], runs[plain], strict=True):
        assert (got - want).abs().max() <= 2e-4 * want.abs().max()
