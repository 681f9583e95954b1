"""Do iteration, horizon and loss memory come back, whatever path of torch's checkpoints a run takes?"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from survival_cases import flatten_case, in_place_case, zero_case
from thetas import create
from torch import nn

from pylo_integrations import CheckpointError, list_optimizers

NAMES = [*list_optimizers(), "toy_loss"]
REMEMBERING = ["velo", "celo", "celo_adam"]


def check(results):
    for before, after, distance in results:
        assert before == after and before[0][:2] == (3, 40) and distance == 0


@pytest.mark.dist
@pytest.mark.parametrize("saved", [True, False], ids=["dcp", "memory"])
@pytest.mark.parametrize("name", NAMES)
def test_flattened_state_dicts(workers, tmp_path, name, saved):
    check(workers.run(1, flatten_case, name=name, wrapper="plain", folder=str(tmp_path) if saved else None))


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["fsdp2", "ddp", "shard_step", "fsdp1"])
@pytest.mark.parametrize("name", ["velo", "celo2"])
def test_flattened_state_dicts_of_ranks(workers, tmp_path, name, wrapper):
    check(workers.run(2, flatten_case, name=name, wrapper=wrapper, folder=str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [name for name in NAMES if name != "toy_loss"]
)  # whose memory is made by its first step
def test_loading_in_place(workers, tmp_path, name):
    check(workers.run(1, in_place_case, name=name, wrapper="plain", folder=str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize("wrapper", ["fsdp2", "shard_step"])
@pytest.mark.parametrize("name", ["velo", "celo2"])
def test_loading_in_place_on_ranks(workers, tmp_path, name, wrapper):
    check(workers.run(2, in_place_case, name=name, wrapper=wrapper, folder=str(tmp_path)))


@pytest.mark.dist
@pytest.mark.parametrize("name", list_optimizers())
def test_zero_redundancy_optimizer(workers, name):
    check(workers.run(2 if name in REMEMBERING else 1, zero_case, name=name))
