"""Names of learned optimizers for the stock ``Trainer``: what :func:`install` changes, and takes back."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
import transformers
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from transformers.training_args import OptimizerNames

from pylo_integrations.catalog import get_optimizer_info, list_optimizers
from pylo_integrations.deepspeed import attach
from pylo_integrations.hf.optimizer import FromGroups, describe
from pylo_integrations.hf.run import RunCallback, tapped
from pylo_integrations.optimizer import unwrap_optimizer

_undo: ExitStack | None = None
"""What :func:`uninstall` will run; None while nothing is installed."""

_added: set[OptimizerNames] = set()
"""Members of ``OptimizerNames`` that are ours."""


def install() -> None:
    """Make ``TrainingArguments(optim="name")`` work with the stock ``transformers.Trainer`` and its subclasses.

    This changes transformers and accelerate for the whole process until :func:`uninstall`: the names of the catalogue
    join ``OptimizerNames``, Trainers find them as they find their own, new Trainers get one more callback and
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
    if _undo is not None and (handlers := _handlers()) is not None:  # else install() adds all of them
        _add_handler(member, handlers, undo)

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


def _choose(name: str, args: transformers.TrainingArguments, model: Any) -> tuple[Any, dict[str, Any]]:
    """What a Trainer asks about an optimizer: who makes it, and with which keywords."""
    # Trainer.create_scheduler, which comes next, reads the arguments.
    kwargs, args.lr_scheduler_type = describe(get_optimizer_info(name), args, model)
    return FromGroups, kwargs


def _offer_to_trainers(undo: ExitStack) -> None:
    """By transformers' own table of handlers, from 5 on; before, by the method that had the choice."""
    if (handlers := _handlers()) is not None:
        for member in _added:
            _add_handler(member, handlers, undo)
        return
    original = transformers.Trainer.get_optimizer_cls_and_kwargs

    @functools.wraps(original)
    def get_optimizer_cls_and_kwargs(args: transformers.TrainingArguments, model: Any = None) -> tuple[Any, Any]:
        if args.optim not in _added:
            return original(args, model)
        return _choose(OptimizerNames(args.optim).value, args, model)

    _replace(transformers.Trainer, "get_optimizer_cls_and_kwargs", staticmethod(get_optimizer_cls_and_kwargs), undo)


def _handlers() -> dict[Any, Callable[[Any], tuple[Any, Any]]] | None:
    """Who knows optimizers by name, in this transformers; None if it has no such table."""
    return getattr(sys.modules[transformers.Trainer.__module__], "_OPTIMIZER_HANDLERS", None)


def _add_handler(
    member: OptimizerNames, handlers: dict[Any, Callable[[Any], tuple[Any, Any]]], undo: ExitStack
) -> None:
    handlers[member] = lambda context: _choose(member.value, context.args, context.model)
    undo.callback(handlers.pop, member, None)


def _add_callback(undo: ExitStack) -> None:
    """Where every Trainer's callbacks come together: ms-swift replaces the list of those that Trainers begin with."""
    original: Any = CallbackHandler.__init__

    @functools.wraps(original)
    def with_ours(self: Any, callbacks: Any, *args: Any, **kwargs: Any) -> None:
        kinds = [callback if isinstance(callback, type) else type(callback) for callback in callbacks]
        if RunCallback not in kinds:
            # After those that decide when to save, before those that report the logs it adds to.
            at = max((i + 1 for i, kind in enumerate(kinds) if issubclass(kind, DefaultFlowCallback)), default=0)
            callbacks = [*callbacks[:at], RunCallback, *callbacks[at:]]
        original(self, callbacks, *args, **kwargs)

    _replace(CallbackHandler, "__init__", with_ours, undo)


def _tap_backward(undo: ExitStack) -> None:
    """Have ``Accelerator.backward`` report the loss: the only place that sees it in every trainer class."""
    original = accelerate.Accelerator.backward
    is_installed = True

    @functools.wraps(original)
    def backward(self: Any, loss: torch.Tensor, **kwargs: Any) -> Any:
        heard = [unwrap_optimizer(optimizer) for optimizer in self._optimizers] if is_installed else []
        trained = [learned for learned in heard if learned is not None and learned in tapped]
        engine = getattr(getattr(self, "deepspeed_engine_wrapped", None), "engine", None)
        if engine is not None and trained:
            attach(engine)  # its backward() takes the step, and must have told the loss before
        result = original(self, loss, **kwargs)
        for learned in trained if engine is None else ():
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
