"""What moves theta: Adam with a falling rate, and the average of where it has been."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

BETAS = (0.9, 0.99)
EPS = 1e-8


@dataclass
class Outer:
    """Adam (Kingma & Ba, ICLR 2015) on a vector, and an exponential average of the vector.

    Attributes:
        vector: Theta's vector, ``(size,)``.
        average: Average of the vectors.
        first: Adam's average of gradients.
        second: Adam's average of squared gradients.
        taken: Steps.
    """

    vector: Tensor
    average: Tensor
    first: Tensor
    second: Tensor
    taken: int = 0

    @classmethod
    def at(cls, vector: Tensor) -> Outer:
        """Before any step."""
        return cls(vector.clone(), vector.clone(), torch.zeros_like(vector), torch.zeros_like(vector))

    def step_(self, gradient: Tensor, lr: float, decay: float) -> None:
        """Move against the gradient; ``decay`` is the average's."""
        self.taken += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * gradient
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * gradient.square()
        mean = self.first / (1 - BETAS[0] ** self.taken)
        root = (self.second / (1 - BETAS[1] ** self.taken)).sqrt()
        self.vector = self.vector - lr * mean / (root + EPS)
        # Early averages would be dominated by the start.
        decay = min(decay, self.taken / (self.taken + 9))
        self.average = decay * self.average + (1 - decay) * self.vector

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint; :attr:`taken` is not among them."""
        return {"vector": self.vector, "average": self.average, "first": self.first, "second": self.second}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], taken: int) -> Outer:
        """From what :meth:`tensors` returned."""
        return cls(**tensors, taken=taken)
