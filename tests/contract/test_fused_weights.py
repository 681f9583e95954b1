"""Is a tensor that shares a parameter with others stepped as a parameter of its own would be?"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from fused_cases import KINDS, STEPS, fused_and_apart, pieces_of, train
from sharded_cases import make, random
from thetas import distinct_rules
from torch import nn

from pylo_integrations import create_optimizer, get_optimizer_info, list_optimizers, param_groups
from pylo_integrations.checkpoints import CheckpointError
from pylo_integrations.ops import loader
from pylo_integrations.state import from_canonical, to_canonical

needs_kernels = pytest.mark.skipif(isinstance(loader.load(), str), reason="needs the native kernels")


def assert_equal(fused, apart, kind) -> None:
    for mine, other in zip(pieces_of(fused, kind), pieces_of(apart, kind), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", distinct_rules())
def test_its_steps_are_those_of_a_parameter_of_its_own_bit_by_bit(name, kind):
    fused, apart = fused_and_apart(kind, name, torch.float64, backend="reference")
    before = [part.clone() for part in pieces_of(fused, kind)]
    train(fused, kind, range(STEPS))
    train(apart, kind, range(STEPS))
    assert_equal(fused, apart, kind)
    assert not any(torch.equal(new, old) for new, old in zip(pieces_of(fused, kind), before, strict=True))


@needs_kernels
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "in_out" not in kind])
@pytest.mark.parametrize("name", ["pace", "celo2", "small_fc_lopt"])
def test_kernels_step_it_alike(name, kind):
    fused, apart = fused_and_apart(kind, name, torch.float32, backend="native")
    train(fused, kind, range(STEPS))
    train(apart, kind, range(STEPS))
    assert_equal(fused, apart, kind)


@needs_kernels
def test_columns_that_kernels_do_not_read_are_told_of_where_kernels_must_run():
    fused, _ = fused_and_apart("in_out", "celo2", torch.float32, backend="native")
    with pytest.raises(RuntimeError, match="split=False"):
        train(fused, "in_out", range(1))


def test_columns_that_kernels_do_not_read_are_left_to_the_reference():
    fused, apart = fused_and_apart("in_out", "celo2", torch.float32)
    train(fused, "in_out", range(STEPS))
    train(apart, "in_out", range(STEPS))
    for mine, other in zip(pieces_of(fused, "in_out"), pieces_of(apart, "in_out"), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wanted",
    [("equal", "bfloat16", "bfloat16"), ("equal", "int8", "int8"), ("in_out", "int8", "bfloat16")],
    ids=" ".join,
)
def test_state_is_stored_as_the_group_wants_where_rows_stay_whole(wanted, monkeypatch):
    kind, state_dtype, stored = wanted
    large = KINDS[kind]._replace(shape=(96, 48) if kind == "equal" else (48, 96))
    axis = 0 if kind == "equal" else 1
    monkeypatch.setitem(KINDS, kind, large._replace(cut=lambda whole: list(whole.split(32, axis))))
    fused, _ = fused_and_apart(kind, "celo2", torch.float32, state_dtype=state_dtype)
    exact, _ = fused_and_apart(kind, "celo2", torch.float32)
    train(fused, kind, range(STEPS))
    train(exact, kind, range(STEPS))
    (own,) = fused.state.values()
    found = {value.dtype for key, value in own.items() if key.startswith("momentum")} - {torch.float32}
    assert found == {torch.bfloat16 if stored == "bfloat16" else torch.int8}
    error = [(a - b).abs().max() for a, b in zip(pieces_of(fused, kind), pieces_of(exact, kind), strict=True)]
    assert 0 < max(error) < 0.01


@pytest.mark.parametrize("kind", ["equal", "unequal", "gates of experts"])
def test_state_has_the_parameters_shape_and_comes_back_bit_by_bit(kind):
    fused, apart = fused_and_apart(kind, "celo2", torch.float64, backend="reference")
    train(fused, kind, range(2))
    (param,), (own,) = fused.param_groups[0]["params"], fused.state.values()
    assert all(own[name].shape == param.shape for name in ("momentum_0", "momentum_2", "rms"))
    again, _ = fused_and_apart(kind, "celo2", torch.float64, backend="reference")
    with torch.no_grad():
        again.param_groups[0]["params"][0].copy_(param)
    again.load_state_dict(copy.deepcopy(fused.state_dict()))
    train(again, kind, range(2, STEPS))
    train(apart, kind, range(STEPS))
    assert_equal(again, apart, kind)


def attention(embed: int = 8) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(embed, 2)


def backward(model: nn.Module, step: int) -> None:
    x = random((3, 2, 8), step, torch.float32)
    model(x, x, x)[0].square().mean().backward()


def test_canonical_state_carries_it():
    model = attention()
    optimizer = make("celo2", param_groups(model, split=True))
    backward(model, 0)
    optimizer.step()
    canonical = to_canonical(optimizer, model)
    other = make("celo2", param_groups(model, split=True))
    from_canonical(other, model, canonical)
    mine, theirs = (one.state[model.in_proj_weight] for one in (optimizer, other))
    assert mine["row"].shape[0] == 3 and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_statistics_of_another_division_are_refused():
    model = attention()
    optimizer = make("celo2", param_groups(model, split=True))
    backward(model, 0)
    optimizer.step()
    groups = param_groups(model, split=True)
    for group in groups:
        group.pop("split", None)
    with pytest.raises(CheckpointError, match="split"):
        make("celo2", groups).load_state_dict(optimizer.state_dict())


def test_a_parameter_that_moved_and_a_state_that_was_replaced_are_noticed():
    fused, apart = fused_and_apart("equal", "pace", torch.float32)
    train(fused, "equal", range(2))
    (param,) = fused.param_groups[0]["params"]
    param.data = param.data.clone()
    train(fused, "equal", range(2, 3))
    fused.state[param]["momentum_0"] = fused.state[param]["momentum_0"].clone()
    train(fused, "equal", range(3, STEPS))
    train(apart, "equal", range(STEPS))
    assert_equal(fused, apart, "equal")


def test_a_step_like_the_last_one_needs_no_new_plan(monkeypatch):
    fused, _ = fused_and_apart("equal", "pace", torch.float32)
    train(fused, "equal", range(2))
    planned = []
    monkeypatch.setattr(fused._engine._planner, "plan", lambda *args: planned.append(args))
    if isinstance(loader.load(), str):
        pytest.skip("needs the native kernels")
    param = fused.param_groups[0]["params"][0]
    param.grad = torch.ones_like(param)
    fused.step()
    assert not planned


def test_autograd_sees_that_the_parameter_changed():
    fused, _ = fused_and_apart("equal", "pace", torch.float32)
    (param,) = fused.param_groups[0]["params"]
    version = param._version
    train(fused, "equal", range(1))
    assert param._version > version


def test_telemetry_tells_of_each_part():
    fused, apart = fused_and_apart("unequal", "celo2", torch.float32)
    for optimizer in (fused, apart):
        optimizer.enable_telemetry(per_parameter=True)
        train(optimizer, "unequal", range(1))
    told, other = fused.telemetry(), apart.telemetry()
    for part in range(3):
        assert told[f"optim/CELO2/param/0.0[{part}]/update_rms"] == other[f"optim/CELO2/param/0.{part}/update_rms"]
    assert math.isclose(told["optim/CELO2/group0/update_rms"], other["optim/CELO2/group0/update_rms"], rel_tol=1e-6)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"split": 5}, "does not divide the 18 outputs"),
        ({"split": (6, 6)}, "does not divide"),
        ({"split": 0}, "split=0"),
        ({"split": "qkv"}, "split='qkv'"),
        ({"split": True}, "split=True"),
        ({"stacked": 3}, "stacked=3"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_made(options, named):
    with pytest.raises(ValueError, match=named):
        make("celo2", [{"params": [nn.Parameter(torch.zeros(18, 10))], **options}])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 4, 12))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))


def described(model, **options) -> dict[str, tuple]:
    return {
        name: (group.get("split", 1), group.get("stacked", False), group["axes"])
        for group in param_groups(model, **options)
        for name, _ in group["params"]
    }


def test_modules_tell_what_is_fused():
    block = nn.Module()
    block.qkv, block.proj, block.gate_up_proj = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 10)
    model = nn.ModuleDict({"lstm": nn.LSTM(4, 5), "gru": nn.GRUCell(4, 5), "mha": attention(), "block": block})
    found = {name: split for name, (split, *_) in described(model, split=True).items() if split != 1}
    assert found == {
        **{f"lstm.{kind}_{which}_l0": 4 for kind in ("weight", "bias") for which in ("ih", "hh")},
        **{f"gru.{kind}_{which}": 3 for kind in ("weight", "bias") for which in ("ih", "hh")},
        **{"mha.in_proj_weight": 3, "mha.in_proj_bias": 3, "block.qkv.weight": 3, "block.qkv.bias": 3},
        **{"block.gate_up_proj.weight": 2, "block.gate_up_proj.bias": 2},
    }
    assert all(split == 1 for split, *_ in described(model, split=False).values())


def test_modules_that_are_no_linear_layers_are_one_tensor_whatever_they_are_called():
    block = nn.Module()
    block.qkv, block.Wqkv, block.gate_up_proj = nn.Conv2d(4, 12, 1), nn.Embedding(4, 12), nn.Conv1d(4, 9, 1)
    assert all(split == 1 for split, *_ in described(block, split=True).values())


def test_experts_are_always_stacks_stored_either_way():
    found = described(nn.ModuleDict({"experts": Experts()}), split=True)
    assert found == {"experts.gate_up_proj": (2, True, "in_out"), "experts.down_proj": (1, True, "in_out")}
    assert described(Experts())["gate_up_proj"] == (1, True, "in_out")


def test_names_divide_what_no_module_tells():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    found = described(model, split={"1": 2, "0.weight": (4, 2)})
    splits = {name: split for name, (split, *_) in found.items()}
    assert splits == {"0.weight": (4, 2), "0.bias": 1, "1.weight": 2, "1.bias": 2}
    with pytest.raises(ValueError, match="missing"):
        param_groups(model, split={"missing": 2})


@pytest.mark.parametrize("known_first", [True, False])
def test_of_modules_that_share_a_parameter_any_that_knows_counts(known_first):
    def shared(*names: str) -> nn.Module:
        block = nn.Module()
        for name in names if known_first else reversed(names):
            setattr(block, name, nn.Linear(4, 12, bias=False))
        for child in block.children():
            child.weight = next(block.children()).weight
        return block

    block = shared("qkv", "out")
    first = "qkv.weight" if known_first else "out.weight"
    assert described(block, split=True) == {first: (3, False, "out_in")}
    for name in ("qkv", "out", "qkv.weight", "out.weight"):  # by any of its names
        assert described(block, split={name: 4}) == {first: (4, False, "out_in")}
    contrary = shared("qkv", "gate_up_proj")
    with pytest.raises(ValueError, match=r"different ways, .*split=2 as gate_up_proj\.weight.*say which") as told:
        param_groups(contrary, split=True)
    assert "split=3 as qkv.weight" in str(told.value)
    assert [split for split, *_ in described(contrary, split={"qkv.weight": 1}).values()] == [1]

    module = nn.Module()
    for name in ("one", "two") if known_first else ("two", "one"):
        setattr(module, name, nn.Module())
    module.one.qkv = module.two.out = nn.Linear(4, 12, bias=False)
    assert [split for split, *_ in described(module, split=True).values()] == [3]

    experts, outside = Experts(), nn.Module()
    outside.weight = experts.gate_up_proj
    tied = nn.ModuleList([experts, outside] if known_first else [outside, experts])
    assert (2, True, "in_out") in described(tied, split=True).values()


def test_transformers_models_are_recognised():
    transformers = pytest.importorskip("transformers")
    gpt = transformers.GPT2Model(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=4))
    assert described(gpt, split=True)["h.0.attn.c_attn.weight"] == (3, False, "in_out")
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    phi = described(transformers.Phi3Model(transformers.Phi3Config(**sizes, **heads)), split=True)
    assert phi["layers.0.self_attn.qkv_proj.weight"][0] == (16, 8, 8)
    assert phi["layers.0.mlp.gate_up_proj.weight"][0] == 2


def test_a_model_and_not_bare_parameters_can_be_divided_by_name():
    model = attention()
    optimizer = create_optimizer(model, "pace", split=True, num_steps=10)
    assert [group.get("split") for group in optimizer.param_groups].count(3) == 2
    with pytest.raises(TypeError, match="split"):
        create_optimizer(model.parameters(), "pace", split=True, num_steps=10)


@pytest.mark.parametrize("name", list_optimizers())
def test_by_default_only_pace_divides(name):
    divided = [group for group in get_optimizer_info(name).param_groups(attention()) if group.get("split", 1) == 3]
    assert bool(divided) == (name == "pace")


@pytest.mark.parametrize(
    "wrong", ["false", 0, 3, ["in_proj_weight"], {"x": True}, {"x": 3.0}, {"x": ()}, {"x": (4, 0)}]
)
def test_a_division_of_another_kind_is_refused(wrong):
    with pytest.raises((TypeError, ValueError), match="split="):
        create_optimizer(attention(), "pace", split=wrong, num_steps=10)
