"""A config of meta-training that is over in seconds."""

from __future__ import annotations

import copy
from pathlib import Path

from pylo_integrations.metatrain import read_config

SMALL = {"width": 4, "inputs": 3, "depth": 1, "batch": 4}
TINY = {
    "name": "tiny",
    "optimizer": "small_fc_lopt",
    "start": {"hidden": 4},
    "train": [{"kind": "teacher", **SMALL}, {"kind": "regression", **SMALL}],
    "selection": [{"kind": "teacher", "name": "other", **SMALL, "width": 5}],
    "held_out": [{"kind": "text_mlp", "width": 4, "batch": 4}],
    "reparametrisation": {},
    "stages": [
        {"space": "linear", "iterations": 6, "pairs": 2, "groups": 2, "truncation": 4, "horizon": [6, 20]},
        {"iterations": 6, "pairs": 2, "truncation": 4, "horizon": [6, 20], "sigma": 0.01, "lr": 0.003},
    ],
    "evaluation": {"every": 4, "horizon": 6, "tasks": 1, "seeds": 1, "adamw": [0.01]},
}


def tiny(**changes):
    return read_config({**copy.deepcopy(TINY), **changes}, Path())
