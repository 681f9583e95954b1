"""Tensors that are elsewhere: a device of torch's that nothing runs on, behind which everything is on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

DEVICE = "lazy:0"


class Far(Tensor):
    """A tensor on :data:`DEVICE`, whose numbers are in a tensor on the CPU.

    Attributes:
        near: That tensor.
        traffic: Elements that were copied from there, and to there, by all of them.
    """

    near: Tensor
    traffic = {"come": 0, "gone": 0}

    @staticmethod
    def __new__(cls, near: Tensor) -> Far:
        far = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=DEVICE, requires_grad=False
        )
        far.near = near
        return far

    def __repr__(self) -> str:
        return f"Far({self.near!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it to what is behind; what comes of it is far, unless it was asked to be near."""
        kwargs = dict(kwargs or {})
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "lazy":
            kwargs["device"] = "cpu"
        made = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        if func is torch.ops.aten.copy_.default:
            to, source = args[:2]
            if isinstance(to, Far) != isinstance(source, Far):
                cls.traffic["gone" if isinstance(to, Far) else "come"] += source.numel()
            return to
        if wanted is not None and torch.device(wanted).type != "lazy":
            return made
        return tree_map(lambda value: cls(value) if isinstance(value, Tensor) else value, made)


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def far_parameters(near: list[Tensor]) -> list[nn.Parameter]:
    """Parameters elsewhere with these values and gradients, copied."""
    made = []
    for tensor in near:
        param = nn.Parameter(Far(tensor.detach().clone()), requires_grad=tensor.requires_grad)
        if tensor.grad is not None:
            param.grad = Far(tensor.grad.clone())
        made.append(param)
    return made
