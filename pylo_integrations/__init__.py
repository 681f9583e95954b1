"""Learned optimizers for PyTorch training."""

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
from pylo_integrations.optimizers import CELO2, ELO, ELOCELO2, Celo, CELO2Base, CeloAdam, MuLO, SmallFCLOpt, VeLO
from pylo_integrations.sharding.agreement import DisagreementError
from pylo_integrations.sharding.pieces import ShardingError
from pylo_integrations.sharding.rounds import RankError
from pylo_integrations.weights.theta import Theta

__version__ = "0.1.0"

__all__ = [
    "Celo",
    "CeloAdam",
    "CELO2",
    "CELO2Base",
    "CheckpointError",
    "DisagreementError",
    "ELO",
    "ELOCELO2",
    "LearnedOptimizer",
    "MuLO",
    "NonFiniteError",
    "OptimizerSpec",
    "RankError",
    "ShardingError",
    "SmallFCLOpt",
    "StateError",
    "Theta",
    "VeLO",
    "create_optimizer",
    "get_optimizer_info",
    "list_optimizers",
    "mup_param_groups",
    "param_groups",
    "register_optimizer",
    "unregister_optimizer",
    "unwrap_optimizer",
]
