"""Is the learning rate of every optimizer step the same on two processes as on one, by adapter and scheduler?"""

from __future__ import annotations

import functools

import pytest
from launched_cases import RATES, rates_case
from scheduler_cases import MAKERS, start, step

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]

LIMIT = 200
SOME = ["CosineAnnealingLR", "OneCycleLR", "SequentialLR", "StepLR"]
KINDS = {
    "accelerate": [*MAKERS],  # it wraps schedulers, the others call them as they are
    "accelerate's own prepare": ["CosineAnnealingLR", "OneCycleLR"],  # those that attach() recognises
}


@functools.cache
def alone(kind: str) -> list[float]:
    """What a plain loop without a framework takes its six steps with."""
    model, optimizer, scheduler = start("celo2", MAKERS[kind])
    rates = []
    for index in range(6):
        if kind == "ReduceLROnPlateau":
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step(1.0)
        else:
            rates += step(model, optimizer, scheduler, index)[:1]
    return rates


@pytest.mark.parametrize(("adapter", "world"), [*((adapter, 2) for adapter in RATES), ("hf", 1), ("fabric", 1)])
def test_learning_rates(workers, small_thetas, tmp_path, adapter, world):
    framework = {"plain": "torch", "hf": "transformers", "fabric": "lightning", "lightning": "lightning"}
    pytest.importorskip(framework.get(adapter, "accelerate"))
    kinds = KINDS.get(adapter, SOME)
    ranks = workers.run(world, rates_case, adapter=adapter, kinds=kinds, folder=str(tmp_path), timeout=LIMIT)
    for kind in kinds:
        for rates in ranks:
            assert rates[kind] == pytest.approx(alone(kind)), kind
