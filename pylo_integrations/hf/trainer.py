"""A trainer class that takes a learned optimizer by name."""

from __future__ import annotations

import inspect
import typing
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer
from transformers.trainer_utils import SchedulerType

from pylo_integrations.catalog import OptimizerSpec, get_optimizer_info
from pylo_integrations.deepspeed import attach
from pylo_integrations.hf.optimizer import FromGroups, Schedule, check_supported, describe
from pylo_integrations.hf.options import parse_optim_args
from pylo_integrations.hf.run import RunCallback, tapped
from pylo_integrations.optimizer import unwrap_optimizer

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
            in ``optimizer_cls_and_kwargs``; the FSDP of XLA.
        ShardingError: DeepSpeed, in a way that hides whole tensors.
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
            check_supported(self._learned, self.args)
            parse_optim_args(self._learned, self.args.optim_args)  # complain now, not after the data was prepared
        if not any(isinstance(callback, RunCallback) for callback in self.callback_handler.callbacks):
            self.add_callback(RunCallback)
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
        kwargs, self._schedule = describe(self._learned, self.args, owner, self._given_schedule)
        self.optimizer_cls_and_kwargs = (FromGroups, kwargs)
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
        tapped.discard(learned)  # a loss must count once, also when install() is in force
        if self.deepspeed is not None:  # its backward() takes the step, and must have told the loss before
            attach(self.deepspeed)
            return super().training_step(*args, **kwargs)
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
