"""The public optimizers: each chooses a rule and its default weights, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pylo_integrations.decay import DecayPolicy
from pylo_integrations.engine import NonFinitePolicy
from pylo_integrations.ops.select import Backend
from pylo_integrations.optimizer import CHUNK_BYTES, LearnedOptimizer
from pylo_integrations.rules.base import Rule
from pylo_integrations.rules.celo import CeloRule
from pylo_integrations.rules.celo_adam import CeloAdamRule
from pylo_integrations.rules.small_fc import SmallFC
from pylo_integrations.rules.velo import VeLORule
from pylo_integrations.weights.sources import load_theta
from pylo_integrations.weights.theta import Theta


class ThetaOptimizer(LearnedOptimizer):
    """A learned optimizer whose rule is built from theta; the public optimizers are its subclasses.

    Args:
        params: As for :class:`LearnedOptimizer`.
        lr: As for :class:`LearnedOptimizer`.
        weight_decay: As for :class:`LearnedOptimizer`.
        weights: Theta: an object, a path, ``"builtin:<name>"``, ``"hub:<owner>/<repo>[@revision]"`` or arrays. By
            default those of the class.
        num_steps: As for :class:`LearnedOptimizer`.
        step_mult: Scale of the step; by default theta's.
        exp_mult: Scale of the magnitude output; by default theta's.
        max_grad_norm: As for :class:`LearnedOptimizer`.
        weight_decay_policy: As for :class:`LearnedOptimizer`.
        maximize: As for :class:`LearnedOptimizer`.
        on_nonfinite: As for :class:`LearnedOptimizer`.
        chunk_bytes: As for :class:`LearnedOptimizer`.
        backend: As for :class:`LearnedOptimizer`.

    Raises:
        ValueError: An argument is out of range, or the weights are for another optimizer.
        FileNotFoundError: The weights cannot be found.
        TypeError: A parameter is complex or not floating point.
    """

    # Spelled out, not **kwargs: Lightning's CLI and optim_args read names and types off the signature.
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        weight_decay: float = 0.0,
        weights: Theta | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        num_steps: int | None = None,
        step_mult: float | None = None,
        exp_mult: float | None = None,
        max_grad_norm: float | None = None,
        weight_decay_policy: DecayPolicy = "before",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
    ) -> None:
        theta, rule = self._load(weights, step_mult=step_mult, exp_mult=exp_mult)
        super().__init__(
            params,
            rule,
            lr=lr,
            weight_decay=weight_decay,
            num_steps=num_steps,
            max_grad_norm=max_grad_norm,
            weight_decay_policy=weight_decay_policy,
            maximize=maximize,
            on_nonfinite=on_nonfinite,
            chunk_bytes=chunk_bytes,
            backend=backend,
            theta=theta,
        )

    architecture: ClassVar[str]
    """What theta must be for, see :data:`~pylo_integrations.weights.theta.ARCHITECTURES`."""

    default_weights: ClassVar[str]
    """A ``weights`` argument."""

    @classmethod
    def _load(
        cls, weights: Theta | str | os.PathLike[str] | Mapping[str, Any] | None, **constants: Any
    ) -> tuple[Theta, Rule]:
        """Theta, and the rule made of it with those ``constants`` that are not None in place of theta's."""
        theta = load_theta(cls.default_weights if weights is None else weights, cls.architecture)
        if theta.architecture != cls.architecture:
            raise ValueError(f"weights={weights!r} are for {theta.architecture}, not for {cls.__name__}")
        return theta, theta.rule(**constants)


class SmallFCLOpt(ThetaOptimizer):
    """small_fc_lopt: a per-parameter MLP over Adafactor-style features (:mod:`pylo_integrations.rules.small_fc`).

    Takes the arguments of :class:`ThetaOptimizer`. The default weights, ``"builtin:small_fc_bootstrap"``, are
    constructed, not meta-trained (:func:`pylo_integrations.weights.bootstrap`). The loss and ``num_steps`` are unused.
    """

    rule_type = SmallFC
    architecture = "small_fc"
    default_weights = "builtin:small_fc_bootstrap"


class VeLO(ThetaOptimizer):
    """VeLO: an LSTM for every tensor controls the MLP that steps it (:mod:`pylo_integrations.rules.velo`).

    Takes the arguments of :class:`ThetaOptimizer`. Needs ``num_steps``, and the loss at every step. The default weights
    are Google's, meta-trained for 4000 TPU-months, as republished in ``"hub:amoudgl/velo-4000"``.
    """

    rule_type = VeLORule
    architecture = "velo"
    default_weights = "hub:amoudgl/velo-4000"


class Celo(ThetaOptimizer):
    """Celo: VeLO's MLPs under one learned schedule for the whole model (:mod:`pylo_integrations.rules.celo`).

    Takes the arguments of :class:`ThetaOptimizer`, and ``phase``. Needs ``num_steps``, and the loss at every step. The
    default weights are the authors', ``"hub:amoudgl/celo"``.

    Args:
        params: As for :class:`LearnedOptimizer`.
        lr: As for :class:`LearnedOptimizer`.
        phase: 2; or 1 for the MLP without the learned schedule, which then leaves annealing to ``lr``.
        weight_decay: As for :class:`LearnedOptimizer`.
        weights: As for :class:`ThetaOptimizer`.
        num_steps: As for :class:`LearnedOptimizer`.
        step_mult: Scale of the step; by default theta's.
        exp_mult: Scale of the magnitude output; by default theta's.
        max_grad_norm: As for :class:`LearnedOptimizer`.
        weight_decay_policy: As for :class:`LearnedOptimizer`.
        maximize: As for :class:`LearnedOptimizer`.
        on_nonfinite: As for :class:`LearnedOptimizer`.
        chunk_bytes: As for :class:`LearnedOptimizer`.
        backend: As for :class:`LearnedOptimizer`.
    """

    rule_type = CeloRule
    architecture = "celo"
    default_weights = "hub:amoudgl/celo"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        phase: Literal[1, 2] = 2,
        weight_decay: float = 0.0,
        weights: Theta | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        num_steps: int | None = None,
        step_mult: float | None = None,
        exp_mult: float | None = None,
        max_grad_norm: float | None = None,
        weight_decay_policy: DecayPolicy = "before",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
    ) -> None:
        theta, rule = self._load(weights, step_mult=step_mult, exp_mult=exp_mult, phase=phase)
        LearnedOptimizer.__init__(
            self,
            params,
            rule,
            lr=lr,
            weight_decay=weight_decay,
            num_steps=num_steps,
            max_grad_norm=max_grad_norm,
            weight_decay_policy=weight_decay_policy,
            maximize=maximize,
            on_nonfinite=on_nonfinite,
            chunk_bytes=chunk_bytes,
            backend=backend,
            theta=theta,
        )


class CeloAdam(ThetaOptimizer):
    """Celo-Adam: Adam under Celo's learned schedule (:mod:`pylo_integrations.rules.celo_adam`).

    Takes the arguments of :class:`ThetaOptimizer` but ``exp_mult``. Needs ``num_steps``, and the loss at every step.
    The default weights are the authors', ``"hub:amoudgl/celo-adam"``.

    Args:
        params: As for :class:`LearnedOptimizer`.
        lr: As for :class:`LearnedOptimizer`.
        weight_decay: As for :class:`LearnedOptimizer`.
        weights: As for :class:`ThetaOptimizer`.
        num_steps: As for :class:`LearnedOptimizer`.
        step_mult: Adam's learning rate before the learned factor; by default theta's.
        max_grad_norm: As for :class:`LearnedOptimizer`.
        weight_decay_policy: As for :class:`LearnedOptimizer`.
        maximize: As for :class:`LearnedOptimizer`.
        on_nonfinite: As for :class:`LearnedOptimizer`.
        chunk_bytes: As for :class:`LearnedOptimizer`.
        backend: As for :class:`LearnedOptimizer`.
    """

    rule_type = CeloAdamRule
    architecture = "celo_adam"
    default_weights = "hub:amoudgl/celo-adam"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        *,
        weight_decay: float = 0.0,
        weights: Theta | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        num_steps: int | None = None,
        step_mult: float | None = None,
        max_grad_norm: float | None = None,
        weight_decay_policy: DecayPolicy = "before",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(
            params,
            lr,
            weight_decay=weight_decay,
            weights=weights,
            num_steps=num_steps,
            step_mult=step_mult,
            max_grad_norm=max_grad_norm,
            weight_decay_policy=weight_decay_policy,
            maximize=maximize,
            on_nonfinite=on_nonfinite,
            chunk_bytes=chunk_bytes,
            backend=backend,
        )
