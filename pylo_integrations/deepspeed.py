"""Learned optimizers with DeepSpeed's ZeRO, stages 1 and 2.

ZeRO takes the parameters of a group from the optimizer and gives it one flat tensor in their place: this rank's run of
all their elements, in float32. Where each parameter lies in it DeepSpeed notes with the parameter. So the optimizer is
given views of the flat tensors, one for each parameter, as the slices that they are of whole tensors: they are stepped
as those of FSDP1 are. :func:`attach` does it, and reports the losses that go through ``engine.backward``.

Nothing here imports DeepSpeed. Tested with 0.19.8.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pylo_integrations.attach import Attachment, require_learned
from pylo_integrations.attach import attach as attach_to_backward
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.sharding.pieces import FlatSlice, ShardingError, parameter_names, stand_in

Groups: TypeAlias = list[dict[str, Any]]


def attach(engine: Any, num_steps: int | None = None) -> Attachment:
    """Have a DeepSpeed engine step a learned optimizer by whole tensors, and report its losses to it.

    Call it on every rank after ``deepspeed.initialize(model=model, optimizer=optimizer, ...)``, before the first step
    and before ``engine.load_checkpoint``; a second call adds nothing. The loss is the one that is differentiated: with
    gradient accumulation the sum, over the micro-batches of a step, of what DeepSpeed makes of each.

    Args:
        engine: What ``deepspeed.initialize`` returned first.
        num_steps: The horizon, i.e. the optimizer steps of the whole run.

    Returns:
        A handle whose ``remove()`` has it hear no more losses; steps go on as they are.

    Raises:
        TypeError: The engine has no learned optimizer.
        ValueError: ``num_steps`` is not a positive integer; or the optimizer has state already.
        ShardingError: The engine trains in a way that hides whole tensors: stage 3, offloading and others; the message
            names the nearest way that does not.
    """
    learned = require_learned(engine.basic_optimizer)
    if not isinstance(engine.backward, Attachment):
        _divide(engine, learned)
    steps_seen = -1

    def observe(loss: Tensor, retain_graph: bool = False, scale_wrt_gas: bool = True) -> None:
        nonlocal steps_seen
        if engine.global_steps != steps_seen:  # losses that are still there are of a step that was skipped
            learned.clear_observed_loss()
            steps_seen = engine.global_steps
        learned.observe_loss(loss.detach() / (engine.gradient_accumulation_steps() if scale_wrt_gas else 1))

    return attach_to_backward(engine, learned, num_steps, observe)


def _divide(engine: Any, learned: LearnedOptimizer) -> None:
    """Give the optimizer of an engine its part of every parameter."""
    check_config(engine._config._param_dict)
    model_parallel_size = getattr(engine.mpu, "get_model_parallel_world_size", lambda: 1)
    if engine.pipeline_parallelism or model_parallel_size() > 1:
        raise ShardingError(
            "DeepSpeed's pipelines and model parallelism (mpu=) leave each rank a part of the model, and a learned "
            "optimizer decides for the whole of it: train without"
        )
    zero = engine.optimizer
    params = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", None)
    if params is not None:
        if not isinstance(zero.optimizer, ZeroOptimizer):
            zero.optimizer = ZeroOptimizer(learned, params)
        zero.optimizer.adopt(parameter_names(engine.module))
    learned.bind_model(engine.module, engine.seq_data_parallel_group)


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ShardingError if DeepSpeed, so configured, hides whole tensors or state from the optimizer."""
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    offloads = {key for key in ("offload_optimizer", "offload_param") if _device_of(zero.get(key)) != "none"}
    offloads |= {key for key in ("cpu_offload", "cpu_offload_params") if zero.get(key)}
    autocast = config.get("torch_autocast") or {}
    is_half = any((config.get(dtype) or {}).get("enabled") for dtype in ("fp16", "bf16"))
    stage_2 = "set zero_optimization.stage to 2 or 1, or use torch's fully_shard() (FSDP2)"
    refused = (
        (zero.get("stage") == 3, "stage 3 divides parameters in another way than stages 1 and 2", stage_2),
        (
            is_half and not zero.get("stage"),
            "stage 0 in half precision begins with a step of its own, with gradients of zero",
            "set zero_optimization.stage to 1",
        ),
        (offloads, f"{', '.join(sorted(offloads))} moves what is stepped behind the optimizer's back", "remove it"),
        (zero.get("zenflow"), "zenflow steps selected columns by an optimizer of its own", "remove it"),
        (
            zero.get("round_robin_gradients"),
            "round_robin_gradients reorders the flat partitions, and DeepSpeed's own map of them does not tell how",
            "set it to false",
        ),
        (
            zero.get("elastic_checkpoint"),
            "elastic_checkpoint keeps one flat tensor of each state, but not every tensor here has the same states",
            "set it to false, and change the number of ranks by pylo_integrations.state.to_canonical()",
        ),
        (
            (config.get("checkpoint") or {}).get("load_universal"),
            "universal checkpoints hold exp_avg and exp_avg_sq, and no other state",
            "change the number of ranks by pylo_integrations.state.to_canonical()",
        ),
        (
            autocast.get("enabled")
            and str(autocast.get("dtype")).removeprefix("torch.") in ("fp16", "float16", "half"),
            "torch_autocast with float16 leaves it to a GradScaler for each group to skip a step",
            "use fp16, or bfloat16",
        ),
        (
            (config.get("tensor_parallel") or {}).get("autotp_size", 1) > 1,
            "tensor_parallel.autotp_size leaves each rank a part of every matrix",
            "set it to 1, or use torch's parallelize_module()",
        ),
    )
    for is_set, what, remedy in refused:
        if is_set:
            raise ShardingError(f"learned optimizers do not train under this DeepSpeed configuration: {what}; {remedy}")


def _device_of(offload: Any) -> str:
    return str(offload.get("device", "none")) if isinstance(offload, Mapping) else "none"


class ZeroOptimizer(Optimizer):
    """What DeepSpeed is given in the place of a learned optimizer, or takes for it after :func:`attach`.

    Its groups are those of the learned optimizer, whose options and schedules stay where they are. DeepSpeed steps one
    group after the other: gradients are kept until the last, and then all groups are stepped at once, as the decisions
    of a step are about the whole model.

    Args:
        optimizer: Without state.
        params: The trained parameters of the model, by group, if DeepSpeed has taken them from ``optimizer`` already.
    """

    def __init__(self, optimizer: LearnedOptimizer, params: Sequence[Sequence[Tensor]] | None = None) -> None:
        # Optimizer.__init__ would make groups of its own.
        self.optimizer = optimizer
        self.defaults = optimizer.defaults
        self.state = defaultdict(dict)  # where DeepSpeed looks for states that are shaped like its flat tensors
        self._params = params or [list(group["params"]) for group in optimizer.param_groups]
        self._runs: list[list[_Run]] = []  # by group, once they are known
        self._flats: list[Tensor] = []
        self._chosen: Groups | None = None
        self._gradients: dict[int, Tensor | None] = {}

    @property
    def param_groups(self) -> Groups:  # type: ignore[override]
        """Those of the learned optimizer. Assigning some of them chooses what the next :meth:`step` is about."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: Groups) -> None:
        self._chosen = None if groups is self.optimizer.param_groups else groups

    def adopt(self, names: Mapping[Tensor, str] | None = None) -> None:
        """Give the learned optimizer its part of every parameter; does nothing if it has it, or all of them.

        Args:
            names: Of the model's parameters; by default those in the groups.

        Raises:
            ShardingError: It cannot be told where the elements of a parameter are.
            ValueError: The learned optimizer has state.
        """
        groups = self.optimizer.param_groups
        given = [params for params in self._params if params]  # DeepSpeed drops empty groups
        now = [[*map(id, group["params"])] for group in groups]
        if self._runs or now == [[*map(id, params)] for params in given]:  # the latter in stage 0
            return
        known = _names_in(groups, given) if names is None else names
        flats = [group["params"][0] for group in groups]
        runs = [
            [_find(param, flat, known[param]) for param in params if param.requires_grad and param.numel()]
            for params, flat in zip(given, flats, strict=True)
        ]
        first, *others = {tuple(dist.get_process_group_ranks(run.ranks)) for group in runs for run in group}
        if others:
            raise ShardingError(
                f"DeepSpeed divides some parameters among the ranks {first} and others among {others[0]}, as it does "
                "with experts: train without DeepSpeed's expert parallelism"
            )
        self.optimizer.replace_params(
            [[(run.name, run.master) for run in group] for group in runs],
            {run.master: run.part for group in runs for run in group if run.part is not None},
            runs[0][0].ranks,
        )
        for run in itertools.chain(*runs):
            stand_in(run.param, run.master, run.part)
        self._runs, self._flats = runs, flats

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take note of the gradients of the chosen groups; after the last of them, take a step.

        Raises:
            ShardingError: As :meth:`adopt`.

        And all that the learned optimizer raises, before anything has changed.
        """
        self.adopt()
        if not self._runs:
            return self.optimizer.step(closure)
        groups, chosen, self._chosen = self.optimizer.param_groups, self._chosen, None
        numbers = {i for i, group in enumerate(groups) if chosen is None or any(group is other for other in chosen)}
        if not self._gradients.keys().isdisjoint(numbers):  # of a step that did not come to its end
            self._gradients.clear()
        self._gradients |= {i: self._flats[i].grad for i in numbers}
        if len(self._gradients) < len(groups):
            return None
        try:
            for i, gradient in self._gradients.items():
                for run in self._runs[i]:
                    run.follow(self._flats[i])
                    run.set_gradient(gradient)
            self.optimizer.step()
        finally:
            for run in itertools.chain(*self._runs):
                run.set_gradient(None)
            self._gradients.clear()
        for i in set(range(len(groups))) - numbers:  # DeepSpeed has copied these to the model before they were stepped
            for run in self._runs[i]:
                run.copy_to_model()
        return None

    def state_dict(self) -> dict[str, Any]:
        """What this rank has of the state of the learned optimizer."""
        self.adopt()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned on this rank of as many.

        Raises:
            CheckpointError: It does not fit; nothing was changed.
        """
        self.adopt()
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Under ZeRO nothing is left to do: a step leaves no gradients."""
        self.optimizer.zero_grad(set_to_none)


@dataclass(frozen=True, eq=False)
class _Run:
    """What this rank steps of a parameter.

    Attributes:
        name: Of the parameter.
        param: Of the model, a tensor with DeepSpeed's notes.
        master: Its elements in the flat tensor: all in their shape, or a run of them.
        part: Which run, if ranks divide the parameter.
        start: Where it begins in the flat tensor.
        ranks: Who divides it.
    """

    name: str
    param: Any
    master: Tensor
    part: FlatSlice | None
    start: int
    ranks: Any

    def follow(self, flat: Tensor) -> None:
        """See to it that the master is in the flat tensor, which has other memory after ``engine.reload_states()``."""
        here = self.view(flat.detach())
        if here.data_ptr() != self.master.data_ptr():
            self.master.data = here

    def view(self, flat: Tensor) -> Tensor:
        """What of a flat tensor is the master's, in its shape; shares memory."""
        return flat.narrow(0, self.start, self.master.numel()).view(self.master.shape)

    def set_gradient(self, flat: Tensor | None) -> None:
        """Give the master its part of the gradient of the flat tensor."""
        self.master.grad = None if flat is None else self.view(flat)

    def copy_to_model(self) -> None:
        """Write what is here to the parameter, rounded to its type."""
        if self.master.numel():
            self.param._hp_mapping.update_lp()


def _find(param: Any, flat: Tensor, name: str) -> _Run:
    """Find a parameter in a flat tensor, by what DeepSpeed notes with it.

    Raises:
        ShardingError: That does not tell where all of its elements are.
    """
    if not hasattr(param, "_hp_mapping"):
        raise ShardingError(
            f"DeepSpeed has put a tensor of {flat.numel()} elements in the place of {name}, and does not tell where in "
            "it the parameter is, as in stage 3: set zero_optimization.stage to 2 or 1"
        )
    if getattr(param, "tensor_model_parallel", False) or hasattr(param, "ds_autotp_universal_checkpoint_meta"):
        raise ShardingError(
            f"{name} is a part of a tensor, by tensor parallelism: set tensor_parallel.autotp_size to 1"
        )
    ranks, here = param._dp_group, param._hp_mapping
    parts = dist.get_world_size(ranks)
    if here is not None and here.use_offload:
        raise ShardingError(f"{name} is offloaded: remove offload_optimizer from the configuration of DeepSpeed")
    start, numel = (0, 0) if here is None else (here.hp_fragment_address.start, here.hp_fragment_address.numel)
    master = flat.detach().narrow(0, start, numel)
    if parts == 1:
        return _Run(name, param, master.view(param.shape).requires_grad_(), None, start, ranks)
    part = FlatSlice(name, tuple(param.shape), 0 if here is None else here.lp_fragment_address.start, parts)
    return _Run(name, param, master.requires_grad_(), part, start, ranks)


def _names_in(groups: Groups, params: Sequence[Sequence[Tensor]]) -> dict[Tensor, str]:
    """Names of parameters by their groups; those without have numbers."""
    return {
        param: name
        for index, (group, members) in enumerate(zip(groups, params, strict=True))
        for param, name in zip(
            members, group.get("param_names") or [f"group{index}.{i}" for i in range(len(members))], strict=True
        )
    }
