"""Theta that was constructed, not meta-trained, so that everything runs before and without any download."""

from __future__ import annotations

import torch

from pylo_integrations.rules.features import TIME_SCALES, channel_count
from pylo_integrations.rules.small_fc import SmallFCRule
from pylo_integrations.weights.theta import Theta

HIDDEN = 32
GAIN = 0.1


def bootstrap() -> Theta:
    """Weights for small_fc whose network takes a normalised-momentum step.

    The network copies one feature, ``momentum_over_rms`` at decay 0.9, through its ReLUs as ``relu(x) - relu(-x)``.
    Features are normalised to root mean square 1 over each tensor, so each step has root mean square ``0.1 *
    step_mult = 1e-3`` times ``lr``, whatever the gradient scale. All other weights are 0; the width is that of the
    published networks, so time and memory are theirs too.
    """
    source = channel_count(SmallFCRule.features[: SmallFCRule.features.index("momentum_over_rms")])
    with torch.device("cpu"):  # whatever the default device is
        arrays = {
            "nn/~/w0": torch.zeros(channel_count(SmallFCRule.features) + len(TIME_SCALES), HIDDEN),
            "nn/~/w1": torch.zeros(HIDDEN, HIDDEN),
            "nn/~/w2": torch.zeros(HIDDEN, 2),
            "nn/~/b0": torch.zeros(HIDDEN),
            "nn/~/b1": torch.zeros(HIDDEN),
            "nn/~/b2": torch.zeros(2),
        }
        signs = torch.tensor([1.0, -1.0])
        arrays["nn/~/w0"][source, :2] = signs
        arrays["nn/~/w1"][:2, :2] = torch.eye(2)
        arrays["nn/~/w2"][:2, 0] = GAIN * signs
    return Theta(
        "small_fc",
        arrays,
        {"exp_mult": 1e-3, "step_mult": 1e-2},
        name="small_fc_bootstrap",
        provenance="constructed by pylo_integrations.weights.bootstrap(); not meta-trained",
        licence="BSD-3-Clause",
    )
