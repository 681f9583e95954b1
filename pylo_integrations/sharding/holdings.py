"""What this process holds of an optimizer's parameters, whoever divided them among ranks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from pylo_integrations.formats import BLOCK, scale_shape
from pylo_integrations.sharding.pieces import (
    Held,
    ShardingError,
    Slice,
    is_sharded,
    local_part,
    locate,
    parameter_names,
    placed_like,
    read_flat_slices,
)
from pylo_integrations.sharding.rounds import Ranks
from pylo_integrations.sharding.shares import share_of, shared_rows, zero_state

AT_HOME = ("cpu", "meta")
"""Types of devices whose parameters are stepped where they are, whatever is asked for."""


@dataclass
class Holdings:
    """Knows of every parameter what is here.

    Attributes:
        shares_steps: Whether ranks that all have a whole parameter share the work of its step.
        ranks: The processes that train together.
        flat_slices: What is known about the slices of FSDP1, ZeRO and Megatron; may be filled later.
        names: Of parameters in the model that was bound; may be filled later.
        offloads: Whether the state of parameters on a device lives on the host.
    """

    shares_steps: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    flat_slices: dict[Tensor, Slice] = field(default_factory=dict)
    names: dict[Tensor, str] = field(default_factory=dict)
    offloads: bool = False

    def bind(self, model: nn.Module, ours: Collection[Tensor], process_group: ProcessGroup | None) -> bool:
        """Learn what parameters do not tell of themselves, anew.

        Args:
            model: As wrapped for training.
            ours: The parameters of the optimizer.
            process_group: The ranks that train together; None for those of the last call, else all.

        Returns:
            Whether some of ours are slices of FSDP1, ZeRO or Megatron.

        Raises:
            ShardingError: FSDP1 melted parameters together, or flattened one in an order other than row-major.
            ValueError: This process is not in ``process_group``.
        """
        slices = read_flat_slices(model)
        self.ranks.bind(process_group)
        self.flat_slices.clear()
        self.flat_slices.update(slices)
        self.names.clear()
        self.names.update((param, name) for param, name in parameter_names(model).items() if param in ours)
        return not slices.keys().isdisjoint(ours)

    def shares(self, param: Tensor) -> bool:
        """Whether ranks share the work of a parameter's step: not of one that is sharded anyway, nor of a scalar."""
        return self.shares_steps and param.dim() > 0 and not is_sharded(param) and self.ranks.size > 1

    def divides(self, param: Tensor) -> bool:
        """Whether ranks may hold different parts of a parameter or its state."""
        return is_sharded(param) or self.shares(param)

    def home(self, param: Tensor) -> torch.device:
        """Where the state of a parameter lives, and its step is computed."""
        return torch.device("cpu") if self.is_away(param) else param.device

    def is_away(self, param: Tensor) -> bool:
        """Whether a parameter is on a device, and its state on the host."""
        return self.offloads and param.device.type not in AT_HOME

    def locate(self, param: Tensor) -> tuple[tuple[int, ...], Held]:
        """Shape of the whole of a parameter, and what this process holds of it.

        Raises:
            ShardingError: The whole tensor cannot be seen from here.
        """
        shape, held = locate(param, self.flat_slices, self.ranks.size)
        return shape, share_of(shape, self.ranks) if self.shares(param) else held

    def name(self, param: Tensor) -> str | None:
        """The name of a parameter in the model that was bound, if one was."""
        flat = self.flat_slices.get(param)
        return flat.name if flat else self.names.get(param)

    def describe(self, param: Tensor) -> str:
        """Shape of the whole of a parameter and how ranks divide it; the same on all of them."""
        if param in self.flat_slices:
            return str(self.flat_slices[param])
        if hasattr(param, "placements"):
            mesh: Any = getattr(param, "device_mesh")  # noqa: B009
            return f"{tuple(param.shape)} placed {param.placements} on a mesh {tuple(mesh.shape)}"
        return f"{tuple(param.shape)}{' shared' if self.shares(param) else ''}"

    def zero_state(self, param: Tensor, held: Held, dtype: torch.dtype) -> Tensor:
        """Zeros for a state that is shaped, and sharded, like what is ``held`` of a parameter."""
        if held.share is not None:
            return zero_state(param, held, dtype, self.ranks)
        device = self.home(param) if self.is_away(param) else None
        return torch.zeros_like(param, dtype=dtype, device=device, requires_grad=False)

    def zero_scales(self, param: Tensor, held: Held) -> Tensor:
        """Scales, one for each block, of a state that is sharded like what is ``held`` of a parameter.

        Rows are divided among ranks as those of the parameter are; see :mod:`pylo_integrations.formats`.
        """
        local = torch.zeros(scale_shape(held.of(local_part(param)).shape), device=self.home(param))
        if held.share is not None:
            return shared_rows(local, scale_shape(param.shape), self.ranks)
        if not hasattr(param, "placements"):
            return local
        return placed_like(local, param, scale_shape(param.shape))

    def check_home(self, param: Tensor) -> None:
        """Raise ShardingError if a parameter cannot be stepped on the host, where its state is to live."""
        if not self.is_away(param):
            return
        fault = None
        if self.divides(param):
            way = "FSDP2's fully_shard(..., offload_policy=CPUOffloadPolicy()) or FSDP1's CPUOffload(True)"
            if self.shares(param):
                fault = "divided by shard_step=True: leave out one of the two"
            else:
                fault = f"sharded: leave offload_state out, and have parameters on the CPU, by {way}"
        elif self.ranks.size > 1 and not self.ranks.meets_on("cpu"):
            fault = (
                "trained by ranks whose process group exchanges nothing on the CPU: create it with "
                'init_process_group("cpu:gloo,cuda:nccl")'
            )
        if fault:
            raise ShardingError(
                f"offload_state=True, and a parameter of shape {tuple(param.shape)} on {param.device} is {fault}"
            )

    def check_blocks(self, param: Tensor) -> None:
        """Raise ShardingError unless ranks divide a parameter so that no block of elements with one scale is divided.

        The answer is the same on all ranks.
        """
        shape, fault = tuple(param.shape), None
        if param in self.flat_slices:
            fault = "is a slice made by FSDP1, ZeRO or Megatron, in which rows are cut: use fully_shard() (FSDP2)"
        elif hasattr(param, "placements"):
            sizes = dict[int, list[int]]()
            mesh: Any = getattr(param, "device_mesh")  # noqa: B009
            for size, placement in zip(mesh.shape, param.placements, strict=True):
                if placement.is_shard() and placement.dim % len(shape) and size > 1:
                    sizes.setdefault(placement.dim % len(shape), []).append(size)
            for axis, ranks in sizes.items():
                if len(shape) != 2 or len(ranks) > 1 or -(-shape[axis] // ranks[0]) % BLOCK:
                    fault = f"is placed {param.placements}, which cuts rows within blocks: shard axis 0"
        if fault:
            raise ShardingError(
                f"state_dtype='int8' keeps blocks of {BLOCK} elements of a row, and a parameter of shape {shape} "
                f"{fault}, or give its group state_dtype='bfloat16'"
            )
