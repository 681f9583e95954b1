"""Do the CUDA kernels store state in bfloat16 and int8 with the bits that the CPU kernels store? Emulated.

What is stored follows from gradients alone, by the same operations; so without multiply-adds that round once, which
neither the emulation nor the baseline set has, nothing may differ. Steps, made of sums too, are held to the bounds of
the CPU kernels.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import test_native_formats
import torch
from cuda_shim import Shim, compile_for_cpu, cpu_library
from native_library import CSRC
from plans import is_native, native_parts
from test_cuda_whole_steps import CELO2, ENTRIES, PACE, launches_of_steps
from test_native_formats import run, states
from test_native_kernels import assert_equal_bits, give_gradients, parameters, snapshot
from thetas import create, slow_unless
from torch import nn

from pylo_integrations.formats import BFLOAT16, INT8
from pylo_integrations.ops import loader, tables
from pylo_integrations.ops.loader import Library, NativeError
from pylo_integrations.ops.obstacles import obstacle

pytestmark = pytest.mark.timeout(900)

KINDS = ["bfloat16", "int8"]
RULES = [*test_native_formats.RULES, "celo_adam"]
CASES = [slow_unless(name in ("pace", "celo_adam") and kind == "int8", name, kind) for name in RULES for kind in KINDS]


@pytest.fixture
def shim(compiled_kernels, monkeypatch) -> Shim:
    """The emulated kernels, which ``backend="native"`` finds in the place of the CPU library."""
    library = Shim(compiled_kernels, "exact")
    monkeypatch.setattr(loader, "load", lambda: library)
    return library


@pytest.fixture
def baseline_states(monkeypatch):
    """What the CPU kernels store, on an instruction set whose multiply-adds round twice, as the emulation's do."""

    def states_of(*args):
        table = tables.Table
        with monkeypatch.context() as patch:
            patch.setattr(loader, "load", cpu_library)
            patch.setattr(tables, "Table", lambda *args: table(*args[:-1], "baseline"))
            return states(*run(*args))

    return states_of


def assert_stored_alike(mine, theirs) -> None:
    """Bit by bit, all that is not float32, and scales."""
    assert mine.keys() == theirs.keys()
    stored = [key for key in mine if mine[key].dtype != torch.float32 or key.endswith("_scale")]
    assert len(stored) >= 3
    for key in stored:
        assert torch.equal(mine[key], theirs[key]), key


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_stored_has_the_bits_of_the_cpu_kernels(name, kind, baseline_states):
    params, optimizer = run(name, kind, "native", 3)
    assert is_native(optimizer)
    assert_stored_alike(states(params, optimizer), baseline_states(name, kind, "native", 3))


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_steps_agree_with_the_reference(name, kind, dtype):
    test_native_formats.test_steps_agree(name, kind, dtype)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_not_finite_are_read_as_zero(kind, monkeypatch, baseline_states):
    original = test_native_formats.gradients

    def spoilt(step):
        made = original(step)
        for grad in made:
            grad.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, 1e30])
        return made

    monkeypatch.setattr(test_native_formats, "gradients", spoilt)
    monkeypatch.setattr(test_native_formats, "create", lambda *a, **k: create(*a, on_nonfinite="zero", **k))
    assert_stored_alike(states(*run("pace", kind, "native", 2)), baseline_states("pace", kind, "native", 2))


@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_the_order_of_blocks_and_threads(kind, shim):
    found = []
    for order in (0, 1, 12345):
        shim.order(order)
        try:
            params, optimizer = run("celo2", kind, "native", 2)
        finally:
            shim.order(0)
        found.append(snapshot(optimizer, params))
    for other in found[1:]:
        assert_equal_bits(found[0], other)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_indices_of_64_bits_find_the_same_elements(kind, tmp_path, compiled_kernels, shim, monkeypatch):
    """As in test_cuda_kernels.py: tensors beyond 4 elements instead of 2^31."""
    cpu = cpu_library().path
    linked = str(cpu), f"-Wl,-rpath,{cpu.parent}"
    planner = compile_for_cpu(CSRC / "cuda/launches.cpp", tmp_path / "planner.so", "-DPYLO_NARROW=4", *linked)
    wide = Shim(compiled_kernels, "exact", Library(planner))
    found = []
    for library in (shim, wide):
        monkeypatch.setattr(loader, "load", lambda library=library: library)
        params, optimizer = run("celo2", kind, "native", 2)
        found.append(snapshot(optimizer, params))
    assert_equal_bits(*found)


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(("name", "mine"), [("pace", PACE), ("celo2", CELO2)])
def test_a_step_launches_one_kernel_more(name, mine, monkeypatch):
    """And of those that are there twice, those that read anything."""
    groups = [{"params": parameters([(64, 96), (130,), (96, 64)])}]
    launched = launches_of_steps(name, groups, monkeypatch, steps=1, state_dtype="int8")
    assert launched == {kernel.removesuffix("_plain"): count for kernel, count in mine.items()} | {"advance": 1}


@pytest.mark.parametrize("form", [BFLOAT16, INT8], ids=KINDS)
@pytest.mark.parametrize("name", [*ENTRIES, "celo_adam"])
def test_no_format_is_in_the_way_of_the_kernels_for_cuda(name, form):
    rule = create(parameters([(3, 2)]), name).rule
    bucket = SimpleNamespace(device=torch.device("cuda"), params=[torch.empty(3, 2)], form=form)
    assert obstacle(rule, bucket) is None


@pytest.mark.usefixtures("shim")
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (("row", 0), 7, "tensor 0: first and row are not those of a run of rows"),
        (("first", 0), -1, "tensor 0: first and row are not those of a run of rows"),
        (("scale", (0, 0)), 0, "tensor 0: scale 0 is null or misaligned"),
        (("scale_bytes", (0, 0)), 60, "tensor 0: scale 0 has 60 bytes, must have 256"),
    ],
)
def test_a_description_of_codes_that_does_not_fit_is_refused(field, value, message):
    param = nn.Parameter(torch.randn(64, 96))
    optimizer = create([param], "pace", num_steps=10, state_dtype="int8", backend="native")
    give_gradients([param], 0)
    optimizer.step()
    (stages,) = native_parts(optimizer)
    before = snapshot(optimizer, [param])
    name, where = field
    stages._tables[0].table.stored[name][where] = value
    with pytest.raises(NativeError, match=message):
        optimizer.step()
    assert_equal_bits(before, snapshot(optimizer, [param]))


def test_codes_that_are_too_few_are_refused(shim):
    param = nn.Parameter(torch.randn(64, 96))
    optimizer = create([param], "pace", num_steps=10, state_dtype="int8", backend="native")
    give_gradients([param], 0)
    optimizer.step()
    (stages,) = native_parts(optimizer)
    table = stages._tables[0].table
    table.tensors["momentum_bytes"][0, 0] -= 1
    with pytest.raises(NativeError, match="tensor 0: momentum has 6143 bytes, must have 6144"):
        shim.check(table.call)
