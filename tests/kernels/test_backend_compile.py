"""Does ``backend="compile"`` take the reference's steps, and compile every function once for every shape?

Compilations are counted where ``torch.compile`` hands a graph to its own backend, so that what the compiler does again
behind our back counts too. That backend runs the graph as it is; one slow test goes through the real one.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from plans import last_buckets
from thetas import create, slow_unless
from torch import Tensor, nn

from pylo_integrations import LearnedOptimizer
from pylo_integrations.ops import compiled, select

SHAPES = [(4, 3), (5,), (), (2, 3, 1, 3), (4, 3)]  # of which 4 are distinct
FUNCTIONS = 3  # accumulate_, normalised, steps


@pytest.fixture
def graphs(monkeypatch):
    """Graphs compiled so far."""
    graphs: list[torch.fx.GraphModule] = []

    def run_as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(select, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=run_as_it_is))
    return graphs


def parameters(shapes: list[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take_step(optimizer: LearnedOptimizer, step: int) -> None:
    """One with gradients, loss and learning rate of its own."""
    generator = torch.Generator().manual_seed(step)
    (group,) = optimizer.param_groups
    group["lr"] = 1.0 / (step + 1)
    for param in group["params"]:
        param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step(loss=torch.tensor(2.0 / (step + 1)))


def assert_equal(params: list[Tensor], expected: list[Tensor]) -> None:
    for param, other in zip(params, expected, strict=True):
        torch.testing.assert_close(param, other, rtol=0, atol=1e-6 * float(other.detach().abs().max()))


@pytest.mark.parametrize("name", [slow_unless(name == "velo", name) for name in ("small_fc_lopt", "velo", "celo")])
def test_steps_are_the_references_and_shapes_compile_once(name, graphs):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    fast, reference = create(params, name, backend="compile"), create(twins, name, backend="reference")
    start = [param.detach().clone() for param in params]
    for step in range(3):
        take_step(fast, step)
        take_step(reference, step)
        assert len(graphs) == FUNCTIONS * len(set(SHAPES))
    assert_equal(params, twins)
    assert all(not torch.equal(param, old) for param, old in zip(params, start, strict=True))
    for param, twin in zip(params, twins, strict=True):
        for key, value in reference.state[twin].items():
            torch.testing.assert_close(fast.state[param][key], value, rtol=1e-6, atol=1e-12)


def test_celo2_compiles_its_matrices(graphs):
    shapes = [(4, 3), (5,)]
    params, twins = parameters(shapes), parameters(shapes)
    fast, reference = create(params, "celo2", backend="compile"), create(twins, "celo2", backend="reference")
    for step in range(2):
        take_step(fast, step)
        take_step(reference, step)
    assert_equal(params, twins)
    assert len(graphs) == FUNCTIONS  # Adam steps the vector


@pytest.mark.slow
def test_more_shapes_than_the_compilers_own_limit_are_all_compiled(graphs):
    shapes = [(n,) for n in range(1, 6)]
    with torch._dynamo.config.patch(recompile_limit=4):  # frameworks raise it for the whole process
        optimizer = create(parameters(shapes), "small_fc_lopt", backend="compile")
        for step in range(2):
            take_step(optimizer, step)
            assert len(graphs) == FUNCTIONS * len(shapes)
        assert torch._dynamo.config.recompile_limit == 4


@pytest.mark.slow  # compiles for seconds
def test_equal_blocks_of_a_large_tensor_share_their_functions(graphs):
    params, twins = parameters([(64, 8)]), parameters([(64, 8)])
    fast = create(params, "small_fc_lopt", backend="compile", chunk_bytes=1 << 15)
    take_step(fast, 0)
    blocks = last_buckets(fast)[0].blocks
    assert len(blocks) > len({block.box.shape for block in blocks})
    assert len(graphs) == FUNCTIONS * len({block.box.shape for block in blocks})
    take_step(create(twins, "small_fc_lopt", backend="reference"), 0)
    assert_equal(params, twins)


@pytest.mark.slow  # compiles for seconds
def test_a_copy_compiles_afresh_and_goes_on_equally(graphs):
    params = parameters([(4, 3)])
    optimizer = create(params, "small_fc_lopt", backend="compile")
    take_step(optimizer, 0)
    twin = copy.deepcopy(optimizer)
    take_step(optimizer, 1)
    assert len(graphs) == FUNCTIONS
    take_step(twin, 1)
    assert len(graphs) == 2 * FUNCTIONS
    assert_equal(params, twin.param_groups[0]["params"])


def test_a_compiler_that_does_not_work_is_named_before_anything_changes(monkeypatch):
    def no_compiler(function, **options):
        def call(*args):
            raise OSError("no C++ compiler found")

        return call

    monkeypatch.setattr(select, "check_compiler", compiled.check_compiler.__wrapped__)  # not what it found before
    monkeypatch.setattr(torch, "compile", no_compiler)
    params = parameters([(4, 3)])
    optimizer = create(params, "velo", backend="compile")
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"backend='compile' .* on cpu: no C\+\+ compiler found; use backend='auto'"):
        take_step(optimizer, 0)
    assert torch.equal(params[0], before)
    assert not optimizer.state[params[0]]["row"].any()  # the first thing that a step writes


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_takes_the_references_steps():
    params, twins = parameters([(4, 3)]), parameters([(4, 3)])
    fast = create(params, "small_fc_lopt", backend="compile")
    reference = create(twins, "small_fc_lopt", backend="reference")
    for step in range(3):
        take_step(fast, step)
        take_step(reference, step)
    assert_equal(params, twins)
