"""small_fc_lopt as its formulas read, tensor by tensor: what the benchmark compares the kernels with.

Nothing is shared between tensors, folded or blocked: every feature of every parameter is a number in one large tensor
that goes through ``torch.nn.Linear``. Such code is the first that anyone writes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pylo_integrations.rules.features import time_features, time_rates
from pylo_integrations.rules.small_fc import SmallFCRule
from pylo_integrations.sharding.layout import AxisOrder, TensorLayout


class NaiveSmallFC(Optimizer):
    """The rule of :class:`~pylo_integrations.SmallFCLOpt` in the simplest eager code.

    Args:
        params: What to step.
        rule: The mathematics and its theta.
        lr: Factor on the step.
        axes: Which axis of a matrix is the input.
    """

    def __init__(self, params: Iterable[Tensor], rule: SmallFCRule, lr: float, axes: AxisOrder = "out_in") -> None:
        super().__init__(params, {"lr": lr})
        self._rule, self._axes, self._iteration = rule, axes, 0
        layers: list[nn.Module] = []
        for weight, bias in zip(rule.weights, rule.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0])
            linear.load_state_dict({"weight": weight, "bias": bias})
            layers += [linear, nn.ReLU()]
        self._network = nn.Sequential(*layers[:-1])
        self._rates = time_rates(torch.float32, torch.device("cpu"))
        self._decays = [1 - w for w in rule.decays.weights(torch.device("cpu"), torch.float32).values()]

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step from the gradients."""
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * self._step_of(param)
        self._iteration += 1

    def _step_of(self, param: Tensor) -> Tensor:
        state, grad = self.state[param], param.grad.unsqueeze(-1)  # type: ignore[union-attr]
        factored = TensorLayout.whole(tuple(param.shape), self._axes).factored
        square = grad * grad
        tiny_square = square + 1e-30
        statistics = [tiny_square] * 2
        if factored is not None:
            d1, d0 = factored
            statistics = [tiny_square.mean(axis, keepdim=True) for axis in (d0, d1)]
        updates = {"momentum": grad, "rms": square, "row": statistics[0], "col": statistics[1]}
        decays = dict(zip(updates, [*self._decays, self._decays[2]], strict=True))
        for name, value in updates.items():
            old = state.get(name, torch.zeros(()))
            state[name] = decays[name] * old + (1 - decays[name]) * value
        momentum, rms, row, col = (state[name] for name in updates)
        inverse_rms = (rms + 1e-6).rsqrt()
        if factored is None:
            grad_scale, momentum_scale = (row + 1e-9).clamp_min(1e-9).rsqrt(), (row + 1e-6).rsqrt()
        else:
            row_scale = (row / (row.mean(d1, keepdim=True) + 1e-9)).clamp_min(1e-9).rsqrt()
            grad_scale = momentum_scale = row_scale * col.clamp_min(1e-9).rsqrt()
        features = torch.cat(
            [
                part.expand(*param.shape, part.shape[-1])
                for part in (
                    grad,
                    param.unsqueeze(-1),
                    momentum,
                    rms,
                    momentum * inverse_rms,
                    inverse_rms,
                    grad * grad_scale,
                    row,
                    col,
                    (row + 1e-8).rsqrt(),
                    (col + 1e-8).rsqrt(),
                    momentum * momentum_scale,
                )
            ],
            dim=-1,
        )
        features = features * (features.square().mean(tuple(range(param.dim())), keepdim=True) + 1e-5).rsqrt()
        time = time_features(self._iteration, self._rates).expand(*param.shape, -1)
        outputs: Tensor = self._network(torch.cat([features, time], dim=-1))
        direction, magnitude = outputs.unbind(-1)
        return direction * torch.exp(magnitude * self._rule.exp_mult) * self._rule.step_mult
