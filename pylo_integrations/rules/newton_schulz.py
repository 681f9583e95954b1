"""Approximate orthogonalisation of matrices by Newton-Schulz iteration (docs/mathematics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

ITERATIONS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd quintic. Its slope at 0 is steep, so small singular values grow fast; they end near 1, not at 1."""


def orthogonalise(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1, whatever their scale; zero matrices stay zero.

    Args:
        matrices: ``(..., rows, cols)``; leading axes are a batch.

    Returns:
        Like ``matrices``: ``u @ v.mT`` of the singular value decomposition, roughly, where it was ``u @ s @ v.mT``.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalise(matrices.mT).mT  # the Gram matrix of the short side is cheaper
    a, b, c = COEFFICIENTS
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-8)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.view(matrices.shape)
