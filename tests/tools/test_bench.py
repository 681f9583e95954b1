"""Does ``pylo bench`` measure what it says? Structure, counts and memory; never speed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from pylo_integrations import bench, cli, create_optimizer, list_optimizers, param_groups
from pylo_integrations.bench import contenders, measure, steps

TINY = bench.Setting("tiny", "float32", "cpu", torch.get_num_threads())
MIB = 2**20


def signature(groups):
    return sorted((tuple(param.shape), group["axes"]) for group in groups for _, param in group["params"])


def of_shapes(name):
    return sorted((kind.shape, kind.axes) for kind in bench.SHAPES[name]())


@pytest.mark.parametrize(
    ("shapes", "parameters", "tensors"),
    [("vit_ti", 5_717_416, 152), ("vit_b16", 86_567_656, 152), ("gpt2", 124_439_808, 148)],
)
def test_parameter_counts_are_those_of_the_papers(shapes, parameters, tensors):
    made = bench.SHAPES[shapes]()
    assert (sum(math.prod(shape) for shape, *_ in made), len(made)) == (parameters, tensors)


@pytest.mark.parametrize(("shapes", "model"), [("vit_ti", "vit_tiny_patch16_224"), ("vit_b16", "vit_base_patch16_224")])
def test_vit_shapes_are_those_of_timm(shapes, model):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        groups = param_groups(timm.create_model(model))
    assert signature(groups) == of_shapes(shapes)


def test_gpt2_shapes_and_axes_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        groups = param_groups(transformers.GPT2LMHeadModel(transformers.GPT2Config()))
    assert signature(groups) == of_shapes("gpt2")


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_report_holds_every_contender_of_every_setting(tmp_path, capsys, monkeypatch):
    path = tmp_path / "out.json"
    argv = ["bench", "--shapes", "tiny", "--threads", "1", "--repeats", "2", "--json", str(path)]
    argv += ["--optimizers", "small_fc_lopt"]
    monkeypatch.setattr(sys, "argv", ["pylo", *argv])
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["command"] == f"pylo {' '.join(argv)}"
    assert {"processor", "cores", "torch", "python", "pylo_integrations"} <= set(report["machine"])
    assert report["machine"]["torch"] == torch.__version__ and report["date"].endswith("+00:00")
    by_name = {record["optimizer"]: record for record in report["results"]}
    assert list(by_name) == ["small_fc_lopt", *bench.BASELINES]
    numel = sum(math.prod(shape) for shape, *_ in bench.SHAPES["tiny"]())
    for name, record in by_name.items():
        assert name in out
        assert (record["parameters"], record["threads"], record["dtype"]) == (numel, 1, "float32")
        samples = record["step_seconds_samples"]
        assert len(samples) == 2 and min(samples) <= record["step_seconds"] <= max(samples)
        assert record["parameters_per_second"] == pytest.approx(numel / record["step_seconds"])
        assert record[f"times_{name}"] == 1 if name in bench.BASELINES else record["times_adamw_fused"] > 0
    # AdamW keeps two moments and a step count per tensor; small_fc three momenta, a second moment, rows and columns.
    assert 8 < by_name["adamw_fused"]["state_bytes_per_parameter"] < 8.1
    assert 16 < by_name["small_fc_lopt"]["state_bytes_per_parameter"] < 20


def test_ratios_are_medians_within_rounds(monkeypatch):
    # The machine slows down threefold in the second round; the ratio does not notice, that of the medians would.
    samples = {"small_fc_lopt": [2.0, 6.0, 4.0], "adamw_fused": [1.0, 3.0, 1.0], "adamw_foreach": [1.0, 3.0, 2.0]}
    samples |= {base: samples["adamw_fused"] for base in bench.BASELINES if base not in samples}
    answers = {bench.sample_step_seconds: lambda *args: samples, bench.measure_memory: lambda *args: (16.0, None)}
    monkeypatch.setattr(steps, "in_fresh_process", lambda function, *args: answers[function](*args))
    learned, fused, foreach, *_ = bench.run_bench(TINY, ["small_fc_lopt"], 3)
    assert (learned["step_seconds"], learned["times_adamw_fused"], learned["times_adamw_foreach"]) == (4.0, 2.0, 2.0)
    table = bench.format_table([learned, fused, foreach]).splitlines()
    assert len(table) == 5 and "unknown" in table[2] and len({len(line) for line in table[1:]}) == 1


def test_eight_bits_of_others_run_beside_states_of_few_bits(monkeypatch, tmp_path, capsys):
    """Of packages that are here; of those that are not it is said in a line."""
    package = tmp_path / "torchao"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "optim.py").write_text("from torch.optim import AdamW as AdamW8bit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(contenders.EIGHT_BIT, "bitsandbytes_adamw8bit", "absent_package.optim")
    assert steps.compared(["pace", "celo2:native"]) == ([], [])
    names, reasons = steps.compared(["pace", "pace:int8"])
    assert names == ["torchao_adamw8bit"]
    assert reasons == ["bitsandbytes_adamw8bit is left out: absent_package is not installed"]
    parameters = TINY.parameters()
    optimizer, step = bench.make_contender("torchao_adamw8bit", parameters)
    before = [param.detach().clone() for param, _ in parameters]
    step()
    assert all(not torch.equal(old, param) for old, (param, _) in zip(before, parameters, strict=True))


def test_bytes_of_subclasses_are_those_of_what_they_are_made_of():
    codes, scales = torch.zeros(256, dtype=torch.uint8), torch.zeros(1)

    class Quantised:
        state = {0: {"exp_avg": None}}

    class Codes(torch.Tensor):
        def __tensor_flatten__(self):
            return ["codes", "scales"], None

    value = torch.zeros(256).as_subclass(Codes)
    value.codes, value.scales = codes, scales
    Quantised.state[0] = {"exp_avg": value, "map": codes}
    assert measure.state_bytes(Quantised()) == 256 + 4  # the map is the codes, which count once


def test_contenders_step_in_turn_and_in_alternating_order(monkeypatch):
    order = []

    def make(name, parameters):
        return None, lambda: order.append(name)

    monkeypatch.setattr(measure, "make_contender", make)
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)
    threads = torch.get_num_threads()
    samples = bench.sample_step_seconds(TINY, ["a", "b"], 3)
    assert torch.get_num_threads() == threads
    assert "".join(order[-6:]) == "abbaab" and {len(times) for times in samples.values()} == {3}


@pytest.mark.parametrize("dtype", bench.DTYPES)
def test_every_contender_steps_every_dtype(dtype):
    setting = bench.Setting("tiny", dtype, "cpu", torch.get_num_threads())
    for name in ["small_fc_lopt", *bench.BASELINES]:
        parameters = setting.parameters()
        before = [param.detach().clone() for param, _ in parameters]
        optimizer, step = bench.make_contender(name, parameters)
        for group in optimizer.param_groups:
            group["lr"] = 1.0  # the benchmark's own is lost in bfloat16
        step()
        assert all(param.dtype == bench.DTYPES[dtype] for param, _ in parameters)
        assert all(param.isfinite().all() for param, _ in parameters)
        assert not all(torch.equal(old, param) for old, (param, _) in zip(before, parameters, strict=True))


def test_a_contender_steps_all_parameters_with_their_axes():
    parameters = bench.Setting("tiny", "float32", "cpu", 1).parameters()
    parameters[0] = (parameters[0][0], bench.ParamShape(parameters[0][1].shape, "in_out"))
    optimizer, _ = bench.make_contender("small_fc_lopt", parameters)
    stepped = {param: group["axes"] for group in optimizer.param_groups for param in group["params"]}
    assert stepped == {param: kind.axes for param, kind in parameters}


@pytest.mark.parametrize("name", list_optimizers())
def test_every_optimizer_can_be_a_contender_without_its_published_weights(name):
    parameters = TINY.parameters()
    parameters[0] = (parameters[0][0], bench.ParamShape(parameters[0][1].shape, "in_out", embeds=True))
    optimizer, step = bench.make_contender(name, parameters)
    rules = {param: group["rule"] for group in optimizer.param_groups for param in group["params"]}
    assert rules[parameters[0][0]] == ("adamw" if name in ("celo2", "pace") else "learned")
    step()
    assert optimizer.iteration == 1


def test_a_loss_driven_optimizer_can_be_a_contender(toy_loss):
    optimizer, step = bench.make_contender(toy_loss.name, TINY.parameters())
    step()
    assert optimizer.iteration == 1


# -- memory: the meter against allocations of known size -------------------------------------------------------------


def hold_one_tensor():
    torch.ones(64 * MIB // 4)


def hold_many_small_tensors():
    held = [torch.ones(4096) for _ in range(4096)]  # below malloc's threshold for memory maps
    del held


def hold_one_after_another():
    # Above 32 MiB malloc always maps and unmaps. Below, it may place the next in a new place while the old one is still
    # resident, as a hole in the heap: 8 MiB for tensors of 4 MiB, which the meter sees and a step really costs.
    for _ in range(4):
        torch.ones(64 * MIB // 4)


def keep_nothing():
    torch.ones(8).sum()


def growth_after_warm_up(work):
    work()  # what malloc keeps of this must not hide the second call
    return bench.peak_growth(work)


WORKS = {hold_one_tensor: 64, hold_many_small_tensors: 64, hold_one_after_another: 64, keep_nothing: 0}
"""MiB at once, by what allocates them."""


def growths_after_warm_up():
    return [growth_after_warm_up(work) for work in WORKS]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_memory_of_known_allocations():
    measured = bench.in_fresh_process(growths_after_warm_up)
    for (work, mebibytes), growth in zip(WORKS.items(), measured, strict=True):
        assert mebibytes - 1 <= growth / MIB <= mebibytes * 1.05 + 2, work.__name__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_memory_of_known_allocations_on_a_gpu():
    assert bench.peak_growth(lambda: torch.ones(64 * MIB // 4, device="cuda"), "cuda") == 64 * MIB
    state_bytes, peak = bench.measure_memory(bench.Setting("tiny", "float32", "cuda", 1), "small_fc_lopt")
    assert state_bytes > 16 and peak > 0


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_peak_of_a_step_is_seen_and_bounded_by_chunk_bytes():
    # 28 features of this matrix are 448 MiB; a learned step makes them block by block.
    peak = bench.in_fresh_process(growth_after_warm_up_of_a_step)
    assert 0 < peak < 100 * MIB


def growth_after_warm_up_of_a_step():
    weight = torch.nn.Parameter(torch.randn(2048, 2048))
    weight.grad = torch.randn(2048, 2048)
    return growth_after_warm_up(create_optimizer([weight], "small_fc_lopt").step)


def test_memory_that_cannot_be_measured_is_unknown(monkeypatch):
    def refuse(self, text):
        raise PermissionError("clear_refs")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert bench.peak_growth(lambda: None) is None
