"""Learned optimizers for PyTorch training."""

from pylo_integrations.catalog import (
    OptimizerSpec,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
    register_optimizer,
    unregister_optimizer,
)
from pylo_integrations.engine import NonFiniteError
from pylo_integrations.groups import param_groups
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.optimizers import Celo, CeloAdam, SmallFCLOpt, VeLO
from pylo_integrations.weights.theta import Theta

__version__ = "0.1.0"

__all__ = [
    "Celo",
    "CeloAdam",
    "LearnedOptimizer",
    "NonFiniteError",
    "OptimizerSpec",
    "SmallFCLOpt",
    "Theta",
    "VeLO",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "param_groups",
    "register_optimizer",
    "unregister_optimizer",
    "unwrap_optimizer",
]
