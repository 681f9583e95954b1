"""Is what state dicts say of the run looked at alike, however it comes: by loading, by a wrapper's hand, in place?

The tensors are those whose names begin with ``run_``. What is odd is refused by CheckpointError before anything moves.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from native_library import library_or_skip
from survival_cases import damaged_in_place_case
from thetas import create, distinct_rules, slow_but, slow_unless
from torch import nn

from pylo_integrations import CheckpointError

COUNTS = ("run_iteration", "run_num_steps", "run_nonfinite_steps")
STEPS = 3


def trained(name, steps=STEPS, backend="auto", dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(dtype)
    optimizer = create(model.named_parameters(), name, num_steps=9, backend=backend)
    for step in range(steps):
        give_gradients(model.parameters(), step)
        optimizer.step(loss=2.0 - 0.3 * step)
    return optimizer


def give_gradients(params, step=0):
    for p in params:
        p.grad = (torch.linspace(-1, 1, p.numel()).view_as(p) + step).to(p.dtype)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def facts(optimizer):
    """Everything that may not move."""
    progress = optimizer._progress
    states = [{k: v.tolist() for k, v in optimizer.state[p].items() if k[:4] != "run_"} for p in parameters(optimizer)]
    memory = {key: value.tolist() for key, value in progress.memory.items()}
    return repr((progress.record(), memory, states, [p.tolist() for p in parameters(optimizer)]))


def freed(value):
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


ANYWHERE = {
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "nested": lambda value: torch.nested.nested_tensor([value.reshape(-1)] * 2),
    "freed": freed,
    "quantized": lambda value: torch.quantize_per_tensor(value.float(), 1.0, 0, torch.quint8),
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "bits": lambda value: torch.zeros(value.shape, dtype=torch.uint8).view(torch.bits8),
    "complex": lambda value: value + 0j,
    "bool": lambda value: value.bool(),
    "shape": lambda value: torch.cat([value.reshape(-1)] * 2),
    "empty": lambda value: value.reshape(-1)[:0],
    "nan": lambda value: torch.full_like(value, math.nan, dtype=torch.float32),
    "infinite": lambda value: torch.full_like(value, math.inf, dtype=torch.float32),
    "None": lambda value: None,
    "str": lambda value: "3",
    "bytes": lambda value: b"3",
    "True": lambda value: True,
    "list": lambda value: [3],
    "dict": lambda value: {"a": value},
    "object": lambda value: object(),
    "a number without type": lambda value: 1 + 2j,
}
COUNT = {
    "negative": lambda value: -1 - value,
    "fraction": lambda value: value + 0.5,
    "huge": lambda value: torch.tensor(2**53 + 1),
    "huge float": lambda value: torch.tensor(1e30),
    "huge int": lambda value: 10**400,
    "rounded": lambda value: torch.tensor(257).bfloat16(),
    "nan float": lambda value: math.nan,
    "infinite float": lambda value: math.inf,
    "negative float": lambda value: -2.0,
}
MEMORY = {"integers": lambda value: value.long(), "number": lambda value: 1.0}


def cases(run):
    for key, value in run.items():
        for kind, spoil in {**ANYWHERE, **(COUNT if key in COUNTS else MEMORY)}.items():
            yield key, kind, spoil(value)


def put(state, key, odd, where):
    """A copy of all states with an odd value in those of some parameters."""
    state = {index: dict(own) for index, own in state.items()}
    for index in where:
        state[index][key] = odd
    return state


def hand(optimizer, state):
    """As ZeroRedundancyOptimizer does."""
    for p, own in zip(parameters(optimizer), state.values(), strict=True):
        optimizer.state[p] = dict(own)


@pytest.mark.parametrize("blob", [True, False], ids=["and the groups", "alone"])
@pytest.mark.parametrize("name", distinct_rules())
def test_odd_ones_are_not_loaded(name, blob):
    saved, other = trained(name).state_dict(), trained(name, 1)
    if not blob:
        saved["param_groups"][0]["progress"] = b""
    run = {key: value for key, value in saved["state"][0].items() if key.startswith("run_")}
    assert {*COUNTS} <= run.keys()
    before = facts(other)
    for key, kind, odd in cases(run):
        for where in ([0], [1], [0, 1]):
            with pytest.raises(CheckpointError, match="does not fit"):
                other.load_state_dict({**saved, "state": put(saved["state"], key, odd, where)})
                pytest.fail(f"{key} of {where} may be {kind}")
    assert facts(other) == before
    other.load_state_dict(saved)
    assert other.iteration == STEPS


@pytest.mark.parametrize("name", [slow_unless(name == "pace", name) for name in ("celo2", "pace", "velo", "celo")])
def test_odd_ones_that_a_wrapper_hands_over_are_not_taken(name):
    """Rules that remember nothing of the run, numbers, averages of the loss, and these and a network's state."""
    saved, before = trained(name).state_dict(), facts(trained(name, 1))
    good = copy.deepcopy(saved["state"])
    run = {key: value for key, value in good[0].items() if key.startswith("run_")}
    for key, kind, odd in cases(run):
        for where in ([0], [1], [0, 1]):
            other = trained(name, 1)
            own = {i: {k: v for k, v in other.state[p].items()} for i, p in enumerate(parameters(other))}
            handed = {i: {**own[i], **{k: v for k, v in good[i].items() if k in run}} for i in own}
            hand(other, put(handed, key, odd, where))
            give_gradients(parameters(other))
            with pytest.raises(CheckpointError, match="was handed"):
                other.step(loss=1.0)
                pytest.fail(f"{key} of {where} may be {kind}")
            assert "was handed" in repr(other)
            with pytest.raises(CheckpointError, match="was handed"):
                _ = other.iteration
            assert facts(other) == before, "neither step nor progress was taken"
        other.load_state_dict(saved)
        other.step(loss=1.0)
        assert other.iteration == STEPS + 1


STATES = {
    "nan": lambda value: value * math.nan,
    "infinite": lambda value: value + math.inf,
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "freed": freed,
    "float8": lambda value: value.to(torch.float8_e4m3fn),
    "nested": lambda value: torch.nested.nested_tensor([value.reshape(-1)] * 2),
    "integers": lambda value: value.long(),
    "complex": lambda value: value + 0j,
    "shape": lambda value: torch.cat([value.reshape(-1)] * 2),
    "None": lambda value: None,
    "number": lambda value: 1.0,
}


@pytest.mark.parametrize("with_run", [True, False], ids=["with the run", "without"])
@pytest.mark.parametrize("name", slow_but("celo", "small_fc_lopt"))
def test_odd_states_are_refused_whichever_way_they_come(name, with_run):
    saved = trained(name).state_dict()
    own = [key for key in saved["state"][0] if not key.startswith("run_")]
    state = saved["state"]
    if not with_run:
        state = {i: {key: value for key, value in state[i].items() if key in own} for i in state}
        saved["param_groups"][0]["progress"] = b""
    for key in own:
        negative = {"negative": lambda value: -1 - value} if key in ("rms", "row", "col") else {}
        for kind, spoil in {**STATES, **negative}.items():
            odd = put(state, key, spoil(state[0][key]), [0])
            other = trained(name, 1)
            before = facts(other)
            with pytest.raises(CheckpointError, match=f"(?s)does not fit.*{key}"):
                other.load_state_dict({**saved, "state": odd})
                pytest.fail(f"{key} may be {kind}")
            assert facts(other) == before

            fresh = trained(name, 0)
            params = [p.detach().clone() for p in parameters(fresh)]
            hand(fresh, odd)
            give_gradients(parameters(fresh))
            with pytest.raises(CheckpointError, match=f"(?s){key}"):
                fresh.step(loss=1.0)
                pytest.fail(f"{key} may be {kind}")
            assert fresh._progress.iteration == 0
            assert all(torch.equal(p, old) for p, old in zip(parameters(fresh), params, strict=True))
    for lost in own:  # a name that is gone, and one that nobody knows
        odd = {i: {("odd_" if k == lost else "") + k: v for k, v in one.items()} for i, one in state.items()}
        with pytest.raises(CheckpointError, match=lost):
            trained(name, 1).load_state_dict({**saved, "state": odd})


@pytest.mark.parametrize("option", ["lr", "weight_decay", "base_lr"])
def test_odd_tensors_among_the_options_of_groups_are_refused_too(option):
    saved, other = trained("celo").state_dict(), trained("celo", 1)
    before = facts(other), repr(other)
    for kind, spoil in {**ANYWHERE, "negative": lambda value: -value}.items():
        saved["param_groups"][0][option] = spoil(torch.tensor(1.0))
        with pytest.raises(CheckpointError, match=option):
            other.load_state_dict(saved)
            pytest.fail(f"{option} may be {kind}")
    assert (facts(other), repr(other)) == before


# -- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [7, -1, "0", "weight", (0,), None, 1.5])
@pytest.mark.parametrize("name", ["celo", "small_fc_lopt"])
def test_states_under_a_key_of_no_parameter_are_refused(name, key):
    saved, other = trained(name).state_dict(), trained(name, 1)
    before = facts(other)
    own = saved["state"][0]
    run = {"run_iteration": torch.tensor(math.inf)}
    rest = {k: v for k, v in own.items() if not k.startswith("run_")}
    added = [{**saved["state"], key: entry} for entry in (own, rest, run, {**own, **run})]
    renamed = [{key if i == 0 else i: entry for i, entry in {**saved["state"], 0: one}.items()} for one in (own, rest)]
    for state in (*added, *renamed):
        with pytest.raises(CheckpointError, match=r"states under.*groups list no such"):
            other.load_state_dict({**saved, "state": state})
    assert facts(other) == before
    if key is not None:
        other.load_state_dict({**saved, "state": {**saved["state"], key: {"mine": 1}}})
        assert other.state[key] == {"mine": 1}, "what other code keeps there is not ours to judge"


@pytest.mark.parametrize("name", ["celo", "small_fc_lopt"])
def test_what_is_of_no_parameter_is_not_taken_for_the_run(name):
    optimizer = trained(name)
    optimizer.state["mine"] = {"run_iteration": torch.tensor(math.inf)}
    optimizer.state = type(optimizer.state)(dict, {"first": {"run_iteration": 5}, **optimizer.state})
    give_gradients(parameters(optimizer))
    optimizer.step(loss=1.0)
    assert optimizer.iteration == STEPS + 1


@pytest.mark.parametrize("lost", [*COUNTS, "run_loss_means"])
@pytest.mark.parametrize("way", ["loaded", "handed"])
def test_a_run_that_lacks_a_part_is_damaged(lost, way):
    saved, other = trained("celo").state_dict(), trained("celo", 1)
    state = {i: {("x" if k == lost else "") + k: v for k, v in own.items()} for i, own in saved["state"].items()}
    with pytest.raises(CheckpointError, match=lost.removeprefix("run_")):
        if way == "loaded":
            other.load_state_dict({**saved, "state": state})
        else:
            hand(other, state)
            other.init_state()


# -- what loses nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blob", [True, False], ids=["and the groups", "alone"])
@pytest.mark.parametrize(
    "cast",
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int32, torch.int16, torch.uint8, torch.uint64),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["celo", "celo2", "velo"])
def test_counts_in_another_type_are_read(name, cast, blob):
    """As wrappers that cast every tensor in a state dict leave them; some also give them an axis."""
    optimizer = trained(name)
    saved = optimizer.state_dict()
    if not blob:
        saved["param_groups"][0]["progress"] = b""
    for shape in ((), (1,)):
        for way in ("loaded", "handed"):
            counts = {key: saved["state"][0][key].to(cast).reshape(shape) for key in COUNTS}
            state = {i: {**own, **counts} for i, own in saved["state"].items()}
            other = trained(name, 0)
            other.set_num_steps(None)
            other.load_state_dict({**saved, "state": state}) if way == "loaded" else hand(other, state)
            assert (other.iteration, other.num_steps) == (STEPS, 9)
            give_gradients(parameters(other))
            other.step(loss=1.0)
            assert other.iteration == STEPS + 1 and other._progress.counts["iteration"].dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_counts_that_a_cast_has_rounded_are_read_where_the_groups_say_what_they_were(dtype):
    optimizer = trained("celo")
    optimizer._progress.iteration, optimizer._progress.num_steps = 40_009, 50_003
    saved = optimizer.state_dict()
    casts = {key: value.to(dtype) for key, value in saved["state"][0].items() if key.startswith("run_")}
    saved["state"] = {i: {**own, **casts} for i, own in saved["state"].items()}
    other = trained("celo", 0)
    other.set_num_steps(None)
    other.load_state_dict(saved)
    assert (other.iteration, other.num_steps) == (40_009, 50_003)
    assert all(value.dtype == torch.float32 for value in other._progress.memory.values())
    saved["param_groups"][0]["progress"] = b""
    if dtype == torch.float32:
        other.load_state_dict(saved)
        assert other.iteration == 40_009
        return
    with pytest.raises(CheckpointError, match="run_iteration.*not certain"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["velo", "celo", "celo_adam"])
def test_memory_in_another_type_is_stepped(name, dtype):
    saved = trained(name).state_dict()
    saved["param_groups"][0]["progress"] = b""
    for own in saved["state"].values():
        own |= {k: v.to(dtype) for k, v in own.items() if k.startswith("run_") and k not in COUNTS}
    for backend in ("reference", "auto"):
        other = trained(name, 0, backend)
        other.load_state_dict(saved)
        for _ in range(2):
            give_gradients(parameters(other))
            other.step(loss=1.0)
        assert other.iteration == STEPS + 2 and all(p.isfinite().all() for p in parameters(other))


# -- in place ----------------------------------------------------------------------------------------------------------

WRITTEN = {
    "negative": ("run_iteration", -5),
    "infinite": ("run_iteration", -(2**63)),
    "huge": ("run_iteration", 2**53 + 1),
    "skipped": ("run_nonfinite_steps", -1),
    "memory": ("run_loss_means", math.nan),
    "nan": ("momentum_0", math.nan),
    "average": ("rms", -1.0),
}


@pytest.fixture(params=["reference", "native"])
def backend(request):
    if request.param == "native":
        library_or_skip()
    return request.param


@pytest.mark.parametrize("what", WRITTEN)
@pytest.mark.parametrize("name", ["celo", "small_fc_lopt", "celo2"])
def test_odd_values_that_are_loaded_in_place_stop_the_next_step(name, what, backend):
    """Also a step that would be taken as the last one was; and also if the iteration is what it was."""
    optimizer = trained(name, backend=backend)
    state = optimizer.state_dict()["state"]
    key, odd = WRITTEN[what]
    if key not in state[0]:
        key = next((k for k in state[0] if k.startswith("momentum")), None) if what == "nan" else None
        if key is None:
            pytest.skip("the rule has none")
    good = copy.deepcopy(state)
    for i, own in state.items():
        for name_, value in own.items():
            value.detach().copy_(good[i][name_])  # as torch.distributed.checkpoint does
    give_gradients(parameters(optimizer))
    optimizer.step(loss=1.0)
    assert optimizer.iteration == STEPS + 1

    state = optimizer.state_dict()["state"]
    for own in state.values():
        own["run_iteration"].copy_(torch.tensor(STEPS + 1))
    state[0][key].view(-1)[0] = odd
    before = facts(optimizer)
    for _ in range(2):
        give_gradients(parameters(optimizer))
        with pytest.raises(CheckpointError, match="loaded in place"):
            optimizer.step(loss=1.0)
    assert facts(optimizer) == before
    for i, own in state.items():
        for name_, value in own.items():
            value.copy_(good[i][name_])
    give_gradients(parameters(optimizer))
    optimizer.step(loss=1.0)
    assert optimizer.iteration == STEPS + 1


def test_steps_of_its_own_are_not_taken_for_loading(monkeypatch, backend):
    optimizer = trained("celo", backend=backend)
    monkeypatch.setattr("pylo_integrations.resume.check_values", lambda *a: pytest.fail("looked at all states"))
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for _ in range(3):
            give_gradients(parameters(one))
            one.step(loss=1.0)
            one.state_dict(), one.iteration, repr(one), one.set_num_steps(20)
        assert one.iteration == STEPS + 3


@pytest.mark.parametrize("iteration", [0, STEPS, 100])
def test_copies_do_not_forget_that_they_were_loaded_in_place(iteration):
    optimizer = trained("celo")
    optimizer.state_dict()["state"][0]["run_iteration"].fill_(iteration)
    for one in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        one.state[parameters(one)[0]]["rms"].fill_(math.nan)
        give_gradients(parameters(one))
        with pytest.raises(CheckpointError, match="loaded in place.*rms"):
            one.step(loss=1.0)


def test_states_that_are_made_in_inference_mode_are_stepped_there():
    """Tensors of that mode have no versions to tell by."""
    with torch.inference_mode():
        optimizer = trained("celo")
        assert optimizer.iteration == copy.deepcopy(optimizer).iteration == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("what", ["negative", "memory", "nan"])
def test_compiled_steps_look_too(what, monkeypatch):
    optimizer = trained("celo")
    compiled = torch.compile(lambda loss: optimizer.step(loss=loss), backend="aot_eager")
    give_gradients(parameters(optimizer))
    compiled(torch.tensor(1.0))
    with monkeypatch.context() as patch:
        patch.setattr("pylo_integrations.resume.check_values", lambda *a: pytest.fail("looked at all states"))
        for step in (compiled, compiled, lambda loss: optimizer.step(loss=loss)):
            step(torch.tensor(1.0))
    compiled(torch.tensor(1.0))
    assert optimizer.iteration == STEPS + 5
    key, odd = WRITTEN[what]
    state = optimizer.state_dict()["state"]
    state[0]["run_iteration"].copy_(torch.tensor(STEPS))
    state[0][key].view(-1)[0] = odd
    before = facts(optimizer)
    with pytest.raises(CheckpointError, match="loaded in place"):
        compiled(torch.tensor(1.0))
    assert facts(optimizer) == before


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["fsdp2", "fsdp1", "shard_step"])
@pytest.mark.parametrize("name", ["celo", "celo2"])
def test_one_rank_that_finds_damage_in_place_tells_the_others(workers, name, wrapper):
    for rank, (told, unchanged, after) in enumerate(workers.run(2, damaged_in_place_case, name=name, wrapper=wrapper)):
        kind = "CheckpointError" if rank == 0 else "RankError"
        assert told.startswith(kind) and "loaded in place" in told and "not finite" in told
        assert unchanged and after == 4, "once it is mended, all go on"
