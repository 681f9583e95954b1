"""What an optimizer remembers about the run as a whole: iteration, horizon, losses, rule memory."""

from __future__ import annotations

import json
from numbers import Real

import safetensors
import safetensors.torch
import torch
from torch import Tensor

COUNTS = ("iteration", "num_steps", "nonfinite_steps")
"""The numbers in :class:`Progress`."""


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

    Attributes:
        clock: :attr:`iteration` as an int64 tensor, which compiled steps count in.
        num_steps: The horizon, or None.
        nonfinite_steps: Steps whose gradients or loss were not finite.
        memory: Whole-model tensors of the rule, by name.
        window: Losses observed for the next step.
    """

    def __init__(
        self,
        iteration: int = 0,
        num_steps: int | None = None,
        nonfinite_steps: int = 0,
        memory: dict[str, Tensor] | None = None,
    ) -> None:
        self.clock = torch.tensor(iteration, device="cpu")
        self.num_steps = num_steps
        self.nonfinite_steps = nonfinite_steps
        self.memory = {} if memory is None else memory
        self.window = LossWindow()

    @property
    def iteration(self) -> int:
        """Steps taken."""
        return int(self.clock)

    @iteration.setter
    def iteration(self, iteration: int) -> None:
        self.clock.fill_(iteration)

    def to_bytes(self, **origin: str | None) -> bytes:
        """Serialise as safetensors, with what else tells where it came from.

        Bytes pass unchanged through every checkpoint path of torch (FSDP would shard a tensor found in a parameter
        group) and load with ``weights_only=True``.
        """
        record = {**{name: getattr(self, name) for name in COUNTS}, **origin}
        memory = {name: tensor.detach().cpu().contiguous() for name, tensor in self.memory.items()}
        return safetensors.torch.save(memory, {"progress": json.dumps(record)})

    @classmethod
    def from_bytes(cls, blob: bytes) -> tuple[Progress, dict[str, str | None]]:
        """The contents of :meth:`to_bytes`, and the origin.

        Raises:
            ValueError: They are damaged.
        """
        try:
            header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
            record = json.loads(header["__metadata__"]["progress"])
            counts = {name: record.pop(name) for name in COUNTS}
            return cls(**counts, memory=safetensors.torch.load(blob)), record
        except (KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"its progress cannot be read ({type(error).__name__}: {error})") from error

    def assign(self, other: Progress) -> None:
        """Replace the contents by those of another, in place; observed losses are forgotten."""
        for name in (*COUNTS, "memory"):
            setattr(self, name, getattr(other, name))
        self.window.take()


def as_scalar_loss(loss: Tensor | float) -> Tensor:
    """A loss as a detached 0-d float32 tensor on its own device.

    Raises:
        TypeError: ``loss`` is neither a tensor nor a number.
        ValueError: ``loss`` has more than one element.
    """
    if isinstance(loss, Tensor):
        if loss.is_complex():
            raise TypeError("loss is complex; pass the real scalar that was given to backward()")
        if loss.numel() != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}; pass the scalar that was given to backward(), e.g. loss.mean()"
            )
        return loss.detach().reshape(()).float()
    if isinstance(loss, Real):  # Python's numbers and numpy's
        return torch.tensor(float(loss), dtype=torch.float32, device="cpu")
    raise TypeError(f"loss must be a scalar tensor or a number, not {type(loss).__name__}")
