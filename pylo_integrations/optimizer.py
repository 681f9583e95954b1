"""``LearnedOptimizer``: the torch.optim contract around a rule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from pylo_integrations.checkpoints import (
    PROGRESS,
    SMALL,
    Checkpoint,
    CheckpointError,
    Member,
    check_groups,
    has_states,
    pack_states,
    read_state_dict,
    whole_states,
)
from pylo_integrations.decay import DecayPolicy
from pylo_integrations.engine import Engine, NonFinitePolicy, state_dtype
from pylo_integrations.ops.select import Backend
from pylo_integrations.ops.step import register
from pylo_integrations.options import check_group
from pylo_integrations.progress import LossWindow, Progress, as_scalar_loss
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.layout import TensorLayout
from pylo_integrations.sharding.pieces import ShardingError, is_sharded, local_gradient, read_flat_slices
from pylo_integrations.telemetry import Telemetry
from pylo_integrations.weights.theta import Theta

CHUNK_BYTES = 256 * 2**20


class _Twins(NamedTuple):
    """Groups and states like an optimizer's own, but with other tensors in the place of some of its parameters.

    Attributes:
        key: Where those tensors are.
        groups: The parameter groups.
        states: By parameter.
        params: Those that are others.
    """

    key: tuple[Any, ...]
    groups: list[dict[str, Any]]
    states: dict[Tensor, dict[str, Any]]
    params: list[Tensor]


class LearnedOptimizer(Optimizer):
    """A torch optimizer whose update is a learned rule.

    Subclasses only choose the rule; all behaviour is here. State is created lazily (:meth:`init_state`), in float32
    (float64 for float64 parameters), shaped like its parameter but for small row and column statistics.

    Args:
        params: Parameters, named parameters, or parameter groups. Groups may set ``lr``, ``weight_decay``,
            ``weight_decay_policy``, ``maximize`` and ``axes``: ``"out_in"`` for weights stored (out, in, ...), as most
            are, ``"in_out"`` for (in, out, ...), as in ``nn.Embedding``; and, where the optimizer has the choice,
            ``rule``: ``"learned"`` or ``"adamw"``. See :func:`~pylo_integrations.param_groups`.
        rule: The mathematics.
        lr: Factor on the whole update; a float or a one-element tensor. 1 is the natural value of most theta.
        weight_decay: Decoupled weight decay.
        num_steps: The horizon, i.e. how many optimizer steps the run will take.
        max_grad_norm: Clip the global L2 norm of the gradients to this before the rule sees them; not with None or
            infinity.
        weight_decay_policy: See :data:`~pylo_integrations.decay.DecayPolicy`.
        maximize: Ascend instead of descend.
        on_nonfinite: See :data:`~pylo_integrations.engine.NonFinitePolicy`.
        chunk_bytes: Bound on the temporaries of a step, in bytes.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        shard_step: Where several processes all have the whole parameters (``DistributedDataParallel``, or replicas in
            the ranks of :meth:`bind_model`), let each step its share of the rows of every tensor and keep the state of
            that share only, as ZeRO's first stage does; afterwards all collect the new parameters. Time of a step and
            bytes of state fall with the number of processes. Without effect on parameters that are sharded anyway
            (``DTensor``, FSDP), on scalars, and in a single process. For checkpoints see
            :meth:`consolidate_state_dict`.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, so that their mean is right and small
            updates are not lost (:mod:`pylo_integrations.rounding`). Without effect on parameters of other types.
        theta: The weights that ``rule`` was built from, if any.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A parameter is complex or not floating point.
    """

    _twins: _Twins | None  # of the last compiled step

    rule_type: ClassVar[type[Rule]]

    default_lr: ClassVar[float] = 1.0
    """Learning rate of the catalogue entry, unless that says otherwise."""

    default_weight_decay: ClassVar[float] = 0.0
    """Weight decay where none is given."""

    default_max_grad_norm: ClassVar[float | None] = None
    """Gradient clipping where none is given."""

    adamw_embeddings: ClassVar[bool] = False
    """Whether groups made from a model leave its embeddings to AdamW."""

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        *,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        num_steps: int | None = None,
        max_grad_norm: float | None = None,
        weight_decay_policy: DecayPolicy = "before",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
        shard_step: bool = False,
        stochastic_rounding: bool = False,
        theta: Theta | None = None,
    ) -> None:
        if on_nonfinite not in get_args(NonFinitePolicy):
            raise ValueError(
                f"on_nonfinite={on_nonfinite!r} is unknown; choose one of {list(get_args(NonFinitePolicy))}"
            )
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} must be positive, or None for no clipping")
        if chunk_bytes < 1:
            raise ValueError(f"chunk_bytes={chunk_bytes!r} must be positive")
        self.rule = rule
        self.theta = theta
        self.max_grad_norm = None if max_grad_norm == math.inf else max_grad_norm
        self.on_nonfinite: NonFinitePolicy = on_nonfinite
        self.chunk_bytes = chunk_bytes
        self.backend = backend
        self.stochastic_rounding = stochastic_rounding
        # Changed in place only: wrappers of frameworks share it with us, see LossWindow.
        self._progress = Progress()
        self._warned: set[str] = set()
        self._holdings = Holdings(shard_step)
        self._whole: dict[int, dict[str, Tensor]] = {}  # of a rank that consolidated, until the next step
        self._born: list[list[int]] = []  # number of axes of every parameter as it was given to us
        self._start_engines()
        self.set_num_steps(num_steps)
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "weight_decay_policy": weight_decay_policy,
            "maximize": maximize,
            "axes": "out_in",
            "rule": "learned",
        }
        super().__init__(params, defaults)

    # -- what the rule needs to know -------------------------------------------------------------------------------

    @property
    def needs_loss(self) -> bool:
        """Whether a step needs the loss."""
        return self.rule.needs_loss

    @property
    def needs_horizon(self) -> bool:
        """Whether a step needs ``num_steps``."""
        return self.rule.needs_horizon

    @property
    def iteration(self) -> int:
        """Steps taken; skipped steps do not count."""
        return self._progress.iteration

    @property
    def nonfinite_steps(self) -> int:
        """Steps that met non-finite gradients or loss, whatever was done about them."""
        return self._progress.nonfinite_steps

    @property
    def num_steps(self) -> int | None:
        """The horizon; see :meth:`set_num_steps`."""
        return self._progress.num_steps

    def set_num_steps(self, num_steps: int | None) -> None:
        """Set how many optimizer steps the run takes in total, counted from iteration 0.

        Raises:
            ValueError: Not a positive integer.
        """
        if num_steps is not None and (not isinstance(num_steps, int) or num_steps < 1):
            raise ValueError(
                f"num_steps={num_steps!r} must be a positive integer: the optimizer steps of the whole run"
            )
        self._progress.num_steps = num_steps

    def observe_loss(self, loss: Tensor | float) -> None:
        """Tell the next :meth:`step` the loss, where the caller of ``step`` cannot pass it.

        Call it once per micro-batch with exactly what went into ``backward()``, before AMP scaling; the losses add up
        until a step consumes them.

        Raises:
            TypeError: Not a tensor or number.
            ValueError: More than one element.
        """
        self._progress.window.add(as_scalar_loss(loss))

    def clear_observed_loss(self) -> None:
        """Forget observed losses, e.g. of a step that a GradScaler skipped."""
        self._progress.window.take()

    @property
    def loss_window(self) -> LossWindow:
        """Where observed losses wait for the next step; for adapters."""
        return self._progress.window

    # -- seeing inside ---------------------------------------------------------------------------------------------

    def enable_telemetry(self, per_parameter: bool = False) -> None:
        """Have further steps leave the numbers that :meth:`telemetry` tells; they cost a pass over all tensors.

        No parameter or state changes by it. It is a setting of this object, not of its checkpoints or copies.

        Args:
            per_parameter: Tell of each parameter too, not only of each group.
        """
        self._engine.telemetry = Telemetry(per_parameter)

    def disable_telemetry(self) -> None:
        """Undo :meth:`enable_telemetry`."""
        self._engine.telemetry = None

    def telemetry(self) -> dict[str, float]:
        """Numbers on the last step that was taken; empty while telemetry is off.

        Reading waits for the device, nothing else does. The update is what a step subtracts, learning rate included,
        weight decay not; the gradient is the one that the rule saw. Names begin with ``optim/<class>/``:

        * ``nonfinite_steps``, a count; ``horizon_fraction``, steps taken / ``num_steps``, where that is known;
        * what the rule tells of its memory, such as features of the loss;
        * ``group<index>/update_rms``, root mean square of the update;
        * ``group<index>/update_ratio``, norm of the update / norm of the parameters before it;
        * ``group<index>/cosine``, between the update's direction and the negative gradient;
        * ``group<index>/<decision>``, what the rule decided per tensor, such as ``lr_mult``: the mean over tensors;
        * with ``per_parameter``, the same under ``param/<name>/``, where ``<name>`` is ``<group>.<position>`` for
          parameters that were given without names.

        A ratio or cosine is nan if what it would divide by is zero.
        """
        watching = self._engine.telemetry
        if watching is None:
            return {}
        progress = self._progress
        numbers: dict[str, float] = {"nonfinite_steps": progress.nonfinite_steps}
        if progress.num_steps is not None:
            numbers["horizon_fraction"] = progress.iteration / progress.num_steps
        numbers |= watching.read(self.param_groups, self.rule.telemetry(progress.memory))
        name = type(unwrap_optimizer(self)).__name__  # self may be a framework's wrapper, of another class
        return {f"optim/{name}/{key}": float(number) for key, number in numbers.items()}

    # -- distributed training --------------------------------------------------------------------------------------

    @property
    def shard_step(self) -> bool:
        """Whether processes that all have the whole parameters share the work of a step."""
        return self._holdings.shares_steps

    def bind_model(self, model: nn.Module, process_group: ProcessGroup | None = None) -> None:
        """Tell the optimizer what it cannot see from its parameters; idempotent.

        Needed for FSDP1 (``FullyShardedDataParallel``), whose parameters are 1-D slices of unknown shape, and where not
        all processes train together. The adapters call it. With FSDP1 it also creates the state, since Accelerate loads
        a sharded checkpoint only into state that is there.

        Args:
            model: As wrapped for training.
            process_group: The ranks that train this model together, over which losses are averaged, and steps shared
                with ``shard_step``; by default all.

        Raises:
            ShardingError: FSDP1 melted parameters together, or flattened one in an order other than row-major.
            ValueError: This process is not in ``process_group``.
        """
        slices = read_flat_slices(model)
        self._holdings.ranks.bind(process_group)
        self._holdings.flat_slices.clear()
        self._holdings.flat_slices.update(slices)
        if any(param in slices for group in self.param_groups for param in group["params"]):
            self.init_state()

    # -- stepping --------------------------------------------------------------------------------------------------

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | Tensor | float | None = None, *, loss: Tensor | float | None = None
    ) -> Any:
        """Take one step.

        Args:
            closure: Evaluates the model and its gradients and returns the loss; called once, with gradients enabled.
                A tensor or number in this place is taken as ``loss``.
            loss: The loss that was given to ``backward()``. Preferred to observed losses, and those to the closure's.

        Returns:
            What the closure returned, else ``loss``.

        Raises:
            RuntimeError: The rule needs a loss or a horizon and has none.
            TypeError: A gradient is sparse or complex.
            StateError: A parameter, its gradient and its state do not fit each other: other code changed the shape of
                one of them, say. A state of another floating type is cast.
            ShardingError: A parameter is distributed in a way that hides whole tensors.
            NonFiniteError: With ``on_nonfinite="error"``.

        Whatever is raised, parameters and state are unchanged. Where several processes train together, all of them
        have to call it.
        """
        if closure is not None and not callable(closure):
            if loss is not None:
                raise TypeError("step() got the loss twice: positionally and as loss=")
            closure, loss = None, closure
        result: Any = loss
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        observed = self._progress.window.take()
        known = loss if loss is not None else observed
        if known is None and self.rule.needs_loss:
            known = result
        known = None if known is None else as_scalar_loss(known)
        if torch.compiler.is_compiling() and self._can_be_traced():
            self._step_traced(known)
        else:
            self._step(known)
        return result

    @torch._disable_dynamo  # type: ignore[attr-defined] # torch.compiler.disable would import the whole compiler
    def _step(self, loss: Tensor | None) -> None:
        self._whole.clear()
        with torch.no_grad(), self._full_precision():
            try:
                taken = self._step_with(loss, self._engine.recall(self.param_groups, self.state))
            finally:
                self._engine.release_gradients()
        if not taken:
            self._warn_of_skip(self._progress)

    def _step_with(self, loss: Tensor | None, recalled: bool) -> bool:
        """Check, and step if it was not a probe; False if the step was skipped."""
        progress = self._progress
        if not recalled:
            self._check_gradients(self.param_groups)
        if loss is None and self._is_state_probe():
            self.init_state()
            return True
        self._check_needs(loss)
        if not recalled:
            self.init_state()
        self._warn_of_horizon(progress)
        return self._engine.step(
            self.param_groups,
            self.state,
            progress,
            loss if self.rule.needs_loss else None,
            self.on_nonfinite,
            self.max_grad_norm,
            recalled=recalled,
        )

    def _full_precision(self) -> AbstractContextManager[Any]:
        kind = self._device_type()
        # Entering one costs as much as stepping dozens of small tensors.
        return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()

    def _device_type(self) -> str:
        kind = next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")
        return kind if torch.amp.is_autocast_available(kind) else "cpu"  # the meta device has none

    @staticmethod
    def _check_gradients(groups: Sequence[Mapping[str, Any]]) -> None:
        for index, group in enumerate(groups):
            for position, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                if grad.layout != torch.strided or grad.is_complex():
                    kind = "complex" if grad.is_complex() else "sparse"
                    names = group.get("param_names")
                    name = names[position] if names else f"{position} of group {index}"
                    raise TypeError(
                        f"the gradient of parameter {name} is {kind}; learned optimizers need dense real gradients "
                        "(for nn.Embedding, pass sparse=False)"
                    )

    def _check_needs(self, loss: Tensor | None) -> None:
        name = type(self).__name__
        if self.rule.needs_loss and loss is None:
            raise RuntimeError(
                f"{name} needs the training loss at every step: call optimizer.step(loss=loss) or "
                "optimizer.step(closure), or observe_loss(loss) before step(); with a framework, use "
                "pylo_integrations.hf.Trainer, pylo_integrations.lightning.LearnedOptimizerCallback or "
                "pylo_integrations.accelerate.attach"
            )
        if self.rule.needs_horizon and self.num_steps is None:
            raise RuntimeError(
                f"{name} needs to know how many steps the run takes: pass num_steps= when creating it, or call "
                "optimizer.set_num_steps(n) before the first step"
            )

    def _is_state_probe(self) -> bool:
        """Whether this is torch.distributed.checkpoint making us create state: a step with lr 0 and zero gradients."""
        if self.iteration > 0 or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        params = [param for group in self.param_groups for param in group["params"]]
        with torch.no_grad():
            nonzero = [local_gradient(param).any() for param in params if param.grad is not None]
        found = torch.stack(nonzero).any() if nonzero else torch.tensor(False, device=params[0].device)
        # Shards may be zero on some ranks only, and all of them have to decide alike.
        ranks = self._holdings.ranks
        return not (ranks.any(found) if any(map(self._holdings.divides, params)) and ranks.size > 1 else found)

    def _warn_of_horizon(self, progress: Progress) -> None:
        if progress.num_steps is not None and progress.iteration >= progress.num_steps:
            self._warn_once(
                "horizon",
                f"step {progress.iteration + 1} is beyond the horizon num_steps={progress.num_steps}; the rule was "
                "told that training ends there. Call set_num_steps() with the true length of the run",
            )

    def _warn_of_skip(self, progress: Progress) -> None:
        self._warn_once(
            "nonfinite",
            f"step {progress.iteration + 1} met a gradient or loss that is not finite and was skipped; further "
            "ones are only counted, in `nonfinite_steps`",
        )

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

    # -- stepping in compiled functions ----------------------------------------------------------------------------

    def _can_be_traced(self) -> bool:
        """Whether a compiled function can contain the step. If not, it breaks there, and the step runs as ever."""
        stepped = [param for group in self.param_groups for param in group["params"] if param.grad is not None]
        if self._holdings.ranks.size > 1 or any(param not in self.state for param in stepped):
            return False
        # A step casts other states, and what stands for them in a compiled function would not be what it cast.
        dtypes = [(state_dtype(p), v.dtype) for p in stepped for v in self.state[p].values() if isinstance(v, Tensor)]
        return all(wanted == found for wanted, found in dtypes)

    def _step_traced(self, loss: Tensor | None) -> None:
        """Have the compiler see one operator, see :mod:`pylo_integrations.ops.step`."""
        everything = [param for group in self.param_groups for param in group["params"]]
        numbers = [i for i, param in enumerate(everything) if param.grad is not None]
        params = [everything[i] for i in numbers]
        state = [value for param in params for value in self.state[param].values()]
        memory = self._progress.memory
        run = [self._progress.clock, *[memory[name] for name in sorted(memory)]]
        with torch.no_grad():
            grads = [param.grad for param in params]
            torch.ops.pylo_integrations.step(self._handle, numbers, params, grads, state, run, loss)

    def step_tensors(
        self,
        numbers: Sequence[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        state: Sequence[Tensor],
        run: Sequence[Tensor],
        loss: Tensor | None,
    ) -> None:
        """Take a step in tensors that stand for this optimizer's; what compiled functions call.

        For the arguments see :class:`~pylo_integrations.ops.step.Stepper`. Raises as :meth:`step` does.
        """
        self._whole.clear()
        self._check_needs(loss)
        own = self._progress
        memory = dict(zip(sorted(own.memory), run[1:], strict=True))
        progress = Progress(int(run[0]), own.num_steps, memory=dict(memory))
        _, groups, states, twins = self._twins_of(numbers, params, state)
        self._warn_of_horizon(progress)
        with torch.no_grad(), self._full_precision():
            try:
                for twin, grad in zip(twins, grads, strict=True):
                    twin.grad = grad
                recalled = self._traced_engine.recall(groups, states)
                if not recalled:
                    self._check_gradients(groups)
                taken = self._traced_engine.step(
                    groups,
                    states,
                    progress,
                    loss if self.rule.needs_loss else None,
                    self.on_nonfinite,
                    self.max_grad_norm,
                    recalled=recalled,
                )
            finally:
                own.nonfinite_steps += progress.nonfinite_steps
                self._traced_engine.release_gradients()
                for twin in twins:
                    twin.grad = None
        if not taken:
            self._warn_of_skip(progress)
        run[0].fill_(progress.iteration)
        for name, value in memory.items():
            value.copy_(progress.memory[name])

    def _twins_of(self, numbers: Sequence[int], params: Sequence[Tensor], state: Sequence[Tensor]) -> _Twins:
        """These tensors in the place of ours; the same objects for the same memory, and with today's options."""
        key = (tuple(numbers), [(t.data_ptr(), t.dtype, t.shape, t.stride(), t.is_neg()) for t in (*params, *state)])
        if self._twins is None or self._twins.key != key:
            everything: list[Tensor] = [param for group in self.param_groups for param in group["params"]]
            twins, values = [param.detach() for param in params], iter(state)
            states: dict[Tensor, dict[str, Any]] = {}
            for twin, number in zip(twins, numbers, strict=True):
                states[twin] = {name: next(values) for name in self.state[everything[number]]}
                everything[number] = twin
            rest = iter(everything)
            groups = [{**group, "params": [next(rest) for _ in group["params"]]} for group in self.param_groups]
            self._twins = _Twins(key, groups, states, twins)
        for twin_group, group in zip(self._twins.groups, self.param_groups, strict=True):
            twin_group.update({name: value for name, value in group.items() if name != "params"})
        return self._twins

    # -- state -----------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, also after steps were taken.

        Raises:
            ValueError: An option of the group is out of range.
            TypeError: A parameter is complex or not floating point.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.rule.choices)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        group.setdefault("base_lr", float(group["lr"]))
        self._born.append([param.dim() for param in group["params"]])

    def init_state(self) -> None:
        """Create the state of every parameter that has none yet; steps do so by themselves.

        Raises:
            ShardingError: A parameter is distributed in a way that hides whole tensors; no state was created.
        """
        created: dict[Tensor, dict[str, Tensor]] = {}
        for index, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"]):
                if param not in self.state and (param.requires_grad or param.grad is not None):
                    self._check_flattening(index, position)
                    created[param] = self._fresh_state(param, group)
        self.state.update(created)
        if not self._progress.memory:
            self._progress.memory.update(self.rule.initial_memory())

    def _check_flattening(self, index: int, position: int) -> None:
        """Raise ShardingError if a 1-D tensor has taken the place of the parameters that the optimizer was given."""
        group, born = self.param_groups[index], self._born[index]
        param = group["params"][position]
        replaced = len(group["params"]) != len(born) or born[position] != 1
        if replaced and param.dim() == 1 and max(born, default=0) > 1 and not is_sharded(param):
            raise ShardingError(
                f"group {index} was given parameters with {max(born)} axes, but now has a flattened one of "
                f"{param.numel()} elements in their place, as DeepSpeed ZeRO makes: learned optimizers need whole "
                "tensors; use torch's fully_shard() (FSDP2) or DistributedDataParallel instead"
            )

    def _rule_of(self, shape: tuple[int, ...], group: Mapping[str, Any]) -> tuple[Rule, TensorLayout]:
        layout = TensorLayout.whole(shape, group["axes"])
        return self.rule.member(layout, group), layout

    def _fresh_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        shape, held = self._holdings.locate(param)
        rule, layout = self._rule_of(shape, group)
        initial, dtype = rule.initial_state(), state_dtype(param)
        state = {
            name: self._holdings.zero_state(param, held, dtype)
            if own is None
            else torch.zeros(own, dtype=dtype, device=param.device)
            for name, own in rule.state_shapes(layout).items()
        }
        for name, value in initial.items():
            state[name].copy_(value)
        return state

    def _members(self, saved: Sequence[Mapping[str, Any]] | None = None) -> list[Member]:
        """Every parameter, in the order of torch's state dicts; with the options of ``saved`` groups, if given."""
        members = []
        for group, options in zip(self.param_groups, saved or self.param_groups, strict=True):
            names = group.get("param_names") or [None] * len(group["params"])
            for param, name in zip(group["params"], names, strict=True):
                shape, held = self._holdings.locate(param)
                rule, layout = self._rule_of(shape, options)
                flat = self._holdings.flat_slices.get(param)
                name = flat.name if flat else name
                shapes = rule.state_shapes(layout)
                members.append(Member(param, name, shape, held, shapes, state_dtype(param), flat is not None))
        return members

    def _states(self, members: Sequence[Member]) -> dict[int, dict[str, Tensor]]:
        return {i: self.state[member.param] for i, member in enumerate(members) if member.param in self.state}

    def _origin(self) -> dict[str, str | None]:
        """What checkpoints tell about who wrote them."""
        return {"theta": self.theta.sha256 if self.theta else None, "rule": type(self.rule).__name__}

    def state_dict(self) -> StateDict:
        """As torch's; what is global to the run is a string of bytes in the first parameter group.

        That is the form which every checkpoint path of torch, FSDP and the frameworks hands back unchanged. So are the
        row and column statistics of FSDP1's slices, since FSDP takes every tensor there to be shaped like the slice.

        With ``shard_step`` states are ``DTensor`` s, of which a rank has its share: torch.distributed.checkpoint saves
        and reshards them. To pickle such a state dict raises CheckpointError, as it would lose the other shares; call
        :meth:`consolidate_state_dict` before.
        """
        state_dict = super().state_dict()
        groups = [dict(group) for group in state_dict["param_groups"]]
        groups[0][PROGRESS] = self._progress.to_bytes(**self._origin())
        state: dict[Any, Any] = {**state_dict["state"], **self._whole}
        if state and not self._whole:  # without state, parameters need not be ready to be looked at
            state, small = pack_states(state, self._members())
            if small is not None:
                groups[0][SMALL] = small
        return {**state_dict, "state": state, "param_groups": groups}

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Make :meth:`state_dict` of rank ``to`` whole until the next step, as one device would have it.

        For checkpoints that one rank writes with ``torch.save``, where ranks divide the state among themselves. All
        ranks have to call it. The whole state is kept on the CPU of that rank. The name is that of torch's
        ``ZeroRedundancyOptimizer``; Lightning calls it by itself. Any optimizer of the same kind loads the result, on
        any number of ranks, with ``shard_step`` or without.

        Args:
            to: Number of the rank among those that train together.

        Raises:
            ShardingError: A parameter is distributed in a way that hides whole tensors.
        """
        self._whole.clear()
        members = self._members()
        if any(member.held.parts > 1 for member in members):
            self._whole.update(whole_states(self._states(members), members, self._holdings, to, "cpu"))

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what :meth:`state_dict` returned; tensors are copied and keep the dtype of this optimizer's state.

        A horizon set on this optimizer is kept, with a warning if the checkpoint has another. State of whole tensors,
        as one device writes it, may be loaded into an optimizer of sharded ones: each rank keeps its part.

        Raises:
            CheckpointError: The rule, the groups or the states are not those of this optimizer; nothing was changed.
        """
        found: list[Checkpoint] = []

        def check(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
            found.append(self._read(state_dict))
            indices = [index for group in state_dict["param_groups"] for index in group["params"]]
            state = dict(state_dict["state"])
            for index in indices:
                state.pop(index, None)
            return {**state_dict, "state": state | {indices[i]: own for i, own in found[0].states.items()}}

        # The hook sees, after all of the user's, what is loaded. Whole tensors never reach the device of their shards.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._whole.clear()
        params = [param for group in self.param_groups for param in group["params"]]
        # torch casts states to their parameter's dtype.
        self.state.update({params[number]: own for number, own in found[0].states.items()})
        for group in self.param_groups:
            group.setdefault("base_lr", float(group["lr"]))
            group.pop(SMALL, None)
            group.pop(PROGRESS, None)
        self._assume(found[0])

    def _read(self, state_dict: StateDict) -> Checkpoint:
        """What a state dict has for this optimizer.

        Raises:
            CheckpointError: It does not fit.
        """
        try:
            check_groups(state_dict["param_groups"], self.param_groups, self.rule.choices)
            # Accelerate loads the state dict of an optimizer without state, and not bound to its model yet.
            members = self._members(state_dict["param_groups"]) if has_states(state_dict) else []
            return read_state_dict(state_dict, members, self._holdings, type(self.rule).__name__)
        except CheckpointError as error:
            raise CheckpointError(f"state_dict does not fit {type(self).__name__}: {error}") from error

    def _assume(self, checkpoint: Checkpoint) -> None:
        """Take over the progress of a checkpoint."""
        if checkpoint.progress is None:
            return
        horizon = self.num_steps
        self._progress.assign(checkpoint.progress)
        if self.theta is not None and checkpoint.theta not in (None, self.theta.sha256):
            warnings.warn(
                f"the checkpoint was written with other weights (theta sha256 {str(checkpoint.theta)[:12]}, here "
                f"{self.theta.sha256[:12]}); training goes on with those of this optimizer",
                RuntimeWarning,
                stacklevel=3,
            )
        if horizon is not None:
            if self.num_steps not in (None, horizon):
                warnings.warn(
                    f"the checkpoint was written with num_steps={self.num_steps}; keeping this optimizer's {horizon}",
                    RuntimeWarning,
                    stacklevel=3,
                )
            self.set_num_steps(horizon)

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "theta", "max_grad_norm", "on_nonfinite", "chunk_bytes", "backend", "stochastic_rounding")
        ours = (*own, "_progress", "_warned", "_holdings", "_born")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_engine" not in self.__dict__:  # load_state_dict() comes here too, and wrappers share our engine
            self._whole = {}
            self._start_engines()

    def _start_engines(self) -> None:
        """Make what holds nothing but caches."""
        fixed = self.rule, self.backend, self.chunk_bytes
        self._engine = Engine(*fixed, self._holdings, self.stochastic_rounding)
        self._traced_engine = Engine(*fixed, Holdings(), self.stochastic_rounding)
        self._twins = None
        self._handle = register(self)


def unwrap_optimizer(optimizer: object) -> LearnedOptimizer | None:
    """The learned optimizer inside the wrappers of Lightning, Fabric or Accelerate; None if there is none."""
    # Lightning's wrappers pass isinstance() for the class they wrap, so look for what is wrapped first.
    while inner := next((vars(optimizer)[key] for key in ("_optimizer", "optimizer") if key in vars(optimizer)), None):
        optimizer = inner
    return optimizer if isinstance(optimizer, LearnedOptimizer) else None
