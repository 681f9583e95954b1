"""Do MuLO and ELO, which share the rule of small_fc_lopt, repeat the trajectories of the original code?

Tolerances are those of test_golden.py. The ELO files come from a PyTorch port, run on the JAX-layout arrays as
they are; it has the features of 0-d tensors wrong (spec: mean over no axis), so those are not compared.
"""

from __future__ import annotations

import pytest
import torch
from golden_files import TRAJECTORIES, Golden, initial_params, replay_float32, replay_float64

from pylo_integrations import ELO, MuLO, Theta


def mulo(case, params):
    hyper = Golden(case).hyper
    theta = Theta.from_arrays("mulo", Golden(case).theta, {key: hyper[key] for key in ("exp_mult", "step_mult")})
    groups = [{"params": [param], "lr": hyper["mup_lr_multipliers"][name]} for name, param in params.items()]
    return MuLO(groups, weights=theta, max_grad_norm=1.0 if hyper["clip_grad"] else None)


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("case", ["mulo_h32", "mulo_h32_clipgrad"])
def test_mulo_matches_in_float32(case, trajectory):
    params = initial_params(trajectory, torch.float32)
    replay_float32(Golden(case), trajectory, params, mulo(case, params))


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_mulo_matches_in_float64(trajectory):
    params = initial_params(trajectory, torch.float64)
    replay_float64(Golden("mulo_h32"), trajectory, params, mulo("mulo_h32", params))


@pytest.mark.usefixtures("auto_backend")
@pytest.mark.parametrize("trajectory", TRAJECTORIES)
@pytest.mark.parametrize("case", ["elo_pyloport", "elo_pyloport_clip"])
def test_elo_matches(case, trajectory):
    golden = Golden(case)
    hyper = golden.hyper
    params = initial_params(trajectory, torch.float32)
    options = {"lr": hyper["lr"], "weight_decay": hyper["weight_decay"], "max_grad_norm": hyper.get("clip_norm")}
    options["weight_decay_policy"] = "before"
    optimizer = ELO(list(params.values()), weights=golden.theta, exp_mult=hyper["exp_mult"], **options)
    replay_float32(golden, trajectory, params, optimizer, skip=["p02_scalar"])
