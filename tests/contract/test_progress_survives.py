"""Do iteration, horizon and loss memory come back, whatever path of torch's checkpoints a run takes?"""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
from survival_cases import (
    first_version_case,
    flatten_case,
    in_backward_case,
    in_place_case,
    post_local_case,
    recipe,
    zero_case,
)
from thetas import create, distinct_rules
from torch import nn

from pylo_integrations import CheckpointError, get_optimizer_info
from pylo_integrations.state import from_canonical, load_canonical

NAMES = [*distinct_rules(), "toy_loss"]
REMEMBERING = ["velo", "celo", "celo_adam"]
OLD = Path(__file__).parent / "written_by_0_1_0"


def check(results):
    for before, after, distance in results:
        assert before == after and before[0][:2] == (3, 40) and distance == 0


@pytest.mark.dist
@pytest.mark.parametrize("saved", [True, False], ids=["dcp", "memory"])
@pytest.mark.parametrize("name", NAMES)
def test_flattened_state_dicts(workers, tmp_path, name, saved):
    check(workers.run(1, flatten_case, name=name, wrapper="plain", folder=str(tmp_path) if saved else None))


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp", "shard_step", "fsdp1"])
@pytest.mark.parametrize("name", ["velo", "celo2"])
def test_flattened_state_dicts_of_ranks(workers, tmp_path, name, wrapper):
    check(workers.run(2, flatten_case, name=name, wrapper=wrapper, folder=str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "toy_loss"]
)  # whose memory is made by its first step
def test_loading_in_place(workers, tmp_path, name):
    check(workers.run(1, in_place_case, name=name, wrapper="plain", folder=str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["fsdp2", "shard_step"])
@pytest.mark.parametrize("name", ["velo", "celo2"])
def test_loading_in_place_on_ranks(workers, tmp_path, name, wrapper):
    check(workers.run(2, in_place_case, name=name, wrapper=wrapper, folder=str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize("name", distinct_rules())
def test_zero_redundancy_optimizer(workers, name):
    check(workers.run(2 if name in REMEMBERING else 1, zero_case, name=name))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["celo", "celo2", "small_fc_lopt"])
def test_post_local_sgd_optimizer(workers, name):
    for *result, averaged in workers.run(2, post_local_case, name=name):
        check([result])
        assert averaged == (6, 6)


WITHOUT_LOSS = [name for name in distinct_rules() if not get_optimizer_info(name).needs_loss]


@pytest.mark.dist
@pytest.mark.parametrize("name", WITHOUT_LOSS)
def test_optimizers_in_backward(workers, tmp_path, name):
    """Without DistributedDataParallel, whose hook for them wants an accelerator."""
    ((before, after, apart, distance),) = workers.run(1, in_backward_case, name=name, folder=str(tmp_path))
    assert before == after and len(before) > 3 and {counts[:2] for counts, _ in before} == {(3, 40)}
    assert distance == 0 and (apart <= 1e-6 or name == "pace")  # which decides for the whole model


@pytest.mark.parametrize("name", REMEMBERING)
def test_an_optimizer_in_backward_that_needs_the_loss_is_refused(name):
    """It is known when backward() is over."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    cls, options = recipe(name)
    model = nn.Linear(4, 3)
    _apply_optimizer_in_backward(cls, model.parameters(), options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        RuntimeError, match=f"{cls.__name__} needs the training loss .* inside backward.* such as celo2"
    ):
        model(torch.ones(2, 4)).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# -- on one device -----------------------------------------------------------------------------------------------------


def trained(name, steps=3, num_steps=9, **options):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = create(model.named_parameters(), name, num_steps=num_steps, **options)
    for step in range(steps):
        for p in model.parameters():
            p.grad = torch.linspace(-1, 1, p.numel()).view_as(p) + step
        optimizer.step(loss=2.0 - 0.3 * step)
    return model, optimizer


def facts(optimizer):
    memory = {key: value.tolist() for key, value in optimizer._progress.memory.items()}
    return optimizer.iteration, optimizer.num_steps, memory


def fresh(name):
    optimizer = trained(name, 0)[1]
    optimizer.set_num_steps(None)
    return optimizer


def without_blob(state_dict):
    state_dict["param_groups"][0]["progress"] = b""
    return state_dict


def without_tensors(state_dict):
    state = {i: {n: v for n, v in own.items() if not n.startswith("run_")} for i, own in state_dict["state"].items()}
    return {**state_dict, "state": state}


@pytest.mark.parametrize("form", [without_blob, without_tensors])
@pytest.mark.parametrize("name", distinct_rules())
def test_either_form_is_enough(name, form):
    optimizer, other = trained(name)[1], fresh(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(form(optimizer.state_dict()))
    assert facts(other) == facts(optimizer)


@pytest.mark.parametrize("name", distinct_rules())
def test_states_without_either_are_loaded_loudly(name):
    optimizer, other = trained(name)[1], fresh(name)
    with pytest.warns(RuntimeWarning, match="without the iteration.*goes on from iteration 0"):
        other.load_state_dict(without_tensors(without_blob(optimizer.state_dict())))
    handed = fresh(name)  # as ZeroRedundancyOptimizer does with a checkpoint of version 0.1.0
    handed.set_num_steps(9)
    params = handed.param_groups[0]["params"]
    for param, own in zip(params, without_tensors(optimizer.state_dict())["state"].values(), strict=False):
        handed.state[param] = {key: value.clone() for key, value in own.items()}
        param.grad = torch.ones_like(param)
    with pytest.warns(RuntimeWarning, match="without the iteration"):
        handed.step(loss=1.0)


@pytest.mark.parametrize("name", ["celo", "celo2"])
def test_groups_of_a_new_optimizer_do_not_start_the_run_anew(name):
    """As people keep new hyper-parameters; and the other way round, where only the groups could be loaded."""
    optimizer = trained(name)[1]
    saved, new = optimizer.state_dict(), fresh(name)
    new.load_state_dict({"state": saved["state"], "param_groups": fresh(name).state_dict()["param_groups"]})
    assert facts(new) == facts(optimizer)
    begun = fresh(name)
    begun.init_state()
    start = {key: value for key, value in begun.state_dict()["state"][0].items() if key.startswith("run_")}
    states = {i: {**own, **start} for i, own in saved["state"].items()}
    other = fresh(name)
    other.load_state_dict({"state": states, "param_groups": saved["param_groups"]})
    assert facts(other) == facts(optimizer)


def test_states_and_groups_of_two_runs_are_refused():
    early, late = (trained("celo", steps)[1].state_dict() for steps in (2, 3))
    for mixed in (
        {"state": early["state"], "param_groups": late["param_groups"]},
        {"state": {0: early["state"][0], 1: late["state"][1]}, "param_groups": late["param_groups"]},
    ):
        other = fresh("celo")
        with pytest.raises(CheckpointError, match="iteration"):
            other.load_state_dict(mixed)
        assert other.iteration == 0 and not other.state


def test_a_horizon_that_is_set_is_kept_in_place_too():
    optimizer, other = trained("celo")[1], trained("celo", 1, num_steps=20)[1]
    for own, theirs in zip(other.state_dict()["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        for key, value in own.items():
            value.copy_(theirs[key])
    assert (other.iteration, other.num_steps) == (3, 20)
    assert facts(other)[2] == facts(optimizer)[2]


def test_to_write_into_a_state_dict_is_to_load_as_with_torchs_own_optimizers():
    """Loading in place depends on it, so it cannot be told from it; a copy is one."""
    optimizer = trained("celo")[1]
    param = nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([param])
    param.grad = torch.ones(3)
    theirs.step()
    for one in (optimizer, theirs):
        before = copy.deepcopy(one.state_dict()["state"])
        for own in copy.deepcopy(one.state_dict())["state"].values():
            [value.zero_() for value in own.values()]
        torch.testing.assert_close(one.state_dict()["state"], before, rtol=0, atol=0)
        for own in one.state_dict()["state"].values():
            [value.zero_() for value in own.values()]
    assert theirs.state[param]["step"] == 0
    assert (optimizer.iteration, optimizer.num_steps) == (0, 9), "the horizon was set, and is kept"
    assert not any(value.any() for own in optimizer.state.values() for value in own.values())
    optimizer.step(loss=1.0)
    assert optimizer.iteration == 1


def test_tensors_of_the_run_are_not_states():
    """What they would do to code that goes through all states, they do in state dicts only."""
    _, optimizer = trained("velo")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = fresh("velo")
    other.load_state_dict(torch.load(file, weights_only=True))
    for some in (optimizer, other):
        assert not any(name.startswith("run_") for own in some.state.values() for name in own)
        assert some.param_groups[0]["progress"] == b"" and "progress" not in some.state_dict()["param_groups"][1:]


def test_a_copied_group_brings_no_second_progress():
    model, optimizer = trained("celo2")
    options = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "param_names")}
    optimizer.add_param_group({**options, "params": [("more", nn.Parameter(torch.ones(2, 2)))]})
    assert ["progress" in group for group in optimizer.state_dict()["param_groups"]] == [
        index == 0 for index in range(len(optimizer.param_groups))
    ]


# -- what version 0.1.0 wrote ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(OLD.glob("*.pt")), ids=lambda path: path.stem)
def test_state_dicts_of_the_first_version_load(path):
    saved = torch.load(path, weights_only=True)
    optimizer, other = fresh(path.stem), trained(path.stem)[1]
    optimizer.load_state_dict(saved)
    assert facts(optimizer)[:2] == (3, 9)
    assert facts(optimizer)[2].keys() == facts(other)[2].keys()
    for param, own in zip(
        (p for g in optimizer.param_groups for p in g["params"]), saved["state"].values(), strict=True
    ):
        assert all(torch.equal(optimizer.state[param][key], value) for key, value in own.items())


def test_flattened_state_dicts_of_the_first_version_load():
    """They had the progress in them, but it was dropped when they were loaded."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    saved = torch.load(OLD / "celo.pt", weights_only=True)
    names = ["weight", "bias"]
    flat = {f"state.{names[i]}.{key}": value for i, own in saved["state"].items() for key, value in own.items()}
    for group in saved["param_groups"]:
        for index in group.pop("params"):
            flat |= {f"param_groups.{names[index]}.{key}": value for key, value in group.items()}
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    optimizer = create(model.named_parameters(), "celo")
    optimizer.set_num_steps(None)
    set_optimizer_state_dict(model, optimizer, flat, options=StateDictOptions(flatten_optimizer_state_dict=True))
    assert facts(optimizer)[:2] == (3, 9)


def test_distributed_checkpoints_of_the_first_version_load_in_part(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import DefaultLoadPlanner

    model, writer = trained("celo")
    saved = without_tensors(writer.state_dict())
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path)
    optimizer = fresh("celo")
    optimizer.init_state()
    state = {"optimizer": optimizer.state_dict()}
    with pytest.raises(dcp.api.CheckpointException, match="run_iteration"):
        dcp.load(state, checkpoint_id=tmp_path)
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert optimizer.iteration == 0, "bytes are not loaded in place"
    optimizer.load_state_dict(state["optimizer"])
    assert facts(optimizer) == facts(writer)
    assert all(
        torch.equal(value, optimizer.state[p][key])
        for p, own in zip(optimizer.state, saved["state"].values(), strict=True)
        for key, value in own.items()
    )
    used = trained("celo", 2)[1]
    state = {"optimizer": used.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, planner=DefaultLoadPlanner(allow_partial_load=True))
    with pytest.raises(CheckpointError, match="groups are of iteration 3, its states of 2"):
        used.load_state_dict(state["optimizer"])


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["plain", "fsdp2", "shard_step"])
def test_distributed_checkpoints_of_the_first_version_load_in_part_on_ranks(workers, tmp_path, wrapper):
    world = 1 if wrapper == "plain" else 2
    for told, *result in workers.run(world, first_version_case, name="celo", wrapper=wrapper, folder=str(tmp_path)):
        assert "Missing key in checkpoint state_dict" in told and "run_iteration" in told
        check([result])


def test_canonical_files_of_the_first_version_load():
    model, optimizer = trained("velo", 0)
    optimizer.set_num_steps(None)
    from_canonical(optimizer, model, load_canonical(OLD / "velo_canonical.safetensors"))
    assert facts(optimizer)[:2] == (3, 9)
