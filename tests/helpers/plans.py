"""What the last step of an optimizer ran on."""

from __future__ import annotations

from pylo_integrations import LearnedOptimizer
from pylo_integrations.ops.native import NativeStages
from pylo_integrations.sharding.blocks import Bucket


def last_buckets(optimizer: LearnedOptimizer) -> list[Bucket]:
    return optimizer._engine._plan.buckets


def native_parts(optimizer: LearnedOptimizer) -> list[NativeStages]:
    """The stages that kernels ran."""
    return [stages for _, stages in optimizer._engine._plan.parts if isinstance(stages, NativeStages)]


def native_buckets(optimizer: LearnedOptimizer) -> list[Bucket]:
    """What they stepped."""
    return [native.bucket for stages in native_parts(optimizer) for native in stages._natives]


def is_native(optimizer: LearnedOptimizer) -> bool:
    """Whether all of the last step was the kernels'."""
    return len(native_buckets(optimizer)) == len(last_buckets(optimizer)) > 0
