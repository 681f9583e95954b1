"""How much do torch's functions launch in a step on CUDA, and does anything wait for the device? Counted without one.

Tensors are fake ones on a device "cuda": shapes and types are computed, and no numbers. An operation counts as a launch
unless it makes a view; concatenations, and lists of tensors, count as several where they are long.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pylo_integrations import bench, create_optimizer, get_optimizer_info
from pylo_integrations.bench.shapes import ParamShape
from pylo_integrations.rules import newton_schulz
from pylo_integrations.step import room

pytestmark = [
    pytest.mark.slow,  # seconds for each step of fake tensors, and only the reference's stages move the counts
    pytest.mark.filterwarnings("ignore:step 2 is beyond the horizon"),  # fake numbers are 1
]

GIB = 2**30
NO_LAUNCH = {
    "device",
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
}


class Launches(TorchDispatchMode):
    """Counts what operations on fake CUDA tensors would launch, and what would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "_local_scalar_dense":
            self.waits[name] += tensors[0].device.type == "cuda"
            return 1.0
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        devices = {tensor.device.type for tensor in tensors + made}
        if "cuda" not in devices or func.is_view or name in NO_LAUNCH:
            return out
        if name in ("_to_copy", "copy_") and len(devices) > 1:
            self.waits[name] += 1
        self.by_name[name] += self._launches(name, args)
        return out

    @staticmethod
    def _launches(name: str, args: Any) -> int:
        if name in ("cat", "stack"):
            return math.ceil(len(args[0]) / 128)
        if not name.startswith("_foreach"):
            return 1
        is_dense = all(tensor.is_contiguous() for tensor in tree_leaves(args[:2]) if isinstance(tensor, torch.Tensor))
        # Chunks of 65536 elements, of which a launch takes 320.
        chunks = sum(math.ceil(tensor.numel() / 65536) for tensor in args[0])
        return math.ceil(chunks / 320) + len(args[0]) // 30 if is_dense else len(args[0])


def count_step(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shapes: Sequence[ParamShape],
    free: int,
    steps_before: int,
    **options: Any,
) -> Launches:
    """Launches of a step on a device with so much free memory, after some others."""
    monkeypatch.setattr(room, "free_memory", lambda device: free)
    monkeypatch.setattr(newton_schulz, "_multiplies_bfloat16", lambda device: True)
    told: list[int] = []  # whole tensors that came to the host
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: told.append(1) or [1.0] * self.numel(), raising=False)
    spec = get_optimizer_info(name)
    groups: dict[Any, dict[str, Any]] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for shape in shapes:
            param = nn.Parameter(torch.empty(shape.shape, device="cuda"))
            param.grad = torch.empty_like(param)
            key = shape.axes, shape.rule_of(spec)
            groups.setdefault(key, {"params": [], "axes": key[0], "rule": key[1]})["params"].append(param)
        with unset_fake_temporarily():
            optimizer = create_optimizer(list(groups.values()), name, backend="reference", **options)
        for _ in range(steps_before):
            optimizer.step()
        told.clear()
        with Launches() as counted:
            optimizer.step()
    counted.waits["tolist"] = len(told)
    return counted


def test_a_step_of_celo2_launches_3500_kernels_at_most_and_reads_one_verdict(monkeypatch):
    counted = count_step(monkeypatch, "celo2", bench.SHAPES["vit_b16"](), free=40 * GIB, steps_before=1)
    assert 100 < counted.by_name.total() <= 3500, counted.by_name
    assert counted.waits == Counter(tolist=1)


def test_blocks_are_smaller_without_memory_to_spare_and_where_that_is_asked_for(monkeypatch):
    # Of first steps, which are of the same blocks as all others; with room, a block has all matrices of a kind.
    layers = 3 * bench.SHAPES["vit_block"]()
    roomy, narrow = (count_step(monkeypatch, "celo2", layers, free * GIB, 0).by_name for free in (40, 1))
    assert narrow.total() > 3 * roomy.total()
    assert count_step(monkeypatch, "celo2", layers, 40 * GIB, 0, chunk_bytes=256 * 2**20).by_name == narrow


@pytest.mark.parametrize(
    ("free", "chunk"), [(0, 0.25), (1, 0.25), (3, 0.5), (8, 2), (15.9, 2), (16, 4), (140, 4)], ids=str
)
def test_a_quarter_of_free_memory_is_taken_within_bounds(monkeypatch, free, chunk):
    monkeypatch.setattr(room, "free_memory", lambda device: int(free * GIB))
    assert room._chunk_on_cuda(torch.device("cuda")) == chunk * GIB
