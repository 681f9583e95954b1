"""What optimizers warn of in the midst of training, and what ranks do about warnings that are errors; see workers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

from disagreement_cases import RULES, Training, pairs_of


def set_option(name: str, value: float) -> Callable[[Any], None]:
    def strange(optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group[name] = value

    return strange


STRANGE: dict[str, Callable[[Any], None]] = {
    "lr": set_option("lr", 20.0),
    "weight_decay": set_option("weight_decay", 5.0),
    "horizon": lambda optimizer: optimizer.set_num_steps(optimizer.iteration),
    "gradient": lambda optimizer: None,
}
"""What is done before a step that then has something to warn of."""

SPOILT = {"gradient": math.nan}
"""Gradients of that step, if that is what is strange about it."""


def hint_case(rank: int, world: int, layout: str, what: str, everywhere: bool) -> tuple[int, int, str]:
    """Warnings are errors, everywhere or on the last rank alone; how many there were, steps taken and parameters."""
    training = Training(layout, rank, world)
    optimizer, raised = training.optimizer(RULES[layout], pairs_of(training.model)), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error" if everywhere or rank == world - 1 else "ignore")
        warnings.filterwarnings("ignore", category=FutureWarning)  # torch's own
        for step in range(4):
            loss = training.backward()
            if step == 2:
                STRANGE[what](optimizer)
                for param in training.model.parameters() if what in SPOILT else ():
                    if param.grad is not None:
                        param.grad.mul_(SPOILT[what])
            try:
                optimizer.step(loss=loss)
            except RuntimeWarning:
                raised += 1
    return raised, optimizer.iteration, training.digest()
