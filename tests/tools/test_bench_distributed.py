"""Does ``pylo bench --distributed`` count what ranks do, and do dry runs and tables tell what real ranks would count?

Structure, counts and bytes; never speed.
"""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sharded_cases import promised
from thetas import distinct_rules, slow_unless

from pylo_integrations import cli
from pylo_integrations.bench import BASELINES, SHAPES
from pylo_integrations.bench import ranks as on_ranks
from pylo_integrations.bench.contenders import Setting, fresh_parameter, make_contender
from pylo_integrations.bench.counts import elements_on_rank_0, state_bytes_on_rank_0
from pylo_integrations.bench.dry_run import dry_run
from pylo_integrations.bench.measure import state_bytes
from pylo_integrations.bench.shapes import ParamShape
from pylo_integrations.bench.strategies import SIMULABLE
from pylo_integrations.sharding.agreement import HEADER
from pylo_integrations.sharding.collectives import Collective, Collectives

KINDS = ["small_fc_lopt", "velo", "celo_adam", "celo2"]
"""One of each way to talk; the others take the same paths."""


# -- counting ------------------------------------------------------------------------------------------------------


def start_some(rank, world):
    whole, parts = torch.zeros(3, dtype=torch.float64), torch.zeros(4 * world)
    with Collectives() as noted:
        dist.all_reduce(whole)
        dist.all_to_all_single(torch.zeros(4 * world), parts)
        dist.all_gather([torch.zeros(5) for _ in range(world)], torch.zeros(5))
        dist.all_gather_into_tensor(torch.zeros(6 * world), torch.zeros(6))
        dist.broadcast(torch.zeros(7, dtype=torch.bfloat16), 0)
        whole += 1  # no collective
    dist.all_reduce(whole)  # nobody is counting any more
    return noted.seen


@pytest.mark.dist
def test_collectives_are_noted_with_what_each_rank_puts_in(workers):
    names = ["allreduce_", "alltoall_base_", "allgather_", "_allgather_base_", "broadcast_"]
    for seen in workers.run(2, start_some):
        assert [collective.name for collective in seen] == names
        assert [collective.bytes for collective in seen] == [24, 32, 20, 24, 14]


# -- real ranks and dry runs -----------------------------------------------------------------------------------------


def counted_rank(rank, world, **options):
    """``measure_rank`` without the steps that it only times, which are most of them."""
    with mock.patch.object(on_ranks, "sample_in_turn", lambda steps, *_: dict.fromkeys(steps)):
        return on_ranks.measure_rank(rank, world, **options)


def counted(workers, strategy, ranks, optimizers):
    """What each rank found of each optimizer, its own torch functions at work."""
    options = {"shapes": "tiny", "dtype": "float32", "strategy": strategy, "repeats": 1}
    names = [f"{name}:reference" for name in optimizers]
    return workers.run(ranks, counted_rank, optimizers=names, **options)


@functools.cache
def tiny_dry_run(strategy, ranks, name):
    return dry_run(SHAPES["tiny"](), strategy, ranks, [name])[name]


CASES = [
    ("ddp", 2),
    ("shard_step", 2),
    ("shard_step", 4),
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp1", 2),
]


@pytest.mark.dist
@pytest.mark.parametrize(("strategy", "ranks"), CASES)
def test_real_ranks_count_as_promised_and_as_a_dry_run(workers, strategy, ranks):
    optimizers = distinct_rules() if (strategy, ranks) == ("fsdp2", 2) else KINDS
    by_rank = counted(workers, strategy, ranks, optimizers)
    assert all(not found[name]["collectives"] for found in by_rank for name in BASELINES)
    for name in optimizers:
        first, *others = (found[f"{name}:reference"] for found in by_rank)
        want = promised(name, ranks, sharded=strategy != "ddp") + ["_allgather_base_"] * (strategy == "shard_step")
        for mine in (first, *others):
            assert [collective.name for collective in mine["collectives"]] == want
            # What is added up is equal in size everywhere; of what is put together, ranks have different parts.
            mine_sums, first_sums = (
                [c for c in found if c.kind == "all_reduce"] for found in (mine["collectives"], first["collectives"])
            )
            assert mine_sums == first_sums
        if strategy in SIMULABLE:
            costs = tiny_dry_run(strategy, ranks, name)
            assert (costs.state_bytes, list(costs.collectives)) == (first["state_bytes"], first["collectives"]), name
            assert max(mine["state_bytes"] for mine in others) <= first["state_bytes"]


@pytest.mark.dist
def test_flat_slices_of_all_ranks_make_up_the_state_of_whole_tensors(workers):
    by_rank = counted(workers, "fsdp1", 2, ["celo_adam"])
    numel = sum(math.prod(kind.shape) for kind in SHAPES["tiny"]())
    assert sum(found["celo_adam:reference"]["state_bytes"] for found in by_rank) == 2 * 4 * numel


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [slow_unless((s, n) == ("fsdp2", 4), s, n) for s in SIMULABLE for n in (4, 24)],
)
def test_rules_name_the_state_that_a_dry_run_makes(strategy, ranks):
    shapes = SHAPES["tiny"]()
    for name in distinct_rules():
        costs = tiny_dry_run(strategy, ranks, name)
        assert state_bytes_on_rank_0(name, shapes, strategy, ranks) == costs.state_bytes, name
        assert elements_on_rank_0(shapes, strategy, ranks) == costs.elements


# -- formulas --------------------------------------------------------------------------------------------------------


def rows_and_columns(shape):
    largest = sorted(shape)[-2:]
    return sum(math.prod(shape) // extent for extent in largest) if len(shape) > 1 else 0


@pytest.mark.parametrize(("shapes", "ranks"), [("vit_ti", 8), ("gpt2", 64)])
def test_small_fc_costs_what_its_definition_says(shapes, ranks):
    kinds = SHAPES[shapes]()
    [costs] = dry_run(kinds, "fsdp2", ranks, ["small_fc_lopt"]).values()
    lines, state = sum(rows_and_columns(kind.shape) for kind in kinds), 0
    for kind in kinds:
        here = math.ceil(kind.shape[0] / ranks) * math.prod(kind.shape[1:])
        # Three momenta and a second moment; vectors have three more of those in place of rows and columns.
        state += 4 * (4 * here + 3 * rows_and_columns(kind.shape) if len(kind.shape) > 1 else 7 * here)
    assert costs.state_bytes == state
    # In float64: whether ranks do the same, sums of squares along rows and columns, one over all, who has gradients and
    # can use kernels; then 28 features a tensor.
    want = [8 * (HEADER + lines + 1 + 2 * len(kinds)), 8 * 28 * len(kinds)]
    assert costs.collectives == tuple(Collective("allreduce_", size) for size in want)


def test_shared_steps_share_the_state_that_is_shaped_like_parameters():
    kinds, ranks = SHAPES["vit_ti"](), 8
    state = 0
    for kind in kinds:
        # (1, 1, 192) and (1, 197, 192) have nothing to share along their first axes.
        long = [extent for extent in kind.shape if extent > 1]
        here = -(-long[0] // ranks) * math.prod(long[1:])
        state += 4 * (4 * here + 3 * rows_and_columns(kind.shape) if len(kind.shape) > 1 else 7 * here)
    assert state_bytes_on_rank_0("small_fc_lopt", kinds, "shard_step", ranks) == state
    numel = sum(math.prod(kind.shape) for kind in kinds)
    assert elements_on_rank_0(kinds, "shard_step", ranks) == numel
    assert state < 1.1 * state_bytes_on_rank_0("small_fc_lopt", kinds, "ddp", ranks) / ranks


def test_a_7b_model_on_256_ranks():
    kinds = SHAPES["llama_7b"]()
    assert sum(math.prod(kind.shape) for kind in kinds) == 6_738_415_616  # Touvron et al., 2023: 6.7 B
    [costs] = dry_run(kinds, "fsdp2", 256, ["small_fc_lopt"]).values()
    assert costs.elements == sum(math.prod(kind.shape) for kind in kinds) // 256
    assert 16 < costs.state_bytes / costs.elements < 18
    assert costs.blocks < 500  # what the plan consists of


def test_shapes_of_llama_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, vocab_size=32000)
    from pylo_integrations import param_groups

    with torch.device("meta"):
        groups = param_groups(transformers.LlamaForCausalLM(config))
    found = sorted((tuple(param.shape), group["axes"]) for group in groups for _, param in group["params"])
    # Axes mean nothing for vectors.
    assert found == sorted((kind.shape, kind.axes) for kind in SHAPES["llama_7b"]())


@pytest.mark.slow
def test_traffic_does_not_grow_with_ranks_and_state_falls():
    few, many = (dry_run(SHAPES["vit_ti"](), "fsdp2", ranks, KINDS) for ranks in (8, 64))
    for name in KINDS:
        for left, right in zip(few[name].collectives, many[name].collectives, strict=True):
            if left.kind == "all_reduce":
                assert left == right
            else:  # whole tensors travel in pieces: what a rank sends falls with what it holds, or owns
                assert right.bytes < left.bytes
        assert many[name].state_bytes < few[name].state_bytes


def test_a_dry_run_leaves_nothing_behind():
    before = torch.get_rng_state()
    dry_run(SHAPES["tiny"](), "hsdp", 4, ["celo2"])
    assert not dist.is_initialized() and torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_simulated_is_refused():
    with pytest.raises(ValueError, match="'fsdp1' cannot be simulated"):
        dry_run(SHAPES["tiny"](), "fsdp1", 4, ["velo"])
    with pytest.raises(ValueError, match="'hsdp' is not for 3 ranks"):
        dry_run(SHAPES["tiny"](), "hsdp", 3, ["velo"])
    with pytest.raises(RuntimeError, match="not part of a process group"):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            dry_run(SHAPES["tiny"](), "fsdp2", 4, ["velo"])
        finally:
            dist.destroy_process_group()


# -- tables and command line -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_page_is_what_the_command_prints(capsys):
    assert cli.main(["bench", "--distributed", "tables"]) == 0
    page = Path(__file__).parents[2] / "docs" / "distributed_costs.md"
    assert capsys.readouterr().out == page.read_text()


def test_the_page_on_memory_ends_with_what_the_command_prints(capsys):
    assert cli.main(["bench", "--distributed", "memory"]) == 0
    page = Path(__file__).parents[2] / "docs" / "memory.md"
    assert page.read_text().endswith("\n\n" + capsys.readouterr().out)


@pytest.mark.parametrize("choice", ["bfloat16", "int8"])
def test_bytes_of_a_format_are_those_that_an_optimizer_keeps(choice):
    for name in ("celo2", "pace"):
        setting = Setting("tiny", "float32", "cpu", 1)
        parameters = setting.parameters()
        parameters.append((fresh_parameter((128, 96), torch.float32, "cpu"), ParamShape((128, 96))))
        optimizer, _ = make_contender(f"{name}:{choice}", parameters)
        optimizer.init_state()
        kinds = [kind for _, kind in parameters]
        assert state_bytes(optimizer) == state_bytes_on_rank_0(name, kinds, "ddp", 1, choice)


@pytest.mark.dist
def test_a_measurement_in_print_and_in_a_file(workers, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pylo_integrations.cli.bench.Workers", lambda: workers)
    monkeypatch.setattr(workers, "close", lambda: None)
    path = tmp_path / "out.json"
    options = ["--shapes", "tiny", "--strategies", "ddp,hsdp", "--ranks", "1,2,4", "--repeats", "2"]
    assert cli.main(["bench", "--distributed", *options, "--json", str(path)]) == 0
    out, report = capsys.readouterr().out, json.loads(path.read_text())
    assert {"collectives", "state_bytes", "step_seconds"} <= set(report["method"]) and out.count("measured: tiny") == 4
    found = {(record["strategy"], record["ranks"], record["optimizer"]): record for record in report["results"]}
    assert {key[:2] for key in found} == {("ddp", 1), ("ddp", 2), ("ddp", 4), ("hsdp", 4)}
    assert {key[2] for key in found} == {"small_fc_lopt", *BASELINES}
    record = found["hsdp", 4, "small_fc_lopt"]
    assert [each["name"] for each in record["collectives"]] == ["allreduce_"] * 2
    assert len(record["state_bytes"]) == 4 and len(record["step_seconds_samples"]) == 2
    assert min(record["step_seconds_samples"]) <= record["step_seconds"] <= max(record["step_seconds_samples"])


def test_a_failed_measurement_is_told_and_the_others_go_on(capsys, monkeypatch):
    def fail(workers, shapes, dtype, strategy, *args):
        if strategy == "ddp":
            raise RuntimeError("rank 1 of 2: no answer within 600 s")
        return []

    monkeypatch.setattr(on_ranks, "measure", fail)
    monkeypatch.setattr(on_ranks, "format_measured", lambda records: "TABLE")
    assert cli.main(["bench", "--distributed", "--shapes", "tiny", "--strategies", "ddp,tp", "--ranks", "2"]) == 1
    out, err = capsys.readouterr()
    assert out.count("TABLE") == 1 and "tiny, ddp on 2 ranks failed: rank 1 of 2" in err


@pytest.mark.slow
def test_a_simulation_in_print_in_a_file_and_as_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "out.json", tmp_path / "out.png"
    options = ["--shapes", "tiny,matrix", "--ranks", "4,16", "--strategies", "fsdp2,hsdp", "--json", str(path)]
    assert cli.main(["bench", "--distributed", "simulate", *options, "--plot", str(picture)]) == 0
    out, report = capsys.readouterr().out, json.loads(path.read_text())
    assert out.count("simulated (but for the time to plan)") == 2 and {"simulated", "measured"} <= set(report["method"])
    assert len(report["results"]) == 8 and picture.read_bytes().startswith(b"\x89PNG")
    record = report["results"][0]
    [costs] = dry_run(SHAPES["tiny"](), "fsdp2", 4, ["small_fc_lopt"]).values()
    assert (record["state_bytes"], record["parameters_per_rank"]) == (costs.state_bytes, costs.elements)
    assert record["plan_seconds"] > 0 and "step_seconds" not in record


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "2"], "--ranks means nothing without --distributed"),
        (["--distributed", "--threads", "2"], "--threads means nothing with --distributed measure"),
        (["--distributed", "--plot", "x.png"], "--plot means nothing with --distributed measure"),
        (["--distributed", "simulate", "--repeats", "2"], "--repeats means nothing with --distributed simulate"),
        (["--distributed", "tables", "--optimizers", "velo"], "--optimizers means nothing with --distributed tables"),
        (["--distributed", "guess"], "invalid choice: 'guess'"),
        (["--distributed", "--ranks", "0"], "'0' is not a positive integer"),
        (["--distributed", "--strategies", "ddp,zero"], "unknown strategy 'zero'; available: ddp, shard_step, fsdp2"),
        (["--distributed", "--strategies", "hsdp", "--ranks", "2"], "none of the strategies hsdp is for 2 ranks"),
        (["--distributed", "simulate", "--strategies", "fsdp1"], "strategy 'fsdp1' can be measured, but not simulated"),
        (["--distributed", "simulate", "--optimizers", "velo:native"], "'velo:native' names a backend"),
    ],
)
def test_misuse_is_refused_in_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["bench", *options])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == "" and err.count("\n") == 1 and message in err


# -- workers ---------------------------------------------------------------------------------------------------------


def fail_on_rank_1(rank, world):
    if rank == 1:
        raise ValueError("nothing to see here")
    return rank


def sleep(rank, world):
    time.sleep(30 * rank)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("function", "message"), [(fail_on_rank_1, "rank 1 of 2: .*nothing to see"), (sleep, "no answer within 1 s")]
)
def test_workers_that_fail_or_hang_are_reported_and_replaced(ranks, function, message):
    ranks.run(2, start_some)  # they have started
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        ranks.run(2, function, timeout=1 if function is sleep else 60)
    assert not ranks._groups
