"""The contract between the engine and a rule.

A learned optimizer needs whole-tensor numbers at two points of a step: row and column means before its features
exist, and the mean square of every feature before its network can run. A rule is therefore not one ``update()`` but
stages; the engine runs each stage over the blocks of all tensors and completes the sums of all tensors between them
in one *round* (see :mod:`pylo_integrations.engine`). Rules never see devices, ranks or chunk sizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from pylo_integrations.rules.kernel_spec import KernelSpec
from pylo_integrations.sharding.blocks import Block, Bucket, PartialSum, Sums
from pylo_integrations.sharding.layout import TensorLayout

LARGEST_GRADIENT = 1e14
"""The square of this, summed over a billion elements, still fits float32."""

CLIP = 1000.0
"""VeLO and its descendants clip gradient elements to plus and minus this (docs/mathematics.md)."""

RuleChoice = Literal["learned", "attention", "adamw"]
"""Who steps the tensors of a parameter group; see :meth:`Rule.rule_for`."""

Control = Mapping[str, Tensor]
"""What a rule decides for whole tensors: entries of shape ``(tensors or 1, ...)``."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Local(Protocol):
    """Who runs the local functions of rules, those that see one block and decide nothing.

    Such a function takes tensors, or sequences of them, by position, and by keyword hashable values that stay the same
    from step to step; it returns tensors, and may overwrite arguments if its name ends in an underscore.
    """

    def __call__(self, function: Callable[_P, _R], /) -> Callable[_P, _R]:
        """What to call in place of ``function``; equal to it up to rounding."""


def as_written(function: Callable[_P, _R], /) -> Callable[_P, _R]:
    """The :class:`Local` that runs functions as they are."""
    return function


@dataclass
class StepContext:
    """What one step knows beyond the tensors.

    Attributes:
        iteration: Optimizer steps taken before this one; the first step sees 0.
        num_steps: The horizon, or None when unknown (never None for a rule that needs it).
        loss: 0-d float32 loss of this step, or None (never None for a rule that needs it).
        grad_scale: 0-d factor on every gradient (global-norm clipping), or None.
        zero_nonfinite: Whether gradient elements that are not finite, or beyond ``LARGEST_GRADIENT``, are read as 0.
        memory: The rule's own whole-model memory, kept in checkpoints; a rule replaces entries in ``control``, and at
            the end of the step.
        constants: :meth:`Rule.constants` on the device and dtype of the tensors at hand.
        local: Who runs the rule's local functions.
        counts: :attr:`Rule.counts` of the rule whose context it is.
        counted: What ``finish`` has counted of whole tensors, by the names of :attr:`Rule.counts`, each ``(tensors,)``.
    """

    iteration: int
    num_steps: int | None
    loss: Tensor | None
    grad_scale: Tensor | None = None
    zero_nonfinite: bool = False
    memory: dict[str, Tensor] = field(default_factory=dict)
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    local: Local = as_written
    counts: tuple[str, ...] = ()
    counted: dict[str, list[Tensor]] = field(default_factory=dict)

    def count(self, name: str, values: Tensor) -> None:
        """Count what a rule finds of whole tensors as it finishes their steps; its sum is what ``conclude`` gets.

        Args:
            name: One of :attr:`Rule.counts`.
            values: ``(tensors,)``.

        Raises:
            ValueError: Another name, which ranks that finish no tensor would not know of, or another shape.
        """
        if name not in self.counts:
            raise ValueError(f"count({name!r}): the rule has counts = {self.counts}; name there what finish() counts")
        if values.dim() != 1:
            raise ValueError(
                f"count({name!r}): values of shape {tuple(values.shape)} must be one for each tensor, (tensors,)"
            )
        self.counted.setdefault(name, []).append(values)


class Rule(ABC):
    """One optimizer's mathematics. Stages run in the order of the methods below; statistics are named tensors.

    A rule is a pure function of theta and is immutable: it holds no state of a run.

    Attributes:
        kind: What checkpoints call the rule; the name of the class, unless it says otherwise.
        needs_loss: Whether every step needs the loss.
        early_losses: How many first steps use the loss, if it is given.
        needs_horizon: Whether every step needs to know how many steps the run takes.
        features: Names of the per-parameter inputs of the network, in order; empty if there is none.
        finishes: Whether :meth:`finish` has something to do; steps are then kept until a tensor's are complete.
        counts: Names of what :meth:`finish` counts, for :meth:`conclude` to read.
        steps_by_scale: Whether a step is in proportion to the root mean square of the tensor that it is for, so that
            a tensor of zeros hardly moves.
    """

    kind: ClassVar[str]
    needs_loss: ClassVar[bool] = False
    early_losses: ClassVar[int] = 0
    needs_horizon: ClassVar[bool] = False
    features: ClassVar[tuple[str, ...]] = ()
    finishes: ClassVar[bool] = False
    counts: ClassVar[tuple[str, ...]] = ()
    steps_by_scale: ClassVar[bool] = False

    def reads_loss(self, iteration: int) -> bool:
        """Whether the step after ``iteration`` others uses the loss, if it is given."""
        return self.needs_loss or iteration < self.early_losses

    @property
    def unread(self) -> tuple[str, ...]:
        """Names of states that rules of this kind keep and this one, whose weights never read them, does not."""
        return ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "kind" not in vars(cls):
            cls.kind = cls.__name__

    def reduced(self) -> Rule:
        """An equal rule without what its weights never use, for theta that is final; by default this one.

        Raises:
            ValueError: Weights are such as no training makes; the message says which.
        """
        return self

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Tensor], *args: Any, **hyper: Any) -> Rule:
        """Build the rule from theta; a rule without theta has no use for this.

        Args:
            arrays: By the reference's tree-path names.
            hyper: Constants of the rule; those left out have defaults.

        Raises:
            ValueError: A name is missing or unknown, or a shape does not fit.
            TypeError: Unknown constant.
        """
        raise TypeError(f"{cls.__name__} has no theta")

    def rule_for(self, layout: TensorLayout, group: Mapping[str, Any]) -> Rule:
        """The rule for a tensor of a parameter group: this one, or another for tensors that it does not step."""
        return self

    @property
    def choices(self) -> tuple[RuleChoice, ...]:
        """Values of the group option ``rule`` that :meth:`member` understands."""
        return ("learned",)

    @property
    def lr_mult(self) -> float:
        """Factor on the learning rate of the group, and so on coupled weight decay too."""
        return 1.0

    @property
    def gradient_power(self) -> int | None:
        """``k`` if a factor ``c`` on all gradients puts ``c**k`` on all sums of :meth:`collect`; None if it does not.

        With it, clipping the gradient norm costs no exchange between ranks of its own.
        """
        return None

    @property
    def kernel_spec(self) -> KernelSpec | None:
        """What native kernels need to know to run the stages; None if they do not know this rule."""
        return None

    @property
    def workspace(self) -> int:
        """Temporaries of the hungriest stage, in elements of the compute dtype per parameter element."""
        return 16

    @property
    def state_names(self) -> frozenset[str]:
        """Names of all states that this rule and its members keep, or would with other weights; others are others'."""
        members = self._members()
        return frozenset(name for member, layout in members for name in (*member.state_shapes(layout), *member.unread))

    @property
    def largest_lr_mult(self) -> float:
        """The largest :attr:`lr_mult` of this rule and its members."""
        return max(member.lr_mult for member, _ in self._members())

    def _members(self) -> list[tuple[Rule, TensorLayout]]:
        """Who steps tensors of every rank and choice."""
        layouts = [TensorLayout.whole((2,) * rank, "out_in") for rank in range(4)]
        return [(self.rule_for(layout, {"rule": choice}), layout) for layout in layouts for choice in self.choices]

    def schedule(self, iteration: int, num_steps: int | None) -> float:
        """Factor on steps by time alone, where a rule has a schedule of its own; weight decay follows it.

        Args:
            iteration: Steps taken before.
            num_steps: The horizon; None if it is not known.
        """
        return 1.0

    @abstractmethod
    def state_shapes(self, layout: TensorLayout) -> dict[str, tuple[int, ...] | None]:
        """Names and shapes of a tensor's state; None stands for "shaped (and sharded) like the parameter"."""

    def initial_state(self) -> Mapping[str, Tensor]:
        """Values of states that do not start at zero, by name."""
        return {}

    def initial_memory(self) -> dict[str, Tensor]:
        """What ``ctx.memory`` is like before the first step, where a rule has one: the names and shapes never change.

        Checkpoints of a rule that needs no loss are checked against it.
        """
        return {}

    def constants(self, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors derived from theta, placed on ``device`` in ``dtype``; cached by the engine."""
        return {}

    def collect(self, block: Block, ctx: StepContext) -> dict[str, PartialSum]:
        """Read-only: what must be summed over whole tensors before any state may change."""
        return {}

    def prepare_(self, bucket: Bucket, sums: Sums, ctx: StepContext) -> Sums:
        """Update factored state from the complete sums of ``collect``; return what blocks need of it."""
        return {}

    def control(self, buckets: Sequence[Bucket], sums: Sequence[Sums], ctx: StepContext) -> Sequence[Control]:
        """Whole-model decisions, once a step, one entry per bucket.

        May update ``ctx.memory``, and states that are not shaped like their parameter.
        """
        return [{}] * len(buckets)

    def describe_(self, block: Block, prepared: Sums, ctx: StepContext) -> dict[str, PartialSum]:
        """Update the block's parameter-shaped state; sum what ``propose`` needs of whole tensors."""
        return {}

    @abstractmethod
    def propose(self, block: Block, prepared: Sums, sums: Sums, control: Control, ctx: StepContext) -> Tensor:
        """The step of every parameter, ``(tensors, 1, *box)`` in parameter units, to be subtracted."""

    def finish(self, steps: Tensor, layout: TensorLayout, ctx: StepContext) -> Tensor:
        """What to subtract, made of the proposed steps of whole tensors, ``(tensors, 1, *layout.shape)``."""
        return steps

    def conclude(self, counted: Mapping[str, Tensor], ctx: StepContext) -> Mapping[str, Tensor]:
        """New entries of ``ctx.memory``, once the last step is finished; asked of the rule that makes the others.

        Args:
            counted: Sums over all tensors of what was counted, 0-d, by name; empty if no tensor's step was finished.
            ctx: Of the step.
        """
        return {}

    def telemetry(self, memory: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What ``ctx.memory``, empty before the first step, has to tell a person: tensors of one element by name.

        What ``control`` decides needs no mention here: entries with one number a tensor are told anyway.
        """
        return {}


def clean_gradient(block: Block, ctx: StepContext) -> Tensor:
    """Gradients under the non-finite policy, ``(tensors, 1, *box)``; may alias ``p.grad``: do not write to it."""
    grad = block.raw_grad
    return grad.where(grad.abs() <= LARGEST_GRADIENT, 0) if ctx.zero_nonfinite else grad


def read_gradient(block: Block, ctx: StepContext) -> Tensor:
    """Gradients as the rule must see them, ``(tensors, 1, *box)``; do not write to it.

    Non-finite policy, sign, clip scale and the gradient of an L2 penalty are applied.
    """
    grad, group = clean_gradient(block, ctx), block.bucket.group
    if group["maximize"]:
        grad = -grad
    if ctx.grad_scale is not None:
        grad = grad * ctx.grad_scale.to(grad.dtype)
    if penalty := l2_penalty(group):
        grad = grad + block.param * penalty
    return grad


def read_clipped_gradient(block: Block, ctx: StepContext) -> Tensor:
    """As :func:`read_gradient`, then every element clipped to plus and minus :data:`CLIP`."""
    return read_gradient(block, ctx).clamp(-CLIP, CLIP)


def l2_penalty(group: Mapping[str, Any]) -> float:
    """Weight of the sum of squared parameters in the loss; 0 unless the group's decay policy is ``"l2"``."""
    return float(group["weight_decay"]) if group["weight_decay_policy"] == "l2" else 0.0
