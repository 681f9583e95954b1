"""Do the CUDA kernels step what is finished as whole tensors, celo2's family and pace, in few launches? Emulated.

Matrices are orthogonalised or normalised by torch between two of the kernels; features are normalised over each slice
of a convolution. The oracles are the reference backend, in float64 where that tells more, and the CPU kernels.
"""

from __future__ import annotations

import collections
from types import SimpleNamespace

import pytest
import test_native_rules
import test_whole_steps
import torch
from cuda_shim import Shim, compile_for_cpu, cpu_library
from native_library import CSRC
from plans import is_native
from test_cuda_kernels import assert_close_to_reference
from test_native_kernels import assert_equal_bits, give_gradients, parameters, snapshot, table_of
from test_native_rules import BOUNDS, CONVOLUTIONS
from thetas import create, slow_unless, theta_for
from torch import nn

from pylo_integrations import bench
from pylo_integrations.formats import FLOAT32
from pylo_integrations.ops import loader, whole
from pylo_integrations.ops.driver import Driver
from pylo_integrations.ops.loader import Library, NativeError
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.obstacles import obstacle
from pylo_integrations.rules.base import StepContext
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import Held, Piece
from pylo_integrations.weights.sources import load_theta

pytestmark = pytest.mark.timeout(900)

ENTRIES = ["celo2", "celo2_base", "elo_celo2", "pace"]
SHAPES = [(), (130,), (33, 7), (64, 37), (16, 8, 3, 3), (5, 5, 5), *CONVOLUTIONS]
MANY_PARTS = [(700, 70), (9000, 3, 2), (40, 30, 5, 5)]


@pytest.fixture
def shim(compiled_kernels, monkeypatch) -> Shim:
    """The emulated kernels, which ``backend="native"`` finds in the place of the CPU library."""
    library = Shim(compiled_kernels, "exact")
    monkeypatch.setattr(loader, "load", lambda: library)
    return library


def linear_theta():
    return load_theta("builtin:celo2", "celo2")


# -- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("name", [slow_unless(name != "elo_celo2", name) for name in ENTRIES])
def test_an_update_is_that_of_float64(name):
    assert_updates_match(name, SHAPES)


@pytest.mark.slow
@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("name", ENTRIES)
def test_tensors_of_many_parts(name):
    assert_updates_match(name, MANY_PARTS)


@pytest.mark.usefixtures("shim")
def test_linear_networks_are_stepped_as_such(monkeypatch):
    launched = count_launches(monkeypatch)
    assert_updates_match("celo2", SHAPES, weights=linear_theta())
    assert launched["apply_linear_plain"] == launched["update"] == 1


def assert_updates_match(name: str, shapes, **options) -> None:
    """One update, and the state, against float64."""
    options |= {} if name == "celo2_base" else {"orthogonalise": "float32"}
    for p, update, want, old, state, reference in test_native_rules.one_step(name, shapes, **options):
        allowed = BOUNDS.get(name, 1e-6) * want.abs().max() + 2**-24 * old.abs().max()
        assert (update - want).abs().max() <= allowed, tuple(p.shape)
        for key, value in state.items():
            error = (value.double() - reference[key]).abs().max()
            assert error <= 1e-6 * reference[key].abs().max(), (tuple(p.shape), key)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        slow_unless(
            (name, dtype) in [("celo2", torch.bfloat16), ("celo2_base", torch.float32), ("pace", torch.float16)],
            name,
            dtype,
        )
        for name in ENTRIES
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    ids=str,
)
def test_parameters_of_any_type_and_format_are_those_of_torchs_functions(name, dtype):
    found, wanted = (test_whole_steps.trained(name, backend, dtype) for backend in ("native", "reference"))
    for got, want, start in zip(found, wanted, test_whole_steps.tensors(dtype), strict=True):
        moved = (want - start).abs().max().float()
        rounding = want.abs().max().float() * torch.finfo(dtype).eps
        assert got.stride() == start.stride()
        assert (got - want).abs().max().float() <= 1e-3 * moved + rounding, tuple(start.shape)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("how", ["float32", "bfloat16"])
def test_directions_may_have_been_made_in_bfloat16(how):
    runs = [test_whole_steps.trained("celo2", backend, orthogonalise=how) for backend in ("native", "reference")]
    bound = 1e-3 if how == "float32" else 5e-2  # of rounding products, whose arguments differ by rounding
    for got, want, start in zip(*runs, test_whole_steps.tensors(), strict=True):
        assert (got - want).norm() <= bound * (want - start).norm() + 1e-6


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("options", test_native_rules.OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("name", ["celo2_base", "pace"])
def test_options_of_a_group_mean_the_same(name, options):
    shapes = [(5,), (12, 9), (6, 8, 3, 3)]
    runs = []
    for backend in ("native", "reference"):
        params = parameters(shapes)
        optimizer = create([{"params": params, **options}], name, backend=backend)
        if "max_grad_norm" in options:
            optimizer.max_grad_norm = options["max_grad_norm"]
        for step in range(3):
            give_gradients(params, step)
            optimizer.step()
        runs.append(params)
    assert_close_to_reference(*runs, parameters(shapes), 1e-3 if name == "pace" else 2e-5)


# -- the same bits ----------------------------------------------------------------------------------------------------


def bits_after_two_steps(library, shapes, monkeypatch, order: int = 0, **options):
    monkeypatch.setattr(loader, "load", lambda: library)
    params = parameters(shapes)
    optimizer = create(params, "celo2_base", backend="native", **options)
    library.order(order)
    try:
        for step in range(2):
            give_gradients(params, step)
            optimizer.step()
    finally:
        library.order(0)
    assert is_native(optimizer)
    return snapshot(optimizer, params)


@pytest.mark.slow
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(shim, monkeypatch):
    first = bits_after_two_steps(shim, SHAPES, monkeypatch)
    for order in (1, 12345):
        assert_equal_bits(first, bits_after_two_steps(shim, SHAPES, monkeypatch, order))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [None, "builtin:celo2"])
def test_indices_of_64_bits_find_the_same_elements(tmp_path, compiled_kernels, shim, monkeypatch, weights):
    """As in test_cuda_kernels.py: tensors beyond 4 elements instead of 2^31."""
    cpu = cpu_library().path
    linked = str(cpu), f"-Wl,-rpath,{cpu.parent}"
    planner = compile_for_cpu(CSRC / "cuda/launches.cpp", tmp_path / "planner.so", "-DPYLO_NARROW=4", *linked)
    wide = Shim(compiled_kernels, "exact", Library(planner))
    options = {"weights": linear_theta()} if weights else {}
    runs = [bits_after_two_steps(library, SHAPES, monkeypatch, **options) for library in (shim, wide)]
    assert_equal_bits(*runs)


@pytest.mark.usefixtures("shim")
def test_how_many_are_stepped_together_changes_nothing_that_counts(monkeypatch):
    together = test_whole_steps.trained("celo2_base", "native")
    monkeypatch.setitem(whole.TOGETHER, "cpu", 1)
    for one_by_one, got in zip(test_whole_steps.trained("celo2_base", "native"), together, strict=True):
        assert torch.allclose(one_by_one, got, rtol=0, atol=1e-6)


# -- pieces of a tensor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "layers"), [("builtin:celo2", 1), ("random", 3)])
@pytest.mark.parametrize(("axis", "at"), [(0, 4), (1, 2), (2, 1), (3, 2)])
def test_pieces_of_a_convolution_propose_what_the_whole_does(shim, axis, at, weights, layers):
    """Boxes that have not all slices, too; twice, as sums of the step before must not stay."""
    theta = linear_theta() if weights == "builtin:celo2" else theta_for("celo2")
    rule = theta.rule()
    assert len(rule.weights) == layers
    shape = (9, 6, 3, 4)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    boxes = []
    for low, high in ((0, at), (at, shape[axis])):
        begin, extent = [0] * 4, list(shape)
        begin[axis], extent[axis] = low, high - low
        boxes.append(Box(tuple(begin), tuple(extent)))
    pieces = _Pieces(shim, rule, start, boxes)
    whole = _Pieces(cpu_library(), rule, start, [Box((0,) * 4, shape)])
    for step in range(2):
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        (want,) = whole.proposals(grad, step)
        got = torch.cat(pieces.proposals(grad, step), axis + 1)
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


class _Pieces:
    """Stages over boxes of one tensor, each as a rank would have it."""

    def __init__(self, library, rule, start, boxes) -> None:
        layout = TensorLayout.whole(tuple(start.shape))
        group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
        self.rule, self.boxes, self.buckets, self.stages = rule, boxes, [], []
        for box in boxes:
            piece = nn.Parameter(start[box.slices((0,) * 4)].clone())
            shapes = rule.state_shapes(layout).items()
            state = {name: torch.zeros(piece.shape if shape is None else shape) for name, shape in shapes}
            held = [Held((Piece(box),))]
            self.buckets.append(Bucket(layout, [piece], [state], group, torch.float32, 2, held=held))
            self.buckets[-1].cut_(2**20)
            self.stages.append(NativeStages(library, [rule], self.buckets[-1:]))

    def proposals(self, grad, step: int) -> list[torch.Tensor]:
        ctx = StepContext(step, None, None, constants=self.rule.constants(torch.device("cpu"), torch.float32))
        for bucket, box in zip(self.buckets, self.boxes, strict=True):
            bucket.grads = [grad[box.slices((0,) * 4)].contiguous()]
        collected = [stages.collect([ctx])[0] for stages in self.stages]
        total = {name: sum(each[name] for each in collected) for name in collected[0]}
        for stages in self.stages:
            stages.prepare_([total], [ctx])
        described = [stages.describe_([ctx])[0]["features"] for stages in self.stages]
        features = sum(each.clone() for each in described)
        for mine in described:
            mine.copy_(features)
        found = []
        for stages, bucket in zip(self.stages, self.buckets, strict=True):
            (steps,) = stages.step_(self.rule.control([bucket], [{}], ctx), [ctx], [(1.0, 1.0)], None, [0])
            found.append(torch.cat([each.flatten(2) for each in steps], 2).view(1, *bucket.params[0].shape))
        return found


# -- what is launched -------------------------------------------------------------------------------------------------


def count_launches(monkeypatch) -> collections.Counter[str]:
    """Kernels by name, as they are launched from now on."""
    launched: collections.Counter[str] = collections.Counter()
    original = Shim.run

    def run(self, stage, call):
        before = dict(self._kernels._functions)
        launch = Driver.launch
        names = {id(function): name for name, function in before.items()}

        def counted(driver, function, *rest):
            launched[names[id(function)].decode()] += 1
            launch(driver, function, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Driver, "launch", counted)
            original(self, stage, call)

    monkeypatch.setattr(Shim, "run", run)
    return launched


CELO2 = {"collect": 1, "merge": 1, "prepare": 1, "describe_plain": 1, "apply_linear_plain": 1, "update": 1}
PACE = {"collect": 1, "merge": 1, "apply_nesterov_plain": 1, "update": 1}
ADAM = {"collect": 1, "merge": 1, "update": 1}
MATRICES = [(24, 16), (16, 24), (16, 24), (8, 4, 3, 3), (24, 16)] * 4

MIXES = {  # shapes, and those of embeddings
    "celo2, one matrix": ("celo2", [(24, 16)], [], CELO2),
    "celo2, matrices": ("celo2", MATRICES, [], CELO2),
    "celo2, all that a model has": ("celo2", [(130,), *MATRICES, ()], [(50, 12)], CELO2),
    "celo2, no matrices": ("celo2", [(130,), ()], [(50, 12)], ADAM),
    "pace, matrices": ("pace", MATRICES, [], PACE),
    "pace, all that a model has": ("pace", [(130,), *MATRICES, ()], [(50, 12)], PACE),  # three rules
}


def launches_of_steps(name: str, groups, monkeypatch, steps: int = 2, **options) -> collections.Counter[str]:
    options |= {"weights": linear_theta()} if name == "celo2" else {}
    optimizer = create(groups, name, backend="native", **options)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    launched = count_launches(monkeypatch)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    assert is_native(optimizer)
    return launched


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("mix", MIXES)
def test_a_step_launches_as_few_kernels_whatever_the_number_of_tensors_and_rules(mix, monkeypatch):
    name, shapes, embeddings, wanted = MIXES[mix]
    groups = [{"params": parameters(shapes)}, {"params": parameters(embeddings), "rule": "adamw"}]
    launched = launches_of_steps(name, groups[: 1 + bool(embeddings)], monkeypatch)
    assert launched == {kernel: 2 * count for kernel, count in wanted.items()}


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(("name", "kernels", "most"), [("celo2", CELO2, 6), ("pace", PACE, 4)])
def test_a_step_of_a_vision_transformer_launches_six_kernels_and_four(name, kernels, most, monkeypatch):
    """All 152 tensors of ViT-B/16, far narrower: matrices, a convolution, a class token, positions, vectors."""
    shapes = [shape.shape for shape in bench.SHAPES["vit_b16"]()]
    params = parameters([tuple(n // 48 if n % 768 == 0 else n for n in shape) for shape in shapes])
    assert len(params) == 152
    monkeypatch.setitem(whole.TOGETHER, "cpu", whole.TOGETHER["cuda"])
    launched = launches_of_steps(name, [{"params": params}], monkeypatch, steps=1)
    assert launched == kernels and launched.total() == most


@pytest.mark.usefixtures("shim")
def test_steps_that_others_round_share_what_comes_before(monkeypatch):
    """Matrices in bfloat16, rounded at random by torch; vectors in float32, by kernels."""
    params = [*parameters(MATRICES[:2], torch.bfloat16), *parameters([(130,)])]
    launched = launches_of_steps("celo2", [{"params": params}], monkeypatch, steps=1, stochastic_rounding=True)
    assert launched == {"collect": 1, "merge": 1, "prepare": 1, "describe": 1, "apply_linear": 2, "update": 1}


# -- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENTRIES)
def test_nothing_is_in_the_way_of_the_kernels_for_cuda(name):
    rule = create(parameters([(3, 2)]), name).rule
    bucket = SimpleNamespace(device=torch.device("cuda"), params=[torch.empty(3, 2)], form=FLOAT32)
    assert obstacle(rule, bucket) is None


def test_scales_without_directions_and_a_direction_of_another_type_are_refused(shim):
    params = parameters([(6, 5), (7, 4)])
    optimizer = create(params, "celo2_base", backend="native")
    give_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer, params)
    (part,) = optimizer._engine._plan.parts
    table = table_of(part.stages)
    scale, directions = torch.ones(1), torch.zeros(2, 6, 5, dtype=torch.bfloat16)
    table.tensors["direction_scale"][0], table.tensors["direction_scale_bytes"][0] = scale.data_ptr(), 4
    with pytest.raises(NativeError, match="tensor 0: direction is null, but has a direction_scale"):
        table.run_some("apply", slice(0, 2))
    table.tensors["direction_scale"][0] = 0
    table.tensors["direction"][0], table.tensors["direction_bytes"][0] = directions.data_ptr(), 60
    table.tensors["direction_dtype"][0] = 2
    with pytest.raises(NativeError, match="tensor 0: the CUDA kernels leave directions in float32"):
        table.run_some("apply", slice(0, 1))
    assert_equal_bits(before, snapshot(optimizer, params))


@pytest.mark.usefixtures("shim")
def test_momentum_knows_no_stage_of_networks(shim):
    params = parameters([(6, 5)])
    optimizer = create(params, "pace", backend="native")
    give_gradients(params, 0)
    optimizer.step()
    (part,) = optimizer._engine._plan.parts
    for stage in ("prepare", "describe"):
        with pytest.raises(NativeError, match="without layers there is no such stage"):
            shim.run(stage, table_of(part.stages).call)


def test_records_are_planned_again_only_when_they_have_changed(shim, monkeypatch):
    params = parameters([(6, 5), (7, 4)])
    optimizer = create(params, "celo2_base", backend="native")
    give_gradients(params, 0)
    optimizer.step()
    (part,) = optimizer._engine._plan.parts
    table, checks, original = table_of(part.stages), [], Shim.check
    monkeypatch.setattr(Shim, "check", lambda self, call: checks.append(call) or original(self, call))
    directions = torch.zeros(2, 6, 5)
    rows = slice(0, 1)
    for direction, wanted in ((directions[0], 1), (directions[0], 1), (directions[1], 2), (directions[1], 2)):
        table.tensors["direction"][0], table.tensors["direction_bytes"][0] = direction.data_ptr(), 120
        table.run_some("apply", rows)
        assert len(checks) == wanted and direction.abs().min() > 0


def test_what_a_device_computed_reaches_some_of_the_records(shim):
    """By its place among them; on a device, learning rates and decisions stay there."""
    params = parameters([(6, 5), (6, 5), (6, 5)])
    optimizer = create(params, "celo2_base", backend="native")
    give_gradients(params, 0)
    optimizer.step()
    (part,) = optimizer._engine._plan.parts
    table, directions = table_of(part.stages), torch.zeros(3, 6, 5)
    table.tensors["direction"] = [each.data_ptr() for each in directions]
    table.tensors["direction_bytes"] = 120
    state = snapshot(optimizer, params)
    found = []
    for values in (torch.ones(3), torch.tensor([1.0, 2.0, 3.0])):
        for tensor, old in zip(tensors_of(optimizer, params), state, strict=True):
            tensor.copy_(old)
        table._on_device["step_mult", 0, 3] = values
        table.run_some("apply", slice(1, 3))
        found.append(directions.clone())
    plain, scaled = found
    assert not plain[0].any() and not scaled[0].any()
    for index in (1, 2):
        torch.testing.assert_close(scaled[index], (index + 1) * plain[index])


def tensors_of(optimizer, params) -> list[torch.Tensor]:
    return [tensor for p in params for tensor in (p.detach(), *optimizer.state[p].values())]
