"""Learned optimizers for PyTorch training."""

from pylo_integrations import optimizers
from pylo_integrations.catalog import (
    OptimizerSpec,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
    register_optimizer,
    unregister_optimizer,
)
from pylo_integrations.checkpoints import CheckpointError
from pylo_integrations.engine import NonFiniteError
from pylo_integrations.fitting import StateError
from pylo_integrations.groups import param_groups
from pylo_integrations.mup import mup_param_groups
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.optimizers import *  # noqa: F403 - all of its __all__, which the catalogue has
from pylo_integrations.sharding.agreement import DisagreementError
from pylo_integrations.sharding.pieces import ShardingError
from pylo_integrations.sharding.rounds import RankError
from pylo_integrations.weights.theta import Theta

__version__ = "0.2.0"

__all__ = [
    "CheckpointError",
    "DisagreementError",
    "LearnedOptimizer",
    "NonFiniteError",
    "OptimizerSpec",
    "RankError",
    "ShardingError",
    "StateError",
    "Theta",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "mup_param_groups",
    "param_groups",
    "register_optimizer",
    "unregister_optimizer",
    "unwrap_optimizer",
]
__all__ += optimizers.__all__
