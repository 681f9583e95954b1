"""The learned optimizer that a Trainer's arguments describe: its learning rate, schedule, options and groups."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import transformers
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers.trainer_utils import SchedulerType

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info
from pylo_integrations.deepspeed import ZeroOptimizer, check_config
from pylo_integrations.hf.options import parse_optim_args
from pylo_integrations.hf.run import horizon_is_ours

logger = logging.getLogger(__package__)

Schedule: TypeAlias = SchedulerType | Callable[[Optimizer], LRScheduler]
"""A schedule for an optimizer that does not exist yet: transformers' name of it, or a function that builds it."""


def _choose_rate_and_schedule(
    spec: OptimizerSpec, args: transformers.TrainingArguments, schedule: Schedule | None, options: dict[str, Any]
) -> tuple[float, Schedule]:
    """Learning rate and schedule: what the user chose, else what suits the optimizer.

    A field that has the default of its class counts as not chosen: 5e-5 is a rate for AdamW, and would divide a learned
    update, whose natural factor is the entry's, by 20,000. The linear default is right for a rule that sees no horizon,
    which like AdamW needs annealing; a rule that knows its horizon anneals by itself, and gets a constant factor.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    lr, kind = args.learning_rate, SchedulerType(args.lr_scheduler_type)
    chosen = schedule or kind
    notes = []
    if lr == defaults["learning_rate"]:
        notes.append(f"lr {spec.lr:g} in place of the default {lr:g}, since lr multiplies the learned update")
        lr = spec.lr
    anneals = (spec.needs_horizon or spec.anneals) and not spec.cls.wants_schedule_with({**spec.defaults, **options})
    if schedule is None and anneals and kind == defaults["lr_scheduler_type"]:
        chosen = SchedulerType.CONSTANT_WITH_WARMUP
        notes.append(f"schedule {chosen.value} in place of the default {kind.value}, since the rule anneals by itself")
    elif notes:
        notes.append(f"schedule {getattr(chosen, 'value', 'as given to the Trainer')}")
    if notes and args.should_log:
        logger.warning(
            "%s: using %s. To choose, set learning_rate and lr_scheduler_type in TrainingArguments.",
            spec.name,
            "; ".join(notes),
        )
    return lr, chosen


class FromGroups(Optimizer):
    """What the Trainer takes for an optimizer class: called with its groups, it returns a learned optimizer.

    Only a class is handed the Trainer's groups, hence its choice of what decays (``get_decay_parameter_names``, which
    subclasses override); a factory is handed the bare model (``Trainer.create_optimizer``).
    """

    def __new__(
        cls,
        groups: Iterable[dict[str, Any]],
        *,
        name: str,
        owner: nn.Module,
        lr: float,
        options: dict[str, Any],
        for_deepspeed: bool,
    ) -> Any:
        """Create the optimizer ``name`` of ``groups``, which hold parameters of ``owner``."""
        wanted = get_optimizer_info(name).param_groups(owner, split=options.get("split"))
        rest = {option: value for option, value in options.items() if option != "split"}
        optimizer = create_optimizer(_split_as_wanted(groups, wanted), name, lr, **rest)
        optimizer.bind_model(owner)
        if "num_steps" not in options:
            horizon_is_ours.add(optimizer)
        return ZeroOptimizer(optimizer) if for_deepspeed else optimizer


def _split_as_wanted(groups: Iterable[dict[str, Any]], wanted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's groups, divided by how weights are stored and what steps them in ``wanted``, with names.

    Raises:
        ValueError: They hold parameters that are not among those of ``wanted``.
    """
    kinds: list[dict[str, Any]] = []
    known: dict[nn.Parameter, tuple[str, int]] = {}
    for group in wanted:
        kind = {key: value for key, value in group.items() if key not in ("params", "weight_decay")}
        if kind not in kinds:
            kinds.append(kind)
        known |= {param: (name, kinds.index(kind)) for name, param in group["params"]}
    groups = list(groups)
    if foreign := [tuple(param.shape) for group in groups for param in group["params"] if param not in known]:
        raise ValueError(
            f"the Trainer's groups hold parameters that the model has not, of shapes {foreign[:5]}: give the Trainer a "
            "module that holds all that is trained"
        )
    divided = []
    for group in groups:
        members: dict[int, list[tuple[str, nn.Parameter]]] = {}
        for param in group["params"]:
            name, number = known[param]
            members.setdefault(number, []).append((name, param))
        divided += [{**group, "params": params, **kinds[number]} for number, params in members.items()]
    return divided


def describe(
    spec: OptimizerSpec, args: transformers.TrainingArguments, model: nn.Module, schedule: Schedule | None = None
) -> tuple[dict[str, Any], Any]:
    """Arguments of :class:`FromGroups`, and the schedule that goes with them."""
    check_supported(spec, args)
    options = parse_optim_args(spec, args.optim_args)
    lr, chosen = _choose_rate_and_schedule(spec, args, schedule, options)
    for_deepspeed = args.deepspeed_plugin is not None
    return {"name": spec.name, "owner": model, "lr": lr, "options": options, "for_deepspeed": for_deepspeed}, chosen


def check_supported(spec: OptimizerSpec, args: transformers.TrainingArguments) -> None:
    """Refuse what hides whole tensors from the optimizer.

    Raises:
        ShardingError: DeepSpeed, so configured.
        ValueError: The FSDP of XLA; or the configuration of DeepSpeed has an optimizer of its own.
    """
    if args.fsdp and isinstance(args.fsdp_config, dict) and args.fsdp_config.get("xla"):
        raise ValueError(
            f"{spec.name}: FSDP of XLA hides whole tensors from the optimizer, and a learned one needs statistics of "
            "them; train with torch's FSDP (TrainingArguments(fsdp=...)), DistributedDataParallel or one device"
        )
    if args.deepspeed_plugin is not None:
        config = args.deepspeed_plugin.hf_ds_config.config
        if "optimizer" in config:
            raise ValueError(
                f"{spec.name} would not be used: the configuration of DeepSpeed has an optimizer of its own, "
                f"{config['optimizer']!r:.100}; remove it"
            )
        check_config(config)
