"""Who is measured: learned optimizers, AdamW and Muon, over parameters of a model's shapes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pylo_integrations.bench.shapes import SHAPES, ParamShape
from pylo_integrations.catalog import create_optimizer, get_optimizer_info
from pylo_integrations.formats import FORMATS
from pylo_integrations.ops.select import Backend
from pylo_integrations.rules.base import RuleChoice
from pylo_integrations.sharding.layout import AxisOrder
from pylo_integrations.weights.stand_in import stand_in

Parameters = Sequence[tuple[Tensor, ParamShape]]
"""With gradients, and what they are in a model."""


def _adamw(**options: Any) -> Callable[[Parameters], list[Optimizer]]:
    return lambda parameters: [AdamW([param for param, _ in parameters], lr=1e-4, **options)]


def _muon(parameters: Parameters) -> list[Optimizer]:
    """torch's Muon for hidden matrices, AdamW for all else, which it would refuse or should not step."""
    hidden = [param for param, kind in parameters if param.dim() == 2 and not kind.embeds]
    rest = [param for param, kind in parameters if param.dim() != 2 or kind.embeds]
    makers = ((hidden, lambda: torch.optim.Muon(hidden, lr=1e-4)), (rest, lambda: AdamW(rest, lr=1e-4, fused=True)))
    return [make() for params, make in makers if params]


BASELINES: Mapping[str, Callable[[Parameters], list[Optimizer]]] = {
    "adamw_fused": _adamw(fused=True),
    "adamw_foreach": _adamw(foreach=True),
    **({"muon": _muon} if hasattr(torch.optim, "Muon") else {}),  # from torch 2.9 on
}
"""What makes torch's optimizers, by the name that results give them."""


EIGHT_BIT: Mapping[str, str] = {"torchao_adamw8bit": "torchao.optim", "bitsandbytes_adamw8bit": "bitsandbytes.optim"}
"""AdamW of other packages that stores its state in 8 bits, by the name that results give it, and where it is."""


def missing_package(name: str) -> str | None:
    """The package that one of :data:`EIGHT_BIT` needs and that is not installed; None if it is."""
    package = EIGHT_BIT[name].partition(".")[0]
    return package if importlib.util.find_spec(package) is None else None


def _eight_bit(name: str, parameters: Parameters) -> list[Optimizer]:
    module = importlib.import_module(EIGHT_BIT[name])  # which may compile, and patch what it likes
    return [module.AdamW8bit([param for param, _ in parameters], lr=1e-4)]


class Together:
    """Optimizers of different parameters as one.

    Args:
        optimizers: They.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    @property
    def state(self) -> dict[Tensor, Any]:
        """Of all parameters."""
        return {param: state for optimizer in self._optimizers for param, state in optimizer.state.items()}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Of all."""
        for optimizer in self._optimizers:
            optimizer.step()


# No float16: torch's AdamW divides by zero in it, its epsilon being below the smallest float16.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def fresh_parameter(shape: Sequence[int], dtype: torch.dtype, device: str) -> torch.nn.Parameter:
    """A parameter of plausible size."""
    return torch.nn.Parameter(_random(torch.empty(*shape, dtype=dtype, device=device), 0.02))


def fresh_gradient(like: Tensor) -> Tensor:
    """A gradient of plausible size for a plain tensor."""
    return _random(torch.empty_like(like, requires_grad=False), 0.01)


def _random(tensor: Tensor, size: float) -> Tensor:
    return tensor if tensor.is_meta else tensor.normal_(0, size)


@dataclass(frozen=True)
class Setting:
    """What all contenders of a table share; names only, so that it travels between processes."""

    shapes: str
    dtype: str
    device: str
    threads: int

    def parameters(self) -> list[tuple[Tensor, ParamShape]]:
        """Fresh parameters with gradients."""
        torch.manual_seed(0)
        made: list[tuple[Tensor, ParamShape]] = []
        for kind in SHAPES[self.shapes]():
            param = fresh_parameter(kind.shape, DTYPES[self.dtype], self.device)
            param.grad = fresh_gradient(param)
            made.append((param, kind))
        return made

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def make_contender(name: str, parameters: Parameters, **options: Any) -> tuple[Optimizer | Together, Callable[[], Any]]:
    """An optimizer over ``parameters`` and the call that steps it.

    Args:
        name: A key of :data:`BASELINES` or :data:`EIGHT_BIT`, or a catalogue name, which may be followed by a colon and
            a backend or a format of state.
        parameters: With gradients; contenders may share them, as no step's cost depends on values.
        **options: Of learned optimizers.
    """
    if name in BASELINES or name in EIGHT_BIT:
        made = BASELINES[name](parameters) if name in BASELINES else _eight_bit(name, parameters)
        baseline = Together(made)
        return baseline, baseline.step
    name, _, choice = name.partition(":")
    backend = choice if choice in get_args(Backend) else "auto"
    form = choice if choice in FORMATS else "float32"
    spec = get_optimizer_info(name)
    members: dict[tuple[AxisOrder, RuleChoice], list[Tensor]] = {}
    for param, kind in parameters:
        members.setdefault((kind.axes, kind.rule_of(spec)), []).append(param)
    groups = [{"params": params, "axes": axes, "rule": rule} for (axes, rule), params in members.items()]
    num_steps = 1_000_000 if spec.needs_horizon else None
    # Published weights may not be at hand. Of the package's own, that of celo2 takes less time than others of its size.
    is_absent = not str(spec.weights).startswith("builtin:")
    weights = stand_in(spec.architecture) if spec.architecture and is_absent else None
    small = spec.lr / 10  # so that parameters stay as they are
    common: dict[str, Any] = {"num_steps": num_steps, "backend": backend, "weights": weights}
    if form != "float32":
        common["state_dtype"] = form
    optimizer = create_optimizer(groups, name, small, **common, **options)
    # Where only early steps read it, others are measured: a run has more of them.
    loss = torch.ones((), device=parameters[0][0].device) if optimizer.needs_loss else None
    return optimizer, lambda: optimizer.step(loss=loss)
