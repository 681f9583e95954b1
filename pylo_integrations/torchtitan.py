"""torchtitan: its configs with a learned optimizer in the place of theirs.

    torchrun ... -m torchtitan.train --module pylo_integrations.torchtitan --config llama3_debugmodel \\
        --optimizer.name pace

Whatever function of torchtitan's ``config_registry`` modules ``--config`` names is found here under the same name. In a
config function of one's own, :func:`learned` does the same. Checkpoints are torchtitan's: state is by parameter names
and reshards, and what is global to the run travels in the options of the first group.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.optimizer import LearnedOptimizer

_T = TypeVar("_T")


class LearnedOptimizers(OptimizersContainer):
    """A learned optimizer for every part of a model.

    Args:
        config: Which one.
        model_parts: As they are trained; FSDP2 and tensor parallelism have been applied.

    Raises:
        ValueError: Unknown name, an option out of range, an optimizer that needs the loss, which torchtitan hands to
            none, options that are AdamW's alone, or pipeline parallelism.
        TypeError: The optimizer has no such option.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Of a learned optimizer."""

        name: str = "celo2"
        """One of ``pylo list``, of those that need no loss."""

        lr: float | None = None
        """Factor on the whole update; by default the optimizer's own, which is far from AdamW's."""

        weight_decay: float | None = None
        """As in AdamW's recipes, 0.01 to 0.1; by default the optimizer's own."""

        options: dict[str, Any] = field(default_factory=dict)
        """Further arguments of ``pylo_integrations.create_optimizer``."""

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.spec = get_optimizer_info(config.name)
        _check(self.spec, config, model_parts)
        self.model_parts = model_parts
        self.optimizers = [_create(self.spec, config, part) for part in model_parts]
        params = [param for each in self.optimizers for group in each.param_groups for param in group["params"]]
        self._validate_params(params)
        self._post_init(params)


class LearnedSchedule(LRSchedulersContainer):
    """torchtitan's learning rates, for optimizers that want some, and the horizon, for those that know it."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """As torchtitan's. An optimizer that anneals by itself keeps its learning rate."""

        def build(self, *, optimizers: OptimizersContainer, training_steps: int) -> LRSchedulersContainer:
            """The schedule of a run of ``training_steps``, or of ``total_steps`` if that is set."""
            plain = LRSchedulersContainer.Config(**_values(self, LRSchedulersContainer.Config))
            for optimizer in optimizers:
                if isinstance(optimizer, LearnedOptimizer) and optimizer.num_steps is None:
                    optimizer.set_num_steps(self.total_steps or training_steps)
            if isinstance(optimizers, LearnedOptimizers) and optimizers.spec.anneals:
                plain.warmup_steps, plain.decay_ratio = 0, 0.0
            return plain.build(optimizers=optimizers, training_steps=training_steps)


def learned(config: _T, name: str = "celo2", **options: Any) -> _T:
    """A config of torchtitan's trainer with a learned optimizer, and its schedule for such; changed in place.

    Args:
        config: As a function of a ``config_registry`` returns it.
        name: The optimizer, which ``--optimizer.name`` overrides.
        **options: Arguments of :func:`~pylo_integrations.create_optimizer`.
    """
    own = {key: options.pop(key) for key in ("lr", "weight_decay") if key in options}
    changed: Any = config
    changed.optimizer = LearnedOptimizers.Config(name=name, **own, options=options)
    changed.lr_scheduler = LearnedSchedule.Config(**_values(changed.lr_scheduler, LRSchedulersContainer.Config))
    return config


def __getattr__(name: str) -> Callable[[], Any]:
    """The config function of this name in torchtitan's registries, with a learned optimizer.

    Raises:
        AttributeError: There is none.
    """
    if re.fullmatch(r"[a-z]\w*", name) and name != "config_registry":
        from torchtitan.models import _supported_models

        for module in sorted(_supported_models, key=lambda known: not name.startswith(known)):
            try:
                registry = importlib.import_module(f"torchtitan.models.{module}.config_registry")
            except ImportError:  # of a model whose packages are not installed
                continue
            if callable(function := getattr(registry, name, None)):
                return lambda: learned(function())
    raise AttributeError(f"module {__name__} has no attribute {name!r}, nor has a config_registry of torchtitan")


def _check(spec: OptimizerSpec, config: LearnedOptimizers.Config, model_parts: list[nn.Module]) -> None:
    if spec.needs_loss:
        able = [name for name in list_optimizers() if not get_optimizer_info(name).needs_loss]
        raise ValueError(
            f"optimizer.name={spec.name!r} needs the loss of every step, which torchtitan hands to no optimizer; "
            f"choose one of {able}"
        )
    if config.param_groups:
        raise ValueError(
            "optimizer.param_groups are of torchtitan's own optimizers; a learned one makes its groups of the model: "
            "leave them empty"
        )
    meshes = [param.device_mesh for part in model_parts for param in part.parameters() if hasattr(param, "device_mesh")]
    world = dist.get_world_size() if dist.is_initialized() else 1
    if len(model_parts) > 1 or any(mesh.size() != world for mesh in meshes):
        raise ValueError(
            f"a learned optimizer agrees on every step with all {world} ranks, and here ranks train different "
            "parameters: set parallelism.pipeline_parallel_degree and expert_parallel_degree to 1"
        )


def _create(spec: OptimizerSpec, config: LearnedOptimizers.Config, model: nn.Module) -> LearnedOptimizer:
    options = dict(config.options)
    groups = spec.param_groups(model, config.weight_decay, options.pop("split", None))
    for group in groups:
        group["params"] = [(canonical_fqn(name), param) for name, param in group["params"]]
    optimizer = create_optimizer(groups, spec.name, config.lr, config.weight_decay, **options)
    optimizer.bind_model(model)
    return optimizer


def _values(config: Any, of: type) -> dict[str, Any]:
    """What a config has for the fields of a config class."""
    return {each.name: getattr(config, each.name) for each in fields(of) if not each.name.startswith("_")}
