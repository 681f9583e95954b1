"""The stages of a step, over whole buckets: the protocol, torch's own functions, and the order that they come in.

:class:`~pylo_integrations.rules.base.Rule` says what the stages are, for a block. Here they are of buckets, so that
whoever runs them may do so in one call for all tensors, as the native kernels do
(:class:`~pylo_integrations.ops.native.NativeStages`), or for many networks at once, as meta-training does.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pylo_integrations.ops.memory import read_memory
from pylo_integrations.rules.base import Control, Rule, StepContext
from pylo_integrations.sharding.blocks import Accumulator, Bucket, PartialSum, Sums
from pylo_integrations.sharding.pieces import local_part
from pylo_integrations.telemetry import StepRecord

Factors = tuple[float | Tensor, float | Tensor]
"""``(keep, scale)`` of a bucket, see :func:`~pylo_integrations.decay.keep_and_scale`."""


class Stages(Protocol):
    """Who runs the stages of a step over some buckets. Sequences have an entry for each of these.

    Attributes:
        recalls: Whether :meth:`recognises` ever does, and there are :attr:`grad_squares`.
    """

    recalls: bool

    @property
    def grad_squares(self) -> Tensor:
        """Sum of all squared gradients as they are stored, 0-d, of the last :meth:`collect`."""

    def is_current(self) -> bool:
        """Whether all tensors and their memory are as when this was made; other code may replace them."""

    def recognises(self, grads: Sequence[Tensor]) -> bool:
        """Whether gradients look as those of the last step did, so that no check is due; if so, this step reads them.

        Args:
            grads: Of all tensors of all buckets, one after the other.
        """

    def release_gradients(self) -> None:
        """Let go of the last step's gradients, which would outlive ``zero_grad()``."""

    def collect(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """The rules' sums before any state may change. Changes nothing."""

    def prepare_(self, collected: Sequence[Sums], contexts: Sequence[StepContext]) -> None:
        """Update factored state from the complete sums of :meth:`collect`. From here on, what is stepped changes."""

    def describe_(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """Update parameter-shaped state where that comes now; the sums that steps need of whole tensors.

        They are completed over ranks in place.
        """

    def step_(
        self,
        controls: Sequence[Control],
        contexts: Sequence[StepContext],
        factors: Sequence[Factors],
        record: StepRecord | None,
        numbers: Sequence[int],
    ) -> list[Iterator[Tensor] | None]:
        """Step the parameters of a bucket, or return an iterator over the steps of its blocks, for others to write.

        Args:
            controls: What the rules decided.
            contexts: Of this step.
            factors: What parameters and steps are multiplied with.
            record: Gets what is stepped here, where a step is watched.
            numbers: Of the buckets in ``record``.
        """


class Part(NamedTuple):
    """Some buckets of a plan, and who runs the stages over them.

    Attributes:
        indices: Of the buckets.
        stages: Over them.
    """

    indices: tuple[int, ...]
    stages: Stages


class ReferenceStages:
    """The rules' own functions, block by block.

    Args:
        rules: Of each bucket.
        buckets: What to step, cut into blocks.
    """

    recalls = False

    def __init__(self, rules: Sequence[Rule], buckets: Sequence[Bucket]) -> None:
        self._rules, self._buckets = rules, buckets
        self._prepared: list[Sums] = []
        self._described: list[Sums] = []
        tensors = self._tensors()
        self._look = _look_of(tensors)
        # DTensors of which torch's functions write the inside: autograd counts versions of the outside.
        self._wrappers = [tensor for tensor in tensors if local_part(tensor) is not tensor]
        self._wrappers += [tensor for bucket in buckets for tensor in bucket.wrappers()]

    def _tensors(self) -> list[Tensor]:
        """All that steps write, parameters and states; what meta-training's stacks hold is nobody's else."""
        tensors: list[Tensor] = []
        for rule, bucket in zip(self._rules, self._buckets, strict=True):
            names = bucket.stored_names(rule.state_shapes(bucket.layout))
            for param, state in zip(bucket.params, bucket.states, strict=True):
                tensors += (param, *(state[name] for name in names))
        return tensors

    @property
    def grad_squares(self) -> Tensor:
        """See :class:`Stages`."""
        raise NotImplementedError("torch's functions read gradients one by one")

    def is_current(self) -> bool:
        """See :class:`Stages`."""
        try:
            return bool(_look_of(self._tensors()) == self._look)
        except (KeyError, TypeError, AttributeError):  # one is gone, or no tensor
            return False

    def recognises(self, grads: Sequence[Tensor]) -> bool:
        """See :class:`Stages`: every step is checked, which costs little beside the functions."""
        return False

    def release_gradients(self) -> None:
        """See :class:`Stages`: there are none but those of the buckets."""

    def collect(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """See :class:`Stages`."""
        return [
            _sums(bucket, (rule.collect(block, ctx) for block in bucket.blocks))
            for rule, bucket, ctx in zip(self._rules, self._buckets, contexts, strict=True)
        ]

    def prepare_(self, collected: Sequence[Sums], contexts: Sequence[StepContext]) -> None:
        """See :class:`Stages`."""
        if self._wrappers:
            torch.autograd.graph.increment_version(self._wrappers)
        self._prepared = [
            rule.prepare_(bucket, sums, ctx)
            for rule, bucket, sums, ctx in zip(self._rules, self._buckets, collected, contexts, strict=True)
        ]

    def describe_(self, contexts: Sequence[StepContext]) -> list[Sums]:
        """See :class:`Stages`."""
        self._described = [
            _sums(bucket, (rule.describe_(block, ready, ctx) for block in bucket.blocks))
            for rule, bucket, ready, ctx in zip(self._rules, self._buckets, self._prepared, contexts, strict=True)
        ]
        return self._described

    def step_(
        self,
        controls: Sequence[Control],
        contexts: Sequence[StepContext],
        factors: Sequence[Factors],
        record: StepRecord | None,
        numbers: Sequence[int],
    ) -> list[Iterator[Tensor] | None]:
        """See :class:`Stages`."""
        prepared, described = self._prepared, self._described
        self._prepared, self._described = [], []  # which are as large as factored state

        def propose(i: int) -> Iterator[Tensor]:
            rule, ready, sums = self._rules[i], prepared[i], described[i]
            return (rule.propose(block, ready, sums, controls[i], contexts[i]) for block in self._buckets[i].blocks)

        return [propose(i) for i in range(len(self._rules))]


_device = operator.attrgetter("device")


def _look_of(tensors: Sequence[Tensor]) -> Any:
    """Which tensors these are, where they are and of what kind, to be compared."""
    devices = {device.type for device in set(map(_device, tensors))}
    if set(map(type, tensors)) <= {Tensor, nn.Parameter} and devices <= {"cpu", "cuda"}:
        with contextlib.suppress(RuntimeError):  # one has no memory, as sparse ones
            return read_memory(tensors, len(tensors)).tobytes()
    return [(id(t), t.dtype, t.device, t.shape, t.is_neg()) for t in tensors]


def _sums(bucket: Bucket, shares: Iterable[Mapping[str, PartialSum]]) -> Sums:
    """Sums over a bucket's tensors, of what its blocks have."""
    if len(bucket.blocks) == 1 and bucket.parts == 1:  # which has all of every tensor
        return {name: share.value for name, share in next(iter(shares)).items()}
    accumulator = Accumulator(bucket)
    for block, share in zip(bucket.blocks, shares, strict=True):
        accumulator.add_(block, share)
    return accumulator.sums


def run_stages(
    parts: Sequence[Part],
    collected: Sequence[Sums],
    contexts: Sequence[StepContext],
    factors: Sequence[Factors],
    decide: Callable[[Sequence[Sums]], Sequence[Control]],
    complete: Callable[[Sequence[Sums]], None] = lambda sums: None,
    record: StepRecord | None = None,
) -> tuple[list[Iterator[Tensor] | None], Sequence[Control]]:
    """The stages from complete sums to steps, in order.

    Args:
        parts: Who runs them; together they have all buckets.
        collected: The sums of their :meth:`~Stages.collect`, complete. This and the others have an entry a bucket.
        contexts: Of this step.
        factors: What parameters and steps are multiplied with.
        decide: Makes whole-model decisions of the collected sums.
        complete: Completes sums over ranks, in place.
        record: Gets what the parts have stepped, where a step is watched.

    Returns:
        For every bucket an iterator over the steps of its blocks, ``(tensors, 1, *box)``, or None if its parameters
        have been stepped; and what was decided.
    """
    for indices, stages in parts:
        stages.prepare_([collected[i] for i in indices], [contexts[i] for i in indices])
    controls = decide(collected)
    described: list[Sums] = [{}] * len(contexts)
    for indices, stages in parts:
        for i, sums in zip(indices, stages.describe_([contexts[i] for i in indices]), strict=True):
            described[i] = sums
    complete(described)
    proposed: list[Iterator[Tensor] | None] = [None] * len(contexts)
    for indices, stages in parts:
        decided, scaled = [controls[i] for i in indices], [factors[i] for i in indices]
        steps_of = stages.step_(decided, [contexts[i] for i in indices], scaled, record, indices)
        for i, steps in zip(indices, steps_of, strict=True):
            proposed[i] = steps
    return proposed, controls
