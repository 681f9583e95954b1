"""Theta that takes the time and memory of the published ones, where those are not at hand."""

from __future__ import annotations

import torch

from pylo_integrations.rules.control import SCHEDULE_FEATURES, lstm_shapes
from pylo_integrations.rules.networks import stack_shapes
from pylo_integrations.rules.velo import VeLORule
from pylo_integrations.weights.bootstrap import bootstrap
from pylo_integrations.weights.theta import Theta


def stand_in(architecture: str, width: int | None = None) -> Theta:
    """Random weights in the published geometry of an architecture: for benchmarks, not for training.

    Args:
        architecture: One of :data:`~pylo_integrations.weights.theta.ARCHITECTURES`.
        width: Of the hidden layers of those with a bank of MLPs, where it is not the published one.

    Raises:
        ValueError: Unknown architecture.
    """
    if architecture == "small_fc":
        return bootstrap()
    shapes: dict[str, tuple[int, ...]] = {}
    if architecture in ("velo", "celo"):
        inputs, hidden, controls = (
            (VeLORule.controller_inputs, 512, 256) if architecture == "velo" else (SCHEDULE_FEATURES, 64, 1)
        )
        shapes |= _lstm(architecture, inputs, hidden)
        shapes |= {"rnn_params/rnn_to_controls/w": (hidden, controls), "rnn_params/rnn_to_controls/b": (controls,)}
        shapes |= {name: (controls, *shape) for name, shape in stack_shapes(width or 4).items()}
    elif architecture == "celo_adam":
        shapes |= _lstm(architecture, SCHEDULE_FEATURES, 64)
    elif architecture == "celo2":
        shapes |= stack_shapes(8)
    generator = torch.Generator().manual_seed(0)
    arrays = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Theta(architecture, arrays, name=f"{architecture}_stand_in", provenance="random; for benchmarks only")


def _lstm(architecture: str, inputs: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return lstm_shapes(architecture, {"lstm_init_state/hidden": torch.empty(1, hidden)}, inputs)
