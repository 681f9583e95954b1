"""Theta that takes the time and memory of the published ones, where those are not at hand."""

from __future__ import annotations

import torch

from pylo_integrations.profiles import SHAPES
from pylo_integrations.rules.networks import stack_shapes
from pylo_integrations.weights.theta import Theta


def stand_in(architecture: str, width: int | None = None) -> Theta:
    """Random weights in the published geometry of an architecture: for benchmarks, not for training.

    Args:
        architecture: A key of :data:`~pylo_integrations.profiles.ARCHITECTURES`.
        width: Of the hidden layers of those with a bank of MLPs, where it is not the published one.
    """
    shapes = dict(SHAPES[architecture])
    if width is not None and "rnn_params/rnn_to_controls/b" in shapes:
        shapes |= stack_shapes(width, *shapes["rnn_params/rnn_to_controls/b"])
    generator = torch.Generator().manual_seed(0)
    arrays = {name: 0.01 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Theta(architecture, arrays, name=f"{architecture}_stand_in", provenance="random; for benchmarks only")
