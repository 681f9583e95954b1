"""What an optimizer remembers about the run as a whole: iteration, horizon, losses, rule memory."""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor

from pylo_integrations import sealed
from pylo_integrations.fitting import missing_memory

COUNTS = ("iteration", "num_steps", "nonfinite_steps")
"""The numbers in :class:`Progress`."""

ORIGIN = ("theta", "rule")
"""What a record of progress may say besides, of who made it."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types in which state is taken."""

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
"""Types in which counts are taken, besides."""

LARGEST_COUNT = 2**53
"""Of steps: up to here float64, in which fractions of a run are computed, has every integer."""


class LossWindow:
    """Sum of the losses observed since the last step, exactly as they went into ``backward``.

    Framework wrappers copy or proxy an optimizer's attributes, so an adapter may be holding a wrapper when it reports
    a loss. The window is therefore one object, only ever changed in place.

    Attributes:
        is_hidden: Whether the gradients of these losses are kept where ``param.grad`` does not show them, as FSDP does
            while it accumulates without communication.
    """

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self.is_hidden = False

    def add(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch."""
        self._total = loss if self._total is None else self._total + loss.to(self._total.device)

    def take(self) -> Tensor | None:
        """The sum, or None if nothing was observed; empties the window."""
        total, self._total, self.is_hidden = self._total, None, False
        return total


class Progress:
    """Run-wide state of one optimizer; everything but the window is kept in checkpoints.

    The numbers are kept in int64 tensors on the CPU, so that what loads tensors in place loads them.

    Attributes:
        counts: The numbers, by name; 0 stands for no horizon.
        memory: Whole-model tensors of the rule, by name.
        window: Losses observed for the next step.
        has_begun: Whether the states of parameters that there are were made, or loaded, together with it.
    """

    def __init__(
        self,
        iteration: int = 0,
        num_steps: int | None = None,
        nonfinite_steps: int = 0,
        memory: dict[str, Tensor] | None = None,
    ) -> None:
        self.counts = {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in COUNTS}
        self._version: int | None
        self._expected: int | None
        self.iteration, self.num_steps, self.nonfinite_steps = iteration, num_steps, nonfinite_steps
        self.memory = {} if memory is None else memory
        self.window = LossWindow()
        self.has_begun = False

    @property
    def clock(self) -> Tensor:
        """:attr:`iteration` as a 0-d tensor, which compiled steps count in."""
        return self.counts["iteration"]

    @property
    def iteration(self) -> int:
        """Steps taken."""
        return int(self.counts["iteration"])

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self.clock.fill_(iteration)
        self.acknowledge()

    @property
    def is_overwritten(self) -> bool:
        """Whether others have written :attr:`clock`, which is what they do who load into our tensors in place."""
        return _version_of(self.clock) != self._version and self.iteration != self._expected

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "is_overwritten": self.is_overwritten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        is_overwritten = state.pop("is_overwritten")
        self.__dict__.update(state)
        self.acknowledge()  # versions of copied tensors are others
        if is_overwritten:
            self._version = None

    def acknowledge(self) -> None:
        """Take what is in :attr:`clock` for our own."""
        self._version, self._expected = _version_of(self.clock), None

    def expect(self, iteration: int) -> None:
        """Take it for our own once this is in it, too: what a compiled step writes gets there when the step is over."""
        self._expected = iteration

    @property
    def num_steps(self) -> int | None:
        """The horizon, or None."""
        return int(self.counts["num_steps"]) or None

    @num_steps.setter
    def num_steps(self, num_steps: int | None) -> None:
        self.counts["num_steps"].fill_(num_steps or 0)

    @property
    def nonfinite_steps(self) -> int:
        """Steps whose gradients or loss were not finite."""
        return int(self.counts["nonfinite_steps"])

    @nonfinite_steps.setter
    def nonfinite_steps(self, nonfinite_steps: int) -> None:
        self.counts["nonfinite_steps"].fill_(nonfinite_steps)

    def record(self) -> dict[str, int | None]:
        """The numbers by name; JSON-serialisable."""
        return {name: getattr(self, name) for name in COUNTS}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], memory: Mapping[str, Tensor]) -> Progress:
        """From the numbers of :meth:`record` and copies of the memory.

        Raises:
            ValueError: Something is missing, of another type or out of range; the message names it.
        """
        counts = {name: record.get(name, "missing") for name in COUNTS}
        for name, value in counts.items():
            if name == "num_steps" and value is None:
                continue
            least = 1 if name == "num_steps" else 0
            if type(value) is not int or not least <= value <= LARGEST_COUNT:
                raise ValueError(f"{name} is {value!r:.50}, which is not an integer of at least {least}")
        if not isinstance(memory, Mapping):
            raise ValueError(f"memory is {type(memory).__name__}, not tensors by name")
        for name, value in memory.items():
            if flaw := flaw_of(value):
                raise ValueError(f"memory {name} {flaw}")
        return cls(**counts, memory={name: value.detach().clone() for name, value in memory.items()})

    def to_bytes(self, **origin: str | None) -> bytes:
        """Serialise as safetensors, with what else tells where it came from.

        Bytes pass unchanged through every checkpoint path of torch (FSDP would shard a tensor found in a parameter
        group) and load with ``weights_only=True``.
        """
        return sealed.to_bytes("progress", {**self.record(), **origin}, self.memory)

    @classmethod
    def from_bytes(cls, blob: bytes) -> tuple[Progress, dict[str, str | None]]:
        """The contents of :meth:`to_bytes`, and the origin.

        Raises:
            ValueError: They are damaged.
        """
        try:
            record, memory = sealed.from_bytes("progress", blob)
            progress = cls.from_record(record, memory)
            origin = {name: value for name, value in record.items() if name not in COUNTS}
            if strange := [name for name in origin if name not in ORIGIN]:
                raise ValueError(f"it has entries {strange!r:.100}")
            if wrong := [name for name, value in origin.items() if not isinstance(value, str | None)]:
                raise ValueError(f"{wrong} are of another type")
        except (TypeError, ValueError) as error:
            raise ValueError(f"its progress cannot be read ({error})") from error
        return progress, origin

    def assign(self, other: Progress) -> None:
        """Replace the contents by those of another, in place; observed losses are forgotten."""
        for name in (*COUNTS, "memory"):
            setattr(self, name, getattr(other, name))
        self.window.take()


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def flaw_of(value: object) -> str | None:
    """What keeps a value from being a tensor of finite floating-point numbers, as the end of a sentence, or None."""
    if not isinstance(value, Tensor):
        return f"is {type(value).__name__}, not a tensor"
    if fault := fault_of(value, FLOATS):
        return fault
    return None if value.isfinite().all() else "holds values that are not finite"


def fault_of(value: Tensor, dtypes: Collection[torch.dtype]) -> str | None:
    """What keeps a plain tensor from being a dense one of some types that can be read, as the end of a sentence."""
    if value.layout != torch.strided or value.is_nested or value.dtype not in dtypes:
        kind = "nested" if value.is_nested else value.layout
        numbers = "floating-point numbers" if dtypes is FLOATS else "numbers"
        return f"is a {kind} tensor of {value.dtype}, not a dense one of {numbers}"
    if value.is_meta:
        return "is on the meta device and has no values"
    return missing_memory(value)


def check_horizon(num_steps: Any) -> int:
    """The horizon that a user has set.

    Raises:
        ValueError: Not a positive integer of at most 2**53.
    """
    try:
        count = operator.index(num_steps)
    except TypeError:
        count = 0
    if isinstance(num_steps, bool) or not 1 <= count <= LARGEST_COUNT:
        raise ValueError(
            f"num_steps={num_steps!r} must be a positive integer of at most 2**53: the optimizer steps of the whole run"
        )
    return count


def as_scalar_loss(loss: Tensor | float) -> Tensor:
    """A loss as a detached 0-d float32 tensor on its own device.

    Raises:
        TypeError: ``loss`` is neither a tensor nor a number.
        ValueError: ``loss`` has more than one element, or no memory any more.
    """
    if isinstance(loss, Tensor):
        if loss.is_complex():
            raise TypeError("loss is complex; pass the real scalar that was given to backward()")
        if hasattr(loss, "full_tensor"):  # a DTensor, as of a parallel loss
            loss = cast(Tensor, loss.full_tensor())
        if loss.layout != torch.strided or loss.is_nested or loss.is_meta:
            kind = "meta" if loss.is_meta else "nested" if loss.is_nested else str(loss.layout)
            raise TypeError(f"loss is a {kind} tensor; pass the scalar that was given to backward()")
        # A compiler has no memory to look at yet.
        if not torch.compiler.is_compiling() and (fault := missing_memory(loss)):
            raise ValueError(f"loss {fault}; pass the scalar that was given to backward()")
        if loss.numel() != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}; pass the scalar that was given to backward(), e.g. loss.mean()"
            )
        return loss.detach().reshape(()).float()
    if isinstance(loss, Real):  # Python's numbers and numpy's
        try:
            return torch.tensor(float(loss), dtype=torch.float32, device="cpu")
        except OverflowError:
            raise ValueError("loss is larger than any float; pass the scalar that was given to backward()") from None
    raise TypeError(f"loss must be a scalar tensor or a number, not {type(loss).__name__}")
