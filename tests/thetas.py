"""Small theta for catalogue entries whose own weights are not shipped: random around networks that are known to train.

Every builder's network passes one feature on, normalised momentum, as ``weights.bootstrap()`` does; noise on all
weights makes every other path count too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pylo_integrations import Theta, get_optimizer_info
from pylo_integrations.rules.celo2 import Celo2
from pylo_integrations.rules.features import channel_counts
from pylo_integrations.weights import bootstrap

NOISE = 0.02


def theta_for(name: str) -> Theta:
    """Theta for a catalogue entry, the same at every call."""
    arrays = BUILDERS[get_optimizer_info(name).cls.architecture]()
    generator = torch.Generator().manual_seed(0)
    noisy = {
        key: array + NOISE * (array.abs().max().item() or 1) * torch.randn(array.shape, generator=generator)
        for key, array in sorted(arrays.items())
    }
    return Theta.from_arrays(name, noisy, provenance="tests/thetas.py; not meta-trained")


def small_fc() -> dict[str, Tensor]:
    """The bootstrap network with a gain of 1 in place of 0.1: a step of root mean square ``step_mult``."""
    arrays = dict(bootstrap().arrays)
    return arrays | {"nn/~/w2": 10 * arrays["nn/~/w2"]}


def celo2(width: int = 8) -> dict[str, Tensor]:
    """An MLP that copies ``momentum_over_rms`` at decay 0.9 to its first output, as ``relu(x) - relu(-x)``."""
    signs = torch.tensor([1.0, -1.0])
    arrays = {f"w0__{i}": torch.zeros(count, width) for i, count in enumerate(channel_counts(Celo2.features))}
    arrays[f"w0__{Celo2.features.index('momentum_over_rms')}"][0, :2] = signs
    arrays |= {"w1": torch.zeros(width, width), "w2": torch.zeros(width, 3)}
    arrays["w1"][:2, :2] = torch.eye(2)
    arrays["w2"][:2, 0] = signs
    arrays |= {"b0": torch.zeros(width), "b1": torch.zeros(width), "b2": torch.zeros(3)}
    return {f"ff_mod_stack/~/{name}": array for name, array in arrays.items()}


BUILDERS: dict[str, Callable[[], dict[str, Tensor]]] = {"small_fc": small_fc, "celo2": celo2}
"""Arrays before noise, by architecture."""
