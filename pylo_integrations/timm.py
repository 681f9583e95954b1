"""Learned optimizers by name in timm, e.g. ``timm.optim.create_optimizer_v2(model, "small_fc_lopt")``.

timm (read in 1.0.31) keeps of an optimizer's name only what follows the last underscore, for the sake of
``"lookahead_adam"``: of ``"small_fc_lopt"`` it would look up ``"lopt"``. Registering is public, but for such names the
registry's factory has to be wrapped as well; :func:`unregister` takes both back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.optim._optim_factory import OptimInfo, OptimizerRegistry, default_registry
from torch.optim.optimizer import Optimizer

from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.optimizer import LearnedOptimizer


def register() -> None:
    """Have timm's factory know every name in the catalogue.

    Without ``lr`` timm then uses that of the catalogue entry. It groups parameters its own way; to have them grouped
    ours, pass ``param_group_fn=partial(pylo_integrations.param_groups, weight_decay=...)``. Call it again after adding
    to the catalogue.

    Raises:
        ValueError: timm has another optimizer of that name; nothing was changed.
    """
    ours = _registered()
    new = [name for name in list_optimizers() if name not in ours]
    if taken := sorted(set(new) & set(default_registry.list_optimizers())):
        raise ValueError(f"timm has optimizers named {taken} of its own; rename those of the catalogue")
    for name in new:
        spec = get_optimizer_info(name)
        default_registry.register(
            OptimInfo(name, spec.cls, spec.description, has_eps=False, defaults={"lr": spec.lr, **spec.defaults})
        )
    default_registry.create_optimizer = _create_optimizer  # type: ignore[method-assign]


def unregister() -> None:
    """Undo :func:`register`."""
    for name in _registered():
        del default_registry._optimizers[name]  # there is no public way to remove one
    if vars(default_registry).get("create_optimizer") is _create_optimizer:
        del default_registry.create_optimizer


def _registered() -> list[str]:
    classes = {name: info.opt_class for name, info in default_registry._optimizers.items()}
    return [name for name, cls in classes.items() if isinstance(cls, type) and issubclass(cls, LearnedOptimizer)]


def _create_optimizer(model_or_params: Any, opt: str, *args: Any, **kwargs: Any) -> Optimizer:
    """``OptimizerRegistry.create_optimizer`` that reads our names whole."""
    name = opt.lower().removeprefix("lookahead_")
    if name not in _registered():
        return OptimizerRegistry.create_optimizer(default_registry, model_or_params, opt, *args, **kwargs)
    alone = OptimizerRegistry()
    alone.register(replace(default_registry.get_optimizer_info(name), name="learned"))
    alias = opt.lower().removesuffix(name) + "learned"
    return alone.create_optimizer(model_or_params, alias, *args, **kwargs)
