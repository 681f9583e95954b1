"""``LearnedOptimizer``: the torch.optim contract around a rule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, get_args

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from pylo_integrations.decay import DecayPolicy, check_decay_policy
from pylo_integrations.engine import Engine, NonFinitePolicy, state_dtype
from pylo_integrations.ops.select import Backend
from pylo_integrations.progress import LossWindow, Progress, as_scalar_loss
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.layout import AxisOrder, TensorLayout
from pylo_integrations.sharding.pieces import (
    FlatSlice,
    ShardingError,
    cut_like,
    is_sharded,
    local_gradient,
    locate,
    read_flat_slices,
)
from pylo_integrations.sharding.rounds import Ranks
from pylo_integrations.telemetry import Telemetry
from pylo_integrations.weights.theta import Theta

CHUNK_BYTES = 256 * 2**20
_BLOB = "progress"  # key of the globals in the first parameter group of a state dict
_SMALL = "tensor_state"  # and of statistics of FSDP1's slices that are not shaped like them


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
        theta: The weights that ``rule`` was built from, if any.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A parameter is complex or not floating point.
    """

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
        # Changed in place only: wrappers of frameworks share it with us, see LossWindow.
        self._progress = Progress()
        self._warned: set[str] = set()
        self._ranks = Ranks()
        self._flat_slices: dict[Tensor, FlatSlice] = {}
        self._born: list[list[int]] = []  # number of axes of every parameter as it was given to us
        self._engine = Engine(rule, backend, chunk_bytes, self._ranks, self._flat_slices)
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

    def bind_model(self, model: nn.Module, process_group: ProcessGroup | None = None) -> None:
        """Tell the optimizer what it cannot see from its parameters; idempotent.

        Needed for FSDP1 (``FullyShardedDataParallel``), whose parameters are 1-D slices of unknown shape, and where not
        all processes train together. The adapters call it. With FSDP1 it also creates the state, since Accelerate loads
        a sharded checkpoint only into state that is there.

        Args:
            model: As wrapped for training.
            process_group: The ranks that train this model together, over which losses are averaged; by default all.

        Raises:
            ShardingError: FSDP1 melted parameters together, or flattened one in an order other than row-major.
            ValueError: This process is not in ``process_group``.
        """
        slices = read_flat_slices(model)
        self._ranks.bind(process_group)
        self._flat_slices.clear()
        self._flat_slices.update(slices)
        if any(param in slices for param, _ in self._params()):
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
        self._step(None if known is None else as_scalar_loss(known))
        return result

    @torch._disable_dynamo  # type: ignore[attr-defined] # torch.compiler.disable would import the whole compiler
    def _step(self, loss: Tensor | None) -> None:
        progress = self._progress
        self._check_gradients()
        if loss is None and self._is_state_probe():
            self.init_state()
            return
        self._check_needs(loss)
        self.init_state()
        if progress.num_steps is not None and progress.iteration >= progress.num_steps:
            self._warn_once(
                "horizon",
                f"step {progress.iteration + 1} is beyond the horizon num_steps={progress.num_steps}; the rule was "
                "told that training ends there. Call set_num_steps() with the true length of the run",
            )
        with torch.no_grad(), torch.autocast(self._device_type(), enabled=False):
            try:
                taken = self._engine.step(
                    self.param_groups,
                    self.state,
                    progress,
                    loss if self.rule.needs_loss else None,
                    self.on_nonfinite,
                    self.max_grad_norm,
                )
            finally:
                self._engine.release_gradients()
        if not taken:
            self._warn_once(
                "nonfinite",
                f"step {progress.iteration + 1} met a gradient or loss that is not finite and was skipped; further "
                "ones are only counted, in `nonfinite_steps`",
            )

    def _device_type(self) -> str:
        kind = next((p.device.type for group in self.param_groups for p in group["params"]), "cpu")
        return kind if torch.amp.is_autocast_available(kind) else "cpu"  # the meta device has none

    def _check_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
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
        return not (self._ranks.any(found) if any(map(is_sharded, params)) and self._ranks.size > 1 else found)

    def _warn_once(self, subject: str, message: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            warnings.warn(message, RuntimeWarning, stacklevel=2)

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
            _check_group(group, self.rule.choices)
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

    def _layout(self, param: Tensor, group: Mapping[str, Any]) -> TensorLayout:
        shape, _ = locate(param, self._flat_slices, self._ranks.size)
        return TensorLayout.whole(shape, group["axes"])

    def _state_shapes(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
        layout = self._layout(param, group)
        return self.rule.member(layout, group).state_shapes(layout)

    def _fresh_state(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
        layout = self._layout(param, group)
        rule = self.rule.member(layout, group)
        initial, dtype = rule.initial_state(), state_dtype(param)
        state = {
            name: torch.zeros_like(param, dtype=dtype, requires_grad=False)
            if shape is None
            else torch.zeros(shape, dtype=dtype, device=param.device)
            for name, shape in rule.state_shapes(layout).items()
        }
        for name, value in initial.items():
            state[name].copy_(value)
        return state

    def state_dict(self) -> StateDict:
        """As torch's; what is global to the run is a string of bytes in the first parameter group.

        That is the form which every checkpoint path of torch, FSDP and the frameworks hands back unchanged. So are the
        row and column statistics of FSDP1's slices, since FSDP takes every tensor there to be shaped like the slice.
        """
        state_dict = super().state_dict()
        groups = [dict(group) for group in state_dict["param_groups"]]
        groups[0][_BLOB] = self._progress.to_bytes(self.theta.sha256 if self.theta else None)
        state = dict(state_dict["state"])
        slices = {
            index: (param, self._flat_slices[param].name, self._state_shapes(param, group))
            for index, (param, group) in enumerate(self._params())
            if index in state and param in self._flat_slices
        }
        if slices:
            small: dict[str, Tensor] = {}
            # FSDP takes all slices to have the same states, too: those that one lacks are zeros.
            like_param = {key: None for *_, shapes in slices.values() for key in shapes if shapes[key] is None}
            for index, (param, name, shapes) in slices.items():
                own = state[index]
                small |= {f"{name}/{key}": own[key].cpu() for key, shape in shapes.items() if shape is not None}
                dtype, device = state_dtype(param), param.device
                state[index] = {
                    key: own[key] if key in own else torch.zeros(param.shape, dtype=dtype, device=device)
                    for key in like_param
                }
            groups[0][_SMALL] = safetensors.torch.save(small)
        return {**state_dict, "state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what :meth:`state_dict` returned; tensors are copied and keep the dtype of this optimizer's state.

        A horizon set on this optimizer is kept, with a warning if the checkpoint has another. State of whole tensors,
        as one device writes it, may be loaded into an optimizer of sharded ones: each rank keeps its part.

        Raises:
            ValueError: The groups or the states are not those of this optimizer; nothing was changed.
        """
        saved: dict[Tensor, dict[str, Tensor]] = {}

        def check(optimizer: Optimizer, state_dict: StateDict) -> None:
            saved.update(self._match_state(state_dict))

        # torch casts states to their parameter's dtype. The hook sees, after all of the user's, what is loaded.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self.state.update(saved)
        for group in self.param_groups:
            group.setdefault("base_lr", float(group["lr"]))
            group.pop(_SMALL, None)
            if blob := group.pop(_BLOB, None):
                self._read_progress(blob)

    def _params(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Every parameter with its group, in the order in which torch numbers them in state dicts."""
        return ((param, group) for group in self.param_groups for param in group["params"])

    def _match_state(self, state_dict: StateDict) -> dict[Tensor, dict[str, Tensor]]:
        """Saved state by parameter of this optimizer, checked, copied and cut to what this rank holds."""
        saved_ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        small = self._read_small(state_dict)
        is_of_slices = any(_SMALL in group for group in state_dict["param_groups"])
        matched: dict[Tensor, dict[str, Tensor]] = {}
        for index, (param, group) in zip(saved_ids, self._params(), strict=False):  # torch reports differing groups
            tensors = {**state_dict["state"].get(index, {}), **small.get(param, {})}
            if not tensors:  # Accelerate loads the state of an optimizer that has none, not bound to its model yet
                continue
            shape, held = locate(param, self._flat_slices, self._ranks.size)
            shapes, dtype = self._state_shapes(param, group), state_dtype(param)
            if is_of_slices:
                tensors = {name: value for name, value in tensors.items() if name in shapes}
            if tensors and not held.numel:  # FSDP1 drops the state of what is not here
                tensors = {name: param.new_zeros(0) for name in shapes if shapes[name] is None} | tensors
            if not tensors:
                continue
            admitted = {name: [tuple(param.shape), shape] if own is None else [own] for name, own in shapes.items()}
            found = {name: tuple(getattr(value, "shape", ())) for name, value in tensors.items()}
            if found.keys() != shapes.keys() or any(found[name] not in admitted[name] for name in found):
                expected = {name: choices[-1] for name, choices in admitted.items()}
                raise ValueError(
                    f"state_dict does not fit {type(self).__name__}: parameter {index} of shape {shape} "
                    f"has state {found}, expected {expected}. Was it written by another optimizer, or for a model with "
                    "other shapes or parameter order?"
                )
            matched[param] = {
                name: cut_like(value, param, held, dtype)
                if shapes[name] is None
                else value.to(param.device, dtype, copy=True)
                for name, value in tensors.items()
            }
        return matched

    def _read_small(self, state_dict: StateDict) -> dict[Tensor, dict[str, Tensor]]:
        """Row and column statistics that were saved apart, see :meth:`state_dict`."""
        blob = next((group[_SMALL] for group in state_dict["param_groups"] if _SMALL in group), None)
        if blob is None:
            return {}
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, tensor in safetensors.torch.load(blob).items():
            owner, _, name = key.rpartition("/")
            by_name.setdefault(owner, {})[name] = tensor
        names = {
            param: name
            for group in self.param_groups
            for param, name in zip(group["params"], group.get("param_names", ()), strict=False)
        }
        names |= {param: where.name for param, where in self._flat_slices.items()}
        if missing := by_name.keys() - names.values():
            raise ValueError(
                f"state_dict was written under FSDP1 and names parameters {sorted(missing)}, which this optimizer does "
                "not know: create it from named parameters, or with FSDP1 call bind_model(model) first"
            )
        return {param: by_name[name] for param, name in names.items() if name in by_name}

    def _read_progress(self, blob: bytes) -> None:
        horizon = self.num_steps
        theta = self._progress.read_bytes(blob)
        if self.theta is not None and theta not in (None, self.theta.sha256):
            warnings.warn(
                f"the checkpoint was written with other weights (theta sha256 {str(theta)[:12]}, here "
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
        own = ("rule", "theta", "max_grad_norm", "on_nonfinite", "chunk_bytes", "backend", "_progress", "_warned")
        distributed = ("_ranks", "_flat_slices", "_born")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own + distributed}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_engine" not in self.__dict__:  # load_state_dict() comes here too, and wrappers share our engine
            self._engine = Engine(self.rule, self.backend, self.chunk_bytes, self._ranks, self._flat_slices)


def _check_group(group: Mapping[str, Any], rules: Collection[str]) -> None:
    """Raise ValueError or TypeError, naming the culprit, unless a parameter group can be stepped."""
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, not of shape {tuple(group['lr'].shape)}")
    for option in ("lr", "weight_decay"):
        value = float(group[option])
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{option}={group[option]!r} must be a finite number >= 0")
    check_decay_policy(group["weight_decay_policy"])
    if group["axes"] not in get_args(AxisOrder):
        raise ValueError(f"axes={group['axes']!r} is unknown; choose one of {list(get_args(AxisOrder))}")
    if group["rule"] not in rules:
        raise ValueError(f"rule={group['rule']!r} is not a choice of this optimizer; it has {list(rules)}")
    for position, param in enumerate(group["params"]):
        if not param.is_floating_point():
            names = group.get("param_names")
            raise TypeError(
                f"parameter {names[position] if names else position} is {param.dtype}; learned optimizers step real "
                "floating-point parameters only (view a complex one with torch.view_as_real)"
            )


def unwrap_optimizer(optimizer: object) -> LearnedOptimizer | None:
    """The learned optimizer inside the wrappers of Lightning, Fabric or Accelerate; None if there is none."""
    # Lightning's wrappers pass isinstance() for the class they wrap, so look for what is wrapped first.
    while inner := next((vars(optimizer)[key] for key in ("_optimizer", "optimizer") if key in vars(optimizer)), None):
        optimizer = inner
    return optimizer if isinstance(optimizer, LearnedOptimizer) else None
