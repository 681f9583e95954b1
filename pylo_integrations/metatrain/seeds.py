"""Randomness by name: every draw has a generator of its own, so nothing depends on order, and resuming needs none."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*key: object) -> int:
    """A number in [0, 2**63) that depends on ``key`` alone, not on the process or machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_of(*key: object) -> torch.Generator:
    """A CPU generator that depends on ``key`` alone."""
    return torch.Generator().manual_seed(seed_of(*key))
