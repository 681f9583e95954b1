"""What learned optimizers are created with: names, types, defaults and meanings of their keywords, each declared once.

A constructor takes them as ``**keywords: Unpack[Keywords]``, which type checkers and editors read. :func:`spelled_out`
puts them into its signature, which all else reads: ``help()``, Lightning's CLI, ``optim_args``, ``pylo info``, docs.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, ParamSpec, TypedDict, cast, get_args, get_origin, get_type_hints

from typing_extensions import Unpack

from pylo_integrations.decay import DecayPolicy
from pylo_integrations.formats import StateDtype
from pylo_integrations.ops.select import Backend
from pylo_integrations.rules.newton_schulz import Precision
from pylo_integrations.step.policies import NonFinitePolicy
from pylo_integrations.weights.sources import Weights

_P = ParamSpec("_P")


class Keywords(TypedDict, total=False):
    """Of every learned optimizer. A default stands beside its type; without one it is None.

    Attributes:
        weight_decay: Weight decay, 0.01 to 0.1 is usual, as with AdamW; by default that of the class.
        num_steps: The horizon, i.e. how many optimizer steps the run will take.
        max_grad_norm: Clip the global L2 norm of the gradients to this before the rule sees them; not if infinity. By
            default that of the class, which is mostly no clipping.
        weight_decay_policy: See :data:`~pylo_integrations.decay.DecayPolicy`.
        maximize: Ascend instead of descend.
        on_nonfinite: See :data:`~pylo_integrations.engine.NonFinitePolicy`.
        chunk_bytes: Bound on the temporaries of a step, in bytes. By default 256 MiB; on CUDA a quarter of the memory
            that is free when a step is planned, at least as much and at most 4 GiB.
        backend: See :data:`~pylo_integrations.ops.select.Backend`.
        shard_step: Where several processes all have the whole parameters (``DistributedDataParallel``, or replicas in
            the ranks of :meth:`LearnedOptimizer.bind_model`), let each step its share of the rows of every tensor and
            keep the state of that share only, as ZeRO's first stage does; afterwards all collect the new parameters.
            Time of a step and bytes of state fall with the number of processes. Without effect on parameters that are
            sharded anyway (``DTensor``, FSDP), on scalars, and in a single process. For checkpoints see
            :meth:`LearnedOptimizer.consolidate_state_dict`.
        stochastic_rounding: Round new bfloat16 parameters up or down at random, so that their mean is right and small
            updates are not lost (:mod:`pylo_integrations.rounding`). Without effect on parameters of other types.
        state_dtype: How state is stored, see :data:`~pylo_integrations.formats.StateDtype`; groups may have their own.
        offload_state: Keep the state of parameters on a device in the host's memory, and step them there
            (:mod:`pylo_integrations.offload`). Without effect on parameters on the CPU, as FSDP2's
            ``CPUOffloadPolicy`` has them.
    """

    weight_decay: float | None
    num_steps: int | None
    max_grad_norm: float | None
    weight_decay_policy: Annotated[DecayPolicy, "adamw"]
    maximize: Annotated[bool, False]
    on_nonfinite: Annotated[NonFinitePolicy, "skip"]
    chunk_bytes: int | None
    backend: Annotated[Backend, "auto"]
    shard_step: Annotated[bool, False]
    stochastic_rounding: Annotated[bool, False]
    state_dtype: Annotated[StateDtype, "float32"]
    offload_state: Annotated[bool, False]


class WeightsKeywords(Keywords, total=False):
    """Of optimizers whose rule is built from theta.

    Attributes:
        weights: Theta: an object, a path, ``"builtin:<name>"``, ``"hub:<owner>/<repo>[@revision]"`` or arrays. By
            default those of the class.
    """

    weights: Weights | None


class ThetaKeywords(WeightsKeywords, total=False):
    """Of those with constants of the rule that stand beside theta.

    Attributes:
        step_mult: Scale of the step; by default theta's.
    """

    step_mult: float | None


class NetworkKeywords(ThetaKeywords, total=False):
    """Of optimizers whose theta has a network for every parameter's step.

    Attributes:
        exp_mult: Scale of the magnitude output; by default theta's.
    """

    exp_mult: float | None


class Orthogonalising(TypedDict, total=False):
    """Of optimizers that orthogonalise.

    Attributes:
        orthogonalise: Precision of the products of matrices that orthogonalise steps, see
            :data:`~pylo_integrations.rules.newton_schulz.Precision`.
    """

    orthogonalise: Annotated[Precision, "auto"]


class OrthogonalKeywords(NetworkKeywords, Orthogonalising, total=False):
    """Of those with a network."""


class PaceKeywords(WeightsKeywords, Orthogonalising, total=False):
    """Of Pace."""


class CeloKeywords(NetworkKeywords, total=False):
    """Of Celo.

    Attributes:
        phase: 2; or 1 for the MLP without the learned schedule, which wants an ``lr`` that falls to zero in its place.
    """

    phase: Annotated[Literal[1, 2], 2]


def split(keywords: Mapping[str, Any]) -> tuple[Keywords, dict[str, Any]]:
    """Those of every learned optimizer, and the others."""
    common = {name: value for name, value in keywords.items() if name in Keywords.__annotations__}
    return cast(Keywords, common), {name: value for name, value in keywords.items() if name not in common}


def spelled_out(init: Callable[_P, None]) -> Callable[_P, None]:
    """Have ``init``, whose last parameter is ``**keywords: Unpack[...]``, take what is declared there and nothing else.

    It is called with a value for every keyword, and its signature has their names, types and defaults.
    """
    signature = inspect.signature(init, eval_str=True)
    *parameters, rest = signature.parameters.values()
    [declared] = get_args(rest.annotation)
    parameters += [_parameter(name, hint) for name, hint in get_type_hints(declared, include_extras=True).items()]
    spelled = signature.replace(parameters=parameters)
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(init)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> None:
        if unknown := kwargs.keys() - spelled.parameters.keys():
            name = type(args[0]).__name__
            raise TypeError(
                f"{name}() got an unexpected keyword argument {min(unknown)!r}; it has {[*spelled.parameters][1:]}"
            )
        init(*args, **cast(Any, {**defaults, **kwargs}))

    checked.__annotations__ = {p.name: p.annotation for p in parameters[1:]} | {"return": None}
    checked.__signature__ = spelled  # type: ignore[attr-defined]
    return checked


def _parameter(name: str, hint: Any) -> inspect.Parameter:
    kind, default = get_args(hint) if get_origin(hint) is Annotated else (hint, None)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


__all__ = [
    "CeloKeywords",
    "Keywords",
    "NetworkKeywords",
    "OrthogonalKeywords",
    "Orthogonalising",
    "PaceKeywords",
    "ThetaKeywords",
    "Unpack",
    "WeightsKeywords",
    "spelled_out",
    "split",
]
