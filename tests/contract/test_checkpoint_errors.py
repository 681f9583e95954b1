"""Is a state dict that does not fit refused by name, with a remedy, and whole?"""

from __future__ import annotations

import copy

import pytest
import torch
from thetas import create
from torch import nn

from pylo_integrations import CheckpointError, SmallFCLOpt


def trained(name: str = "small_fc_lopt", shapes=((4, 3), (5,)), **options):
    params = [nn.Parameter(torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape)) for shape in shapes]
    optimizer = create(params, name, **options)
    for _ in range(2):
        for p in params:
            p.grad = p.detach() + 1
        optimizer.step(loss=1.0)
    return optimizer


def values(optimizer):
    """Everything that loading may change."""
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return groups, [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]


def damaged(state_dict):
    state_dict["param_groups"][0]["progress"] = state_dict["param_groups"][0]["progress"][:-20]
    return state_dict


def of_torch(kind):
    p, q = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(5))
    optimizer = kind([p, q])
    p.grad, q.grad = torch.ones(4, 3), torch.ones(5)
    optimizer.step()
    return optimizer.state_dict()


def with_group(**options):
    state_dict = trained().state_dict()
    state_dict["param_groups"][0].update(options)
    return state_dict


def of_fsdp1():
    """Statistics that were saved apart, of parameters whose names nobody here knows."""
    import safetensors.torch

    state_dict = trained().state_dict()
    state_dict["param_groups"][0]["tensor_state"] = safetensors.torch.save({"a.weight/row": torch.zeros(3, 1, 3)})
    return state_dict


CASES = {
    "rule": (lambda: trained("velo").state_dict(), "VeLORule.*SmallFC.*create the optimizer"),
    "alike": (lambda: trained("celo2").state_dict(), "Celo2.*SmallFC"),
    "another kind": (lambda: of_torch(torch.optim.AdamW), "another kind of optimizer"),
    "shape": (
        lambda: trained(shapes=((4, 3), (6,))).state_dict(),
        r"parameter 1 of shape \(5,\).*\(6,\).*other shapes",
    ),
    "order": (lambda: trained(shapes=((5,), (4, 3))).state_dict(), "parameter 0.*parameter order"),
    "groups": (lambda: trained(shapes=((4, 3),)).state_dict(), r"groups of \[1\].*\[2\].*to_canonical"),
    "damage": (lambda: damaged(trained().state_dict()), "damaged"),
    "option": (lambda: with_group(weight_decay_policy="sometimes"), "sometimes"),
    "choice": (lambda: with_group(rule="adamw"), "adamw.*not a choice"),
    "apart": (of_fsdp1, "a.weight.*bind_model"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_named_and_changes_nothing(case):
    make, message = CASES[case]
    optimizer, state_dict = trained(), make()
    groups, states = values(optimizer)
    with pytest.raises(CheckpointError, match=rf"(?s)does not fit SmallFCLOpt: .*{message}"):
        optimizer.load_state_dict(state_dict)
    new_groups, new_states = values(optimizer)
    assert new_groups == groups
    for old, new in zip(states, new_states, strict=True):
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    assert optimizer.iteration == 2


def test_state_that_would_be_mistaken_for_whole_is_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)]))]
        writer = SmallFCLOpt(sharded)
        writer.init_state()
        reader = SmallFCLOpt([nn.Parameter(torch.ones(4, 3))])
        with pytest.raises(CheckpointError, match="DTensor.*torch.distributed.checkpoint.*to_canonical"):
            reader.load_state_dict(writer.state_dict())
        assert not reader.state
        SmallFCLOpt(sharded).load_state_dict(writer.state_dict())
    finally:
        dist.destroy_process_group()


def test_a_rule_of_a_group_is_that_of_the_state():
    """Groups may be loaded into an optimizer that had others in mind, as torch's own optimizers do."""
    params = [nn.Parameter(torch.ones(4, 4))]
    writer = create([{"params": params, "rule": "adamw", "axes": "in_out"}], "celo2")
    writer.init_state()
    reader = create([nn.Parameter(torch.ones(4, 4))], "celo2")
    reader.load_state_dict(writer.state_dict())
    assert (reader.param_groups[0]["rule"], reader.param_groups[0]["axes"]) == ("adamw", "in_out")
    assert reader.state[reader.param_groups[0]["params"][0]].keys() == writer.state[params[0]].keys()


def test_checkpoints_from_before_rules_were_named_load():
    optimizer = trained()
    state_dict = optimizer.state_dict()
    state_dict["param_groups"][0]["progress"] = optimizer._progress.to_bytes(theta=optimizer.theta.sha256)
    reader = trained()
    reader.load_state_dict(state_dict)
    assert reader.iteration == 2
