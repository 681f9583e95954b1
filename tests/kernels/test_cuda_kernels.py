"""Do the CUDA kernels compute what the reference computes? The same sources as for a GPU, run by the emulation.

The oracle is the reference backend in float64 on the same float32 numbers, as for the CPU kernels. In float32
(``exact``) an update may be off by 1e-6 of its largest element; on tensor cores (``precise``), which add products of
numbers in two parts of 8 bits each, by 3e-5.
"""

from __future__ import annotations

import ctypes
import re

import golden_optimizers
import pytest
import test_native_kernels
import torch
from cuda_shim import Shim, compile_for_cpu, cpu_library
from golden_files import initial_params, needs_published, replay_float32
from native_library import CSRC
from plans import is_native
from test_native_kernels import (
    SHAPES,
    assert_equal_bits,
    assert_step_matches,
    bucket_of,
    give_gradients,
    one_step,
    parameters,
    snapshot,
    stages_of,
    table_of,
    theta,
)
from thetas import create
from torch import nn

from pylo_integrations import SmallFCLOpt
from pylo_integrations.ops import cuda, kernels, loader
from pylo_integrations.ops.driver import Driver
from pylo_integrations.ops.loader import Library, NativeError
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.base import StepContext
from pylo_integrations.sharding.layout import TensorLayout

pytestmark = pytest.mark.timeout(900)

# Of more than one part in every kernel: rows, lanes, slices, entries and lines of statistics, elements.
LARGE = [(17000,), (700, 70), (3, 30000), (2500, 3), (70, 2, 70)]
FEW = [(), (130,), (33, 7), (8, 16, 3, 3)]


@pytest.fixture(params=["exact", "precise"])
def precision(request) -> str:
    return request.param


@pytest.fixture
def shim(compiled_kernels, precision, monkeypatch) -> Shim:
    """The emulated kernels, which ``backend="native"`` finds in the place of the CPU library."""
    library = Shim(compiled_kernels, precision)
    monkeypatch.setattr(loader, "load", lambda: library)
    return library


def bound_of(precision: str) -> float:
    return 1e-6 if precision == "exact" else 3e-5


# -- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("shim")
def test_an_update_is_as_near_to_float64_as_promised(precision):
    assert_step_matches(*one_step(SHAPES), bound=bound_of(precision))


@pytest.mark.slow
@pytest.mark.usefixtures("shim")
def test_tensors_of_many_parts(precision):
    assert_step_matches(*one_step(LARGE), bound=bound_of(precision))


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    "widths", [(4,), (5,), (9,), (64,), (4, 4), (12, 12), (33, 17), (32, 3, 32), (1, 2, 1), (64, 64, 64)]
)
def test_any_geometry_of_the_network_is_evaluated(widths, precision):
    # Ten times the bound: little networks of random weights may cancel in their last layer.
    assert_step_matches(*one_step(FEW, widths), bound=10 * bound_of(precision))


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "lr": 0.5},
        {"weight_decay": 0.1, "weight_decay_policy": "l2"},
        {"maximize": True},
        {"max_grad_norm": 0.1},
        {"on_nonfinite": "zero"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("precision", ["exact"], indirect=True)
def test_options_of_a_group_mean_the_same(options):
    options = dict(options)
    maximize, broken = options.pop("maximize", False), "on_nonfinite" in options
    params, twins = parameters(FEW), parameters(FEW)
    for backend, ps in (("native", params), ("reference", twins)):
        group = {"params": ps, "maximize": maximize}
        optimizer = SmallFCLOpt([group], weights=theta(), backend=backend, **options)
        for step in range(3):
            give_gradients(ps, step)
            if broken:
                ps[1].grad[3], ps[2].grad[4, 5], ps[3].grad[0] = torch.inf, 1e20, torch.nan
            optimizer.step()
    assert_close_to_reference(params, twins, parameters(FEW), 2e-5)


def assert_close_to_reference(params, twins, starts, bound: float) -> None:
    for p, twin, start in zip(params, twins, starts, strict=True):
        moved = (twin - start).abs().max()
        assert moved > 0
        assert (p - twin).abs().max() <= bound * moved + 2**-23 * twin.abs().max(), tuple(p.shape)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("name", ["velo", "celo", "small_fc_lopt", "mulo", "elo", "celo_adam"])
def test_whole_runs_of_every_rule_follow_the_reference(name, precision):
    params, twins = parameters(FEW), parameters(FEW)
    for backend, ps in (("native", params), ("reference", twins)):
        optimizer = create(ps, name, num_steps=10, backend=backend)
        for step in range(4):
            give_gradients(ps, step)
            optimizer.step(loss=torch.tensor(3.0 - step))
        if backend == "native":
            assert is_native(optimizer)
    assert_close_to_reference(params, twins, parameters(FEW), 2e-5 if precision == "exact" else 2e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    "case",
    ["small_fc_h4_default", "small_fc_h32_pylo", "velo_small", pytest.param("celo_real", marks=needs_published)],
)
def test_the_trajectories_of_the_original_code_are_repeated(case):
    golden = golden_optimizers.read(case)
    params = initial_params("wild", torch.float32)
    if case.startswith("small_fc"):
        optimizer = golden_optimizers.small_fc(golden, list(params.values()), backend="native")
    else:
        optimizer = golden_optimizers.build(golden, params, "wild", backend="native")
    replay_float32(golden, "wild", params, optimizer)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_once_as_torch_rounds(dtype, shim):
    halves = parameters(FEW, dtype)
    floats = [nn.Parameter(p.detach().float()) for p in halves]
    give_gradients(halves, 0)
    for p, twin in zip(halves, floats, strict=True):
        twin.grad = p.grad.float()
    for params in (halves, floats):
        _, run = stages_of(params, library=shim)
        run()
    for p, twin in zip(halves, floats, strict=True):
        assert torch.equal(p, twin.to(dtype)), tuple(p.shape)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("precision", ["exact"], indirect=True)
def test_the_sums_of_a_stage_are_those_of_the_reference(shim):
    """Sums of squares along both axes, against torch in float64; the kernels add at most 64 numbers in float32."""
    shapes = [s for s in SHAPES + LARGE if len(s) >= 2]
    params = parameters(shapes)
    stages, _ = stages_of(params, library=shim)
    give_gradients(params, 0)
    buckets = [native.bucket for native in stages._natives]
    for bucket in buckets:
        bucket.grads = [p.grad for p in bucket.params]
    for bucket, sums in zip(buckets, stages.collect([StepContext(0, None, None)]), strict=True):
        d1, d0 = bucket.layout.factored
        squares = bucket.grads[0].double().square()
        for name, axis in (("row", d0), ("col", d1)):
            want = squares.sum(axis, keepdim=True)
            torch.testing.assert_close(sums[name][0, 0], want, rtol=1e-6, atol=0)


# -- the same bits ----------------------------------------------------------------------------------------------------


def bits_after_two_steps(library, shapes, order: int = 0):
    params = parameters(shapes)
    stages, run = stages_of(params, library=library)
    library.order(order)
    try:
        for step in range(2):
            give_gradients(params, step)
            run(iteration=step)
    finally:
        library.order(0)
    return snapshot(stages.optimizer, params)


@pytest.mark.slow
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(shim):
    """Nor on which block is the last and adds up: partial sums are added in a fixed order."""
    shapes = [*FEW, (17000,), (700, 17)]
    first = bits_after_two_steps(shim, shapes)
    for order in (1, 12345):
        assert_equal_bits(first, bits_after_two_steps(shim, shapes, order))


def test_tensors_do_not_influence_each_other(shim):
    together = bits_after_two_steps(shim, FEW)
    generator_order = parameters(FEW)  # the tensors alone must start from the same numbers
    alone = []
    for index in range(len(FEW)):
        (param,) = [generator_order[index]]
        stages, run = stages_of([param], library=shim)
        others = parameters(FEW)
        for step in range(2):
            give_gradients(others, step)
            param.grad = others[index].grad
            run(iteration=step)
        alone += snapshot(stages.optimizer, [param])
    assert_equal_bits(together, alone)


@pytest.mark.parametrize("precision", ["exact"], indirect=True)
def test_rules_that_share_a_table_step_as_each_does_alone(shim, monkeypatch):
    """Two networks and two of Adam's rules, their tensors mixed: a network's stages come for each, all else once."""
    each = [theta((5,)).rule(), AdamWRule(), theta((12, 12)).rule(), AdamWRule((0.8, 0.9), clips=True)]
    rules = each * 2
    shapes = [(33, 7), (130,), (8, 16, 3, 3), (24, 16), (130,), (33, 7), (), (5, 4)]
    launched = []
    original = Driver.launch
    monkeypatch.setattr(Driver, "launch", lambda self, *args: launched.append(args[1]) or original(self, *args))
    results = []
    for together in ([range(8)], [range(k, 8, 4) for k in range(4)]):
        launched.clear()
        params = parameters(shapes)
        give_gradients(params, 0)
        states = [
            {n: torch.zeros(s or p.shape) for n, s in r.state_shapes(TensorLayout.whole(p.shape)).items()}
            for r, p in zip(rules, params, strict=True)
        ]
        for mine in together:
            step_at_once(shim, [rules[i] for i in mine], [params[i] for i in mine], [states[i] for i in mine])
        results.append([t for p, state in zip(params, states, strict=True) for t in (p.detach(), *state.values())])
        assert len(launched) == (2 + 2 * 3 + 1 if len(together) == 1 else 2 * 5 + 2 * 3)
    assert_equal_bits(*results)


def step_at_once(library, rules, params, states) -> None:
    group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
    buckets = [bucket_of(param, state, group) for param, state in zip(params, states, strict=True)]
    for bucket, param in zip(buckets, params, strict=True):
        bucket.grads = [param.grad]
    stages = NativeStages(library, rules, buckets)
    cpu = torch.device("cpu")
    contexts = [StepContext(0, None, None, constants=rule.constants(cpu, torch.float32)) for rule in rules]
    stages.prepare_(stages.collect(contexts), contexts)
    stages.describe_(contexts)
    pairs = zip(rules, buckets, contexts, strict=True)
    controls = [rule.control([bucket], [{}], context)[0] for rule, bucket, context in pairs]
    stages.step_(controls, contexts, [(1.0, 1e-2)] * len(rules), None, range(len(rules)))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["exact"], indirect=True)
def test_indices_of_64_bits_find_the_same_elements(tmp_path, compiled_kernels, shim, precision):
    """Tensors beyond 2^31 elements take another way to row and column; here, tensors beyond 4 elements do."""
    cpu = cpu_library().path
    linked = str(cpu), f"-Wl,-rpath,{cpu.parent}"
    planner = compile_for_cpu(CSRC / "cuda/launches.cpp", tmp_path / "planner.so", "-DPYLO_NARROW=4", *linked)
    wide = Shim(compiled_kernels, precision, Library(planner))
    assert_equal_bits(bits_after_two_steps(shim, SHAPES), bits_after_two_steps(wide, SHAPES))


# -- pieces of a tensor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["exact"], indirect=True)
@pytest.mark.parametrize(
    ("shape", "cuts"),
    [((20, 30), {0: [7]}), ((31, 9), {0: [4, 30]}), ((8, 12, 3), {0: [3], 1: [5]}), ((50,), {0: [17]})],
)
def test_pieces_of_a_tensor_make_the_steps_of_the_whole(shim, shape, cuts):
    test_native_kernels.test_pieces_of_a_tensor_make_the_steps_of_the_whole(shim, shape, cuts)


# -- the interface ----------------------------------------------------------------------------------------------------


def test_structures_have_the_size_that_the_library_expects():
    sizes = re.findall(r"static_assert\(sizeof\(pylo_cuda_(\w+)\) == (\d+)", (CSRC / "cuda/launches.cpp").read_text())
    structs = {"call": cuda.CudaCallStruct, "launch": kernels.LaunchStruct, "kernels": cuda.KernelsStruct}
    assert {name: int(size) for name, size in sizes} == {name: ctypes.sizeof(each) for name, each in structs.items()}


@pytest.mark.parametrize("precision", ["exact"], indirect=True)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("abi_version", 99, "interface version"),
        ("size", 8, "interface version"),
        ("plan", 0, "plan is not what"),
        ("device_plan", 0, "device_plan is null"),
        ("device_plan", 8, "device_plan is null or not aligned"),
        ("workspace", 0, "workspace is null"),
        ("workspace_bytes", 8, "workspace_bytes is 8, must be at least"),
        ("device_steps", 0, "steps or device_steps is null"),
        ("device_stored", 0, "stored or device_stored is null"),
    ],
)
def test_a_bad_call_is_refused_and_nothing_changes(shim, field, value, message):
    params = parameters([(6, 5), (7,)])
    stages, run = stages_of(params, library=shim)
    give_gradients(params, 0)
    before = snapshot(stages.optimizer, params)
    setattr(table_of(stages).call.plan.call, field, value)
    with pytest.raises(NativeError, match=message):
        run()
    assert_equal_bits(before, snapshot(stages.optimizer, params))


@pytest.mark.parametrize("precision", ["exact"], indirect=True)
def test_bad_tables_and_steps_are_refused(shim):
    params = parameters([(6, 5), (7,)])
    stages, run = stages_of(params, library=shim)
    table_of(stages).tensors["row"][0] = 0
    with pytest.raises(NativeError, match="tensor 0: row is null"):
        shim.check(table_of(stages).call)
    stages, run = stages_of(params, library=shim)
    give_gradients(params, 0)
    before = snapshot(stages.optimizer, params)
    for field, value, message in (
        ("precision", 7, "precision 7"),
        ("grad", 0, "tensor 1: grad is null"),
        ("grad_bytes", 27, "tensor 1: grad has 27 bytes, must have 28"),
        ("grad_dtype", 9, "tensor 1: grad_dtype 9 is unknown"),
    ):
        table_of(stages).steps["grad"] = [p.grad.data_ptr() for p in params]
        table_of(stages).steps["grad_bytes"] = [p.grad.nbytes for p in params]
        table_of(stages).steps["grad_dtype"] = 0
        shim._precision = 1
        if field == "precision":
            shim._precision = value
        else:
            table_of(stages).steps[field][1] = value
        with pytest.raises(NativeError, match=message):
            shim.run("collect", table_of(stages).call)
    assert_equal_bits(before, snapshot(stages.optimizer, params))


@pytest.mark.parametrize("precision", ["exact"], indirect=True)
def test_adam_has_three_launches_and_no_other_stage(shim, monkeypatch):
    (param,) = params = parameters([(700, 70)])
    rule = AdamWRule()
    state = {name: torch.zeros_like(param.detach()) for name in rule.state_shapes(TensorLayout.whole(param.shape))}
    group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
    bucket = bucket_of(param, state, group)
    stages = NativeStages(shim, [rule], [bucket])
    give_gradients(params, 0)
    bucket.grads = [param.grad]
    launched = []
    original = Driver.launch
    monkeypatch.setattr(Driver, "launch", lambda self, *args: launched.append(args[1]) or original(self, *args))
    contexts = [StepContext(0, None, None, constants=rule.constants(torch.device("cpu"), torch.float32))]
    before = param.detach().clone()
    stages.prepare_(stages.collect(contexts), contexts)
    stages.describe_(contexts)
    stages.step_([{}], contexts, [(1.0, 1e-2)], None, [0])
    assert len(launched) == 3
    # The first step of Adam is that of the sign, but for eps.
    wanted = 1e-2 * param.grad / (param.grad.abs() + rule.eps)
    torch.testing.assert_close(before - param.detach(), wanted, rtol=1e-5, atol=1e-6)
    table = table_of(stages)
    for stage in ("prepare", "describe"):
        with pytest.raises(NativeError, match="without layers there is no such stage"):
            shim.run(stage, table.call)
    table.steps["rms_correction"] = 0
    with pytest.raises(NativeError, match="tensor 0: momentum_correction and rms_correction must be positive"):
        shim.run("apply", table.call)


def test_steps_are_copied_to_the_device_only_when_they_change(shim, monkeypatch):
    params = parameters([(6, 5)])
    stages, run = stages_of(params, library=shim)
    give_gradients(params, 0)
    run()
    plan = table_of(stages).call.plan
    copies = []
    original = torch.Tensor.copy_

    def counted(self, *args, **kwargs):
        if self.data_ptr() == plan._steps.data.data_ptr():
            copies.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    shim.run("describe", table_of(stages).call)
    assert not copies
    table_of(stages).steps["l2"] = 0.5
    shim.run("describe", table_of(stages).call)
    assert len(copies) == 1


def test_values_that_a_device_computed_need_not_come_to_the_host(shim):
    """A learning rate on the device, say: it goes from tensor to tensor."""
    results = []
    for on_device in (False, True):
        params = parameters(FEW)
        stages, run = stages_of(params, library=shim)
        give_gradients(params, 0)
        run()
        call = table_of(stages).call
        for index in range(len(params)):
            if on_device:
                table_of(stages)._on_device["scale", index, index + 1] = torch.tensor(0.5)
            else:
                table_of(stages).steps["scale"][index] = 0.5
        shim.run("apply", call)
        results.append(snapshot(stages.optimizer, params))
    assert_equal_bits(*results)
