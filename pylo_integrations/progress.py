"""What an optimizer remembers about the run as a whole: iteration, horizon, losses, rule memory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import safetensors
import safetensors.torch
import torch
from torch import Tensor


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


@dataclass
class Progress:
    """Run-wide state of one optimizer; everything but the window is kept in checkpoints.

    Attributes:
        iteration: Steps taken.
        num_steps: The horizon, or None.
        nonfinite_steps: Steps whose gradients or loss were not finite.
        memory: Whole-model tensors of the rule, by name.
        window: Losses observed for the next step.
    """

    iteration: int = 0
    num_steps: int | None = None
    nonfinite_steps: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    window: LossWindow = field(default_factory=LossWindow)

    def to_bytes(self, theta: str | None = None) -> bytes:
        """Serialise as safetensors; ``theta`` identifies the weights in use.

        Bytes pass unchanged through every checkpoint path of torch (FSDP would shard a tensor found in a parameter
        group) and load with ``weights_only=True``.
        """
        record = {
            "iteration": self.iteration,
            "num_steps": self.num_steps,
            "nonfinite_steps": self.nonfinite_steps,
            "theta": theta,
        }
        memory = {name: tensor.detach().cpu().contiguous() for name, tensor in self.memory.items()}
        return safetensors.torch.save(memory, {"progress": json.dumps(record)})

    def read_bytes(self, blob: bytes) -> str | None:
        """Replace the contents by those of :meth:`to_bytes`, in place; returns its ``theta``."""
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        record = json.loads(header["__metadata__"]["progress"])
        self.iteration = record["iteration"]
        self.num_steps = record["num_steps"]
        self.nonfinite_steps = record["nonfinite_steps"]
        self.memory = safetensors.torch.load(blob)
        self.window.take()
        theta: str | None = record["theta"]
        return theta


def as_scalar_loss(loss: Tensor | float) -> Tensor:
    """A loss as a detached 0-d float32 tensor on its own device.

    Raises:
        TypeError: ``loss`` is neither a tensor nor a number.
        ValueError: ``loss`` has more than one element.
    """
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}; pass the scalar that was given to backward(), e.g. loss.mean()"
            )
        return loss.detach().reshape(()).float()
    if isinstance(loss, (int, float)):
        return torch.tensor(float(loss), dtype=torch.float32, device="cpu")
    raise TypeError(f"loss must be a scalar tensor or a number, not {type(loss).__name__}")
