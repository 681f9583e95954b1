r"""Stochastic rounding: of new parameters and of stored state.

Of the two neighbours of a number, rounding takes each with a probability that makes the mean right, so that updates
smaller than half the distance between them are not lost but taken now and then.

The noise is a function of step, tensor, state and element and of nothing else, no seed either. So it does not depend on
threads or kernels, nor on how a tensor is divided among ranks; ranks that all have a tensor round it alike; and a
resumed run repeats the numbers of one that went on.

From step to step, the noise of a state's element moves on by the golden ratio (a Kronecker sequence): what a step adds
is rounded up about as often in any few steps as it should be in all, while independent noise lets a slow average take a
random walk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFF
_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E379E37
"""The golden ratio's fraction in each half of a word."""


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """Float32 ``values`` rounded to what bfloat16 can hold, unbiased if ``noise`` is uniform; still float32.

    Args:
        values: Those that are not finite stay as they are.
        noise: Int32 of the same shape, from 0 to 2**16 - 1.
    """
    # A bfloat16 is the upper half of a float32. Magnitudes are ordered as integers, so a carry rounds away from zero.
    bits = (values.view(torch.int32) + noise) & ~_LOW
    return torch.where(values.isfinite(), bits.view(torch.float32), values)


def box_noise(
    start: Sequence[int],
    extent: Sequence[int],
    shape: Sequence[int],
    keys: Sequence[tuple[int, int]],
    device: torch.device,
    bit: int = 0,
) -> Tensor:
    """Noise for :func:`round_stochastically`, int32 ``(keys, *extent)``.

    Args:
        start: Where, in the whole tensors, the box begins that is rounded.
        extent: Shape of the box.
        shape: Of the whole tensors.
        keys: Of each, see :func:`noise_keys`.
        device: Where to make it.
        bit: Of the hash, where the noise begins.
    """
    words = torch.tensor(keys, device=device).view(-1, 2, *(1,) * len(extent))
    index = _element_numbers(start, extent, shape, device)
    noise = _hash((index & _WORD) ^ _hash(index >> 32) ^ words[:, 0]) + words[:, 1] & _WORD
    return (noise >> bit & _LOW).to(torch.int32)


def noise_keys(iteration: int, number: int, state: str = "") -> tuple[int, int]:
    """Two words of 32 bits for a step, a tensor and what is rounded of it.

    Args:
        iteration: Steps taken before this one.
        number: Of the tensor among all parameters of the optimizer.
        state: Name of a state; nothing for the parameter itself.
    """
    whose = f"{number} {state}" if state else f"{iteration} {number}"
    digest = hashlib.blake2b(whose.encode(), digest_size=8).digest()
    first, second = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")
    return first, second + iteration * _GOLDEN & _WORD if state else second


def _element_numbers(start: Sequence[int], extent: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Positions of a box's elements in the whole tensor, row-major, int64 ``(1, *extent)``."""
    index = torch.zeros((1,) * (1 + len(extent)), dtype=torch.int64, device=device)
    for axis, (first, count) in enumerate(zip(start, extent, strict=True)):
        along = torch.arange(first, first + count, device=device)
        index = index * shape[axis] + along.view(-1, *(1,) * (len(extent) - 1 - axis))
    return index


def _hash(x: Tensor) -> Tensor:
    """A mixing of 32 bits held in int64, whose products do not overflow; the multiplier is Thomas Mueller's."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & _WORD
    return (x >> 16) ^ x
