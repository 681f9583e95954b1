"""Learned optimizers in the Hugging Face ``Trainer``.

Three ways to choose one by its catalogue name:

* :class:`Trainer` accepts ``optimizers="name"``; so does any other trainer class after :func:`with_learned_optimizer`.
  Nothing is patched.
* After :func:`install`, the stock ``transformers.Trainer`` and its subclasses accept
  ``TrainingArguments(optim="name")``, from Python, YAML, JSON or the command line.

All of them read ``TrainingArguments.optim_args`` (:func:`parse_optim_args`), keep the Trainer's choice of what decays,
and tell the optimizer what the Trainer's bare ``optimizer.step()`` does not: the loss and the length of the run.

Written against transformers 5.24 and accelerate 1.15. The trainer classes use documented methods only; what
:func:`install` needs beyond them, it checks.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import inspect
import logging
import pickle
import sys
import types
import typing
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin
from weakref import WeakSet

import accelerate  # type: ignore[import-untyped]
import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from pylo_integrations.catalog import OptimizerSpec, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.optimizer import LearnedOptimizer, unwrap_optimizer
from pylo_integrations.telemetry import TelemetryMode

logger = logging.getLogger(__name__)

Schedule: TypeAlias = SchedulerType | Callable[[Optimizer], LRScheduler]
"""A schedule for an optimizer that does not exist yet: transformers' name of it, or a function that builds it."""

# -- the optimizer: options, learning rate, groups ---------------------------------------------------------------------

_FIELD_OF = {"lr": "learning_rate", "weight_decay": "weight_decay"}  # options that TrainingArguments has fields for
_BOOLS = {"true": True, "1": True, "false": False, "0": False}
_KIND = {bool: "true or false", int: "an integer", float: "a number", str: "text", Any: "text", types.NoneType: "None"}


def parse_optim_args(spec: OptimizerSpec, optim_args: str | None) -> dict[str, Any]:
    """Read ``"option=value,option=value"`` as keyword arguments of an optimizer, typed by its constructor.

    Args:
        spec: The catalogue entry whose class has the options. ``telemetry`` is one of every entry, see
            :func:`~pylo_integrations.create_optimizer`.
        optim_args: As in ``TrainingArguments.optim_args``. Values cannot contain ``,`` or ``=``; numbers, ``true`` and
            ``false``, ``None`` and the choices of a ``Literal`` are recognised where the annotation has them.

    Raises:
        ValueError: Malformed text, an unknown option, a value that the option's type does not admit, or an option that
            has a field of its own in ``TrainingArguments``.
    """
    if not optim_args or not optim_args.strip():
        return {}
    hints = {**typing.get_type_hints(spec.cls.__init__), "telemetry": TelemetryMode}
    available = sorted({*spec.options, "telemetry"} - set(_FIELD_OF))
    options: dict[str, Any] = {}
    for item in optim_args.split(","):
        key, equals, text = (part.strip() for part in item.partition("="))
        if not (key and equals and text) or "=" in text:
            raise ValueError(f"optim_args={optim_args!r}: {item!r} is not of the form option=value")
        if field := _FIELD_OF.get(key):
            raise ValueError(f"optim_args={optim_args!r}: give {key!r} as TrainingArguments({field}={text}) instead")
        if key not in available:
            near = difflib.get_close_matches(key, available, n=3)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {available}"
            raise ValueError(f"optim_args={optim_args!r}: {spec.name} has no option {key!r}; {hint}")
        if key in options:
            raise ValueError(f"optim_args={optim_args!r} sets {key!r} twice")
        options[key] = _read_value(key, text, hints.get(key, Any))
    return options


def _read_value(key: str, text: str, hint: Any) -> Any:
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    expected: list[str] = []
    for member in sorted(members, key=lambda member: member in (str, Any)):  # text admits anything, so it comes last
        if get_origin(member) is Literal:
            choices = {str(choice): choice for choice in get_args(member)}
            if text in choices:
                return choices[text]
            expected += map(repr, choices)
        elif member in _KIND:
            try:
                return _read_simple(text, member)
            except (KeyError, ValueError):
                expected.append(_KIND[member])
    if not expected:
        raise ValueError(f"optim_args: {key} cannot be given as text; create the optimizer in Python to set it")
    raise ValueError(f"optim_args: {key}={text!r} is invalid; expected {' or '.join(expected)}")


def _read_simple(text: str, kind: Any) -> Any:
    if kind is types.NoneType:
        return {"none": None}[text.lower()]
    if kind is bool:
        return _BOOLS[text.lower()]
    return kind(text) if kind in (int, float) else text


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
    anneals = spec.needs_horizon and not spec.cls.wants_schedule_with({**spec.defaults, **options})
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


class _FromGroups(Optimizer):
    """What the Trainer takes for an optimizer class: called with its groups, it returns a learned optimizer.

    Only a class is handed the Trainer's groups, hence its choice of what decays (``get_decay_parameter_names``, which
    subclasses override); a factory is handed the bare model (``Trainer.create_optimizer``).
    """

    def __new__(
        cls, groups: Iterable[dict[str, Any]], *, name: str, owner: nn.Module, lr: float, options: dict[str, Any]
    ) -> Any:
        optimizer = create_optimizer(
            _split_as_wanted(groups, get_optimizer_info(name).param_groups(owner)), name, lr, **options
        )
        optimizer.bind_model(owner)
        if "num_steps" not in options:
            _horizon_is_ours.add(optimizer)
        return optimizer


def _split_as_wanted(groups: Iterable[dict[str, Any]], wanted: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's groups, divided by how weights are stored and which rule steps them in ``wanted``, with names."""
    known = {param: (name, (group["axes"], group["rule"])) for group in wanted for name, param in group["params"]}
    divided = []
    for group in groups:
        members: dict[tuple[str, str], list[tuple[str, nn.Parameter]]] = {}
        for param in group["params"]:
            name, kind = known[param]
            members.setdefault(kind, []).append((name, param))
        divided += [{**group, "params": params, "axes": axes, "rule": rule} for (axes, rule), params in members.items()]
    return divided


def _describe(
    spec: OptimizerSpec, args: transformers.TrainingArguments, model: nn.Module, schedule: Schedule | None = None
) -> tuple[dict[str, Any], Any]:
    """Arguments of :class:`_FromGroups`, and the schedule that goes with them."""
    _check_supported(spec, args)
    options = parse_optim_args(spec, args.optim_args)
    lr, chosen = _choose_rate_and_schedule(spec, args, schedule, options)
    return {"name": spec.name, "owner": model, "lr": lr, "options": options}, chosen


def _check_supported(spec: OptimizerSpec, args: transformers.TrainingArguments) -> None:
    is_xla = isinstance(args.fsdp_config, dict) and args.fsdp_config.get("xla")
    for is_used, what in ((args.fsdp and is_xla, "FSDP of XLA"), (args.deepspeed_plugin, "DeepSpeed")):
        if is_used:
            raise ValueError(
                f"{spec.name}: {what} hides whole tensors from the optimizer, and a learned one needs statistics of "
                "them; train with torch's FSDP (TrainingArguments(fsdp=...)), DistributedDataParallel or one device"
            )


# -- the run: horizon and loss -----------------------------------------------------------------------------------------

_horizon_is_ours: WeakSet[LearnedOptimizer] = WeakSet()
"""Optimizers whose horizon follows the Trainer; the others keep the one that the user gave."""

_tapped: WeakSet[LearnedOptimizer] = WeakSet()
"""Optimizers in training whose losses only the tap of install() can see."""


class _RunCallback(transformers.TrainerCallback):
    """Tells a learned optimizer, if there is one, how long the run is and when a step begins; logs its telemetry."""

    def on_train_begin(self, args: Any, state: transformers.TrainerState, control: Any, **kwargs: Any) -> None:
        learned = unwrap_optimizer(kwargs["optimizer"])
        if learned is None:
            return
        _tapped.add(learned)
        learned.bind_model(kwargs["model"])  # of an optimizer that the user made
        if learned.num_steps is None:
            _horizon_is_ours.add(learned)
        if learned in _horizon_is_ours and state.max_steps > 0:
            # A second train() goes on with the same optimizer but counts its steps from 0. Skipped steps, which leave
            # the optimizer's count behind, do not move the horizon.
            horizon = state.max_steps + max(0, learned.iteration - state.global_step)
            if state.global_step and learned.num_steps not in (None, horizon):
                logger.warning(
                    "the checkpoint was written in a run of %s steps, this one has %s: the optimizer's horizon changes",
                    learned.num_steps,
                    horizon,
                )
            learned.set_num_steps(horizon)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (learned := unwrap_optimizer(kwargs["optimizer"])) is not None:
            learned.clear_observed_loss()  # of a step that the GradScaler skipped

    def on_step_end(self, args: Any, state: Any, control: transformers.TrainerControl, **kwargs: Any) -> None:
        _consolidate_before_saving(control, kwargs["optimizer"])

    def on_epoch_end(self, args: Any, state: Any, control: transformers.TrainerControl, **kwargs: Any) -> None:
        _consolidate_before_saving(control, kwargs["optimizer"])

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or kwargs["optimizer"] is None:
            return  # of an evaluation, or the summary of a run
        if (learned := unwrap_optimizer(kwargs["optimizer"])) is not None:
            numbers = learned.telemetry()
            logs.update(numbers)  # the callbacks after this one report it
            state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (learned := unwrap_optimizer(kwargs["optimizer"])) is not None:
            _tapped.discard(learned)


def _consolidate_before_saving(control: transformers.TrainerControl, optimizer: Any) -> None:
    """The first process alone writes the optimizer's state, so what is shared out has to come to it before."""
    learned = unwrap_optimizer(optimizer)
    if control.should_save and learned is not None and learned.shard_step:
        learned.consolidate_state_dict()


# -- a trainer class that takes names ----------------------------------------------------------------------------------

if TYPE_CHECKING:
    _TrainerBase = transformers.Trainer
else:
    _TrainerBase = object


class LearnedOptimizerMixin(_TrainerBase):
    """Lets a trainer class take a learned optimizer by name; put it before the class: ``class T(Mixin, SFTTrainer)``.

    Args:
        *args: As for the trainer class.
        **kwargs: As for the trainer class, but ``optimizers``, by keyword or position, may also be

            * ``"name"``: an entry of the catalogue, with the schedule of ``TrainingArguments.lr_scheduler_type``;
            * ``("name", schedule)``: ``schedule`` is None, a ``SchedulerType`` or its value, such as ``"cosine"``, or a
              function that makes a scheduler of an optimizer.

            Options of the optimizer come from ``TrainingArguments.optim_args``.

    Raises:
        ValueError: Unknown name, schedule or option; a scheduler that belongs to another optimizer; a second optimizer
            in ``optimizer_cls_and_kwargs``; DeepSpeed or the FSDP of XLA.
        TypeError: The schedule is none of these.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._learned: OptimizerSpec | None = None
        self._given_schedule: Schedule | None = None
        self._schedule: Schedule | None = None
        args, kwargs = self._take_name(args, kwargs)
        super().__init__(*args, **kwargs)
        if self._learned is not None:
            if self.optimizer_cls_and_kwargs is not None:
                raise ValueError(
                    f"optimizers={self._learned.name!r} and optimizer_cls_and_kwargs= each name an optimizer; pass one"
                )
            _check_supported(self._learned, self.args)
            parse_optim_args(self._learned, self.args.optim_args)  # complain now, not after the data was prepared
        if not any(isinstance(callback, _RunCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(_RunCallback)
            callbacks: list[Any] = self.callback_handler.callbacks
            # After the one that decides when to save, before those that report the logs it adds to.
            callbacks.insert(1, callbacks.pop())

    def _take_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments with ``optimizers`` in a form that the trainer class knows."""
        if "optimizers" in kwargs:
            return args, {**kwargs, "optimizers": self._read_optimizers(kwargs["optimizers"])}
        # Trainers often forward *args: the position is that of the first class which has the argument by name.
        bases = type(self).__mro__[type(self).__mro__.index(LearnedOptimizerMixin) + 1 :]
        names = next(names for base in bases if "optimizers" in (names := [*inspect.signature(base).parameters]))
        at = names.index("optimizers")
        if at < len(args):
            args = (*args[:at], self._read_optimizers(args[at]), *args[at + 1 :])
        return args, kwargs

    def _read_optimizers(self, optimizers: Any) -> Any:
        pair = (optimizers, None) if isinstance(optimizers, str) else optimizers
        if not (isinstance(pair, (tuple, list)) and pair and isinstance(pair[0], str)):
            return optimizers
        if len(pair) != 2:
            raise ValueError(f"optimizers={optimizers!r} must be a name or (name, schedule)")
        name, schedule = pair
        self._learned = get_optimizer_info(name)
        if isinstance(schedule, LRScheduler):
            raise ValueError(
                f"optimizers=({name!r}, {type(schedule).__name__}(...)): this scheduler belongs to another optimizer, "
                f"since {name} is created when training starts. Pass the name of a schedule, such as 'cosine', or a "
                "function that makes it, such as functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=...)"
            )
        if isinstance(schedule, str):
            schedule = SchedulerType(schedule)
        elif schedule is not None and not callable(schedule):
            raise TypeError(
                f"optimizers=({name!r}, {schedule!r}): the schedule must be None, the name of one or a function that "
                "makes one from an optimizer"
            )
        self._given_schedule = schedule
        return (None, None)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the optimizer as the trainer class does, but with the learned one in the place of its choice.

        Raises:
            RuntimeError: The trainer class has a ``create_optimizer`` of its own that ignores the choice.
        """
        arguments = () if model is None else (model,)  # older overrides of this method take none
        if self._learned is None or self.optimizer is not None:
            return super().create_optimizer(*arguments)
        owner: Any = self.model if model is None else model
        kwargs, self._schedule = _describe(self._learned, self.args, owner, self._given_schedule)
        self.optimizer_cls_and_kwargs = (_FromGroups, kwargs)
        try:
            optimizer = super().create_optimizer(*arguments)
        finally:
            self.optimizer_cls_and_kwargs = None
        if unwrap_optimizer(self.optimizer) is None:
            raise RuntimeError(
                f"optimizers={self._learned.name!r} was not used: {type(self).__name__}.create_optimizer built "
                f"{type(self.optimizer).__name__} regardless of optimizer_cls_and_kwargs. Create the optimizer with "
                "pylo_integrations.create_optimizer() and pass optimizers=(optimizer, None)"
            )
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the schedule as the trainer class does, but of the chosen kind.

        Raises:
            TypeError: The given function made something else.
        """
        if self._schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        if not isinstance(self._schedule, SchedulerType):
            target: Any = self.optimizer if optimizer is None else optimizer
            for group in target.param_groups:  # of a second train(), or one with a smaller batch: from the beginning
                group["lr"] = group.get("initial_lr", group["lr"])
            scheduler = self._schedule(target)
            if not isinstance(scheduler, LRScheduler):
                raise TypeError(f"the function given in optimizers= made {scheduler!r}, not a scheduler")
            self.lr_scheduler = typing.cast(Any, scheduler)
            self._created_lr_scheduler = True  # as in Trainer: a second train() makes a new one
            return scheduler
        given = self.args.lr_scheduler_type
        self.args.lr_scheduler_type = self._schedule
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        finally:
            self.args.lr_scheduler_type = given  # the user's arguments may serve another Trainer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-batch, as the trainer class does it; its loss goes to the optimizer.

        Returns:
            The loss that went into ``backward``: what the Trainer logs.
        """
        learned = unwrap_optimizer(self.optimizer)
        if learned is None:
            return super().training_step(*args, **kwargs)
        _tapped.discard(learned)  # a loss must count once, also when install() is in force
        loss = super().training_step(*args, **kwargs)
        learned.observe_loss(loss)
        return loss


class Trainer(LearnedOptimizerMixin, transformers.Trainer):
    """``transformers.Trainer`` that takes a learned optimizer by name, see :class:`LearnedOptimizerMixin`."""


_TrainerT = TypeVar("_TrainerT", bound=transformers.Trainer)


def with_learned_optimizer(trainer_class: type[_TrainerT]) -> type[_TrainerT]:
    """A subclass of any trainer class that takes a learned optimizer by name, see :class:`LearnedOptimizerMixin`.

    Args:
        trainer_class: ``transformers.Trainer`` or a subclass, e.g. of TRL; returned as it is if it has the mixin.

    Raises:
        TypeError: Not such a class.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, transformers.Trainer)):
        raise TypeError(f"with_learned_optimizer() takes a subclass of transformers.Trainer, not {trainer_class!r}")
    if issubclass(trainer_class, LearnedOptimizerMixin):
        return trainer_class
    body = {"__module__": trainer_class.__module__, "__doc__": trainer_class.__doc__}
    return type(f"{trainer_class.__name__}WithLearnedOptimizer", (LearnedOptimizerMixin, trainer_class), body)


# -- names for the stock Trainer ---------------------------------------------------------------------------------------

_undo: ExitStack | None = None
"""What :func:`uninstall` will run; None while nothing is installed."""

_added: set[OptimizerNames] = set()
"""Members of ``OptimizerNames`` that are ours."""


def install() -> None:
    """Make ``TrainingArguments(optim="name")`` work with the stock ``transformers.Trainer`` and its subclasses.

    This changes transformers and accelerate for the whole process until :func:`uninstall`: the names of the catalogue
    join ``OptimizerNames``, ``Trainer.get_optimizer_cls_and_kwargs`` knows them, new Trainers get one more callback and
    ``Accelerator.backward`` reports its loss to the learned optimizer that a Trainer is training.

    Names registered later work too, but an ``HfArgumentParser`` lists its choices when it is built: call this again
    before, which otherwise does nothing.

    Raises:
        RuntimeError: This Python or transformers cannot be extended so; nothing was changed.
        ValueError: A name of the catalogue is also one of transformers' own; nothing was changed.
    """
    global _undo
    if _undo is not None:
        for name in list_optimizers():
            _add_name(name, _undo)
        return
    try:
        with ExitStack() as undo:
            for name in list_optimizers():
                _add_name(name, undo)
                _check_name(name)
            _accept_later_names(undo)
            _offer_to_trainers(undo)
            _add_callback(undo)
            _tap_backward(undo)
            _undo = undo.pop_all()
    except (AssertionError, AttributeError, ImportError, KeyError) as error:
        raise RuntimeError(
            f"install() does not work with transformers {transformers.__version__}, accelerate "
            f"{accelerate.__version__} and Python {sys.version.split()[0]} ({error!r}); use "
            "pylo_integrations.hf.Trainer or with_learned_optimizer(), which change nothing"
        ) from error


def uninstall() -> None:
    """Take back everything that :func:`install` changed; does nothing if it was not called."""
    global _undo
    if _undo is not None:
        _undo.close()
        _undo = None


def _add_name(name: str, undo: ExitStack) -> OptimizerNames:
    """Make ``name`` a member of ``OptimizerNames``, unless it already is one of ours.

    An enumeration cannot be extended through its interface. The three tables changed here have been the same from
    Python 3.4 to 3.13; :func:`_check_name` tells if that ends.
    """
    by_value: dict[Any, Any] = OptimizerNames._value2member_map_
    by_name: dict[str, Any] = OptimizerNames._member_map_
    label = name.upper()
    if (member := by_value.get(name)) is not None or label in by_name:
        if not isinstance(member, OptimizerNames) or member not in _added:
            raise ValueError(f"{name!r} is a learned optimizer and one of transformers; unregister_optimizer({name!r})")
        return member
    member = str.__new__(OptimizerNames, name)
    member._name_, member._value_ = label, name
    by_name[label] = by_value[name] = member
    OptimizerNames._member_names_.append(label)
    _added.add(member)

    def remove() -> None:
        del by_name[label], by_value[name]
        OptimizerNames._member_names_.remove(label)
        _added.remove(member)

    undo.callback(remove)
    return member


def _check_name(name: str) -> None:
    member = OptimizerNames(name)
    assert member.value == name and member in list(OptimizerNames), f"OptimizerNames has no {name!r}"
    copies = (copy.deepcopy(member), pickle.loads(pickle.dumps(member)))
    assert all(copied is member for copied in copies), f"a copy of {member!r} is another member"


def _accept_later_names(undo: ExitStack) -> None:
    refuse: Callable[[object], Any] = OptimizerNames._missing_

    def look_in_catalog(cls: type[OptimizerNames], value: object) -> Any:
        if _undo is not None and isinstance(value, str) and value in list_optimizers():
            return _add_name(value, _undo)
        return refuse(value)

    _replace(OptimizerNames, "_missing_", classmethod(look_in_catalog), undo)


def _offer_to_trainers(undo: ExitStack) -> None:
    original = transformers.Trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: transformers.TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        if args.optim not in _added:
            return original(args, model)
        spec = get_optimizer_info(OptimizerNames(args.optim).value)
        # Trainer.create_scheduler, which comes next, reads the arguments.
        kwargs, args.lr_scheduler_type = _describe(spec, args, model)
        return _FromGroups, kwargs

    _replace(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(get_optimizer_cls_and_kwargs), undo)


def _add_callback(undo: ExitStack) -> None:
    from transformers.trainer import DEFAULT_CALLBACKS

    callbacks: list[Any] = DEFAULT_CALLBACKS
    callbacks.append(_RunCallback)
    undo.callback(callbacks.remove, _RunCallback)


def _tap_backward(undo: ExitStack) -> None:
    """Have ``Accelerator.backward`` report the loss: the only place that sees it in every trainer class."""
    original = accelerate.Accelerator.backward
    is_installed = True

    @functools.wraps(original)
    def backward(self: Any, loss: torch.Tensor, **kwargs: Any) -> Any:
        result = original(self, loss, **kwargs)
        if is_installed:
            for optimizer in self._optimizers:
                if (learned := unwrap_optimizer(optimizer)) is not None and learned in _tapped:
                    learned.observe_loss(loss.detach() / self.gradient_accumulation_steps)
        return result

    def disconnect() -> None:
        nonlocal is_installed
        is_installed = False  # whoever wrapped this function in the meantime goes on calling it

    _replace(accelerate.Accelerator, "backward", backward, undo)
    undo.callback(disconnect)


def _replace(owner: type, name: str, value: object, undo: ExitStack) -> None:
    """Set an attribute of a class; undoing restores it unless somebody else has set it since."""
    original = vars(owner).get(name)
    setattr(owner, name, value)

    def restore() -> None:
        if vars(owner).get(name) is value:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    undo.callback(restore)
