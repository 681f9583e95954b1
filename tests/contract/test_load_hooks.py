"""Do torch's hooks of loading and saving see everything, and does what they change stay?"""

from __future__ import annotations

import threading

import pytest
import torch
from thetas import create, distinct_rules
from torch import nn


def trained(name, dtype=torch.float32, steps=2):
    params = [nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3).to(dtype)), nn.Parameter(torch.ones(5, dtype=dtype))]
    optimizer = create(params, name, num_steps=9)
    for _ in range(steps):
        for p in params:
            p.grad = p.detach() + 1
        optimizer.step(loss=1.0)
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", distinct_rules())
def test_after_loading_everything_is_there(name, dtype):
    writer, reader = trained(name, dtype), trained(name, dtype, steps=1)
    seen = []

    def look(optimizer):
        params = [p for group in optimizer.param_groups for p in group["params"]]
        states = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in params]
        seen.append((optimizer.iteration, optimizer.num_steps, dict(optimizer._progress.memory), states))

    reader.register_load_state_dict_post_hook(look)
    reader.register_load_state_dict_post_hook(look, prepend=True)
    reader.load_state_dict(writer.state_dict())
    look(writer)
    *looks, want = seen
    assert len(looks) == 2
    for got in looks:
        assert got[:2] == want[:2]
        torch.testing.assert_close(got[2:], want[2:], rtol=0, atol=0)


@pytest.mark.parametrize("name", distinct_rules())
def test_what_a_hook_changes_stays(name):
    writer, reader = trained(name, torch.bfloat16), trained(name, torch.bfloat16, steps=0)

    def edit(optimizer):
        for own in optimizer.state.values():
            for value in own.values():
                value.fill_(0.123)
        optimizer.set_num_steps(77)
        optimizer.param_groups[0]["lr"] = 0.5

    reader.register_load_state_dict_post_hook(edit)
    reader.load_state_dict(writer.state_dict())
    for own in reader.state.values():
        for value in own.values():
            assert value.dtype == torch.float32 and torch.equal(value, torch.full_like(value, 0.123))
    assert (reader.num_steps, reader.param_groups[0]["lr"]) == (77, 0.5)

    reader = trained(name)
    handle = reader.register_load_state_dict_post_hook(lambda optimizer: optimizer.state.clear())
    reader.load_state_dict(writer.state_dict())
    assert not reader.state and reader.iteration == 2
    handle.remove()
    reader.load_state_dict(writer.state_dict())
    assert reader.state


def test_hooks_before_loading_may_change_what_is_loaded():
    writer, reader = trained("celo2", steps=2), trained("celo2", steps=1)

    def edit(optimizer, state_dict):
        assert optimizer.iteration == 1
        state = {
            i: {key: value * 0 for key, value in own.items() if key[:4] != "run_"}
            for i, own in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    reader.register_load_state_dict_pre_hook(edit)
    saved = writer.state_dict()
    reader.load_state_dict(saved)
    assert reader.iteration == 2
    assert not any(value.any() for own in reader.state.values() for value in own.values())
    assert all(own["momentum_0"].any() for own in saved["state"].values()), "the argument is left alone"


def test_hooks_of_saving_see_all_that_is_saved():
    optimizer = trained("celo")
    seen = []

    def look(_, state_dict):
        seen.append(("progress" in state_dict["param_groups"][0], "run_iteration" in state_dict["state"][0]))
        return {**state_dict, "extra": 1}

    optimizer.register_state_dict_post_hook(look)
    assert optimizer.state_dict()["extra"] == 1 and seen == [(True, True)]


def test_an_error_in_a_hook_leaves_no_hook_of_ours():
    writer, reader = trained("celo2"), trained("celo2", steps=1)
    handle = reader.register_load_state_dict_post_hook(lambda optimizer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reader.load_state_dict(writer.state_dict())
    assert reader.iteration == 2  # torch's optimizers have loaded by then, too
    handle.remove()
    assert not reader._optimizer_load_state_dict_pre_hooks and not reader._optimizer_load_state_dict_post_hooks
    assert not reader._optimizer_state_dict_post_hooks


@pytest.mark.timeout(60)
def test_threads_may_save_at_once():
    optimizer, found = trained("celo"), []
    want = optimizer.state_dict()["param_groups"]

    def save():
        for _ in range(20):
            found.append(optimizer.state_dict()["param_groups"] == want)

    threads = [threading.Thread(target=save) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert found == [True] * 120
