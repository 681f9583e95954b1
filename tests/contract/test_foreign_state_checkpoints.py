"""Does what other code keeps among an optimizer's states travel untouched, and is it told from another optimizer's?"""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from foreign_cases import marked_case
from thetas import create, distinct_rules
from torch import nn

from pylo_integrations import CheckpointError, create_optimizer
from pylo_integrations.state import from_canonical, to_canonical


def trained(name, steps=2, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    optimizer = create(model.named_parameters(), name, num_steps=20)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, steps, **options):
    for step in steps:
        for p in model.parameters():
            p.grad = (torch.linspace(-1, 1, p.numel()).view_as(p) + step).to(p)
        optimizer.step(**options) if options else optimizer.step(loss=2.0)


FOREIGN = {
    "slow": torch.arange(12.0).view(4, 3).T,  # not contiguous, of no parameter's shape
    "half": torch.ones(2, dtype=torch.bfloat16),
    "count": 3,
    "step": torch.tensor(5),  # as wrappers have it
    "flags": [True, None],
    "name": "text",
    "nested": {"mask": torch.tensor([True, False]), "pair": (1, torch.tensor(2.5))},
    "exp_avg": torch.zeros(3, 4),  # an optimizer around ours may be Adam's relative
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", distinct_rules())
def test_it_travels_untouched(name, dtype):
    model, optimizer = trained(name, dtype=dtype)
    weight = model.weight
    optimizer.state[weight].update(copy.deepcopy(FOREIGN))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin, other = trained(name, 0, dtype)
    twin.load_state_dict(model.state_dict())
    saved = torch.load(file, weights_only=True)
    other.load_state_dict(saved)
    found = {key: other.state[twin.weight][key] for key in FOREIGN}
    assert found.pop("name") == "text"
    torch.testing.assert_close(found, {key: FOREIGN[key] for key in found}, rtol=0, atol=0)
    assert type(found["nested"]["pair"]) is tuple
    assert found["slow"] is not saved["state"][0]["slow"], "it is a copy"
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert other.state_dict()["state"].keys() == optimizer.state_dict()["state"].keys()


@pytest.mark.parametrize("name", distinct_rules())
def test_timms_lookahead_resumes(name, small_thetas):
    timm = pytest.importorskip("timm.optim")
    from pylo_integrations import timm as ours

    ours.register()
    try:

        def run():
            torch.manual_seed(0)
            model = nn.Linear(4, 3)
            optimizer = timm.create_optimizer_v2(model, f"lookahead_{name}")
            optimizer._base_optimizer.set_num_steps(20)
            return model, optimizer

        def go(model, optimizer, steps):
            for step in steps:
                for p in model.parameters():
                    p.grad = torch.linspace(-1, 1, p.numel()).view_as(p) + step
                optimizer._base_optimizer.observe_loss(1.0)
                optimizer.step()

        (model, optimizer), (twin, other) = run(), run()
        go(model, optimizer, range(7))  # the slow weights are made at the sixth
        assert "lookahead_slow_buff" in optimizer._base_optimizer.state[model.weight]
        twin.load_state_dict(model.state_dict())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for one in ((model, optimizer), (twin, other)):
            go(*one, range(7, 14))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    finally:
        ours.unregister()


@pytest.mark.parametrize("name", distinct_rules())
def test_state_that_was_only_looked_at_is_not_saved(name):
    model, optimizer = trained(name, 0)
    assert [len(optimizer.state[p]) for p in model.parameters()] == [0, 0]
    assert optimizer.state_dict()["state"] == {}
    optimizer.state[model.weight]["old"] = torch.ones(3)
    saved = optimizer.state_dict()
    twin, other = trained(name, 0)
    other.load_state_dict(saved)
    assert torch.equal(other.state[twin.weight]["old"], torch.ones(3)) and other.iteration == 0


@pytest.mark.parametrize("name", distinct_rules())
def test_a_missing_entry_of_its_own_is_an_error(name):
    _, optimizer = trained(name)
    saved = copy.deepcopy(optimizer.state_dict())
    own = [key for key in saved["state"][0] if not key.startswith("run_")]
    saved["state"][0]["slow"] = saved["state"][0].pop(own[-1])
    _, other = trained(name, 0)
    with pytest.raises(CheckpointError, match=rf"parameter 0.*has state.*expected.*{own[-1]}"):
        other.load_state_dict(saved)
    saved["state"] = {i: {"slow": torch.ones(2), "run_iteration": torch.tensor(2)} for i in (0, 1)}
    del saved["param_groups"][0]["progress"]
    with pytest.raises(CheckpointError):
        other.load_state_dict(saved)
    assert not other.state


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Muon"])
@pytest.mark.parametrize("name", distinct_rules())
def test_another_optimizers_checkpoint_is_called_that(name, kind, small_thetas):
    """Whatever the groups are: to group the parameters otherwise would not help."""
    if not hasattr(torch.optim, kind):
        pytest.skip(f"torch {torch.__version__} has no {kind}")
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    params = [p for p in model.parameters() if p.dim() == 2 or kind != "Muon"]
    theirs = getattr(torch.optim, kind)(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    horizon = {"num_steps": 9} if name in ("velo", "celo", "celo_adam") else {}
    optimizer = create_optimizer(model, name, weight_decay=0.01, **horizon)
    with pytest.raises(
        CheckpointError, match="another kind of optimizer wrote it.*Create the optimizer that wrote it"
    ) as e:
        optimizer.load_state_dict(theirs.state_dict())
    assert "group the parameters" not in str(e.value)
    if kind == "AdamW":
        assert "exp_avg_sq" in str(e.value)
    other = create(model, "small_fc_lopt" if name != "small_fc_lopt" else "velo")
    other.init_state()
    if type(other.rule) is not type(optimizer.rule):
        with pytest.raises(CheckpointError, match="with the rule.*create the optimizer"):
            optimizer.load_state_dict(other.state_dict())


def test_canonical_states_leave_it_out_and_say_so():
    model, optimizer = trained("celo2")
    optimizer.state[model.bias]["slow"] = torch.ones(3)
    with pytest.warns(RuntimeWarning, match=r"no place for.*\['slow'\] are left out"):
        canonical = to_canonical(optimizer, model)
    assert "slow" not in canonical["state"]["bias"]
    twin, other = trained("celo2", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_canonical(other, twin, canonical)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("wrapper", "how"),
    [
        ("ddp", "dcp"),
        ("ddp", "plain"),
        ("fsdp2", "dcp"),
        ("fsdp2", "plain"),
        ("shard_step", "dcp"),
        ("shard_step", "consolidated"),
    ],
)
def test_under_wrappers(workers, wrapper, how):
    for found in workers.run(2, marked_case, wrapper=wrapper, how=how):
        assert all(found["same"]) and len(found["same"]) == 8
        assert "average" not in found["canonical"]


@pytest.mark.dist
def test_fsdp1_leaves_it_out_and_says_so(workers):
    for found in workers.run(2, marked_case, wrapper="fsdp1", how="plain"):
        assert not any(found["same"])
        assert any("FSDP1 cannot save" in message and "average" in message for message in found["told"])
