"""State on the host, and steps there: what ``offload_state=True`` does for parameters on a device.

Every such parameter has a *stand-in* on the CPU. Before a step parameters and gradients are copied into the stand-ins,
the engine steps these as it steps any parameters on a CPU, by its kernels, and what became of them is copied back. So a
step has the bits of one on the CPU, a device holds no state at all, and groups, formats, checks and checkpoints know of
no device. Parameters come along at every step, as other code may have changed them.

Stand-ins of parameters on CUDA are in pinned memory. State is not, as it does not travel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from pylo_integrations.fitting import check_copies, check_gradients
from pylo_integrations.ledger import Groups, Ledger, States


class Offload:
    """Stand-ins for the parameters of an optimizer.

    Args:
        ledger: Knows the parameters, and where their state lives.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._holdings = ledger.holdings
        self._names = ledger.names
        self._twins: dict[Tensor, Tensor] = {}
        self._buffers: dict[Tensor, Tensor] = {}  # for gradients
        self._groups: list[dict[str, Any]] = []

    def bring(self, groups: Groups) -> Groups:
        """Groups with stand-ins, which have the values and gradients of now; those given, if nothing is offloaded.

        Raises:
            TypeError: A gradient is sparse, or not of real floating point.
            StateError: A parameter or its gradient cannot be copied.
            ShardingError: A parameter cannot be stepped on the host.
        """
        if not self._holdings.offloads:
            return groups
        away = list(dict.fromkeys(p for group in groups for p in group["params"] if self._is_away(p)))
        self._twins = {param: self._twin(param) for param in away}
        self._buffers = {param: buffer for param, buffer in self._buffers.items() if param in self._twins}
        if not away:
            return groups
        check_gradients(groups)
        check_copies(away, groups)
        for param, twin in self._twins.items():
            twin.grad = self._gradient(param)
            if twin.grad is not None:
                twin.copy_(param, non_blocking=param.is_cuda)
        for device in {param.device for param in away if param.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        return self.stand_ins(groups)

    def states(self, state: States) -> States:
        """States by stand-in. Those that others have moved to a device come back, in ``state`` too."""
        if not self._twins:
            return state
        for param in self._twins.keys() & state.keys():
            own = state[param]
            moved = {name: value for name, value in own.items() if name in self._names and _is_astray(value)}
            own.update({name: value.to("cpu") for name, value in moved.items()})
        return {self._twins.get(param, param): own for param, own in state.items()}

    def loss(self, loss: Tensor | None) -> Tensor | None:
        """A loss where the step is."""
        return loss.to("cpu") if loss is not None and self._twins else loss

    def give_back(self) -> None:
        """Copy what became of the stand-ins into the parameters."""
        for param, twin in self._twins.items():
            if twin.grad is not None:
                param.copy_(twin, non_blocking=param.is_cuda)

    def _is_away(self, param: Tensor) -> bool:
        if not self._holdings.is_away(param) or is_lazy(param):
            return False
        self._holdings.check_home(param)
        return True

    def _twin(self, param: Tensor) -> Tensor:
        twin = self._twins.get(param)
        if twin is None or not _lies_like(twin, param):
            twin = _host_copy(param)
        return twin.requires_grad_(param.requires_grad)

    def _gradient(self, param: Tensor) -> Tensor | None:
        grad = param.grad
        if grad is None:
            return None
        buffer = self._buffers.get(param)
        if buffer is None or not _lies_like(buffer, grad):
            buffer = self._buffers[param] = _host_copy(grad)
        return buffer.copy_(grad, non_blocking=grad.is_cuda)

    def stand_ins(self, groups: Groups) -> Groups:
        """Groups with the stand-ins of the last step in the place of their parameters.

        They are the same dictionaries at every step: a plan is of those that it was made for.
        """
        if not self._twins:
            return groups
        del self._groups[len(groups) :]
        self._groups += [{} for _ in range(len(groups) - len(self._groups))]
        for mine, group in zip(self._groups, groups, strict=True):
            mine.clear()
            mine.update({name: value.to("cpu") if _is_astray(value) else value for name, value in group.items()})
            mine["params"] = [self._twins.get(param, param) for param in group["params"]]
        return self._groups


def _is_astray(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type not in (
        "cpu",
        "meta",
    )  # which has no numbers, and is refused


def _lies_like(copy: Tensor, tensor: Tensor) -> bool:
    """Whether a copy is what :func:`_host_copy` would make."""
    is_like = copy.dtype == tensor.dtype and copy.shape == tensor.shape
    return is_like and copy.stride() == torch.empty_like(tensor, device="meta").stride()


def _host_copy(tensor: Tensor) -> Tensor:
    """Memory on the CPU, in the same order where that has no gaps."""
    with torch.inference_mode(False):  # later steps may be outside
        copy = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.is_cuda)
    if hasattr(copy, "grad_dtype"):  # gradients may be of another type than their parameter
        copy.grad_dtype = None
    return copy
