"""Small theta for catalogue entries whose own weights are not shipped: random around networks that are known to train.

Every builder's network passes one feature on, normalised momentum, as ``weights.bootstrap()`` does; noise on all
weights makes every other path count too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pylo_integrations import LearnedOptimizer, Theta, create_optimizer, get_optimizer_info, list_optimizers
from pylo_integrations.metatrain.spaces import PaceNumbers
from pylo_integrations.rules.celo2 import Celo2Rule
from pylo_integrations.rules.control import SCHEDULE_FEATURES
from pylo_integrations.rules.features import channel_counts
from pylo_integrations.rules.mixture import MixtureRule
from pylo_integrations.rules.velo import VeLORule
from pylo_integrations.weights import bootstrap

WIDTH, CONTROLS, NOISE = 6, 3, 0.02


BOOTSTRAP = "builtin:small_fc_bootstrap"


@functools.cache
def theta_for(name: str) -> Theta:
    """Theta for a catalogue entry, the same at every call."""
    arrays = BUILDERS[get_optimizer_info(name).cls.architecture]()
    generator = torch.Generator().manual_seed(0)
    noisy = {
        key: array + NOISE * (array.abs().max().item() or 1) * torch.randn(array.shape, generator=generator)
        for key, array in sorted(arrays.items())
    }
    return Theta.from_arrays(name, noisy, provenance="tests/helpers/thetas.py; not meta-trained")


def create(params: Any, name: str, *args: Any, **options: Any) -> LearnedOptimizer:
    """As ``create_optimizer``, with a horizon and weights where they are needed and not given."""
    spec = get_optimizer_info(name)
    if spec.needs_horizon:
        options.setdefault("num_steps", 1000)
    if is_absent(spec.cls):
        options.setdefault("weights", theta_for(name))
    return create_optimizer(params, name, *args, **options)


SAME_RULE = {"mulo": "small_fc_lopt", "elo": "small_fc_lopt", "elo_celo2": "celo2"}
"""Entries that step as another does, but for weights and defaults: no question of layouts has another answer there."""


def distinct_rules() -> list[str]:
    """One catalogue entry for every rule."""
    return [name for name in list_optimizers() if name not in SAME_RULE]


def slow_unless(quick: bool, *values: Any) -> Any:
    """The values of a case, which is left to the rest of the suite unless it is for the smoke run."""
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


def slow_but(*quick: str) -> list[Any]:
    """One catalogue entry for every rule; all but those named are slow."""
    return [slow_unless(name in quick, name) for name in distinct_rules()]


def is_absent(cls: type[LearnedOptimizer]) -> bool:
    """Whether tests bring weights: the default ones have to be downloaded, do not exist, or leave arrays unused."""
    default = getattr(cls, "default_weights", BOOTSTRAP)
    return default is None or (isinstance(default, str) and default != BOOTSTRAP)


def small_fc() -> dict[str, Tensor]:
    """The bootstrap network with a gain of 1 in place of 0.1: a step of root mean square ``step_mult``."""
    arrays = dict(bootstrap().arrays)
    return arrays | {"nn/~/w2": 10 * arrays["nn/~/w2"]}


def celo2(width: int = 8) -> dict[str, Tensor]:
    """An MLP that copies ``momentum_over_rms`` at decay 0.9 to its first output, as ``relu(x) - relu(-x)``."""
    signs = torch.tensor([1.0, -1.0])
    arrays = {f"w0__{i}": torch.zeros(count, width) for i, count in enumerate(channel_counts(Celo2Rule.features))}
    arrays[f"w0__{Celo2Rule.features.index('momentum_over_rms')}"][0, :2] = signs
    arrays |= {"w1": torch.zeros(width, width), "w2": torch.zeros(width, 3)}
    arrays["w1"][:2, :2] = torch.eye(2)
    arrays["w2"][:2, 0] = signs
    arrays |= {"b0": torch.zeros(width), "b1": torch.zeros(width), "b2": torch.zeros(3)}
    return {f"ff_mod_stack/~/{name}": array for name, array in arrays.items()}


def velo() -> dict[str, Tensor]:
    return lstm(VeLORule.controller_inputs, CONTROLS, lr_mult=10.0, control=1 / VeLORule.gain) | bank(CONTROLS)


def celo() -> dict[str, Tensor]:
    return lstm(SCHEDULE_FEATURES, 1, lr_mult=math.log(10 / 0.1)) | bank(1)


def celo_adam() -> dict[str, Tensor]:
    return lstm(SCHEDULE_FEATURES, 0, lr_mult=math.log(3 / 0.1))


def pace() -> dict[str, Tensor]:
    """The numbers that meta-training starts from."""
    space = PaceNumbers()
    return space.theta(space.start)


BUILDERS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "small_fc": small_fc,
    "celo2": celo2,
    "velo": velo,
    "celo": celo,
    "celo_adam": celo_adam,
    "pace": pace,
}
"""Arrays before noise, by architecture."""


def lstm(inputs: int, controls: int, lr_mult: float, control: float = 0.0) -> dict[str, Tensor]:
    """An LSTM whose heads' biases are ``lr_mult`` and ``control``; no head for 0 ``controls``."""
    layers = {"linear": inputs, "linear_1": inputs, "linear_2": inputs}
    arrays = {f"rnn_params/{layer}/w": torch.zeros(count, WIDTH) for layer, count in layers.items()}
    arrays |= {f"rnn_params/{layer}/b": torch.zeros(WIDTH) for layer in layers}
    arrays |= {"rnn_params/rnn/linear/w": torch.zeros(2 * WIDTH, 4 * WIDTH)}
    arrays |= {"rnn_params/rnn/linear/b": torch.zeros(4 * WIDTH)}
    arrays |= {f"lstm_init_state/{part}": torch.zeros(1, WIDTH) for part in ("hidden", "cell")}
    heads = {"step_size": (1, lr_mult)} | ({"rnn_to_controls": (controls, control)} if controls else {})
    for head, (outputs, bias) in heads.items():
        arrays[f"rnn_params/{head}/w"] = torch.zeros(WIDTH, outputs)
        arrays[f"rnn_params/{head}/b"] = torch.full((outputs,), bias)
    return arrays


def bank(controls: int) -> dict[str, Tensor]:
    """MLPs that copy ``momentum_over_rms`` at decay 0.9 to their first output, as ``relu(x) - relu(-x)``."""
    signs = torch.tensor([1.0, -1.0])
    arrays = {f"w0__{i}": torch.zeros(count, 4) for i, count in enumerate(channel_counts(MixtureRule.features))}
    arrays[f"w0__{MixtureRule.features.index('momentum_over_rms')}"][0, :2] = signs
    arrays |= {"w1": torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])), "w2": torch.zeros(4, 3)}
    arrays["w2"][:2, 0] = signs
    arrays |= {"b0": torch.zeros(4), "b1": torch.zeros(4), "b2": torch.zeros(3)}
    return {f"ff_mod_stack/~/{name}": array.expand(controls, *array.shape).clone() for name, array in arrays.items()}
