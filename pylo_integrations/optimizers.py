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
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.base import Rule
from pylo_integrations.rules.celo import CeloRule
from pylo_integrations.rules.celo2 import Celo2Rule
from pylo_integrations.rules.celo_adam import CeloAdamRule
from pylo_integrations.rules.small_fc import SmallFCRule
from pylo_integrations.rules.velo import VeLORule
from pylo_integrations.weights.sources import load_theta
from pylo_integrations.weights.theta import Theta


class ThetaOptimizer(LearnedOptimizer):
    """A learned optimizer whose rule is built from theta; the public optimizers are its subclasses.

    Args:
        params: As for :class:`LearnedOptimizer`.
        lr: As for :class:`LearnedOptimizer`; by default :attr:`default_lr`.
        weight_decay: As for :class:`LearnedOptimizer`; by default :attr:`default_weight_decay`.
        weights: Theta: an object, a path, ``"builtin:<name>"``, ``"hub:<owner>/<repo>[@revision]"`` or arrays. By
            default those of the class.
        num_steps: As for :class:`LearnedOptimizer`.
        step_mult: Scale of the step; by default theta's.
        exp_mult: Scale of the magnitude output; by default theta's.
        max_grad_norm: As for :class:`LearnedOptimizer`; by default :attr:`default_max_grad_norm`, which infinity
            switches off.
        weight_decay_policy: As for :class:`LearnedOptimizer`.
        maximize: As for :class:`LearnedOptimizer`.
        on_nonfinite: As for :class:`LearnedOptimizer`.
        chunk_bytes: As for :class:`LearnedOptimizer`.
        backend: As for :class:`LearnedOptimizer`.
        shard_step: As for :class:`LearnedOptimizer`.
        stochastic_rounding: As for :class:`LearnedOptimizer`.

    Raises:
        ValueError: An argument is out of range, or the weights are for another optimizer.
        FileNotFoundError: The weights cannot be found, or none are given and the class has no default.
        TypeError: A parameter is complex or not floating point.
    """

    # Spelled out, not **kwargs: Lightning's CLI and optim_args read names and types off the signature.
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        *,
        weight_decay: float | None = None,
        weights: Theta | str | os.PathLike[str] | Mapping[str, Any] | None = None,
        num_steps: int | None = None,
        step_mult: float | None = None,
        exp_mult: float | None = None,
        max_grad_norm: float | None = None,
        weight_decay_policy: DecayPolicy = "adamw",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
        shard_step: bool = False,
        stochastic_rounding: bool = False,
    ) -> None:
        theta, rule = self._load(weights, step_mult=step_mult, exp_mult=exp_mult)
        super().__init__(
            params,
            rule,
            lr=self.default_lr if lr is None else lr,
            weight_decay=self.default_weight_decay if weight_decay is None else weight_decay,
            num_steps=num_steps,
            max_grad_norm=self.default_max_grad_norm if max_grad_norm is None else max_grad_norm,
            weight_decay_policy=weight_decay_policy,
            maximize=maximize,
            on_nonfinite=on_nonfinite,
            chunk_bytes=chunk_bytes,
            backend=backend,
            shard_step=shard_step,
            stochastic_rounding=stochastic_rounding,
            theta=theta,
            usual_lrs=self._usual_lrs(theta, rule, weights is None and step_mult is None),
        )

    architecture: ClassVar[str]
    """What theta must be for, see :data:`~pylo_integrations.weights.theta.ARCHITECTURES`."""

    default_weights: ClassVar[str | None]
    """A ``weights`` argument; None if no weights are published."""

    theta_name: ClassVar[str] = ""
    """What :meth:`Theta.from_arrays` calls bare arrays, where it is not :attr:`architecture`."""

    constants: ClassVar[Mapping[str, Any]] = {}
    """Constants of the rule that make it this optimizer, whatever theta."""

    @classmethod
    def _load(
        cls, weights: Theta | str | os.PathLike[str] | Mapping[str, Any] | None, **constants: Any
    ) -> tuple[Theta, Rule]:
        """Theta, and the rule made of it with those ``constants`` that are not None in place of theta's."""
        weights = cls.default_weights if weights is None else weights
        if weights is None:
            raise FileNotFoundError(
                f"no weights of {cls.__name__} are published, so weights= is needed: a Theta, the path of a "
                f"{cls.architecture} theta.safetensors, 'hub:<owner>/<repo>[@revision]', or arrays by the names of the "
                "reference implementation"
            )
        theta = load_theta(weights, cls.theta_name or cls.architecture)
        if theta.architecture != cls.architecture:
            raise ValueError(f"weights={weights!r} are for {theta.architecture}, not for {cls.__name__}")
        return theta, theta.rule(**{**cls.constants, **constants})

    @classmethod
    def _usual_lrs(cls, theta: Theta, rule: Rule, is_default: bool) -> list[float]:
        """Learning rates that can be meant: with theta or a ``step_mult`` of the user's, those for its scale too."""
        if is_default:
            return [cls.default_lr]
        config, step_mult = theta.training.get("config"), getattr(rule, "step_mult", 0.0)
        trained = config.get("lr") if isinstance(config, Mapping) else None  # a file may record anything
        lrs = [cls.default_lr, trained, cls.adamw_lr / step_mult if step_mult else None]
        return [lr for lr in lrs if isinstance(lr, (float, int)) and lr > 0]


class SmallFCLOpt(ThetaOptimizer):
    """small_fc_lopt: a per-parameter MLP over Adafactor-style features (:mod:`pylo_integrations.rules.small_fc`).

    Takes the arguments of :class:`ThetaOptimizer`. The default weights, ``"builtin:small_fc_bootstrap"``, are
    constructed, not meta-trained (:func:`pylo_integrations.weights.bootstrap`). The loss and ``num_steps`` are unused.
    """

    rule_type = SmallFCRule
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
    default weights were meta-trained by this package on small networks, ``"builtin:celo"``; those of the authors are
    ``"hub:amoudgl/celo"``.

    Args:
        params: As for :class:`LearnedOptimizer`.
        lr: As for :class:`LearnedOptimizer`.
        phase: 2; or 1 for the MLP without the learned schedule, which wants an ``lr`` that falls to zero in its place.
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
        shard_step: As for :class:`LearnedOptimizer`.
        stochastic_rounding: As for :class:`LearnedOptimizer`.
    """

    rule_type = CeloRule
    architecture = "celo"
    default_weights = "builtin:celo"

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
        weight_decay_policy: DecayPolicy = "adamw",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
        shard_step: bool = False,
        stochastic_rounding: bool = False,
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
            shard_step=shard_step,
            stochastic_rounding=stochastic_rounding,
            theta=theta,
            usual_lrs=self._usual_lrs(theta, rule, weights is None and step_mult is None),
            wants_schedule=self.wants_schedule_with({"phase": phase}),
        )

    @classmethod
    def wants_schedule_with(cls, options: Mapping[str, Any]) -> bool:
        """Whether the learned schedule is left out."""
        return bool(options.get("phase") == 1)


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
        shard_step: As for :class:`LearnedOptimizer`.
        stochastic_rounding: As for :class:`LearnedOptimizer`.
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
        weight_decay_policy: DecayPolicy = "adamw",
        maximize: bool = False,
        on_nonfinite: NonFinitePolicy = "skip",
        chunk_bytes: int = CHUNK_BYTES,
        backend: Backend = "auto",
        shard_step: bool = False,
        stochastic_rounding: bool = False,
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
            shard_step=shard_step,
            stochastic_rounding=stochastic_rounding,
        )


class MuLO(ThetaOptimizer):
    """MuLO: small_fc_lopt meta-trained, and used, in the maximal-update parametrisation.

    Therien et al., "μLO: Compute-Efficient Meta-Generalization of Learned Optimizers", 2024. The rule is that of
    :class:`SmallFCLOpt`, and the width multipliers are learning rates of parameter groups: make those with
    :func:`~pylo_integrations.mup_param_groups`. The learned decays are part of theta. Takes the arguments of
    :class:`ThetaOptimizer`. The default weights, ``"builtin:mulo"``, were meta-trained by this package on small
    networks; those of the authors are ``"hub:btherien/mulo"``.
    """

    rule_type = SmallFCRule
    architecture = "small_fc"
    theta_name = "mulo"
    default_weights = "builtin:mulo"


class ELO(ThetaOptimizer):
    """ELO: the rule of :class:`SmallFCLOpt` with decays that were not learned and no scale but ``lr``.

    Takes the arguments of :class:`ThetaOptimizer`.
    """

    rule_type = SmallFCRule
    architecture = "small_fc"
    theta_name = "elo"
    default_weights = "hub:DiamondXL/elo"
    default_lr = 1e-3
    wants_schedule = True


class CELO2(ThetaOptimizer):
    """CELO2: a learned per-parameter MLP, orthogonalised, for matrices (:mod:`pylo_integrations.rules.celo2`).

    Vectors, scalars and the tensors of groups marked ``rule="adamw"`` are stepped by Adam without bias correction at
    20 times the learning rate; ``create_optimizer(model, "celo2")`` marks embeddings. Takes the arguments of
    :class:`ThetaOptimizer`. The default weights, ``"builtin:celo2"``, were meta-trained by this package on small
    networks; the authors published none. They want a learning rate that falls to zero, along a line or a cosine.
    """

    rule_type = Celo2Rule
    architecture = "celo2"
    default_weights = "builtin:celo2"
    default_lr = 3e-4
    adamw_lr = 3e-4
    wants_schedule = True
    adamw_embeddings = True
    constants: ClassVar[Mapping[str, Any]] = {
        "adamw": AdamWRule((0.9, 0.95), eps=0.0, eps_root=1e-8, bias_correction=False, lr_mult=20.0)
    }


class CELO2Base(ThetaOptimizer):
    """CELO2-base: the learned rule of CELO2 for every tensor, vectors too, and without orthogonalisation.

    Takes the arguments of :class:`ThetaOptimizer`; no weights are published, so ``weights`` is needed.
    """

    rule_type = Celo2Rule
    architecture = "celo2"
    default_weights = None
    default_lr = 1e-3
    wants_schedule = True
    constants: ClassVar[Mapping[str, Any]] = {"orthogonalises": False}


class ELOCELO2(ThetaOptimizer):
    """ELO-CELO2: the rule of CELO2 for matrices, embeddings included, and AdamW for vectors and scalars.

    AdamW has bias correction, eps outside the root and the same learning rate. Groups may be marked ``rule="adamw"``.
    Takes the arguments of :class:`ThetaOptimizer`.
    """

    rule_type = Celo2Rule
    architecture = "celo2"
    default_weights = "hub:DiamondXL/elo-celo2"
    default_lr = 3e-4
    adamw_lr = 3e-4
    wants_schedule = True
    default_weight_decay = 0.1
    default_max_grad_norm = 1.0
    constants: ClassVar[Mapping[str, Any]] = {"adamw": AdamWRule((0.9, 0.95), eps=1e-8, clips=True)}
