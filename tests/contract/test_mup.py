"""Do learning rates of parameter groups make a step's effect independent of width?"""

from __future__ import annotations

import math

import pytest
import torch
from thetas import theta_for
from torch import nn

from pylo_integrations import create_optimizer, mup_param_groups


class Conv1D(nn.Module):
    """Named and stored like transformers'."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(inputs, outputs)), nn.Parameter(torch.zeros(outputs))


def zoo(width: int) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "embedding": nn.Embedding(50, width),
            "norm": nn.LayerNorm(width),
            "qkv": nn.Linear(width, 3 * width),
            "up": nn.Linear(width, 100 + 2 * width),
            "conv1d": Conv1D(width, 4 * width),
            "stem": nn.Conv2d(3, width, 3),
            "conv": nn.Conv2d(width, 2 * width, 3),
            "depthwise": nn.Conv2d(width, width, 3, groups=width),
            "transposed": nn.ConvTranspose2d(2 * width, width, 3),
            "attention": nn.MultiheadAttention(width, 4),
            "head": nn.Linear(width, 10),
        }
    )


def lrs(groups) -> dict[str, float]:
    return {name: group["lr"] for group in groups for name, _ in group["params"]}


HIDDEN = {
    *("qkv.weight", "up.weight", "conv1d.weight", "conv.weight", "transposed.weight"),
    *("attention.in_proj_weight", "attention.out_proj.weight"),
}


@pytest.mark.parametrize("kind", ["module", "meta", "shapes", "state_dict"])
def test_hidden_matrices_get_the_reciprocal_of_the_width_ratio(kind):
    if kind == "meta":
        with torch.device("meta"):
            base = zoo(8)
    else:
        base = zoo(8)
    if kind == "shapes":
        base = {name: list(p.shape) for name, p in base.named_parameters()}
    elif kind == "state_dict":
        base = base.state_dict()
    found = lrs(mup_param_groups(zoo(32), base, lr=0.5))
    assert found == {name: 0.125 if name in HIDDEN else 0.5 for name, _ in zoo(32).named_parameters()}


def test_the_ratio_is_that_of_the_inputs_whichever_way_they_are_stored():
    def model(inputs, outputs):
        return nn.ModuleDict({"linear": nn.Linear(inputs, outputs), "conv1d": Conv1D(inputs, outputs)})

    found = lrs(mup_param_groups(model(40, 16), model(4, 8)))
    assert found["linear.weight"] == found["conv1d.weight"] == 0.1


def test_weight_decay_and_axes_are_those_of_param_groups():
    groups = mup_param_groups(zoo(16), zoo(8), 0.1, no_decay=["head.weight"])
    placed = {name: (g["weight_decay"], g["axes"]) for g in groups for name, _ in g["params"]}
    assert placed["qkv.weight"] == (0.1, "out_in") and placed["conv1d.weight"] == (0.1, "in_out")
    assert placed["embedding.weight"] == (0.0, "in_out") and placed["head.weight"][0] == 0.0
    wanted = lrs(groups)
    optimizer = create_optimizer(groups, "mulo", weights=theta_for("mulo"))
    assert {name: g["lr"] for g in optimizer.param_groups for name in g["param_names"]} == wanted


def test_infshape_of_the_mup_package_is_read():
    class InfShape:  # what mup.set_base_shapes hangs on every parameter
        def __init__(self, infinite, mult):
            self.infinite, self.mult = infinite, mult

        def ninf(self):
            return self.infinite

        def width_mult(self):
            return self.mult

    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    for i, layer in enumerate(model):
        layer.weight.infshape = InfShape(2 if i == 1 else 1, 4.0)
        layer.bias.infshape = InfShape(0 if i == 2 else 1, 4.0)
    found = lrs(mup_param_groups(model))
    assert found == {name: 0.25 if name == "1.weight" else 1.0 for name, _ in model.named_parameters()}
    del model[2].bias.infshape
    with pytest.raises(ValueError, match=r"2\.bias has no `infshape`; pass the base model"):
        mup_param_groups(model)


def experts(*shape: int) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(shape))
    return model


def test_stacked_matrices_are_understood_where_nothing_is_ambiguous():
    assert lrs(mup_param_groups(experts(6, 32, 64), experts(6, 8, 16))) == {"weight": 0.25}
    with pytest.raises(ValueError, match=r"weight of shape \(6, 32, 64\).*which of its axes \[1, 2\] holds the inputs"):
        mup_param_groups(experts(6, 32, 64), experts(6, 8, 8))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (experts(2, 2), "weight has shape"),
        (experts(2, 2, 2), "not 3"),
        ({}, r"lacks parameters \['weight'\]"),
    ],
    ids=["rank", "three", "names"],
)
def test_a_base_that_differs_in_more_than_width_is_refused(base, message):
    with pytest.raises(ValueError, match=message):
        mup_param_groups(experts(4, 4, 4), base)


WIDTHS = (64, 128, 256, 512, 1024)
BASE = 64


class Net(nn.Module):
    """A muP network: fan-in initialisation, and an output layer whose product is divided by the width ratio."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 4)
        for layer in (*self.layers, self.head):
            nn.init.normal_(layer.weight, std=1 / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.head.weight, std=1 / math.sqrt(BASE))

    def forward(self, x):
        activations = []
        for layer in self.layers:
            x = layer(x).tanh()
            activations.append(x)
        activations.append(self.head(x) * BASE / self.head.in_features)
        return activations


def changes(width: int, *, mup: bool, lr: float = 0.05) -> list[float]:
    """Root mean square change of the coordinates of every layer's output after four steps."""
    torch.manual_seed(0)
    model, x, y = Net(width), torch.randn(32, 16), torch.randn(32, 4)
    groups = mup_param_groups(model, Net(BASE), lr=lr) if mup else [{"params": list(model.parameters()), "lr": lr}]
    optimizer = create_optimizer(groups, "mulo", weights=theta_for("mulo"))
    before = [a.detach() for a in model(x)]
    for _ in range(4):
        optimizer.zero_grad()
        (model(x)[-1] - y).square().mean().backward()
        optimizer.step()
    return [(a.detach() - b).square().mean().sqrt().item() for a, b in zip(model(x), before, strict=True)]


@pytest.mark.timeout(300)
def test_coordinate_check():
    # muP promises a limit, not equality: at width 64 sums of random terms are still off by 1 / sqrt(64) = 1/8 either
    # way, and the features see that too, hence a factor of 1.5 between any two widths. The control, one learning rate
    # for all, has width 1024 move its hidden matrices' outputs, and with them the head's, several times as far.
    mup = torch.tensor([changes(width, mup=True) for width in WIDTHS])
    plain = torch.tensor([changes(width, mup=False) for width in WIDTHS])
    assert (mup.amax(0) / mup.amin(0)).max() < 1.5
    assert (plain[-1] / plain[0])[1:].min() > 4
