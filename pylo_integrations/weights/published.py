"""Theta that others have published: where it is, and in which layout."""

from __future__ import annotations

from dataclasses import dataclass

THETA_FILE = "theta.safetensors"
FLAX_FILE = "theta.state"
PYTORCH_FILE = "model.safetensors"


@dataclass(frozen=True)
class Repository:
    """A repository with a published theta, or a part of one.

    Attributes:
        name: ``<owner>/<repository>``.
        filename: The file with the weights; its name tells the layout.
        revision: Commit that is loaded unless another is asked for; None for the newest.
        sha256: Digest of the file at that commit; None if unknown.
    """

    name: str
    filename: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Published:
    """A theta that its authors published.

    Attributes:
        name: What to call it.
        optimizer: The optimizer it is for, one of :data:`pylo_integrations.weights.convert.OPTIMIZERS`; None
            if this package has no rule for it.
        repositories: Where its parts are.
        description: One line.
    """

    name: str
    optimizer: str | None
    repositories: tuple[Repository, ...]
    description: str


PUBLISHED = (
    Published(
        "mulo",
        "mulo",
        (Repository("btherien/mulo", PYTORCH_FILE),),
        "muLO, for models in maximal-update parametrisation",
    ),
    Published(
        "velo",
        "velo",
        (Repository("Pauljanson002/VeLO_RNN", PYTORCH_FILE), Repository("Pauljanson002/VeLO_MLP", PYTORCH_FILE)),
        "Google's VeLO as PyTorch modules",
    ),
    Published("velo_4000", "velo", (Repository("amoudgl/velo-4000", FLAX_FILE),), "Google's VeLO, 4000 TPU-months"),
    Published("velo_s", "velo", (Repository("amoudgl/velo-s", FLAX_FILE),), "VeLO at reduced width, by Celo's authors"),
    Published("celo", "celo", (Repository("amoudgl/celo", FLAX_FILE),), "learned MLP and learned schedule"),
    Published("celo_adam", "celo_adam", (Repository("amoudgl/celo-adam", FLAX_FILE),), "learned schedule over Adam"),
    Published(
        "adafac_mlp_lopt",
        "small_fc",
        (Repository("amoudgl/adafac-mlp-lopt", FLAX_FILE),),
        "small_fc_lopt by Celo's authors",
    ),
    Published(
        "rnn_mlp_lopt",
        None,
        (Repository("amoudgl/rnn-mlp-lopt", FLAX_FILE),),
        "RNN over tensors and MLP over parameters, by Celo's authors",
    ),
    Published(
        "celo2", "celo2", (Repository("amoudgl/celo2", FLAX_FILE),), "CELO2 by its authors: learned directions, MIT"
    ),
    Published(
        "celo2_base",
        "celo2_base",
        (Repository("amoudgl/celo2-base", FLAX_FILE),),
        "CELO2 for all tensors, not orthogonalised, by its authors, MIT",
    ),
    Published("elo", "elo", (Repository("DiamondXL/elo", PYTORCH_FILE),), "small_fc's network with plain decays"),
    Published("elo_celo2", "elo_celo2", (Repository("DiamondXL/elo-celo2", PYTORCH_FILE),), "ELO with CELO2's rule"),
)
"""All published theta. No revision or digest is pinned: the hub could not be reached when this was written."""
