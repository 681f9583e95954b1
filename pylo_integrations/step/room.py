"""How large the blocks of a step may be: what their temporaries take, and what is fast on a device."""

from __future__ import annotations

import torch

from pylo_integrations.rules.base import Rule
from pylo_integrations.sharding.blocks import Bucket

CHUNK = 256 * 2**20
"""Bytes of a step's temporaries, where nobody says another bound."""

LARGEST_CHUNK = 4 * 2**30
"""The same on a CUDA device with memory to spare: there every block costs as many launches, however large it is."""

CACHE_NUMEL = 32_768
"""Elements per thread of a block on a CPU: measured fastest of 8k to 64k with 2 MiB of L2 cache a core."""


def block_numel(rule: Rule, bucket: Bucket, chunk_bytes: int | None) -> int:
    """Elements of a block of a bucket at most.

    Args:
        rule: That steps it.
        bucket: What it is cut from.
        chunk_bytes: Bound on the temporaries, in bytes; None for one that suits the device.
    """
    if chunk_bytes is None:
        chunk_bytes = _chunk_on_cuda(bucket.device) if bucket.device.type == "cuda" else CHUNK
    numel = max(1, chunk_bytes // (rule.workspace * bucket.dtype.itemsize))
    return min(numel, CACHE_NUMEL * torch.get_num_threads()) if bucket.device.type == "cpu" else numel


def _chunk_on_cuda(device: torch.device) -> int:
    """A quarter of the memory that is free; a power of two, so that runs mostly have blocks of the same size."""
    quarter = free_memory(device) // 4
    return max(CHUNK, min(LARGEST_CHUNK, 1 << max(quarter, 1).bit_length() - 1))


def free_memory(device: torch.device) -> int:
    """Bytes that a CUDA device has, and that torch has taken from it and not given to any tensor."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
