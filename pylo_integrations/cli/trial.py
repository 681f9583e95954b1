"""An optimizer as it comes, with its default weights and of one parameter, without the network."""

from __future__ import annotations

import torch

from pylo_integrations.catalog import OptimizerSpec, create_optimizer
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.weights import load_theta


class NotDownloaded(Exception):
    """The weights of an optimizer would have to be downloaded first, which nobody asked for."""


def on_one_parameter(spec: OptimizerSpec) -> tuple[torch.Tensor, LearnedOptimizer]:
    """One parameter and an optimizer of it; raises :class:`NotDownloaded` rather than use the network."""
    weights = spec.weights
    if isinstance(weights, str) and weights.startswith("hub:"):
        try:
            weights = load_theta(weights, spec.name, local_files_only=True)
        except FileNotFoundError:
            raise NotDownloaded(f"{weights}, not on this machine; using it downloads it") from None
    param = torch.nn.Parameter(torch.ones(2, 3))
    param.grad = torch.ones_like(param)
    horizon = 1 if spec.needs_horizon else None
    return param, create_optimizer([param], spec.name, weights=weights, num_steps=horizon)
