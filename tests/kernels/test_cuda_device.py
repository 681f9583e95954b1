"""On a CUDA device: are the kernels what their emulation is, do they wait for nothing, and can a graph hold them?

Skipped without a device; the same kernels run by the emulation in tests/kernels/test_cuda_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from plans import is_native, native_parts
from test_native_kernels import LARGE, SHAPES, assert_equal_bits, give_gradients, parameters, snapshot, theta
from thetas import create
from torch import nn

from pylo_integrations import SmallFCLOpt, kernel_check
from pylo_integrations.ops import cuda
from pylo_integrations.rules.base import StepContext

on_gpu = pytest.mark.usefixtures("library")


@pytest.fixture
def library() -> cuda.CudaLibrary:
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    found = cuda.load(torch.device("cuda", torch.cuda.current_device()))
    if isinstance(found, str):
        pytest.skip(found)
    return found


def on_device(params, device="cuda") -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().to(device, copy=True)) for p in params]


def copy_gradients(params, twins) -> None:
    for p, twin in zip(params, twins, strict=True):
        p.grad = twin.grad.to(p.device)


def take_steps(optimizer, params, count: int, first: int = 0, **options) -> None:
    twins = [torch.empty_like(p, device="cpu") for p in params]
    for step in range(first, first + count):
        give_gradients(twins, step)
        copy_gradients(params, twins)
        optimizer.step(**options)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["small_fc_lopt", "mulo", "elo", "velo", "celo", "celo_adam", "celo2_base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_on_the_device_are_those_of_the_reference(name, dtype):
    """The reference's steps in float32 on the CPU; of half-precision parameters, before they are rounded."""
    starts = parameters(SHAPES + LARGE, dtype)
    params, twins = on_device(starts), [nn.Parameter(p.detach().to(torch.float32, copy=True)) for p in starts]
    fast = create(params, name, num_steps=10, backend="native")
    slow = create(twins, name, num_steps=10, backend="reference")
    for step in range(3):
        give_gradients(starts, step)
        copy_gradients(params, starts)
        for twin, start in zip(twins, starts, strict=True):
            twin.grad = start.grad.float()
        loss = torch.tensor(3.0 - step)
        fast.step(loss=loss.cuda())
        slow.step(loss=loss)
        if dtype != torch.float32:
            break  # from then on the rounded parameters have gradients of their own
    # A scalar may be back where it began; all tensors move alike.
    moved = max((twin - start.float()).abs().max() for twin, start in zip(twins, starts, strict=True))
    assert moved > 1e-4
    for p, twin in zip(params, twins, strict=True):
        rounding = torch.finfo(dtype).eps * twin.abs()
        error = (p.detach().cpu().float() - twin).abs()
        assert (error <= 2e-4 * moved + rounding).all(), tuple(p.shape)


@on_gpu
@pytest.mark.gpu
def test_a_second_run_has_the_same_bits():
    results = []
    for _ in range(2):
        params = on_device(parameters(SHAPES + LARGE))
        optimizer = SmallFCLOpt(params, weights=theta(), backend="native")
        take_steps(optimizer, params, 3)
        results.append(snapshot(optimizer, params))
    assert_equal_bits(*results)


def stages_and_step(params, name="small_fc_lopt"):
    """Native stages after two ordinary steps, and a function that runs them once more on the same gradients."""
    weights = theta() if name == "small_fc_lopt" else f"builtin:{name}"
    optimizer = create(params, name, weights=weights, backend="native")
    take_steps(optimizer, params, 2)
    (stages,) = native_parts(optimizer)
    buckets = [native.bucket for native in stages._natives]
    for bucket in buckets:
        bucket.grads = [p.grad for p in bucket.params]
    context = StepContext(2, None, None, constants=optimizer.rule.constants(params[0].device, torch.float32))
    if name == "pace":
        context.memory.update(
            {key: value.to(params[0].device) for key, value in optimizer.rule.initial_memory().items()}
        )

    def step() -> None:
        contexts = [context] * len(buckets)
        collected = stages.collect(contexts)
        stages.prepare_(collected, contexts)
        controls = optimizer.rule.control(buckets, collected, context)
        stages.describe_(contexts)
        stages.step_(controls, contexts, [(1.0, 1.0)] * len(buckets), None, range(len(buckets)))

    return optimizer, step


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["small_fc_lopt", "celo2", "pace"])
def test_stages_wait_for_nothing_and_allocate_nothing_new(name):
    _, step = stages_and_step(on_device(parameters([shape for shape in SHAPES if len(shape) > 1])), name)
    step()
    torch.cuda.synchronize()
    allocations = torch.cuda.memory_stats()["num_device_alloc"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["num_device_alloc"] == allocations


@on_gpu
@pytest.mark.gpu
def test_a_graph_repeats_the_stages():
    results = []
    for captured in (False, True):
        params = on_device(parameters(SHAPES))
        optimizer, step = stages_and_step(params)
        step()
        if captured:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
        for _ in range(3):
            step()
        results.append(snapshot(optimizer, params))
    assert_equal_bits(*results)


@on_gpu
@pytest.mark.gpu
def test_stages_run_on_the_current_stream():
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            params = on_device(parameters(SHAPES))
            optimizer = SmallFCLOpt(params, weights=theta(), backend="native")
            take_steps(optimizer, params, 3)
            results.append(snapshot(optimizer, params))
        stream.synchronize()
    assert_equal_bits(*results)


@on_gpu
@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one CUDA device")
    results = []
    for device in ("cuda:0", "cuda:1"):
        params = on_device(parameters(SHAPES), device)
        optimizer = SmallFCLOpt(params, weights=theta(), backend="native")
        take_steps(optimizer, params, 3)
        results.append([t.cpu() for t in snapshot(optimizer, params)])
    assert torch.cuda.current_device() == 0
    assert_equal_bits(*results)


@on_gpu
@pytest.mark.gpu
def test_a_learning_rate_on_the_device_stays_there():
    params = on_device(parameters(SHAPES))
    optimizer = SmallFCLOpt(params, weights=theta(), lr=torch.tensor(0.5, device="cuda"), backend="native")
    twins = on_device(parameters(SHAPES))
    plain = SmallFCLOpt(twins, weights=theta(), lr=0.5, backend="native")
    take_steps(optimizer, params, 2)
    take_steps(plain, twins, 2)
    for p, twin in zip(params, twins, strict=True):
        assert torch.equal(p, twin)


@on_gpu
@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.parametrize("subject", kernel_check.standard_subjects(), ids=lambda subject: subject.kind)
def test_the_check_finds_the_kernels_right(subject):
    assert kernel_check.check(torch.device("cuda", torch.cuda.current_device()), subject, print).right


@on_gpu
@pytest.mark.gpu
@pytest.mark.timeout(900)
def test_auto_takes_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("PYLO_CACHE", str(tmp_path))
    params = on_device(parameters(SHAPES))
    optimizer = SmallFCLOpt(params, weights=theta())
    take_steps(optimizer, params, 2)
    assert is_native(optimizer)
