"""Does a run go on under any other wrapper, on any number of ranks, from its canonical state?

Whoever goes on is compared, parameters and state, with a run on one device that was not interrupted, in float64.
"""

from __future__ import annotations

import copy
import io

import pytest
import torch
from canonical_cases import (
    after_evaluation_case,
    arrive_case,
    distance,
    leave_case,
    plain_run,
    refusal_case,
    tensors_of,
    unused,
)
from sharded_cases import make, net, train_wrapped
from thetas import distinct_rules
from torch import nn

from pylo_integrations import SmallFCLOpt, param_groups
from pylo_integrations.checkpoints import CheckpointError
from pylo_integrations.state import from_canonical, load_canonical, parameter_names, save_canonical, to_canonical

CLOSE = 1e-12  # of the largest element of a tensor: the order of sums
SETUPS = [
    ("plain", 1),
    ("fsdp1", 1),
    ("fsdp1", 3),
    ("fsdp1_hsdp", 4),
    ("fsdp2", 2),
    ("fsdp2", 4),
    ("hsdp", 4),
    ("tp", 2),
    ("fsdp2_tp", 4),
    ("ddp", 2),
    ("shard_step", 1),
    ("shard_step", 3),
]
FEW = [("plain", 1), ("fsdp1", 3), ("fsdp2_tp", 4), ("shard_step", 3)]
"""One of each way to divide a tensor."""
MANY = {"velo": SETUPS, "small_fc_lopt": FEW, "celo2": FEW}
"""Where optimizers are left and arrive."""


@pytest.fixture(scope="module")
def saved(workers, tmp_path_factory):
    """Paths of runs that were saved under all its setups, by name of the optimizer; and how exact their states are."""
    runs: dict[str, tuple[list[str], float]] = {}

    def of(name: str) -> tuple[list[str], float]:
        if name not in runs:
            folder, paths, worst = tmp_path_factory.mktemp(name), [], 0.0
            for wrapper, world in MANY[name]:
                paths.append(str(folder / f"{wrapper}{world}.pt"))
                left = workers.run(world, leave_case, wrapper=wrapper, name=name, path=paths[-1])
                worst = max(worst, *left)
            runs[name] = paths, worst
        return runs[name]

    return of


@pytest.mark.dist
@pytest.mark.parametrize("name", MANY)
def test_all_setups_have_the_same_state(saved, name):
    assert saved(name)[1] <= CLOSE


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "wrapper", "world"), [(name, *setup) for name, setups in MANY.items() for setup in setups]
)
def test_any_setup_goes_on_from_all_others(workers, saved, name, wrapper, world):
    paths, _ = saved(name)
    assert max(workers.run(world, arrive_case, wrapper=wrapper, name=name, paths=paths)) <= CLOSE


@pytest.mark.dist
@pytest.mark.parametrize("name", [*distinct_rules(), "toy_loss", "toy_finish"])
def test_every_rule_moves(workers, tmp_path, name):
    path = str(tmp_path / "run.pt")
    assert max(workers.run(2, leave_case, wrapper="fsdp1", name=name, path=path)) <= CLOSE
    assert max(workers.run(3, arrive_case, wrapper="shard_step", name=name, paths=[path])) <= CLOSE


@pytest.mark.dist
@pytest.mark.parametrize(("before", "after"), [("shard_step", "fsdp1"), ("fsdp2", "shard_step")])
def test_one_rank_alone_may_have_the_state(workers, tmp_path, before, after):
    path = str(tmp_path / "run.pt")
    assert max(workers.run(2, leave_case, wrapper=before, name="velo", path=path, rank0_only=True)) <= CLOSE
    assert max(workers.run(3, arrive_case, wrapper=after, name="velo", paths=[path], rank0_only=True)) <= CLOSE


@pytest.mark.dist
def test_gathered_parameters_are_no_obstacle_and_files_need_no_pickle(workers, tmp_path):
    assert max(workers.run(2, after_evaluation_case, folder=str(tmp_path))) <= CLOSE


@pytest.mark.dist
def test_all_ranks_refuse_what_the_first_one_has(workers):
    for first, *others in workers.run(2, refusal_case):
        assert "up.weight" in first
        assert len(others) == 2 and all("version" in message for message in others)


# -- on one device -----------------------------------------------------------------------------------------------------


def test_a_file_of_torch_loads_without_code():
    model, optimizer = plain_run("velo", 2)
    canonical, file = to_canonical(optimizer, model), io.BytesIO()
    torch.save(canonical, file)
    file.seek(0)
    again = torch.load(file, weights_only=True)
    assert distance(tensors_of(again), tensors_of(canonical)) == 0
    assert canonical["progress"]["iteration"] == 2 and canonical["rule"] == "VeLORule"
    assert canonical["state"]["up.weight"]["momentum_0"].shape == (14, 5)


def test_the_result_is_a_copy():
    model, optimizer = plain_run("velo", 2)
    canonical = to_canonical(optimizer, model)
    untouched = copy.deepcopy(canonical)
    train_wrapped(model, optimizer, range(2, 4))
    assert distance(tensors_of(canonical), tensors_of(untouched)) == 0
    twin, other = net(), make("velo", net().parameters())
    other = make("velo", twin.parameters())
    from_canonical(other, twin, canonical)
    train_wrapped(twin, other, range(2, 4))
    assert distance(tensors_of(canonical), tensors_of(untouched)) == 0


def test_names_are_those_of_the_bare_model():
    class Odd(nn.Module):  # whose own names look like a wrapper's
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Linear(2, 2, bias=False)
            self.twin = self.module

    for wrapped in (Odd(), torch.compile(Odd()), nn.DataParallel(Odd()), torch.compile(nn.DataParallel(Odd()))):
        assert list(parameter_names(wrapped).values()) == ["module.weight"]


def test_options_of_groups_come_back_in_the_form_they_have():
    model = net()
    groups = param_groups(model, 0.1)
    optimizer = SmallFCLOpt(groups, lr=0.5)
    optimizer.param_groups[0]["lr"] = 0.25  # a scheduler's doing
    canonical = to_canonical(optimizer, model)
    again = [{**group, "weight_decay": 0.3} for group in param_groups(model, 0.1)]
    other = SmallFCLOpt(again, lr=torch.tensor(1.0))
    from_canonical(other, model, canonical)
    rates = [group["lr"] for group in other.param_groups]
    assert list(map(float, rates)) == [0.25, 0.5] and all(isinstance(rate, torch.Tensor) for rate in rates)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0]
    mixed = SmallFCLOpt(model.parameters())
    with pytest.raises(CheckpointError, match="lr.*group the parameters as in the run"):
        from_canonical(mixed, model, canonical)
    assert not mixed.state and mixed.param_groups[0]["lr"] == 1.0


def test_groups_may_be_split_and_parameters_frozen():
    model, optimizer = plain_run("small_fc_lopt", 2)
    canonical = to_canonical(optimizer, model)
    params = list(model.parameters())
    split = make("small_fc_lopt", [{"params": params[3:]}, {"params": params[:3]}])
    params[0].requires_grad_(False)
    from_canonical(split, model, canonical)
    assert split.iteration == 2
    for p in params:
        for key, value in optimizer.state[p].items():
            assert torch.equal(split.state[p][key], value)


def test_parameters_that_are_not_stepped_are_not_named():
    model, optimizer = unused("small_fc_lopt")
    canonical = to_canonical(optimizer, model)
    assert set(canonical["state"]) == {name for name, p in model.named_parameters() if p.requires_grad}
    twin, other = unused("small_fc_lopt")
    from_canonical(other, twin, canonical)


def spoil(canonical, what):
    if what == "version":
        canonical["version"] = 2
    elif what == "keys":
        del canonical["groups"]
    elif what == "rule":
        canonical["rule"] = "VeLORule"
    elif what == "missing":
        del canonical["state"]["up.weight"]
    elif what == "unknown":
        canonical["state"]["out.weight"] = canonical["state"].pop("up.weight")
    elif what == "shape":
        state = canonical["state"]["up.weight"]
        state["rms"] = state["rms"].T.contiguous()
    elif what == "states":
        del canonical["state"]["up.weight"]["rms"]
    elif what == "group":
        canonical["groups"][0]["weight_decay_policy"] = "sometimes"
    return canonical


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("version", "version 2.*newer"),
        ("keys", "keys.*to_canonical"),
        ("rule", "VeLORule.*SmallFC.*create the optimizer"),
        ("missing", "lacks parameters .'up.weight'.*same model"),
        ("unknown", "unknown ones .'out.weight'.*same model"),
        ("shape", "up.weight.*state.*expected.*other shapes"),
        ("states", "up.weight.*state.*expected.*another optimizer"),
        ("group", "weight_decay_policy"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(what, message):
    model, optimizer = plain_run("small_fc_lopt", 2)
    canonical = to_canonical(optimizer, model)
    twin = net()
    other = make("small_fc_lopt", twin.named_parameters())
    train_wrapped(twin, other, range(1))
    before = to_canonical(other, twin)
    with pytest.raises(CheckpointError, match=message):
        from_canonical(other, twin, spoil(canonical, what))
    after = to_canonical(other, twin)
    assert distance(tensors_of(after), tensors_of(before)) == 0
    assert {**after, "state": 0, "memory": 0} == {**before, "state": 0, "memory": 0}


def test_a_model_that_is_not_the_optimizers_is_refused():
    model, optimizer = plain_run("small_fc_lopt", 1)
    with pytest.raises(CheckpointError, match="not parameters of the model"):
        to_canonical(optimizer, net())
    with pytest.raises(TypeError, match="AdamW"):
        to_canonical(torch.optim.AdamW(model.parameters()), model)


def test_files_that_hold_something_else_are_refused(tmp_path):
    model, optimizer = plain_run("small_fc_lopt", 1)
    path = tmp_path / "run.safetensors"
    save_canonical(to_canonical(optimizer, model), path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="save_canonical"):
        load_canonical(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="save_canonical"):
        load_canonical(path)
    with pytest.raises(FileNotFoundError):
        load_canonical(tmp_path / "none.safetensors")
