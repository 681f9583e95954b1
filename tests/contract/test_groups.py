"""Does a model's parameter find the right group?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pylo_integrations import create_optimizer, get_optimizer_info, list_optimizers, param_groups


def placement(model, **options) -> dict[str, tuple[float, str]]:
    return {
        name: (group["weight_decay"], group["axes"])
        for group in param_groups(model, 0.1, **options)
        for name, _ in group["params"]
    }


class Conv1D(nn.Module):
    """Named and stored like transformers'."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(4, 12)), nn.Parameter(torch.zeros(12))


def test_decay_and_axes_follow_the_module_type():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 8),
            "conv": nn.Conv2d(3, 8, 3),
            "transposed": nn.ConvTranspose2d(3, 8, 3),
            "embedding": nn.Embedding(5, 4),
            "bag": nn.EmbeddingBag(5, 4),
            "layer_norm": nn.LayerNorm((3, 4)),
            "batch_norm": nn.BatchNorm1d(4),
            "rms_norm": nn.RMSNorm((2, 4)),
            "conv1d": Conv1D(),
            "mha": nn.MultiheadAttention(4, 2),
        }
    )
    decayed, exempt = (0.1, "out_in"), (0.0, "out_in")
    assert placement(model) == {
        "linear.weight": decayed,
        "linear.bias": exempt,
        "conv.weight": decayed,
        "conv.bias": exempt,
        "transposed.weight": (0.1, "in_out"),
        "transposed.bias": exempt,
        "embedding.weight": (0.0, "in_out"),
        "bag.weight": (0.0, "in_out"),
        "layer_norm.weight": exempt,
        "layer_norm.bias": exempt,
        "batch_norm.weight": exempt,
        "batch_norm.bias": exempt,
        "rms_norm.weight": exempt,
        "conv1d.weight": (0.1, "in_out"),
        "conv1d.bias": exempt,
        "mha.in_proj_weight": decayed,
        "mha.in_proj_bias": exempt,
        "mha.out_proj.weight": decayed,
        "mha.out_proj.bias": exempt,
    }


def test_names_given_or_known_to_the_model_are_exempt():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed, self.token = nn.Parameter(torch.zeros(1, 4, 8)), nn.Parameter(torch.zeros(1, 1, 8))
            self.head = nn.Linear(8, 2)

        def no_weight_decay(self):
            return {"pos_embed"}

    placed = placement(Model(), no_decay=["token"])
    assert placed["pos_embed"][0] == placed["token"][0] == 0.0 and placed["head.weight"][0] == 0.1
    assert placement(Model(), no_decay=["head.weight"])["head.weight"][0] == 0.0


def test_tied_weights_appear_once_and_count_as_embedding():
    model = nn.ModuleDict({"head": nn.Linear(4, 5, bias=False), "embedding": nn.Embedding(5, 4)})
    model["embedding"].weight = model["head"].weight
    assert placement(model) == {"head.weight": (0.0, "in_out")}


def test_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    assert set(placement(model)) == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        create_optimizer(model.requires_grad_(False), "small_fc_lopt")


def test_axes_decide_ties_only():
    def step(axes, shape):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(shape))
        optimizer = create_optimizer([{"params": [p], "axes": axes}], "small_fc_lopt", weights=random_theta())
        for _ in range(2):
            p.grad = torch.randn(shape) * torch.arange(1.0, 1 + shape[0]).view(-1, 1)
            optimizer.step()
        return p

    assert torch.equal(step("out_in", (4, 6)), step("in_out", (4, 6)))
    assert not torch.equal(step("out_in", (5, 5)), step("in_out", (5, 5)))


def random_theta():
    from golden_files import Golden

    return Golden("small_fc_h32_pylo").theta


def rules(model, **options) -> dict[str, str]:
    return {name: group["rule"] for group in param_groups(model, **options) for name, _ in group["params"]}


def language_model():
    return nn.ModuleDict({"wte": nn.Embedding(9, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 9)})


def test_adamw_gets_embeddings_and_the_names_given():
    assert set(rules(language_model()).values()) == {"learned"}
    embeddings = {"wte.weight": "adamw"} | dict.fromkeys(
        ["body.weight", "body.bias", "head.weight", "head.bias"], "learned"
    )
    assert rules(language_model(), adamw=()) == embeddings
    assert rules(language_model(), adamw=["head.weight"]) == embeddings | {"head.weight": "adamw"}


def test_adamw_gets_exactly_what_a_function_chooses():
    chosen = rules(language_model(), adamw=lambda name, param, module: 9 in module.weight.shape and param.dim() > 1)
    assert {name for name, rule in chosen.items() if rule == "adamw"} == {"wte.weight", "head.weight"}


def test_a_tied_head_goes_where_its_embedding_goes():
    model = language_model()
    model["head"].weight = model["wte"].weight
    assert rules(model, adamw=())["wte.weight"] == "adamw"


@pytest.mark.usefixtures("small_thetas")
def test_a_model_for_celo2_has_its_embeddings_marked_and_others_do_not():
    def marked(name, **options):
        groups = create_optimizer(language_model(), name, **options).param_groups
        return {n for group in groups if group["rule"] == "adamw" for n in group["param_names"]}

    assert marked("celo2") == {"wte.weight"}
    assert marked("celo2_base") == marked("elo_celo2") == marked("small_fc_lopt") == set()


def attention(**parts: nn.Module | nn.Parameter) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def linear(outputs: int = 4) -> nn.Linear:
    return nn.Linear(4, outputs)


@pytest.mark.parametrize(
    ("module", "marked"),
    [
        (nn.MultiheadAttention(4, 2), ["in_proj_weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3, vdim=5), ["k_proj_weight", "q_proj_weight", "v_proj_weight"]),
        (attention(qkv=linear(12), proj=linear()), ["qkv.weight"]),
        (attention(c_attn=Conv1D(), c_proj=Conv1D()), ["c_attn.weight"]),
        (
            attention(q_proj=linear(), k_proj=linear(2), v_proj=linear(2), o_proj=linear()),
            ["k_proj.weight", "q_proj.weight", "v_proj.weight"],
        ),
        (attention(query=linear(), key_value=linear(8), out=linear()), ["key_value.weight", "query.weight"]),
        (attention(query=linear(), key=linear(), value=linear()), ["key.weight", "query.weight", "value.weight"]),
        (attention(policy=linear(), value=linear(1)), []),  # an actor and its critic
        (attention(key=linear(), value=linear(), receptance=linear()), []),  # who mixes channels in RWKV
        (attention(query=nn.Parameter(torch.zeros(5, 4)), key=linear(), value=linear()), []),  # a table of latents
        (attention(query=nn.utils.parametrizations.spectral_norm(linear()), key=linear(), value=linear()), []),
        (attention(qkv=nn.Sequential(nn.Conv2d(4, 12, 1), nn.BatchNorm2d(12))), ["qkv.0.weight"]),
        (attention(q=None, k=linear(), v=linear()), []),
        (
            attention(q=nn.Embedding(4, 4), k=linear(), v=linear()),
            ["k.weight", "v.weight"],
        ),  # an embedding is one first
    ],
)
@pytest.mark.parametrize("wrap", [lambda module: module, torch.compile], ids=["bare", "compiled"])
def test_what_makes_queries_keys_and_values_is_marked_by_the_company_it_keeps(module, marked, wrap):
    model = nn.Sequential(linear(), wrap(module))
    groups = param_groups(model, adamw=(), attention=True)
    names = [name.removeprefix("1.") for group in groups if group["rule"] == "attention" for name, _ in group["params"]]
    assert sorted(names) == marked
    assert not any(group["rule"] == "attention" for group in param_groups(model, adamw=()))


def test_queries_and_keys_may_share_a_module():
    shared = linear()
    groups = param_groups(attention(q=shared, k=shared, v=linear()), attention=True)
    marked = [name for group in groups if group["rule"] == "attention" for name, _ in group["params"]]
    assert sorted(marked) == ["q.weight", "v.weight"]


def test_adapters_inside_attention_are_not_marked():
    query = linear()
    query.lora_A = nn.Linear(4, 2, bias=False)
    module = attention(q_proj=query, k_proj=linear(), v_proj=linear())
    groups = {group["rule"]: [name for name, _ in group["params"]] for group in param_groups(module, attention=True)}
    assert "q_proj.weight" in groups["attention"]
    assert "q_proj.lora_A.weight" not in groups["attention"]


def test_of_a_model_pace_marks_attention_and_others_do_not():
    model = nn.TransformerEncoderLayer(8, 2)
    rules = {
        name: {group["rule"] for group in get_optimizer_info(name).param_groups(model)} for name in list_optimizers()
    }
    assert {name for name, found in rules.items() if "attention" in found} == {"pace"}


def test_attention_is_no_choice_where_a_rule_has_none():
    with pytest.raises(ValueError, match="rule='attention' is not a choice"):
        create_optimizer([{"params": [nn.Parameter(torch.zeros(4, 4))], "rule": "attention"}], "celo2")
