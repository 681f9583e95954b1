"""The catalogue: every learned optimizer by name."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch.optim
from torch import nn
from torch.optim.optimizer import ParamsT

from pylo_integrations import optimizers
from pylo_integrations.groups import param_groups
from pylo_integrations.ops.select import Backend
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.profiles import PROFILES, Profile
from pylo_integrations.sharding.components import Split
from pylo_integrations.telemetry import TelemetryMode, is_per_parameter
from pylo_integrations.weights.published import PUBLISHED, Published
from pylo_integrations.weights.sources import Weights


@dataclass(frozen=True)
class OptimizerSpec:
    """A catalogue entry.

    Attributes:
        name: Lower snake case.
        cls: Called as ``cls(params, lr=..., **options)``.
        description: One line.
        lr: Default learning rate; if not given, that of ``cls``.
        defaults: Options that differ from those of ``cls``.
    """

    name: str
    cls: type[LearnedOptimizer]
    description: str
    lr: float = math.nan  # until __post_init__
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if math.isnan(self.lr):
            object.__setattr__(self, "lr", self.cls.default_lr)
        object.__setattr__(self, "defaults", MappingProxyType(dict(self.defaults)))

    @property
    def needs_loss(self) -> bool:
        """Whether every step needs the loss."""
        return self.cls.rule_type.needs_loss

    @property
    def needs_horizon(self) -> bool:
        """Whether the optimizer needs ``num_steps``."""
        return self.cls.rule_type.needs_horizon

    @property
    def anneals(self) -> bool:
        """Whether the optimizer lets its steps fall by itself, over a horizon that it need not know."""
        return (profile := self._profile) is not None and profile.anneals

    @property
    def wants_schedule(self) -> bool:
        """Whether a run ends well only under a learning rate that falls to zero, which the caller has to bring."""
        return self.cls.wants_schedule_with(self.defaults)

    @property
    def architecture(self) -> str | None:
        """What theta must be for; None for an optimizer without theta."""
        return getattr(self.cls, "architecture", None)

    @property
    def weights(self) -> Weights | None:
        """Theta where none is given; None if some must be."""
        weights: Weights | None = self.defaults.get("weights", getattr(self.cls, "default_weights", None))
        return weights

    @property
    def hyper(self) -> dict[str, Any]:
        """Constants of the rule and their defaults; theta may have others of its own."""
        parameters = inspect.signature(self.cls.rule_type.from_arrays).parameters.values()
        known = {option.name: option.default for option in parameters if option.kind is option.KEYWORD_ONLY}
        return {**known, **(self._profile.hyper if self._profile else {}), **getattr(self.cls, "constants", {})}

    @property
    def published(self) -> tuple[Published, ...]:
        """Theta that others have published for it."""
        return tuple(entry for entry in PUBLISHED if self._profile and entry.optimizer == self._profile.converts_as)

    @property
    def _profile(self) -> Profile | None:
        return PROFILES.get(getattr(self.cls, "theta_name", ""))

    @property
    def options(self) -> tuple[str, ...]:
        """Keyword arguments of ``cls``."""
        return tuple(inspect.signature(self.cls).parameters)[1:]

    @property
    def weight_decay(self) -> float:
        """Default weight decay."""
        decay: float = self.defaults.get("weight_decay", self.cls.default_weight_decay)
        return decay

    def param_groups(
        self, model: nn.Module, weight_decay: float | None = None, split: bool | Mapping[str, Split] | None = None
    ) -> list[dict[str, Any]]:
        """Parameter groups of a model as this optimizer wants them; see :func:`~pylo_integrations.param_groups`."""
        decay = self.weight_decay if weight_decay is None else weight_decay
        divided = self.cls.splits_fused if split is None else split
        adamw = () if self.cls.adamw_embeddings else None
        return param_groups(model, decay, adamw=adamw, split=divided, attention=self.cls.marks_attention)


_CATALOG = {
    cls.theta_name: OptimizerSpec(cls.theta_name, cls, PROFILES[cls.theta_name].description)
    for cls in (getattr(optimizers, name) for name in optimizers.__all__)
}


def list_optimizers(filter: str = "") -> list[str]:
    """Names in the catalogue, sorted; those matching a wildcard pattern, or containing ``filter`` if it has none."""
    pattern = filter if any(wildcard in filter for wildcard in "*?[") else f"*{filter}*"
    return sorted(fnmatch.filter(_CATALOG, pattern))


def get_optimizer_info(name: str) -> OptimizerSpec:
    """The catalogue entry of ``name``.

    Raises:
        ValueError: There is none; the message lists near matches.
    """
    try:
        return _CATALOG[name]
    except (KeyError, TypeError):
        raise ValueError(f"unknown learned optimizer {name!r}; {_advise(str(name))}") from None


_DESIGNED = {
    name.lower(): f"torch.optim.{name}"
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and cls is not torch.optim.Optimizer
}
_DESIGNED.setdefault("muon", "Muon")  # torch has it from 2.9, and it is spelt almost like mulo


def _advise(name: str) -> str:
    """What whoever asked for a name that is not in the catalogue may have meant."""
    if (respelt := name.lower().replace("-", "_")) in _CATALOG:
        return f"did you mean {respelt!r}?"
    if not (near := difflib.get_close_matches(name.lower(), _CATALOG, n=3, cutoff=0.8)):
        words = (word.rstrip("0123456789") for word in name.lower().replace("-", "_").split("_"))
        if home := next((_DESIGNED[word] for word in words if word in _DESIGNED), None):
            return (
                f"it is no learned one: use {home} where any optimizer can stand (configure_optimizers() of a module, "
                f"TrainingArguments(optim=...), a plain loop); learned ones are {list_optimizers()}"
            )
        near = difflib.get_close_matches(name.lower(), _CATALOG, n=3, cutoff=0.7)
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"available: {list_optimizers()}"


def register_optimizer(spec: OptimizerSpec) -> None:
    """Add an entry; every adapter then accepts its name.

    Raises:
        ValueError: The name is taken.
    """
    if spec.name in _CATALOG:
        raise ValueError(f"optimizer {spec.name!r} is already registered; call unregister_optimizer first")
    _CATALOG[spec.name] = spec


def unregister_optimizer(name: str) -> None:
    """Remove an entry.

    Raises:
        ValueError: There is none.
    """
    del _CATALOG[get_optimizer_info(name).name]


def create_optimizer(
    model_or_params: nn.Module | ParamsT,
    name: str,
    lr: float | None = None,
    weight_decay: float | None = None,
    *,
    weights: Weights | None = None,
    backend: Backend = "auto",
    num_steps: int | None = None,
    step_mult: float | None = None,
    max_grad_norm: float | None = None,
    telemetry: TelemetryMode = False,
    split: bool | Mapping[str, Split] | None = None,
    **kwargs: Any,
) -> LearnedOptimizer:
    """Create a learned optimizer by name.

    Args:
        model_or_params: A model, grouped by :func:`~pylo_integrations.param_groups` and bound
            (:meth:`LearnedOptimizer.bind_model`); or parameters; or groups.
        name: One of :func:`list_optimizers`.
        lr: Factor on the whole update; by default that of the entry. More than 10 times off is warned of.
        weight_decay: As in AdamW's recipes, 0.01 to 0.1, see :data:`~pylo_integrations.decay.DecayPolicy`; by default
            that of the entry: 0, but for ``elo_celo2`` 0.1.
        weights: Theta, see :data:`~pylo_integrations.weights.Weights`; by default that of the entry.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        num_steps: The horizon: optimizer steps of the whole run.
        step_mult: Scale of the step, where the optimizer has one; by default theta's.
        max_grad_norm: Clip the global L2 norm of the gradients to this; by default the entry's, which infinity
            switches off.
        telemetry: Whether to call :meth:`LearnedOptimizer.enable_telemetry`, and how.
        split: Of a model, whether parameters in which several tensors are fused are divided, and which, see
            :func:`~pylo_integrations.param_groups`; by default as the entry.
        **kwargs: Further options of the entry's class.

    Raises:
        ValueError: Unknown name, or an option out of range.
        TypeError: The entry's class has no such option; or ``split`` is given without a model.
    """
    spec, per_parameter = get_optimizer_info(name), is_per_parameter(telemetry)
    given = {"weights": weights, "num_steps": num_steps, "step_mult": step_mult, "max_grad_norm": max_grad_norm}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    decay = spec.weight_decay if weight_decay is None else weight_decay
    options = {**spec.defaults, **options, "backend": backend, "weight_decay": decay, **kwargs}
    if unknown := sorted(set(options) - set(spec.options)):
        message = f"{name} has no option {unknown}; it has {sorted({*spec.options, 'telemetry'})}"
        if {"betas", "eps"} & set(unknown):
            message += "; betas and eps are part of the learned weights: leave them out"
        raise TypeError(message)
    model = model_or_params if isinstance(model_or_params, nn.Module) else None
    if model is None and split is not None:
        raise TypeError(f"split={split!r} is of a model: pass one, or groups that param_groups(model, split=...) made")
    params: Any = model_or_params if model is None else spec.param_groups(model, decay, split)
    optimizer = spec.cls(params, lr=spec.lr if lr is None else lr, **options)
    if model is not None:
        optimizer.bind_model(model)
        optimizer.expect_frozen({name: p for name, p in model.named_parameters() if not p.requires_grad})
    if telemetry:
        optimizer.enable_telemetry(per_parameter)
    return optimizer
