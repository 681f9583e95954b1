"""Megatron-Core: one of its own optimizers around a learned one.

Tensor parallelism of Megatron leaves each rank a slice of a parameter that looks like a whole one; attributes of it say
which. They are noted here, and the learned optimizer then sees slices of whole tensors, as those of FSDP1 are. All else
is Megatron's: the groups that its schedule reads, masters in float32, clipping, the loss scale.
:func:`megatron_optimizer` takes the place of ``get_megatron_optimizer``, which knows Adam and SGD and no others.

Tested with Megatron-Core 0.16.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    OptimizerConfig,
    _get_param_groups,
)
from megatron.core.optimizer.grad_scaler import ConstantGradScaler, DynamicGradScaler, MegatronGradScaler
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.sharding.pieces import AxisSlice, ShardingError, stand_in

_LEARNED = "learned"  # key of a rank's state in sharded state dicts
_REORDERED = ("MambaMixer", "GatedDeltaNet")
"""Modules that fuse matrices whose rows then lie in an order that depends on the number of ranks, untold."""


def megatron_optimizer(
    model_chunks: Sequence[nn.Module],
    name: str,
    *,
    config: OptimizerConfig,
    num_steps: int | None = None,
    config_overrides: Mapping[Any, Any] | None = None,
    **options: Any,
) -> MegatronOptimizer:
    """A learned optimizer as Megatron's training loop wants one, in place of ``get_megatron_optimizer``.

    Call it on every rank, after the model was wrapped by Megatron's ``DistributedDataParallel`` and, in half precision,
    ``Float16Module``. Megatron decides about learning rate, weight decay and clipping, by ``config``,
    ``config_overrides`` and its schedule; which way weights are stored, and what is left to AdamW, is the learned
    optimizer's.

    Args:
        model_chunks: The model, in a list.
        name: One of :func:`~pylo_integrations.list_optimizers`.
        config: Megatron's. ``optimizer`` is not read, nor what begins with ``adam_``, ``sgd_``, ``muon_``. ``lr`` None
            leaves the learning rate to the optimizer, or to the schedule if there is one.
        num_steps: The horizon, i.e. the optimizer steps of the whole run.
        config_overrides: Megatron's, for learning rates and weight decay of some parameters; by default its own: no
            weight decay for vectors.
        **options: Of :func:`~pylo_integrations.create_optimizer`, such as ``shard_step`` and ``state_dtype``.

    Returns:
        A ``FP32Optimizer`` or a ``Float16OptimizerWithFloat16Params``, whose ``optimizer`` is the learned one.

    Raises:
        ShardingError: Megatron is set up in a way that hides whole tensors, or that was not tried; the message names
            the nearest way that is supported.
        ValueError: Unknown name, an option out of range, or a loss that the optimizer would see wrong.
        TypeError: The optimizer has no such option.
    """
    spec = get_optimizer_info(name)
    check_setup(model_chunks, config)
    model = model_chunks[0]
    if spec.needs_loss:
        check_loss(name, model)
    groups = _param_groups(spec, model, config, config_overrides, options.pop("split", None))
    lr = spec.lr if config.lr is None else config.lr
    learned = create_optimizer(groups, name, lr, config.weight_decay, num_steps=num_steps, **options)
    params = [[*group["params"]] for group in learned.param_groups]
    wrapper: Any
    if config.fp16 or config.bf16:
        wrapper = LearnedFloat16Optimizer(learned, config, _grad_scaler(config), _init_state)
    else:
        wrapper = LearnedFP32Optimizer(learned, config, _init_state)
    wrapper.grad_stats_parallel_group = parallel_state.get_model_parallel_group()
    wrapper.tp_group = parallel_state.get_tensor_model_parallel_group()
    _adopt(learned, params, wrapper.tp_group)
    learned.bind_model(model)
    return wrapper  # type: ignore[no-any-return]


def check_setup(model_chunks: Sequence[nn.Module], config: OptimizerConfig) -> None:
    """Raise ShardingError if Megatron, so set up, hides whole tensors, or does what was not tried."""
    model, ddp = model_chunks[0], getattr(model_chunks[0], "ddp_config", None)
    divides = parallel_state.get_tensor_model_parallel_world_size() > 1
    experts = getattr(get_model_config(model), "num_moe_experts", None)
    reordered = sorted({kind for module in model.modules() if (kind := type(module).__name__) in _REORDERED})
    shares = "set it to False; shard_step=True shares steps and state among data-parallel ranks"
    refused = (
        (
            len(model_chunks) > 1 or parallel_state.get_pipeline_model_parallel_world_size() > 1,
            "pipeline parallelism leaves each rank other layers, and a learned optimizer decides for the whole model",
            "set pipeline_model_parallel_size to 1 and use tensor parallelism",
        ),
        (
            parallel_state.get_expert_model_parallel_world_size() > 1,
            "expert parallelism leaves each rank other experts",
            "set expert_model_parallel_size to 1",
        ),
        (
            divides and experts,
            "the experts of num_moe_experts are divided among ranks in ways of their own under tensor parallelism",
            "set tensor_model_parallel_size to 1",
        ),
        (
            divides and reordered,
            f"{', '.join(reordered)} keeps the rows of fused matrices in an order that depends on tensor parallelism",
            "set tensor_model_parallel_size to 1",
        ),
        (
            config.use_distributed_optimizer or getattr(ddp, "use_distributed_optimizer", False),
            "use_distributed_optimizer melts tensors together and gives each rank a run of all their elements",
            shares,
        ),
        (
            getattr(ddp, "use_megatron_fsdp", False),
            "use_megatron_fsdp keeps parameters in buffers of its own",
            "set it to False, or use torch's fully_shard() (FSDP2) without Megatron's optimizer",
        ),
        (
            config.optimizer_cpu_offload,
            "optimizer_cpu_offload steps by optimizers of Megatron's own",
            'set it to False; state_dtype="bfloat16" makes state small',
        ),
        (
            config.use_precision_aware_optimizer or config.reuse_grad_buf_for_mxfp8_param_ag,
            "use_precision_aware_optimizer and fp8 parameters keep masters and gradients out of sight",
            "set them to False",
        ),
    )
    for is_set, what, remedy in refused:
        if is_set:
            raise ShardingError(f"learned optimizers do not train under this setup of Megatron: {what}; {remedy}")


def check_loss(name: str, model: nn.Module) -> None:
    """Raise ValueError if what goes into ``scale_loss`` is not the mean loss of what a rank sees."""
    config = get_model_config(model)
    wrong = {
        "calculate_per_token_loss=True": getattr(config, "calculate_per_token_loss", False),
        "context_parallel_size": parallel_state.get_context_parallel_world_size() > 1,
    }
    if told := [what for what, is_set in wrong.items() if is_set]:
        raise ValueError(
            f"{name} needs the mean loss of every step, and with {' and '.join(told)} what Megatron differentiates on "
            "a rank is another number: train without, or choose an optimizer that needs no loss, such as celo2 or pace"
        )


def _param_groups(
    spec: OptimizerSpec, model: nn.Module, config: OptimizerConfig, overrides: Mapping[Any, Any] | None, split: Any
) -> list[dict[str, Any]]:
    """Groups that Megatron and the learned optimizer would each put together; all ranks have to call it."""
    theirs = _get_param_groups([model], config, None if overrides is None else dict(overrides))
    number_of = {param: number for number, group in enumerate(theirs) for param in group["params"]}
    made: dict[tuple[int, int], dict[str, Any]] = {}
    for number, group in enumerate(spec.param_groups(model, split=split)):
        for name, param in group["params"]:
            options = {key: value for key, value in theirs[number_of[param]].items() if value is not None}
            new = {**group, **options, "params": []}
            new["weight_decay"] = config.weight_decay * new["wd_mult"]
            if "max_lr" in new:
                new["lr"] = new["max_lr"]
            made.setdefault((number_of[param], number), new)["params"].append((name, param))
    return [made[key] for key in sorted(made)]


def _adopt(learned: LearnedOptimizer, params: Sequence[Sequence[Tensor]], group: Any) -> None:
    """Note what of each parameter is here, and that Megatron has put masters in the place of some.

    Args:
        learned: With the masters.
        params: Of the model, by group.
        group: The ranks of tensor parallelism.
    """
    members, slices = list[list[tuple[str, Tensor]]](), dict[Tensor, AxisSlice]()
    for options, models in zip(learned.param_groups, params, strict=True):
        masters = options["params"]
        members.append(list(zip(options["param_names"], masters, strict=True)))
        for (name, master), param in zip(members[-1], models, strict=True):
            part = slice_of(param, name, group.rank(), group.size())
            stand_in(param, master, part)
            if part is not None:
                slices[master] = part
    learned.replace_params(members, slices)


def slice_of(param: Tensor, name: str, rank: int, parts: int) -> AxisSlice | None:
    """What a parameter is of a whole tensor, by Megatron's attributes; None if it is the whole one.

    Args:
        param: Of a layer of Megatron.
        name: Of the parameter.
        rank: Of this process among those of tensor parallelism.
        parts: Number of those.

    Raises:
        ShardingError: A rank has several slices along another axis than the first.
    """
    if parts == 1 or not getattr(param, "tensor_model_parallel", False):
        return None
    axis, runs = getattr(param, "partition_dim", 0), getattr(param, "partition_stride", 1)
    if runs > 1 and axis:
        raise ShardingError(
            f"{name} has partition_stride={runs} along axis {axis}, whose slices are no neighbours in memory: set "
            "tensor_model_parallel_size to 1"
        )
    shape = tuple(extent * parts if i == axis else extent for i, extent in enumerate(param.shape))
    return AxisSlice(name, shape, axis, rank, parts, runs)


def _grad_scaler(config: OptimizerConfig) -> MegatronGradScaler | None:
    """What scales the loss of half precision, as Megatron's options have it."""
    if config.loss_scale:
        return ConstantGradScaler(config.loss_scale)
    if not config.fp16:
        return None
    return DynamicGradScaler(
        initial_scale=config.initial_loss_scale,
        min_scale=config.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=config.loss_scale_window,
        hysteresis=config.hysteresis,
    )


def _init_state(learned: LearnedOptimizer, config: OptimizerConfig | None = None) -> None:
    learned.init_state()


class _Learned(MegatronOptimizer):  # type: ignore[misc]
    """What Megatron's optimizers do otherwise around a learned one."""

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Scale what will be differentiated; the learned optimizer hears of it."""
        if loss.requires_grad and self.optimizer.needs_loss:  # Megatron also asks for the scale of 1, without gradients
            self.optimizer.observe_loss(loss.detach())
        return super().scale_loss(loss)  # type: ignore[no-any-return]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients, and losses of a step that was not taken."""
        self.optimizer.clear_observed_loss()
        super().zero_grad(set_to_none)

    def prepare_grads(self) -> bool:
        """Prepare gradients; True if float16 overflowed somewhere, and the step is skipped."""
        has_overflowed: bool = super().prepare_grads()
        if has_overflowed:
            self.optimizer.clear_observed_loss()
        return has_overflowed

    @staticmethod
    def _filter_and_reorder_param_groups(current_groups: Any, state_dict_groups: Any) -> Any:
        # Megatron finds groups by its own options, in which two of ours may be the same. Loading checks ours.
        return state_dict_groups

    def sharded_state_dict(
        self, model_sharded_state_dict: Any, is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """This rank's state as one object, for as many ranks of tensor parallelism.

        Megatron's own form is for states that are all shaped like their parameter.
        """
        group, replica = self.tp_group, parallel_state.get_data_parallel_rank(with_context_parallel=True)
        place = (group.size(),), (group.rank(),)
        return {_LEARNED: ShardedObject("optimizer.learned", self.state_dict(), *place, replica_id=(0, 0, replica))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` or :meth:`sharded_state_dict` returned on this rank.

        Raises:
            CheckpointError: It does not fit; nothing was changed.
        """
        super().load_state_dict(state_dict.get(_LEARNED, state_dict))


class LearnedFP32Optimizer(_Learned, FP32Optimizer):  # type: ignore[misc]
    """Megatron's ``FP32Optimizer`` around a learned optimizer."""


class LearnedFloat16Optimizer(_Learned, Float16OptimizerWithFloat16Params):  # type: ignore[misc]
    """Megatron's ``Float16OptimizerWithFloat16Params`` around a learned optimizer."""
