"""Do the native kernels compute what the reference computes, for every shape, type, instruction set and thread count?

The oracle is the reference backend in float64 on the same float32 numbers. Against it the update may be off by 1e-6 of
its largest element, besides what the float32 accumulators make of float32 decays, which both backends share.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_files import Golden
from native_library import CSRC, library_or_skip
from plans import native_buckets, native_parts
from torch import nn

from pylo_integrations import SmallFCLOpt, Theta
from pylo_integrations.ops import loader, records
from pylo_integrations.ops.loader import ABI_VERSION, ISAS, CallStruct, Library, NativeError, RuleStruct
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.obstacles import local_obstacle, obstacle
from pylo_integrations.ops.records import Table, memory_order, record_axes
from pylo_integrations.rules.base import StepContext
from pylo_integrations.rules.features import channel_count
from pylo_integrations.rules.small_fc import SmallFCRule
from pylo_integrations.sharding.blocks import Bucket
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import Held, Piece, locate

# 0-d; vectors; matrices wide, tall, of one row, of less than a SIMD vector; tied axes; factored axes anywhere.
SHAPES = [
    (),
    (1,),
    (5,),
    (130,),
    (1, 1),
    (1, 9),
    (9, 1),
    (5, 7),
    (8, 8),
    (32, 10),
    (10, 32),
    (64, 37),
    (37, 64),
    (300, 49),
    (3, 3, 3),
    (7, 5, 6),
    (16, 8, 3, 3),
    (8, 16, 3, 3),
    (24, 3, 8, 8),
    (40, 1, 3),
    (1, 40, 3),
    (2, 3, 4, 5, 6),
    (20, 20, 20),
]


@pytest.fixture(scope="module")
def library() -> Library:
    return library_or_skip()


def theta(widths: tuple[int, ...] = (32, 32)) -> Theta:
    """Random weights, large enough for every feature to matter."""
    generator = torch.Generator().manual_seed(1)
    arrays, inputs = {}, 39
    for layer, outputs in enumerate((*widths, 2)):
        arrays[f"nn/~/w{layer}"] = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
        arrays[f"nn/~/b{layer}"] = torch.randn(outputs, generator=generator) * 0.1
        inputs = outputs
    return Theta.from_arrays("small_fc_lopt", arrays, {"step_mult": 1e-2, "exp_mult": 1e-1})


def parameters(shapes, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.1).to(dtype)) for s in shapes]


def give_gradients(params, step: int) -> None:
    """Of uneven rows and columns, so that a confusion of the two shows."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator)
        for axis in range(p.dim()):
            scale = 10 ** -torch.linspace(0, 1.5, p.shape[axis])
            grad *= scale.view(-1, *(1,) * (p.dim() - axis - 1))
        p.grad = grad.to(p.dtype)


def train(optimizer, params, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        give_gradients(params, step)
        optimizer.step()


def snapshot(optimizer, params) -> list[torch.Tensor]:
    return [t.detach().clone() for p in params for t in (p, *optimizer.state[p].values())]


def assert_equal_bits(a, b) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def float64_twins(params) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().double()) for p in params]


def one_step(shapes, widths=(32, 32), **options):
    """A step from the state of three reference steps, by the reference in float64 and by the native kernels.

    Both start from the same float32 numbers and use float32 decays, so what differs is the arithmetic of one step.
    """
    params = parameters(shapes)
    weights = theta(widths)
    warm = SmallFCLOpt(params, weights=weights, backend="reference", **options)
    train(warm, params, 3)
    twins = float64_twins(params)
    oracle = SmallFCLOpt(twins, weights=weights, backend="reference", **options)
    decays = oracle.rule.decays
    float32_decays = {
        name: tuple((1 - w.double()).tolist())
        for name, w in zip(
            ("momentum", "rms", "factored"), decays.weights(torch.device("cpu"), torch.float32).values(), strict=True
        )
    }
    object.__setattr__(oracle.rule, "decays", type(decays)(**float32_decays))
    oracle.init_state()
    for p, twin in zip(params, twins, strict=True):
        for name, value in warm.state[p].items():
            oracle.state[twin][name].copy_(value)
    fast = SmallFCLOpt(params, weights=weights, backend="native", **options)
    fast.state.update(warm.state)
    for optimizer in (oracle, fast):
        optimizer._progress.iteration = 3
    before = [p.detach().double() for p in params]
    give_gradients(params, 3)
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.double()
    oracle.step()
    fast.step()
    return params, twins, before, fast, oracle


def assert_step_matches(params, twins, before, fast, oracle, bound: float = 1e-6) -> None:
    for p, twin, old in zip(params, twins, before, strict=True):
        update, want = p.detach().double() - old, twin.detach() - old
        # Half a unit in the last place of the parameter is not the kernel's.
        allowed = bound * want.abs().max() + 2**-24 * old.abs().max()
        assert (update - want).abs().max() <= allowed, tuple(p.shape)
        for name, value in fast.state[p].items():
            reference = oracle.state[twin][name]
            assert (value.double() - reference).abs().max() <= 5e-7 * reference.abs().max(), (tuple(p.shape), name)


# -- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
def test_an_update_is_within_a_millionth_of_float64():
    assert_step_matches(*one_step(SHAPES))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("widths", [(4,), (5,), (64,), (4, 4), (33, 17), (64, 64), (32, 3, 32), (1, 2, 1)])
def test_any_geometry_of_the_network_is_evaluated(widths):
    shapes = [(130,), (70, 20), (8, 8), (3, 4, 5)]
    # Ten times the bound: little networks of random weights may cancel in their last layer.
    assert_step_matches(*one_step(shapes, widths), bound=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "lr": 0.5},
        {"weight_decay": 0.1, "lr": 0.5, "weight_decay_policy": "after"},
        {"weight_decay": 0.1, "weight_decay_policy": "l2"},
        {"maximize": True},
        {"max_grad_norm": 0.1},
        {"lr": torch.tensor(0.3)},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_a_group_mean_the_same(options):
    maximize = options.pop("maximize", False)
    params, twins = parameters(SHAPES), None
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    fast = SmallFCLOpt([{"params": params, "maximize": maximize}], weights=theta(), backend="native", **options)
    slow = SmallFCLOpt([{"params": twins, "maximize": maximize}], weights=theta(), backend="reference", **options)
    train(fast, params, 3)
    train(slow, twins, 3)
    for p, twin, start in zip(params, twins, parameters(SHAPES), strict=True):
        moved = (twin - start).abs().max()
        assert moved > 0
        assert (p - twin).abs().max() <= 2e-5 * moved + 2**-23 * twin.abs().max(), tuple(p.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_half_precision_parameters_are_rounded_once_as_torch_rounds(dtype, isa, library):
    if isa not in library.isas():
        pytest.skip(f"this machine has no {isa}")
    halves = parameters(SHAPES, dtype)
    floats = [nn.Parameter(p.detach().float()) for p in halves]
    give_gradients(halves, 0)
    for p, twin in zip(halves, floats, strict=True):
        twin.grad = p.grad.float()
    for params in (halves, floats):
        stages, run = stages_of(params, isa=isa, library=library)
        run()
        states = snapshot(stages.optimizer, params)
    for p, twin in zip(halves, floats, strict=True):
        assert torch.equal(p, twin.to(dtype)), tuple(p.shape)
    assert states[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_every_half_precision_number_is_read_and_written(dtype, isa, library):
    """A step of size 0 writes back what it read."""
    if isa not in library.isas():
        pytest.skip(f"this machine has no {isa}")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    every = every[every.float().abs() < 1e15]  # and no NaN; the mean square of larger ones is infinite
    param = nn.Parameter(every.clone())
    _, run = stages_of([param], isa=isa, library=library)
    param.grad = torch.ones_like(param)
    run(scale=0.0)
    assert torch.equal(param.detach().view(torch.int16), every.view(torch.int16))


@pytest.mark.usefixtures("library")
def test_gradients_in_other_types_and_memory_formats():
    weight = torch.randn(16, 8, 3, 3)
    plain = nn.Parameter(weight.clone())
    last = nn.Parameter(weight.to(memory_format=torch.channels_last))
    results = []
    for param in (plain, last):
        optimizer = SmallFCLOpt([param], weights=theta(), backend="native")
        for step in range(2):
            give_gradients([plain], step)
            param.grad = plain.grad.clone()  # the format of `plain`, not of `last`
            optimizer.step()
        results.append([param.detach().contiguous(), *(s.contiguous() for s in optimizer.state[param].values())])
        assert optimizer.state[param]["rms"].stride() == param.stride()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    half = nn.Parameter(weight.bfloat16())
    half.grad = torch.ones(16, 3, 3, 8).permute(0, 3, 1, 2).to(torch.bfloat16)
    SmallFCLOpt([half], weights=theta(), backend="native").step()


# -- the same bits ----------------------------------------------------------------------------------------------------


def bucket_of(param, state, group) -> Bucket:
    """A bucket of one whole tensor."""
    shape, held = locate(param, {}, 1)
    return Bucket(TensorLayout.whole(shape), [param], [state], group, torch.float32, held=[held])


def stages_of(params, *, isa=None, library=None):
    """Native stages over buckets of one tensor each, and a function that takes a step with them."""
    rule = theta().rule()
    group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
    optimizer = SmallFCLOpt(params, weights=theta())
    optimizer.init_state()
    buckets = [bucket_of(p, optimizer.state[p], group) for p in params]
    stages = NativeStages(library or library_or_skip(), [rule] * len(buckets), buckets, isa)
    constants = rule.constants(torch.device("cpu"), torch.float32)

    def run(scale: float = 1.0, iteration: int = 0) -> None:
        for bucket in buckets:
            bucket.grads = [p.grad for p in bucket.params]
        context = StepContext(iteration, None, None, constants=constants)
        contexts = [context] * len(buckets)
        stages.prepare_(stages.collect(contexts), contexts)
        stages.describe_(contexts)
        controls = rule.control(buckets, [{}] * len(buckets), context)
        stages.step_(controls, contexts, [(1.0, scale)] * len(buckets), None, range(len(buckets)))

    stages.optimizer = optimizer
    return stages, run


LARGE = [(70000,), (4000, 70), (3, 900), (20, 60, 18)]  # several parts in some stage


@pytest.mark.parametrize(
    "dtype", [torch.float32, *(pytest.param(half, marks=pytest.mark.slow) for half in (torch.bfloat16, torch.float16))]
)
def test_results_have_the_same_bits_for_any_thread_count_and_vector_width(library, dtype):
    """Instruction sets with fused multiply-add agree with each other; the baseline of x86 has none."""
    outcomes = {}
    threads_before = torch.get_num_threads()
    try:
        for isa in [None, *library.isas()]:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                params = parameters(SHAPES + LARGE, dtype)
                stages, run = stages_of(params, isa=isa, library=library)
                for step in range(2):
                    give_gradients(params, step)
                    run(iteration=step)
                outcomes[isa, threads] = snapshot(stages.optimizer, params)
    finally:
        torch.set_num_threads(threads_before)
    fused = [isa for isa in (None, "avx2", "avx512") if (isa, 1) in outcomes and library.isa != "baseline"]
    for (isa, threads), outcome in outcomes.items():
        assert_equal_bits(outcome, outcomes[isa, 1])
        if isa in fused:
            assert_equal_bits(outcome, outcomes[fused[0], threads])


@pytest.mark.usefixtures("library")
def test_a_second_run_has_the_same_bits():
    results = []
    for _ in range(2):
        params = parameters(SHAPES)
        optimizer = SmallFCLOpt(params, weights=theta(), backend="native")
        train(optimizer, params, 3)
        results.append(snapshot(optimizer, params))
    assert_equal_bits(*results)


@pytest.mark.usefixtures("library")
def test_tensors_do_not_influence_each_other():
    params = parameters(SHAPES)
    optimizer = SmallFCLOpt(params, weights=theta(), backend="native")
    train(optimizer, params, 2)
    together = snapshot(optimizer, params)
    alone = []
    singles = parameters(SHAPES)
    optimizers = [SmallFCLOpt([p], weights=theta(), backend="native") for p in singles]
    for step in range(2):
        give_gradients(singles, step)
        for optimizer in optimizers:
            optimizer.step()
    for optimizer, p in zip(optimizers, singles, strict=True):
        alone += snapshot(optimizer, [p])
    assert_equal_bits(together, alone)


# -- backends mix -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("order", [("native", "reference"), ("reference", "native")])
def test_a_run_may_change_its_backend(order):
    params, twins = parameters(SHAPES), parameters(SHAPES)
    first = SmallFCLOpt(params, weights=theta(), backend=order[0])
    whole = SmallFCLOpt(twins, weights=theta(), backend="reference")
    train(whole, twins, 4)
    train(first, params, 2)
    second = SmallFCLOpt(params, weights=theta(), backend=order[1])
    second.load_state_dict(first.state_dict())
    train(second, params, 2, first=2)
    for p, twin, start in zip(params, twins, parameters(SHAPES), strict=True):
        moved = (twin - start).abs().max()
        assert (p - twin).abs().max() <= 2e-5 * moved + 2**-23 * twin.abs().max(), tuple(p.shape)


@pytest.mark.usefixtures("library")
def test_auto_leaves_float64_to_the_reference():
    double, single = nn.Parameter(torch.ones(4, 3, dtype=torch.float64)), nn.Parameter(torch.ones(4, 3))
    give_gradients([double, single], 0)
    optimizer = SmallFCLOpt([double, single], weights=theta())
    optimizer.step()
    assert [bucket.dtype for bucket in native_buckets(optimizer)] == [torch.float32]
    with pytest.raises(RuntimeError, match=r"backend='native' cannot step a tensor of shape \(4, 3\).*float64.*auto"):
        SmallFCLOpt([double], weights=theta(), backend="native").step()


@pytest.mark.usefixtures("library")
def test_obstacles_are_named():
    rule, group = theta().rule(), {}

    def why(param, state=None, rule=rule):
        shapes = rule.state_shapes(TensorLayout.whole(tuple(param.shape))).items()
        fresh = {name: torch.zeros(param.shape if shape is None else shape) for name, shape in shapes}
        bucket = bucket_of(param, fresh | (state or {}), group)
        return obstacle(rule, bucket) or local_obstacle(rule, bucket)

    assert why(torch.zeros(4, 3)) is None
    assert "strides" in why(torch.zeros(4, 6)[:, ::2])
    assert "strides" in why(torch.zeros(4, 1).expand(4, 3))
    assert "memory format" in why(torch.zeros(4, 3), {"rms": torch.zeros(3, 4).t()})
    assert "65" in why(torch.zeros(4), rule=theta((65,)).rule())
    assert "meta" in why(torch.zeros(4, device="meta"))


@pytest.mark.usefixtures("library")
def test_new_storage_of_parameters_and_state_is_noticed():
    """Frameworks swap ``param.data``; a table of stale addresses would write to freed memory."""
    params, twins = parameters([(8, 6), (5,)]), parameters([(8, 6), (5,)])
    moving = SmallFCLOpt(params, weights=theta(), backend="native")
    resting = SmallFCLOpt(twins, weights=theta(), backend="native")
    kept = []
    for step in range(3):
        train(moving, params, 1, first=step)
        train(resting, twins, 1, first=step)
        assert_equal_bits(snapshot(moving, params), snapshot(resting, twins))
        kept.append([p.data for p in params])
        for p in params:
            p.data = p.data.clone()
            moving.state[p]["rms"] = moving.state[p]["rms"].clone()


@pytest.mark.usefixtures("library")
def test_nonfinite_gradients_change_nothing_or_count_as_zero():
    params = parameters([(6, 5), (4,)])
    optimizer = SmallFCLOpt(params, weights=theta(), backend="native", on_nonfinite="skip")
    train(optimizer, params, 1)
    before = snapshot(optimizer, params)
    give_gradients(params, 1)
    params[0].grad[2, 3] = torch.nan
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert_equal_bits(before, snapshot(optimizer, params))

    twins = parameters([(6, 5), (4,)])
    zeroing = [
        SmallFCLOpt(ps, weights=theta(), backend=backend, on_nonfinite="zero")
        for ps, backend in ((params, "native"), (twins, "reference"))
    ]
    for p, twin in zip(params, twins, strict=True):
        twin.data.copy_(p.data)
    for value in (torch.nan, torch.inf, 1e20):
        for optimizer, ps in zip(zeroing, (params, twins), strict=True):
            give_gradients(ps, 2)
            ps[0].grad[2, 3], ps[1].grad[0] = value, value
            optimizer.step()
    for p, twin in zip(params, twins, strict=True):
        assert p.isfinite().all()
        torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7)


# -- pieces of a tensor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [
        ((20, 30), {0: [7]}),
        ((20, 30), {1: [11]}),
        ((31, 9), {0: [4, 30]}),
        ((8, 12, 3), {0: [3], 1: [5]}),
        ((50,), {0: [17]}),
    ],
)
def test_pieces_of_a_tensor_make_the_steps_of_the_whole(library, shape, cuts):
    """Sums of boxes, completed between the stages as ranks would, against the undivided tensor."""
    (whole,) = parameters([shape])
    start = whole.detach().clone()
    stages, run = stages_of([whole], library=library)
    boxes = [Box((0,) * len(shape), shape)]
    for axis, positions in cuts.items():
        edges = [0, *positions, shape[axis]]
        boxes = [
            Box(
                (*box.start[:axis], low, *box.start[axis + 1 :]),
                (*box.shape[:axis], high - low, *box.shape[axis + 1 :]),
            )
            for box in boxes
            for low, high in zip(edges, edges[1:], strict=False)
        ]
    origin = (0,) * len(shape)
    optimizer = SmallFCLOpt([whole], weights=theta())
    group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
    rule = theta().rule()
    shards, buckets = [], []
    layout = TensorLayout.whole(whole.shape)
    for box in boxes:
        piece = nn.Parameter(start[box.slices(origin)].clone())
        state = {
            name: torch.zeros_like(piece.detach()) if s is None else torch.zeros(s)
            for name, s in optimizer.rule.state_shapes(layout).items()
        }
        held = [Held((Piece(box),))]
        bucket = Bucket(layout, [piece], [state], group, torch.float32, held=held)
        buckets.append(bucket)
        shards.append(NativeStages(library, [rule], [bucket]))
    constants = rule.constants(torch.device("cpu"), torch.float32)
    for step in range(2):
        give_gradients([whole], step)
        for bucket, box in zip(buckets, boxes, strict=True):
            bucket.grads = [whole.grad[box.slices(origin)].contiguous()]
        run(iteration=step)
        context = StepContext(step, None, None, constants=constants)
        collected = [shard.collect([context])[0] for shard in shards]
        total = {name: sum(c[name] for c in collected) for name in collected[0]}
        for shard in shards:
            shard.prepare_([total], [context])
        described = [shard.describe_([context])[0]["features"] for shard in shards]
        features = sum(d.clone() for d in described)
        for mine in described:
            mine.copy_(features)
        for shard, bucket in zip(shards, buckets, strict=True):
            shard.step_(rule.control([bucket], [{}], context), [context], [(1.0, 1.0)], None, [0])
    for bucket, box in zip(buckets, boxes, strict=True):
        want = whole.detach()[box.slices(origin)]
        moved = (whole.detach() - start).abs().max()
        assert (bucket.params[0].detach() - want).abs().max() <= 1e-6 * moved + 2**-24 * start.abs().max()
        for name in ("row", "col"):
            if name in bucket.states[0]:
                torch.testing.assert_close(
                    bucket.states[0][name], stages.optimizer.state[whole][name], rtol=1e-6, atol=0
                )


def test_axes_of_equal_role_are_merged():
    axes = record_axes(TensorLayout.whole((16, 8, 3, 3)), memory_order(torch.zeros(16, 8, 3, 3)))
    assert axes.extent == (16, 8, 9) and (axes.d0_axis, axes.d1_axis) == (0, 1)
    assert (axes.row_stride, axes.col_stride) == ((0, 9, 1), (9, 0, 1))
    assert memory_order(torch.zeros(4, 6)[:, ::2]) is None
    box = TensorLayout.whole((64, 5, 4, 3, 2, 5, 5, 63))
    assert record_axes(box, memory_order(torch.zeros(1).expand(box.shape)) or range(8)) is not None


# -- the interface ----------------------------------------------------------------------------------------------------


def test_features_are_the_same_on_both_sides(library):
    names = library.feature_names()
    for name in dict.fromkeys(names):
        assert names.count(name) == channel_count([name]), name
    assert set(SmallFCRule.features) <= set(names)


def test_structures_have_the_size_that_the_library_expects(library):
    """Wrong offsets would make pylo_check() see nonsense; a wrong total size is refused by name."""
    call = CallStruct(abi_version=ABI_VERSION, size=ctypes.sizeof(CallStruct) - 8)
    with pytest.raises(NativeError, match="interface version"):
        library.check(call)
    call = CallStruct(abi_version=ABI_VERSION + 1, size=ctypes.sizeof(CallStruct))
    with pytest.raises(NativeError, match=f"caller {ABI_VERSION + 1}"):
        library.check(call)
    sizes = re.findall(r"static_assert\(sizeof\(pylo_(\w+)\) == (\d+)", (CSRC / "core/table.cpp").read_text())
    assert {name: int(size) for name, size in sizes} == {
        "tensor": records.TENSOR.itemsize,
        "step": records.STEP.itemsize,
        "stored": records.STORED.itemsize,
        "rule": ctypes.sizeof(RuleStruct),
        "call": ctypes.sizeof(CallStruct),
    }


def table_of(stages: NativeStages) -> Table:
    """The table of tensors that are in one piece."""
    (layer,) = stages._tables
    return layer.table


def damage(field, value):
    def apply(stages):
        tensors = table_of(stages).tensors
        tensors[field][0] = value(tensors[field][0]) if callable(value) else value

    return apply


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("param", 0, "param is null"),
        ("param", lambda x: x + 2, "param is not aligned"),
        ("rms", lambda x: x + 1, "rms is not aligned"),
        ("row", 0, "row is null"),
        ("param_dtype", 7, "param_dtype 7 is unknown"),
        ("rank", 9, "rank must be 1 to 6, is 9"),
        ("numel", 3, "numel is smaller"),
        ("d0_axis", 4, "d0_axis and d1_axis must be two of the 2 axes"),
        ("row_numel", 4, "row axis . leaves its 4 entries"),
        ("row_offset", 3, "row axis"),
        ("col_offset", -1, "col the offset lies outside"),
        ("d1_row_stride", 5, "d1_row_stride times d1_extent must divide row_numel"),
    ],
)
def test_a_bad_table_is_refused_and_nothing_changes(library, field, value, message):
    params = parameters([(6, 5), (7,)])
    stages, run = stages_of(params, library=library)
    give_gradients(params, 0)
    before = snapshot(stages.optimizer, params)
    damage(field, value)(stages)
    with pytest.raises(NativeError, match=f"tensor 0: {message}"):
        library.check(table_of(stages).call)
    with pytest.raises(NativeError, match="check them again"):
        run()
    assert_equal_bits(before, snapshot(stages.optimizer, params))


def test_overlapping_buffers_are_refused(library):
    params = parameters([(6, 5), (7,)])
    stages, _ = stages_of(params, library=library)
    tensors = table_of(stages).tensors
    tensors["rms"][1] = tensors["diagonal"][1][0]
    with pytest.raises(NativeError, match="(rms|diagonal) of tensor 1 overlaps (rms|diagonal) of tensor 1"):
        library.check(table_of(stages).call)
    stages, _ = stages_of(params, library=library)
    tensors = table_of(stages).tensors
    tensors["param"][1] = tensors["param"][0] + 8
    with pytest.raises(NativeError, match="param of tensor . overlaps param of tensor ."):
        library.check(table_of(stages).call)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("threads", 0, "threads must be positive"),
        ("isa", 42, "instruction set 42"),
        ("workspace", 0, "workspace is null"),
        ("workspace_bytes", 8, "workspace_bytes is 8, must be at least"),
        ("steps", 0, "steps is null"),
        ("grad_squares", 0, "grad_squares is null"),
        ("token", 1, "check them again"),
        ("count", -1, "count is negative"),
    ],
)
def test_a_bad_call_is_refused(library, attribute, value, message):
    params = parameters([(6, 5), (7,)])
    stages, _ = stages_of(params, library=library)
    give_gradients(params, 0)
    table = table_of(stages)
    table.steps["grad"] = [p.grad.data_ptr() for p in params]
    table.steps["grad_bytes"] = [p.grad.nbytes for p in params]
    before = snapshot(stages.optimizer, params)
    setattr(table.call, attribute, value)
    with pytest.raises(NativeError, match=message):
        library.run("collect", table.call)
    assert_equal_bits(before, snapshot(stages.optimizer, params))


# -- the loader -------------------------------------------------------------------------------------------------------


def test_a_missing_or_broken_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(loader, "find_library", lambda: None)
    assert "C++ compiler" in loader.load.__wrapped__()
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(loader, "find_library", lambda: broken)
    assert f"{broken} cannot be loaded" in loader.load.__wrapped__()
    monkeypatch.setattr(loader, "find_library", lambda: Path(ctypes.util.find_library("m") or "libm.so.6"))
    assert "cannot be loaded" in loader.load.__wrapped__()


def test_without_a_library_auto_works_and_native_raises(monkeypatch):
    monkeypatch.setattr(loader, "load", lambda: "it is not there")
    params = parameters([(4, 3)])
    give_gradients(params, 0)
    optimizer = SmallFCLOpt(params, weights=theta())
    optimizer.step()
    assert not native_parts(optimizer)
    with pytest.raises(RuntimeError, match="backend='native' is not available: it is not there"):
        SmallFCLOpt(params, weights=theta(), backend="native")


PROBE = """
import torch, threading
from pathlib import Path
from pylo_integrations import SmallFCLOpt
p = torch.nn.Parameter(torch.ones(300, 200)); p.grad = torch.ones(300, 200)
torch.ones(10**6).sum()
o = SmallFCLOpt([p], backend="native")
tasks = lambda: len(list(Path("/proc/self/task").iterdir()))
before = tasks()
o.step(); o.step()
maps = {line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line or "libomp" in line or "iomp" in line}
print(len(maps), before, tasks())
"""


@pytest.mark.slow
@pytest.mark.usefixtures("library")
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux /proc")
def test_one_openmp_runtime_serves_torch_and_the_kernels():
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    runtimes, before, after = map(int, run.stdout.split())
    assert runtimes == 1
    assert after == before, "the kernels started threads of their own"


@pytest.mark.usefixtures("library")
def test_the_golden_decays_out_of_range_take_the_native_path():
    golden = Golden("small_fc_h32_outofrange_decays")
    hyper = {key: golden.hyper[key] for key in ("exp_mult", "step_mult")}
    param = nn.Parameter(torch.ones(4, 3))
    give_gradients([param], 0)
    weights = Theta.from_arrays("small_fc_lopt", golden.theta, hyper)
    SmallFCLOpt([param], weights=weights, backend="native").step()
    assert param.isfinite().all()
