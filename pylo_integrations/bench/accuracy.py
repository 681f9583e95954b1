"""How far an update of the kernels is from that of float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pylo_integrations.optimizers import SmallFCLOpt
from pylo_integrations.weights.theta import Theta


def update_error(shape: Sequence[int] = (768, 3072), warm_up: int = 3) -> float:
    """How far an update of the kernels is from float64's, of the largest element, from the same float32 numbers."""
    theta, generator = random_theta(), torch.Generator().manual_seed(2)
    param = nn.Parameter(0.1 * torch.randn(*shape, generator=generator))
    warm = SmallFCLOpt([param], weights=theta, backend="reference", lr=1.0)
    for _ in range(warm_up):
        param.grad = _uneven(param, generator)
        warm.step()
    twin = nn.Parameter(param.detach().double())
    exact, native = (
        SmallFCLOpt([p], weights=theta, backend=backend, lr=1.0)  # type: ignore[arg-type]
        for p, backend in ((twin, "reference"), (param, "native"))
    )
    # Decays as float32 has them, so that only the arithmetic of the step differs.
    decays = exact.rule.decays  # type: ignore[attr-defined]
    weights = decays.weights(torch.device("cpu"), torch.float32).values()
    rounded = (tuple((1 - weight.double()).tolist()) for weight in weights)
    object.__setattr__(exact.rule, "decays", type(decays)(*rounded))
    saved = warm.state_dict()
    for optimizer in (exact, native):
        optimizer.load_state_dict(saved)
        optimizer.param_groups[0]["lr"] = 1e3  # or the parameters' own rounding would hide that of the update
    before = twin.detach().clone()
    param.grad = _uneven(param, generator)
    twin.grad = param.grad.double()
    for optimizer in (exact, native):
        optimizer.step()
    want = twin.detach() - before
    return ((param.detach().double() - twin.detach()).abs().max() / want.abs().max()).item()


def _uneven(param: Tensor, generator: torch.Generator) -> Tensor:
    """A gradient whose rows and columns differ in size by a factor of 30."""
    grad = torch.randn(*param.shape, generator=generator)
    for axis, extent in enumerate(param.shape):
        grad *= (10 ** -torch.linspace(0, 1.5, extent)).view(-1, *(1,) * (param.dim() - axis - 1))
    return grad


def random_theta() -> Theta:
    """Random weights, large enough for every feature to matter."""
    generator = torch.Generator().manual_seed(1)
    arrays, inputs = {}, 39
    for layer, outputs in enumerate((32, 32, 2)):
        arrays[f"nn/~/w{layer}"] = torch.randn(inputs, outputs, generator=generator) / math.sqrt(inputs)
        arrays[f"nn/~/b{layer}"] = torch.randn(outputs, generator=generator) * 0.1
        inputs = outputs
    return Theta.from_arrays("small_fc_lopt", arrays, {"step_mult": 1e-2, "exp_mult": 1e-1})
