"""``LearnedOptimizer``: the torch.optim contract around a rule."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import ParamsT, StateDict

from pylo_integrations.advice import Advice
from pylo_integrations.checkpoints.form import PROGRESS, SMALL, CheckpointError
from pylo_integrations.checkpoints.writing import whole_states
from pylo_integrations.compiled import CompiledSteps, StepTensors, register
from pylo_integrations.engine import Engine
from pylo_integrations.hints import SettingsWatch, warn_user
from pylo_integrations.informed import Informed
from pylo_integrations.keywords import Keywords, Unpack, spelled_out
from pylo_integrations.ledger import Ledger
from pylo_integrations.naming import name_new
from pylo_integrations.offload import Offload
from pylo_integrations.ops.select import Backend
from pylo_integrations.options import MOMENTUM, USUAL, OptionCheck, check_group
from pylo_integrations.progress import Progress
from pylo_integrations.resume import Resumption
from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.holdings import Holdings
from pylo_integrations.sharding.pieces import Slice
from pylo_integrations.step.policies import NonFinitePolicy, Policies, check_policies
from pylo_integrations.steplock import between_steps
from pylo_integrations.stepping import Stepping
from pylo_integrations.weights.theta import Theta


class LearnedOptimizer(Informed):
    """A torch optimizer whose update is a learned rule.

    Subclasses only choose the rule; all behaviour is here. State is created lazily (:meth:`init_state`), in float32
    unless ``state_dtype`` says otherwise (float64 for float64 parameters), shaped like its parameter but for small row
    and column statistics.

    What else it takes, and its subclasses do, is in :class:`~pylo_integrations.keywords.Keywords`.

    Args:
        params: Parameters, named parameters, or parameter groups. Groups may set ``lr``, ``weight_decay``,
            ``weight_decay_policy``, ``maximize``, ``state_dtype`` and ``axes``: ``"out_in"`` for weights stored
            (out, in, ...), as most are, ``"in_out"`` for (in, out, ...), as in ``nn.Embedding``; ``split`` and
            ``stacked`` where a parameter is several tensors (:mod:`pylo_integrations.fused`); and, where the optimizer
            has the choice, ``rule``: ``"learned"``, ``"adamw"`` or ``"attention"``. See
            :func:`~pylo_integrations.param_groups`.
        rule: The mathematics.
        lr: Factor on the whole update; a float or a one-element tensor. By default, and naturally, that of the class,
            :attr:`default_lr`; one that is more than 10 times off is warned of.
        theta: The weights that ``rule`` was built from, if any.
        usual_lrs: Learning rates that suit the rule; by default :attr:`default_lr`.
        wants_schedule: As the attribute, which is the default.

    Raises:
        ValueError: An argument is out of range.
        TypeError: A parameter that requires gradients is complex or not floating point. Others are left as they are.
    """

    _is_made: bool = True

    rule_type: ClassVar[type[Rule]]

    default_lr: ClassVar[float] = 1.0
    """Learning rate of the catalogue entry, unless that says otherwise."""

    adamw_lr: ClassVar[float] = 1e-3
    """AdamW's learning rate whose steps are as large as ours at :attr:`default_lr`; weight decay is measured by it."""

    wants_schedule: ClassVar[bool] = False
    """Whether a run ends well only under a learning rate that falls to zero."""

    anneals: ClassVar[bool] = False
    """Whether steps fall by themselves over a horizon, if one is given; else they do as those that want a schedule."""

    default_weight_decay: ClassVar[float] = 0.0
    """Weight decay where none is given."""

    default_max_grad_norm: ClassVar[float | None] = None
    """Gradient clipping where none is given."""

    adamw_embeddings: ClassVar[bool] = False
    """Whether groups made from a model leave its embeddings to AdamW."""

    splits_fused: ClassVar[bool] = False
    """Whether groups made from a model divide parameters in which several tensors are fused."""

    marks_attention: ClassVar[bool] = False
    """Whether groups made from a model mark the matrices that make queries, keys and values."""

    @spelled_out
    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        *,
        lr: float | Tensor | None = None,
        theta: Theta | None = None,
        usual_lrs: Sequence[float] = (),
        wants_schedule: bool | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        chunk_bytes, weight_decay, norm = (keywords[name] for name in ("chunk_bytes", "weight_decay", "max_grad_norm"))
        if chunk_bytes is not None and (not isinstance(chunk_bytes, int) or chunk_bytes < 1):
            raise ValueError(f"chunk_bytes={chunk_bytes!r} must be a positive integer")
        self.rule = rule
        self.theta = theta
        self.max_grad_norm = self.default_max_grad_norm if norm is None else None if norm == math.inf else norm
        self.on_nonfinite: NonFinitePolicy = keywords["on_nonfinite"]
        self.chunk_bytes = chunk_bytes
        self.backend: Backend = keywords["backend"]
        self.stochastic_rounding = keywords["stochastic_rounding"]
        self._policies()  # which checks them
        # Changed in place only: wrappers of frameworks share it with us, see LossWindow.
        self._progress = Progress()
        wants_schedule = self.wants_schedule if wants_schedule is None else wants_schedule
        rates = self.default_lr, usual_lrs or [self.default_lr], self.adamw_lr
        self._advice = Advice(SettingsWatch(type(self).__name__, *rates, wants_schedule, self.anneals))
        offloads = keywords["offload_state"]
        if not isinstance(offloads, bool):
            raise TypeError(f"offload_state={offloads!r} must be True or False")
        self._holdings = Holdings(keywords["shard_step"], offloads=offloads)
        self._whole: dict[int, dict[str, Tensor]] = {}  # of a rank that consolidated, until the next step
        self._born: list[list[int]] = []  # number of axes of every parameter as it was given to us
        self._start_engines()
        self.set_num_steps(keywords["num_steps"])
        defaults = {
            "lr": self.default_lr if lr is None else lr,
            "weight_decay": self.default_weight_decay if weight_decay is None else weight_decay,
            "weight_decay_policy": keywords["weight_decay_policy"],
            "maximize": keywords["maximize"],
            "axes": "out_in",
            "rule": "learned",
            **USUAL,
            "state_dtype": keywords["state_dtype"],
            MOMENTUM: 0.0,
        }
        self._is_made = False  # until then, groups of which some have names are an error, as in torch
        super().__init__(params, defaults)
        del self._is_made
        self._advice.at_start(self.param_groups)

    @classmethod
    def wants_schedule_with(cls, options: Mapping[str, Any]) -> bool:
        """As :attr:`wants_schedule`, for an optimizer that is given these arguments."""
        return cls.wants_schedule

    # -- seeing inside ---------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        lines = [] if self.theta is None else [f"    theta: {self.theta!r}"]
        try:
            lines += [f"    num_steps: {self.num_steps}", f"    iteration: {self.iteration}"]
        except CheckpointError as error:  # of states that a wrapper handed over
            lines.append(f"    {error}")
        for index, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {index}")
            options = sorted(group.keys() - {"params", PROGRESS, SMALL})  # which are for checkpoints
            lines += [f"    {name}: {group[name]}" for name in options]
        return "\n".join([f"{type(self).__name__} (", *lines, ")"])

    # -- distributed training --------------------------------------------------------------------------------------

    @property
    def shard_step(self) -> bool:
        """Whether processes that all have the whole parameters share the work of a step."""
        return self._holdings.shares_steps

    @property
    def offload_state(self) -> bool:
        """Whether the state of parameters on a device lives on the host, where they are stepped."""
        return self._holdings.offloads

    def bind_model(self, model: nn.Module, process_group: ProcessGroup | None = None) -> None:
        """Tell the optimizer what it cannot see from its parameters; idempotent.

        Needed for FSDP1 (``FullyShardedDataParallel``), whose parameters are 1-D slices of unknown shape, and where not
        all processes train together. The adapters call it. With FSDP1 it also creates the state, since Accelerate loads
        a sharded checkpoint only into state that is there.

        Args:
            model: As wrapped for training.
            process_group: The ranks that train this model together, over which losses are averaged, and steps shared
                with ``shard_step``; by default those of the last call, else all.

        Raises:
            ShardingError: FSDP1 melted parameters together, or flattened one in an order other than row-major.
            ValueError: This process is not in ``process_group``.
        """
        ours = {param for group in self.param_groups for param in group["params"]}
        has_slices = self._holdings.bind(model, ours, process_group)
        self._models.clear()
        self._models.add(model)
        if has_slices:
            self._resumption.reserve(self.param_groups)
            self.init_state()

    @between_steps
    def replace_params(
        self,
        params: Sequence[Sequence[tuple[str, Tensor]]],
        slices: Mapping[Tensor, Slice],
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Step other tensors in the place of parameters, for adapters of frameworks that keep masters of them.

        Args:
            params: What to step, with names, in the groups that there are.
            slices: Those of them that have some elements of a whole tensor only.
            process_group: As for :meth:`bind_model`.

        Raises:
            ValueError: There is state of the parameters; or this process is not in ``process_group``.
        """
        if any(self.state.values()):
            raise ValueError(
                f"{type(self).__name__} has state of parameters that masters are to take the place of: wrap it before "
                "its first step, and load checkpoints after"
            )
        self._holdings.ranks.bind(process_group)
        self._holdings.flat_slices.update(slices)
        for group, members in zip(self.param_groups, params, strict=True):
            if "param_names" in group:
                group["param_names"] = [name for name, _ in members]
            group["params"] = [tensor for _, tensor in members]
        self.state.clear()
        self._born[:] = [[tensor.dim() for _, tensor in members] for members in params]
        self._resumption.reserve(self.param_groups)

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
            ValueError: An option of a parameter group, or of this optimizer, is not in range any more.
            StateError: A parameter, its gradient and its state do not fit each other: other code changed the shape of
                one of them, say. A state of another floating type is cast.
            CheckpointError: State was handed over by a wrapper, or loaded in place, that :meth:`load_state_dict` would
                not take.
            TypeError: A gradient is sparse, or not of real floating point; the loss is not a number.
            ShardingError: A parameter is distributed in a way that hides whole tensors.
            NonFiniteError: With ``on_nonfinite="error"``.
            DisagreementError: Ranks that train together do not do the same.
            RankError: Another rank raised in place of its step, or is gone.

        Whatever of these is raised, parameters and state are unchanged. Threads that share the optimizer step one after
        the other, and signals such as that of Ctrl-C are handled when the step is over; the closure runs before, like
        any other code. Where several processes train together, all of them have to call it. If no parameter has a
        gradient there is nothing to step: neither loss nor horizon is asked for, and it does not count as a step.
        """
        if closure is not None and not callable(closure):
            if loss is not None:
                raise TypeError("step() got the loss twice: positionally and as loss=")
            closure, loss = None, closure
        result: Any = loss
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if torch.compiler.is_compiling() and self._can_be_traced():
            self._step_traced(self._stepping.take_loss(loss, result))
        else:
            self._step(loss, result)
        return result

    @torch._disable_dynamo  # type: ignore[attr-defined] # torch.compiler.disable would import the whole compiler
    def _step(self, loss: Tensor | float | None, result: Any) -> None:
        take_loss = functools.partial(self._stepping.take_loss, loss, result)
        self._stepping.step(self.param_groups, self.state, take_loss, self._policies, self.init_state)

    def _can_be_traced(self) -> bool:
        alone = self._holdings.ranks.size == 1 and not self.offload_state
        return alone and self._compiled.allows(self.param_groups, self.state)

    def _step_traced(self, loss: Tensor | None) -> None:
        """Have the compiler see one operator, see :mod:`pylo_integrations.compiled`."""
        with torch.no_grad():
            tensors = self._compiled.tensors_of(self.param_groups, self.state, self._progress)
            torch.ops.pylo_integrations.step(self._handle, *tensors, loss)

    def step_tensors(self, tensors: StepTensors, loss: Tensor | None) -> None:
        """Take a step in tensors that stand for this optimizer's, as compiled functions do. Raises as :meth:`step`."""
        self._stepping.step_tensors(tensors, self.param_groups, self.state, loss, self._policies)

    def _policies(self) -> Policies:
        """Of now, as attributes may be set at any time; raises ValueError if they are not in range."""
        return check_policies(self.on_nonfinite, self.max_grad_norm)

    def expect_frozen(self, params: Mapping[str, Tensor]) -> None:
        """Have it warned of, once, if parameters that were left out as frozen are trained later.

        Args:
            params: By name.
        """
        self._advice.expect_frozen(params)

    # -- state -----------------------------------------------------------------------------------------------------

    @between_steps
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, also after steps were taken.

        torch wants all parameters to have names or none. If only some have been given names, the others get those that
        they have in the model of :meth:`bind_model`, or such as ``group1.0``: the first parameter of the group 1.

        Raises:
            ValueError: An option of the group is out of range.
            TypeError: A parameter that requires gradients is complex or not floating point.
        """
        groups, has_momentum = list(self.param_groups), MOMENTUM in param_group
        nameless = name_new(param_group, self.param_groups, self._models) if self._is_made else []
        try:
            super().add_param_group(param_group)
            check_group(self.param_groups[-1], self.rule.choices, len(groups))
            self._options.check_new(self.param_groups[-1], len(groups))
        except (TypeError, ValueError):
            self.param_groups[:] = groups
            for group in nameless:
                group.pop("param_names", None)
            raise
        group = self.param_groups[-1]
        if isinstance(group["split"], list):
            group["split"] = tuple(group["split"])
        for option, usual in USUAL.items():
            if group[option] == usual:
                del group[option]
        group.setdefault("base_lr", float(group["lr"]))
        if not has_momentum:
            del group[MOMENTUM]
        group.pop(PROGRESS, None)  # of a group that was copied
        self._resumption.reserve(self.param_groups)
        self._born.append([1 if is_lazy(param) else param.dim() for param in group["params"]])

    @between_steps
    def init_state(self) -> None:
        """Create the state of every parameter that has none yet; steps do so by themselves.

        Raises:
            ShardingError: A parameter is distributed in a way that hides whole tensors; no state was created.
            CheckpointError: As for :meth:`step`.
        """
        self._settle(everywhere=True)
        warn_user(*self._resumption.check_arrival(self.param_groups, self.state))
        created = self.ledger.new_states(self.param_groups, self.state, self._born)
        for param, state in created.items():
            self.state.setdefault(param, {}).update(state)
        if not self._progress.memory:
            memory = self._resumption.placed(self.rule.initial_memory(), self.param_groups, fresh=True)
            self._progress.memory.update(memory)
        self._progress.has_begun = True

    @between_steps
    def state_dict(self) -> StateDict:
        """As torch's; what is global to the run is a string of bytes in the first parameter group, and also among the
        states of every parameter, as tensors whose names begin with ``run_``.

        The former is what every checkpoint path of torch, FSDP and the frameworks hands back unchanged. So are the row
        and column statistics of FSDP1's slices, since FSDP takes every tensor there to be shaped like the slice. The
        latter go where states go: ``torch.distributed.checkpoint.load(optimizer.state_dict(), ...)`` loads in place,
        once there is state to load into, and ``ZeroRedundancyOptimizer`` hands them over.

        As with torch's optimizers, tensors are the ones that train, not copies, ``run_iteration`` as their ``step``:
        whoever writes into them loads, and the next step looks at what was loaded before it takes it. Copy them, with
        ``copy.deepcopy`` or by saving, before you change or keep them. (``run_num_steps`` is a copy where a horizon is
        set, which stays.)

        With ``shard_step`` states are ``DTensor`` s, of which a rank has its share: torch.distributed.checkpoint saves
        and reshards them. To pickle such a state dict raises CheckpointError, as it would lose the other shares; call
        :meth:`consolidate_state_dict` before.
        """
        self._settle()

        with self._resumption.packing(self, self._whole):
            return super().state_dict()

    @between_steps
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
        entries = self.ledger.entries(self.param_groups)
        if any(entry.held.parts > 1 for entry in entries):
            complete = self.ledger.complete(entries, self.state)
            self._whole.update(whole_states(complete, entries, self._holdings, to, "cpu"))

    @between_steps
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load what :meth:`state_dict` returned; tensors are copied and keep the dtype of this optimizer's state.

        A horizon set on this optimizer is kept, with a warning if the checkpoint has another. State of whole tensors,
        as one device writes it, may be loaded into an optimizer of sharded ones: each rank keeps its part. Entries that
        are not the rule's, as wrappers keep them among the states, are copied as they are. When the hooks of
        ``register_load_state_dict_post_hook`` run, everything is loaded.

        Raises:
            CheckpointError: The rule, the groups or the states are not those of this optimizer, or they are damaged;
                nothing was changed.
        """
        if not isinstance(state_dict, dict):
            raise CheckpointError(f"state_dict is {type(state_dict).__name__}, not what state_dict() returned")
        with self._resumption.loading(self, self._whole) as remarks:
            super().load_state_dict(state_dict)
        warn_user(*remarks)

    def __getstate__(self) -> dict[str, Any]:
        own = ("rule", "theta", "max_grad_norm", "on_nonfinite", "chunk_bytes", "backend", "stochastic_rounding")
        ours = (*own, "_progress", "_advice", "_holdings", "_born")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in ours}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_engine" not in self.__dict__:  # load_state_dict() comes here too, and wrappers share our engine
            self._whole = {}
            self._start_engines()

    def _start_engines(self) -> None:
        """Make what is of this object, and not of its copies."""
        adamw_scale = self.adamw_lr / self.default_lr
        settings = self.backend, self.chunk_bytes, self.stochastic_rounding, self.theta, adamw_scale
        self.ledger = Ledger(self.rule, self._holdings)
        self._engine = Engine(self.ledger, *settings)
        self._compiled = CompiledSteps(Engine(Ledger(self.rule, Holdings()), *settings), self.ledger.names)
        self._handle = register(self)
        self._options = OptionCheck(self.rule, adamw_scale)
        name = type(self).__name__
        self._resumption = Resumption(name, self.ledger, self.theta, self._progress, self._options)
        checks = self._options, self._resumption, self._progress, self._advice
        offload = Offload(self.ledger)
        self._stepping = Stepping(name, self.ledger, self._engine, self._compiled, *checks, offload, self._whole)
        self._steplock = self._stepping.lock
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the one that we are bound to


def unwrap_optimizer(optimizer: object) -> LearnedOptimizer | None:
    """The learned optimizer inside the wrappers of Lightning, Fabric or Accelerate; None if there is none."""
    # Lightning's wrappers pass isinstance() for the class they wrap, so look for what is wrapped first.
    while inner := next((vars(optimizer)[key] for key in ("_optimizer", "optimizer") if key in vars(optimizer)), None):
        optimizer = inner
    return optimizer if isinstance(optimizer, LearnedOptimizer) else None
