"""The public optimizers. What makes one of a name is in :mod:`pylo_integrations.profiles`; here are types and words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from pylo_integrations.keywords import (
    CeloKeywords,
    NetworkKeywords,
    OrthogonalKeywords,
    PaceKeywords,
    ThetaKeywords,
    Unpack,
    WeightsKeywords,
    spelled_out,
    split,
)
from pylo_integrations.optimizer import LearnedOptimizer
from pylo_integrations.profiles import PROFILES
from pylo_integrations.rules.base import Rule
from pylo_integrations.weights.sources import Weights, load_theta
from pylo_integrations.weights.theta import Theta

__all__ = ["CELO2", "ELO", "ELOCELO2", "CELO2Base", "Celo", "CeloAdam", "MuLO", "Pace", "SmallFCLOpt", "VeLO"]
"""Those of the catalogue, which the package has at its top."""


class ThetaOptimizer(LearnedOptimizer):
    """A learned optimizer whose rule is built from theta; the public optimizers are its subclasses.

    Its keywords are those of :class:`~pylo_integrations.keywords.NetworkKeywords`, and what that is made of.

    Args:
        params: As for :class:`LearnedOptimizer`.
        lr: As for :class:`LearnedOptimizer`.

    Raises:
        ValueError: An argument is out of range, or the weights are for another optimizer.
        FileNotFoundError: The weights cannot be found, or none are given and the class has no default.
        TypeError: A parameter is complex or not floating point.
    """

    architecture: ClassVar[str]
    """What theta must be for, see :data:`~pylo_integrations.profiles.ARCHITECTURES`."""

    default_weights: ClassVar[str | None]
    """A ``weights`` argument; None if there are no default weights."""

    theta_name: ClassVar[str] = ""
    """What :meth:`Theta.from_arrays` calls bare arrays, where it is not :attr:`architecture`."""

    constants: ClassVar[Mapping[str, Any]] = {}
    """Constants of the rule that make it this optimizer, whatever theta."""

    def __init_subclass__(cls, name: str | None = None, **kwargs: Any) -> None:
        """Have a subclass be the optimizer ``name``; without it, it inherits what its base is."""
        super().__init_subclass__(**kwargs)
        if name is None:
            return
        profile = PROFILES[name]
        cls.theta_name, cls.rule_type, cls.architecture = name, profile.rule, profile.architecture
        cls.default_weights, cls.constants = profile.weights, profile.constants
        cls.default_lr, cls.adamw_lr, cls.wants_schedule = profile.lr, profile.adamw_lr, profile.wants_schedule
        cls.default_weight_decay, cls.default_max_grad_norm = profile.weight_decay, profile.max_grad_norm
        cls.adamw_embeddings, cls.anneals = profile.adamw_embeddings, profile.anneals

    @spelled_out
    def __init__(self, params: ParamsT, lr: float | Tensor | None = None, **keywords: Unpack[NetworkKeywords]) -> None:
        self._make(params, lr, keywords)

    def _make(self, params: ParamsT, lr: float | Tensor | None, keywords: WeightsKeywords) -> None:
        """Make theta of ``weights``, the rule of theta, and the optimizer of the rule."""
        common, constants = split(keywords)
        weights = constants.pop("weights")
        theta = self._load(weights)
        rule = theta.rule(**{**self.constants, **constants})
        LearnedOptimizer.__init__(
            self,
            params,
            rule,
            lr=lr,
            theta=theta,
            usual_lrs=self._usual_lrs(theta, rule, weights is None and constants.get("step_mult") is None),
            wants_schedule=self.wants_schedule_with(constants),
            **common,
        )

    @classmethod
    def _load(cls, weights: Weights | None) -> Theta:
        """Theta of a ``weights`` argument."""
        weights = cls.default_weights if weights is None else weights
        if weights is None:
            raise FileNotFoundError(
                f"{cls.__name__} has no default weights, so weights= is needed: a Theta, the path of a "
                f"{cls.architecture} theta.safetensors, 'hub:<owner>/<repo>[@revision]', or arrays by the names of the "
                "reference implementation"
            )
        theta = load_theta(weights, cls.theta_name or cls.architecture)
        if theta.architecture != cls.architecture:
            raise ValueError(f"weights={weights!r} are for {theta.architecture}, not for {cls.__name__}")
        return theta

    @classmethod
    def _usual_lrs(cls, theta: Theta, rule: Rule, is_default: bool) -> list[float]:
        """Learning rates that can be meant: with theta or a ``step_mult`` of the user's, those for its scale too."""
        if is_default:
            return [cls.default_lr]
        config, step_mult = theta.training.get("config"), getattr(rule, "step_mult", 0.0)
        trained = config.get("lr") if isinstance(config, Mapping) else None  # a file may record anything
        lrs = [cls.default_lr, trained, cls.adamw_lr / step_mult if step_mult else None]
        return [lr for lr in lrs if isinstance(lr, (float, int)) and lr > 0]


class SmallFCLOpt(ThetaOptimizer, name="small_fc_lopt"):
    """small_fc_lopt: a per-parameter MLP over Adafactor-style features (:mod:`pylo_integrations.rules.small_fc`).

    Takes the arguments of :class:`ThetaOptimizer`. The default weights, ``"builtin:small_fc_bootstrap"``, are
    constructed, not meta-trained (:func:`pylo_integrations.weights.bootstrap`). The loss and ``num_steps`` are unused.
    """


class VeLO(ThetaOptimizer, name="velo"):
    """VeLO: an LSTM for every tensor controls the MLP that steps it (:mod:`pylo_integrations.rules.velo`).

    Takes the arguments of :class:`ThetaOptimizer`. Needs ``num_steps``, and the loss at every step. The default weights
    are Google's, meta-trained for 4000 TPU-months, as republished in ``"hub:amoudgl/velo-4000"``.
    """


class Celo(ThetaOptimizer, name="celo"):
    """Celo: VeLO's MLPs under one learned schedule for the whole model (:mod:`pylo_integrations.rules.celo`).

    Takes the arguments of :class:`ThetaOptimizer`, and ``phase`` (:class:`~pylo_integrations.keywords.CeloKeywords`).
    Needs ``num_steps``, and the loss at every step. The default weights were meta-trained by this package on small
    networks, ``"builtin:celo"``; those of the authors are ``"hub:amoudgl/celo"``.
    """

    @spelled_out
    def __init__(self, params: ParamsT, lr: float | Tensor | None = None, **keywords: Unpack[CeloKeywords]) -> None:
        self._make(params, lr, keywords)

    @classmethod
    def wants_schedule_with(cls, options: Mapping[str, Any]) -> bool:
        """Whether the learned schedule is left out."""
        return bool(options.get("phase") == 1)


class CeloAdam(ThetaOptimizer, name="celo_adam"):
    """Celo-Adam: Adam under Celo's learned schedule (:mod:`pylo_integrations.rules.celo_adam`).

    Takes the arguments of :class:`ThetaOptimizer` but ``exp_mult``. Needs ``num_steps``, and the loss at every step.
    The default weights are the authors', ``"hub:amoudgl/celo-adam"``.
    """

    @spelled_out
    def __init__(self, params: ParamsT, lr: float | Tensor | None = None, **keywords: Unpack[ThetaKeywords]) -> None:
        self._make(params, lr, keywords)


class MuLO(ThetaOptimizer, name="mulo"):
    """MuLO: small_fc_lopt meta-trained, and used, in the maximal-update parametrisation.

    Therien et al., "μLO: Compute-Efficient Meta-Generalization of Learned Optimizers", 2024. The rule is that of
    :class:`SmallFCLOpt`, and the width multipliers are learning rates of parameter groups: make those with
    :func:`~pylo_integrations.mup_param_groups`. The learned decays are part of theta. Takes the arguments of
    :class:`ThetaOptimizer`. The default weights, ``"builtin:mulo"``, were meta-trained by this package on small
    networks; those of the authors are ``"hub:btherien/mulo"``.
    """


class ELO(ThetaOptimizer, name="elo"):
    """ELO: the rule of :class:`SmallFCLOpt` with decays that were not learned and no scale but ``lr``.

    Takes the arguments of :class:`ThetaOptimizer`.
    """


class CELO2(ThetaOptimizer, name="celo2"):
    """CELO2: a learned per-parameter MLP, orthogonalised, for matrices (:mod:`pylo_integrations.rules.celo2`).

    Vectors, scalars and the tensors of groups marked ``rule="adamw"`` are stepped by Adam without bias correction at
    20 times the learning rate; ``create_optimizer(model, "celo2")`` marks embeddings. Takes the arguments of
    :class:`ThetaOptimizer`, and ``orthogonalise`` (:class:`~pylo_integrations.keywords.Orthogonalising`). The
    default weights, ``"builtin:celo2"``, were meta-trained by this package on small networks; the authors' are
    ``"hub:amoudgl/celo2"``. They want a learning rate that falls to zero, along a line or a cosine.
    """

    @spelled_out
    def __init__(
        self, params: ParamsT, lr: float | Tensor | None = None, **keywords: Unpack[OrthogonalKeywords]
    ) -> None:
        self._make(params, lr, keywords)


class Pace(ThetaOptimizer, name="pace"):
    """Pace: orthogonalised momentum that finds its own step size (:mod:`pylo_integrations.rules.pace`).

    Matrices go where their momentum points, orthogonalised; vectors, scalars, embeddings and the tensors of groups
    marked ``rule="adamw"`` take Adam's step. How far both go is learned: by width and horizon, over the run, by the
    spectrum of the momentum, and by what a step promises to take off the first loss; what makes queries, keys and
    values, of groups marked ``rule="attention"``, goes less far. Takes the arguments of
    :class:`ThetaOptimizer` but ``step_mult`` and ``exp_mult``, and ``orthogonalise`` as :class:`CELO2` does. It wants
    ``num_steps``, over which steps shrink to zero by themselves, so no schedule is needed; without it they never
    shrink. The losses of the first hundred steps are used if they are told, on all ranks or on none. The default
    weights, ``"builtin:pace"``, were meta-trained by this package on small networks. Of a model, tensors that share a
    parameter are stepped each by itself (:mod:`pylo_integrations.fused`), and attention is marked
    (:mod:`pylo_integrations.attention`).
    """

    splits_fused = True
    marks_attention = True

    @spelled_out
    def __init__(self, params: ParamsT, lr: float | Tensor | None = None, **keywords: Unpack[PaceKeywords]) -> None:
        self._make(params, lr, keywords)


class CELO2Base(ThetaOptimizer, name="celo2_base"):
    """CELO2-base: the learned rule of CELO2 for every tensor, vectors too, and without orthogonalisation.

    Takes the arguments of :class:`ThetaOptimizer`. The default weights are the authors', ``"hub:amoudgl/celo2-base"``.
    """


class ELOCELO2(ThetaOptimizer, name="elo_celo2"):
    """ELO-CELO2: the rule of CELO2 for matrices, embeddings included, and AdamW for vectors and scalars.

    AdamW has bias correction, eps outside the root and the same learning rate. Groups may be marked ``rule="adamw"``.
    Takes the arguments of :class:`ThetaOptimizer`, and ``orthogonalise`` as :class:`CELO2` does.
    """

    @spelled_out
    def __init__(
        self, params: ParamsT, lr: float | Tensor | None = None, **keywords: Unpack[OrthogonalKeywords]
    ) -> None:
        self._make(params, lr, keywords)
