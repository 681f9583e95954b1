"""Optimizers with the weights and settings of the golden trajectories."""

from __future__ import annotations

from golden_files import PUBLISHED, Golden
from torch import Tensor

from pylo_integrations import Celo, CeloAdam, LearnedOptimizer, SmallFCLOpt, Theta, VeLO

CELO = ("celo_real", "celo_real_phase1", "celo_adam_real")


def small_fc(golden: Golden, params, **options) -> SmallFCLOpt:
    hyper = {key: golden.hyper[key] for key in ("exp_mult", "step_mult")}
    return SmallFCLOpt(params, weights=Theta.from_arrays("small_fc_lopt", golden.theta, hyper), **options)


def read(case: str) -> Golden:
    return Golden(case, PUBLISHED) if case in CELO else Golden(case)


def build(golden: Golden, params: dict[str, Tensor] | list, trajectory: str, **options) -> LearnedOptimizer:
    hyper, given = golden.hyper, {"num_steps": golden.num_steps(trajectory), **options}
    params = list(params.values()) if isinstance(params, dict) else params
    if "Adam" in hyper["cls"] or "celo_adam" in hyper["cls"]:
        return CeloAdam(params, weights=Theta.from_arrays("celo_adam", golden.theta), **given)
    constants = {"exp_mult": hyper["exp_mult"], "step_mult": hyper["step_mult"]}
    if "celo" in hyper["cls"]:
        theta = Theta.from_arrays("celo", golden.theta or read("celo_real").theta, constants)
        return Celo(params, weights=theta, phase=hyper["train_phase"], **given)
    constants |= {flag: hyper[flag] for flag in ("use_bugged_next_lstm_state", "use_bugged_loss_features")}
    decay = {"weight_decay": hyper["weight_decay_wrapper"], "weight_decay_policy": "l2"}
    return VeLO(params, weights=Theta.from_arrays("velo", golden.theta, constants), **decay, **given)
