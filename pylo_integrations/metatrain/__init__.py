"""Meta-training: train the weights of a learned optimizer on families of tasks."""

from pylo_integrations.metatrain.config import Config, ConfigError, load_config, read_config
from pylo_integrations.metatrain.data import DataError
from pylo_integrations.metatrain.resuming import ResumeError
from pylo_integrations.metatrain.tasks import FAMILIES, Family, Task
from pylo_integrations.metatrain.trainer import MetaTrainer

__all__ = [
    "FAMILIES",
    "Config",
    "ConfigError",
    "DataError",
    "Family",
    "MetaTrainer",
    "ResumeError",
    "Task",
    "load_config",
    "read_config",
]
