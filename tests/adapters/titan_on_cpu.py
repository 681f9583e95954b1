"""``torchtitan.train`` on ranks of gloo: what torchtitan lacks on CPUs, and nothing of its optimizers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch._utils
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.flex_attention import AuxOutput, create_mask

torch._utils._get_available_device_type = lambda: "cpu"
torch.cpu.get_device_name = lambda *args: "CPU"
torch.cpu.get_device_properties = lambda *args: SimpleNamespace(total_memory=2**33)
torch.cpu.get_device_capability = lambda *args: (0, 0)
torch.cpu.memory_stats = lambda *args: {}
torch.cpu.reset_peak_memory_stats = torch.cpu.empty_cache = lambda *args: None

from torchtitan.distributed import utils  # noqa: E402
from torchtitan.models.common.attention import FlexAttention  # noqa: E402
from torchtitan.train import main  # noqa: E402


def attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: Any, scale: Any, enable_gqa: bool, **_: Any) -> Any:
    """FlexAttention has no backward pass there: plain attention under the same mask."""
    mask = create_mask(block_mask.mask_mod, q.shape[0], 1, q.shape[2], k.shape[2], device="cpu")
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa), AuxOutput(None)


def sum_and_divide(self: FSDPModule, factor: float, divide: Any = FSDPModule.set_gradient_divide_factor) -> None:
    """Gloo's sums know no factor."""
    self.set_force_sum_reduction_for_comms(True)
    divide(self, factor)


FlexAttention._compiled_flex_attn = attend
FSDPModule.set_gradient_divide_factor = sum_and_divide
utils.set_pg_timeouts = lambda *args, **kwargs: None  # by a barrier that names a device
main()
