"""Do runs go on, as they would have, from the files that version 0.1.0 wrote? (tests/contract/version_0_1_0)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pylo_integrations import Theta, create_optimizer, list_optimizers
from pylo_integrations.state import from_canonical, load_canonical

FILES = Path(__file__).parent / "version_0_1_0"
NAMES = ["w", "b", "c"]
TOLERANCE = 2e-6  # of what parameters move: kernels and torch's functions round otherwise


def saved(name):
    return torch.load(FILES / f"{name}.pt", weights_only=True)


class Model(nn.Module):
    def __init__(self, values) -> None:
        super().__init__()
        for key, value in zip(NAMES, values, strict=True):
            self.register_parameter(key, nn.Parameter(value.clone()))


def optimizer_of(name, model, backend):
    theta = Theta.load(FILES / f"{name}.theta.safetensors")
    return create_optimizer(list(model.named_parameters()), name, weights=theta, num_steps=20, backend=backend)


def test_every_entry_of_then_is_there():
    assert {path.name.split(".")[0] for path in FILES.glob("*.pt")} <= set(list_optimizers())


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", [path.stem for path in sorted(FILES.glob("*.pt"))])
def test_runs_go_on(name, backend):
    old = saved(name)
    model = Model(old["params"])
    optimizer = optimizer_of(name, model, backend)
    optimizer.load_state_dict(old["optimizer"])
    assert optimizer.iteration == 3 and optimizer.param_groups[0]["weight_decay_policy"] == "before"
    for step in (3, 4):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step(loss=1.0 / (1 + step))
    bound = 500 * TOLERANCE if "celo2" in name and name != "celo2_base" else TOLERANCE  # orthogonalisation
    for param, start, after in zip(model.parameters(), old["params"], old["after"], strict=True):
        moved = (after - start).abs().max()
        assert (param - after).abs().max() <= bound * moved + 2**-23 * after.abs().max()

    canonical = load_canonical(FILES / f"{name}.state.safetensors")
    twin = Model(old["after"])
    other = optimizer_of(name, twin, backend)
    from_canonical(other, twin, canonical)
    assert other.iteration == 5
    for param, copy in zip(model.parameters(), twin.parameters(), strict=True):
        for key, value in optimizer.state[param].items():
            torch.testing.assert_close(other.state[copy][key], value, rtol=1e-5, atol=1e-7)
