"""The learned optimizers that this package has, and each fact about them once.

Whatever depends on which optimizers there are reads it here: theta, the converters, the classes, the catalogue,
benchmarks. An *architecture* is a rule that theta can be for; an optimizer is an architecture with constants, learning
rates and weights. Names are those of the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.base import Rule
from pylo_integrations.rules.celo import CeloRule
from pylo_integrations.rules.celo2 import Celo2Rule
from pylo_integrations.rules.celo_adam import CeloAdamRule
from pylo_integrations.rules.control import SCHEDULE_FEATURES, lstm_shapes
from pylo_integrations.rules.networks import stack_shapes
from pylo_integrations.rules.pace import NUMBERS, PaceRule
from pylo_integrations.rules.small_fc import SmallFCRule
from pylo_integrations.rules.velo import VeLORule

ARCHITECTURES: Mapping[str, type[Rule]] = MappingProxyType(
    {
        "small_fc": SmallFCRule,
        "velo": VeLORule,
        "celo": CeloRule,
        "celo_adam": CeloAdamRule,
        "celo2": Celo2Rule,
        "pace": PaceRule,
    }
)
"""Rules that theta can be for."""

_SMALL_FC = {"w0": (39, 32), "b0": (32,), "w1": (32, 32), "b1": (32,), "w2": (32, 2), "b2": (2,)}

SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "small_fc": {f"nn/~/{name}": shape for name, shape in _SMALL_FC.items()},
    "velo": lstm_shapes(VeLORule.controller_inputs, 512, 256) | stack_shapes(4, 256),
    "celo": lstm_shapes(CeloRule.controller_inputs, 64, 1) | stack_shapes(4, 1),
    "celo_adam": lstm_shapes(SCHEDULE_FEATURES, 64),
    "celo2": stack_shapes(8),
    "pace": {"numbers": (len(NUMBERS),)},
}
"""Of an architecture's arrays, as large as its authors have them."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What there is to know of an optimizer.

    Attributes:
        name: In the catalogue; lower snake case.
        description: One line.
        architecture: A key of :data:`ARCHITECTURES`.
        weights: A ``weights`` argument, where none is given; None if there are none.
        lr: The learning rate that is natural for the rule.
        adamw_lr: AdamW's learning rate whose steps are as large as ours at ``lr``; weight decay is measured by it.
        weight_decay: Where none is given.
        max_grad_norm: Where none is given.
        wants_schedule: Whether a run ends well only under a learning rate that falls to zero.
        anneals: Whether it lets its steps fall by itself over a horizon that it need not know.
        adamw_embeddings: Whether groups made from a model leave its embeddings to AdamW.
        constants: Of the rule; they make it this optimizer, whatever theta.
        hyper: Constants that belong to the published weights, where they are not the rule's own defaults.
        converts_as: What converters call it; "" if nobody has weights for it in a foreign layout.
        modules: Classes of PyTorch modules whose files, together, are taken for its weights; each way to have them.
        decays: Learned decays that are in the code beside the published weights, and not in their file.
    """

    name: str
    description: str
    architecture: str
    weights: str | None = None
    lr: float = 1.0
    adamw_lr: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float | None = None
    wants_schedule: bool = False
    anneals: bool = False
    adamw_embeddings: bool = False
    constants: Mapping[str, Any] = field(default_factory=dict)
    hyper: Mapping[str, float] = field(default_factory=dict)
    converts_as: str = ""
    modules: tuple[tuple[str, ...], ...] = ()
    decays: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def rule(self) -> type[Rule]:
        """Of the architecture."""
        return ARCHITECTURES[self.architecture]


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        profile.name: profile
        for profile in (
            Profile(
                name="small_fc_lopt",
                description="MLP for every parameter, Adafactor's features (Metz et al., 2022)",
                architecture="small_fc",
                weights="builtin:small_fc_bootstrap",
                converts_as="small_fc",
            ),
            Profile(
                name="mulo",
                description="small_fc_lopt for models in muP (Therien et al., 2024)",
                architecture="small_fc",
                weights="builtin:mulo",
                hyper={"step_mult": 1e-2},
                converts_as="mulo",
                modules=(("MetaMLP",),),  # which ELO's are as well
                decays={
                    "momentum_decays": (0.15216392, 0.14245212, 0.06812963),
                    "rms_decays": (0.01079706,),
                    "adafactor_decays": (0.18621896, -0.10864615, -0.06185547),
                },
            ),
            Profile(
                name="elo",
                description="small_fc_lopt with fixed decays, scaled by lr alone",
                architecture="small_fc",
                weights="hub:DiamondXL/elo",
                lr=1e-3,
                wants_schedule=True,
                hyper={"step_mult": 1.0},
                converts_as="elo",
            ),
            Profile(
                name="velo",
                description="MLP for every parameter, mixed by an LSTM (Metz et al., 2022)",
                architecture="velo",
                weights="hub:amoudgl/velo-4000",
                converts_as="velo",
                modules=(("VeLO_MLP", "VeLO_RNN"),),
            ),
            Profile(
                name="celo",
                description="MLP for every parameter, learned schedule (Moudgil et al., 2025)",
                architecture="celo",
                weights="builtin:celo",
                converts_as="celo",
            ),
            Profile(
                name="celo_adam",
                description="Adam under one learned schedule (Moudgil et al., 2025)",
                architecture="celo_adam",
                weights="hub:amoudgl/celo-adam",
                converts_as="celo_adam",
            ),
            Profile(
                name="celo2",
                description="orthogonalised MLP for matrices, Adam for vectors and embeddings",
                architecture="celo2",
                weights="builtin:celo2",
                lr=3e-4,
                adamw_lr=3e-4,
                wants_schedule=True,
                adamw_embeddings=True,
                constants={
                    "adamw": AdamWRule((0.9, 0.95), eps=0.0, eps_root=1e-8, bias_correction=False, lr_mult=20.0)
                },
                converts_as="celo2",
                modules=(("CELO2MLP",), ("Celo2MLP",)),
            ),
            Profile(
                name="pace",
                description="orthogonalised momentum, learned step size; Adam for vectors",
                architecture="pace",
                weights="builtin:pace",
                anneals=True,
                adamw_embeddings=True,
            ),
            Profile(
                name="celo2_base",
                description="the MLP of celo2 for all tensors, not orthogonalised",
                architecture="celo2",
                weights="hub:amoudgl/celo2-base",
                lr=1e-3,
                wants_schedule=True,
                constants={"orthogonalise": "never"},
                converts_as="celo2_base",
            ),
            Profile(
                name="elo_celo2",
                description="celo2 with AdamW for vectors and clipped gradients",
                architecture="celo2",
                weights="hub:DiamondXL/elo-celo2",
                lr=3e-4,
                adamw_lr=3e-4,
                weight_decay=0.1,
                max_grad_norm=1.0,
                wants_schedule=True,
                constants={"adamw": AdamWRule((0.9, 0.95), eps=1e-8, clips=True)},
                converts_as="elo_celo2",
            ),
        )
    }
)
"""The optimizers by name."""


def architecture_of(name: str) -> str:
    """The architecture that a catalogue name, or an architecture, stands for."""
    return PROFILES[name].architecture if name in PROFILES else name
