"""Are the CUDA kernels right on a device? What a child process finds out before they are taken unasked.

Kernels and reference step the same tensors on the device, of every kind that kernels tell apart; what differs by more
than rounding explains is an error (:mod:`pylo_integrations.ops.self_check` is who asks).
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pylo_integrations.ops.native import NativeStages
from pylo_integrations.ops.select import library_for
from pylo_integrations.ops.self_check import Subject, Verdict, spoken
from pylo_integrations.optimizers import CELO2, Celo, CELO2Base, CeloAdam, Pace, SmallFCLOpt, ThetaOptimizer, VeLO
from pylo_integrations.rules.adamw import AdamWRule
from pylo_integrations.rules.base import Control, Rule, StepContext
from pylo_integrations.rules.celo2 import Celo2Rule
from pylo_integrations.rules.features import TIME_SCALES, channel_count, channel_counts
from pylo_integrations.rules.networks import STACK
from pylo_integrations.rules.pace import PacedAdamRule, PaceRule
from pylo_integrations.sharding.blocks import Bucket, Sums
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import Held, Piece
from pylo_integrations.step.stages import Part, run_stages
from pylo_integrations.weights.sources import load_theta
from pylo_integrations.weights.stand_in import stand_in
from pylo_integrations.weights.theta import Theta

BOUND = 2e-4
"""Of the largest change of a tensor: on tensor cores numbers have 16 bits, and three steps add up."""

LOOSE = 0.2
"""The same where state is rounded for a second time: of sums that differ in the last bit, a few elements take the other
neighbour, which in int8 is up to 1/16 away in an average of squares."""

OPTIMIZERS: dict[str, type[ThetaOptimizer]] = {
    cls.rule_type.kind: cls for cls in (SmallFCLOpt, VeLO, Celo, CeloAdam, CELO2Base, Pace)
}
"""Those with kernels for CUDA, by the kind of their rule. ``celo2_base`` has the kernels of ``celo2``, and no
orthogonalisation multiplies their rounding errors."""

VECTORS: dict[str, type[ThetaOptimizer]] = {AdamWRule.kind: CELO2, PacedAdamRule.kind: Pace}
"""Those with groups that are marked ``"adamw"``, by the kind of the rule that these have."""

_STEP_MULTS = {"small_fc": 1e-2, "velo": 5e3, "celo": 1e-1, "celo_adam": 1e-1, "celo2": 5.0}
"""By architecture, so that a step of :func:`_theta_of` changes tensors by a few percent."""

_LRS = {AdamWRule.kind: 1e-2, PacedAdamRule.kind: 1.0, Pace.rule_type.kind: 1.0}
"""For the same purpose, where theta has no such constant."""

# Scalars, vectors, matrices, ties, convolutions; of one part and of several in every kernel.
_MATRICES = [(33, 7), (64, 64), (700, 70), (3, 3000), (2500, 3), (8, 16, 3, 3), (5, 5, 5), (6, 5, 4)]
SHAPES: list[tuple[int, ...]] = [(), (7,), (130,), (17000,), *_MATRICES]
FEW: list[tuple[int, ...]] = [(130,), (33, 7), (8, 16, 3, 3)]
STORED: list[tuple[int, ...]] = [(700, 70), (3, 3000), (64, 16, 3, 3), (130,)]
"""Large enough for formats of state, in rows of one block and of several."""

_RANKS = 2
"""Among which tensors in pieces are divided."""

_CIRCUMSTANCES = ("out of memory", "busy or unavailable", "already in use")


class Finding(NamedTuple):
    """One comparison.

    Attributes:
        what: Was compared.
        error: The largest, as a share of what is allowed; NaN if there is something else than a number.
    """

    what: str
    error: float

    def __str__(self) -> str:
        return f"{self.what}: {'right' if self.is_right else 'WRONG'}, error {self.error:.2g} of what is allowed"

    @property
    def is_right(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= 1  # which NaN is not


def main() -> None:
    """Check the kernels on the device, and for the rule, that the command line names; the last line is the verdict."""
    warnings.simplefilter("ignore")  # about learning rates, which suit no training here
    torch.set_float32_matmul_precision("highest")  # the reference has to be better than the kernels
    device, kind, widths = sys.argv[1:]
    subject = Subject(kind, tuple(map(int, filter(None, widths.split(",")))))
    print(spoken(check(torch.device(device), subject, print)))


def check(device: torch.device, subject: Subject, tell: Callable[[object], object]) -> Verdict:
    """Compare kernels and reference; ``tell`` gets every finding."""
    worst = 0.0
    try:
        for finding in findings(device, subject):
            tell(finding)
            if not finding.is_right:
                return Verdict(False, str(finding))
            worst = max(worst, finding.error)
    except Exception as error:  # whatever it is, kernels are not to be used
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        return Verdict(False, text, final=not any(words in str(error) for words in _CIRCUMSTANCES))
    return Verdict(True, f"largest error {worst:.2g} of what is allowed")


def standard_subjects() -> list[Subject]:
    """The rules with kernels for CUDA, in their published geometry."""
    rules = [stand_in(cls.architecture).rule() for cls in OPTIMIZERS.values()]
    return [Subject.of(rule) for rule in (*rules, _shipped("celo2").rule(), *map(_rule_of_vectors, VECTORS))]


def findings(device: torch.device, subject: Subject) -> Iterator[Finding]:
    """All comparisons, one after the other."""
    runs = _Runs(subject)
    yield runs.compare("tensors of all shapes", _tensors(SHAPES, device), steps=3)
    yield runs.repeat("the same again, bit by bit", _tensors(SHAPES, device))
    images = [tensor.contiguous(memory_format=torch.channels_last) for tensor in _tensors([(8, 16, 3, 3)], device)]
    yield runs.compare("channels last", images)
    for kind in ("bfloat16", "int8"):
        yield runs.compare(f"state in {kind}", _tensors(STORED, device), state_dtype=kind)
        yield runs.compare(f"state in {kind}, again", _tensors(STORED, device), steps=2, bound=LOOSE, state_dtype=kind)
    for dtype in (torch.bfloat16, torch.float16):
        yield runs.compare(str(dtype).removeprefix("torch."), _tensors(FEW, device), dtype)
    options: dict[str, Any] = {"weight_decay": 0.1, "weight_decay_policy": "l2", "maximize": True}
    yield runs.compare("options of a group", _tensors(FEW, device), **options)
    yield runs.compare("gradients that are not finite", _tensors(FEW, device), spoils=True, on_nonfinite="zero")
    for shape, axis, at in (((20, 30), 0, 7), ((20, 30), 1, 11), ((6, 8, 3, 3), 2, 1)):
        error = _error_of_pieces(runs.rule, device, shape, axis, at)
        yield Finding(f"a tensor of shape {shape} cut in two along axis {axis}", error)
    if runs.is_linear:
        yield _Runs(subject, _shipped("celo2")).compare("the network of celo2", _tensors(FEW, device))
    numel = _large_numel(device)
    yield runs.compare(f"a tensor of {numel:,} elements", _tensors([(numel // 1024, 1024)], device))


class _Runs:
    """Short trainings from the same tensors, with the same gradients."""

    def __init__(self, subject: Subject, theta: Theta | None = None) -> None:
        self._group: dict[str, Any] = {}
        if subject.kind in VECTORS:
            self.rule, self._group["rule"] = _rule_of_vectors(subject.kind), "adamw"
            self._optimizer: Callable[..., ThetaOptimizer] = VECTORS[subject.kind]
        else:
            theta = theta or _theta_of(subject)
            self.rule = theta.rule()
            exact: dict[str, Any] = {"orthogonalise": "float32"} if subject.kind == PaceRule.kind else {}
            self._optimizer = functools.partial(OPTIMIZERS[subject.kind], weights=theta, num_steps=10, **exact)
        if subject.kind in _LRS:
            self._group["lr"] = _LRS[subject.kind]

    @property
    def is_linear(self) -> bool:
        """Whether the rule has a network of one layer."""
        return isinstance(self.rule, Celo2Rule) and len(self.rule.weights) == 1

    def compare(
        self,
        what: str,
        starts: Sequence[Tensor],
        dtype: torch.dtype = torch.float32,
        steps: int = 1,
        spoils: bool = False,
        bound: float = BOUND,
        **options: Any,
    ) -> Finding:
        """Kernels on tensors of ``dtype`` against the reference, in float32 on the same numbers."""
        starts = [start.to(dtype) for start in starts]
        found = self._train("native", starts, dtype, steps, spoils, **options)
        wanted = self._train("reference", starts, torch.float32, steps, spoils, **options)
        moves = [(want - start).abs().max().item() for want, start in zip(wanted, starts, strict=True)]
        if not max(moves) > 0.005 * max(start.abs().max().item() for start in starts):  # nothing could be told then
            return Finding(what, math.nan)
        errors = []
        for param, want, move in zip(found, wanted, moves, strict=True):
            # A single element may be back where it began.
            allowed = (
                bound * (move if param.numel() > 1 else max(moves)) + torch.finfo(dtype).eps * want.abs().max().item()
            )
            errors.append((param.float() - want).abs().max().item() / allowed)
        return Finding(what, max(errors, key=lambda error: math.inf if math.isnan(error) else error))

    def repeat(self, what: str, starts: Sequence[Tensor]) -> Finding:
        """Kernels twice; partial sums are added in a fixed order, so only a race makes a difference."""
        first, second = (self._train("native", starts, torch.float32, 2) for _ in range(2))
        return Finding(what, 0.0 if all(map(torch.equal, first, second)) else math.inf)

    def _train(
        self,
        backend: str,
        starts: Sequence[Tensor],
        dtype: torch.dtype,
        steps: int,
        spoils: bool = False,
        **options: Any,
    ) -> list[Tensor]:
        params = [nn.Parameter(start.to(dtype, copy=True)) for start in starts]
        optimizer = self._optimizer([{"params": params, **self._group}], backend=backend, **options)
        for step in range(steps):
            for number, (param, start) in enumerate(zip(params, starts, strict=True)):
                grad = _uneven_gradient(start, 100 * step + number)
                if spoils:
                    grad.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, 1e20])
                param.grad = grad.to(dtype)
            # Who needs none gets none: these gradients promise far more than such a loss, and pace would hardly move.
            loss = torch.tensor(3.0 - step, device=starts[0].device) if optimizer.needs_loss else None
            optimizer.step(loss=loss)
        return [param.detach() for param in params]


def _tensors(shapes: Sequence[tuple[int, ...]], device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device).mul_(0.1) for shape in shapes]


def _uneven_gradient(like: Tensor, seed: int) -> Tensor:
    """One whose slices differ in size along every axis, so that statistics of another axis show."""
    grad = torch.empty_like(like, dtype=torch.float32)
    grad.normal_(generator=torch.Generator(like.device).manual_seed(seed))
    for axis, extent in enumerate(like.shape):
        grad *= (10 ** -torch.linspace(0, 1.5, extent, device=like.device)).view(-1, *(1,) * (like.dim() - axis - 1))
    return grad.to(like.dtype)


def _shipped(name: str) -> Theta:
    return load_theta(f"builtin:{name}", name)


def _rule_of_vectors(kind: str) -> Rule:
    if kind == AdamWRule.kind:
        return AdamWRule()
    pace = _shipped("pace").rule()
    assert isinstance(pace, PaceRule)
    return pace.vectors


def _theta_of(subject: Subject) -> Theta:
    """Random weights in a geometry, large enough for every input to matter; of Pace, those that it has."""
    if subject.kind == PaceRule.kind:
        return _shipped("pace")
    generator = torch.Generator().manual_seed(1)
    architecture, hidden = OPTIMIZERS[subject.kind].architecture, subject.widths[:-1]
    shapes: dict[str, tuple[int, ...]]
    kept: dict[str, Tensor] = {}
    if architecture == "small_fc":
        inputs = [channel_count(SmallFCLOpt.rule_type.features) + len(TIME_SCALES), *hidden]
        shapes = {f"nn/~/w{layer}": pair for layer, pair in enumerate(itertools.pairwise([*inputs, 2]))}
        shapes.update((f"nn/~/b{layer}", (width,)) for layer, width in enumerate([*hidden, 2]))
    elif architecture == "celo2":
        widths = [*hidden, 3]
        channels = enumerate(channel_counts(CELO2Base.rule_type.features))
        shapes = {f"{STACK}w0__{index}": (count, widths[0]) for index, count in channels}
        shapes.update((f"{STACK}w{1 + layer}", pair) for layer, pair in enumerate(itertools.pairwise(widths)))
        shapes.update((f"{STACK}b{layer}", (width,)) for layer, width in enumerate(widths))
    else:
        given = stand_in(architecture, max(hidden, default=None)).arrays
        shapes = {name: tuple(array.shape) for name, array in given.items() if name.startswith(STACK)}
        kept = {name: array for name, array in given.items() if name not in shapes}
    arrays = {}
    for name, shape in shapes.items():
        is_weight = name.rpartition("/")[2].startswith("w")
        scale = 1 / math.sqrt(max(shape[-2], 8)) if is_weight else 0.1
        arrays[name] = scale * torch.randn(shape, generator=generator)
    hyper = {"step_mult": _STEP_MULTS[architecture], **({"exp_mult": 1e-1} if subject.widths else {})}
    return Theta(architecture, arrays | kept, hyper)


def _error_of_pieces(rule: Rule, device: torch.device, shape: tuple[int, ...], axis: int, at: int) -> float:
    """A tensor against itself in two pieces, as two ranks would hold it, of which the sums are added up."""
    (start,) = _tensors([shape], device)
    first, second = list(start.shape), list(start.shape)
    first[axis], second[axis] = at, start.shape[axis] - at
    origin = (0,) * len(shape)
    begin = [at if each == axis else 0 for each in range(len(shape))]
    boxes = [Box(origin, tuple(first)), Box(tuple(begin), tuple(second))]
    (whole,) = _step_boxes(rule, start, [Box(origin, shape)])
    pieces = torch.cat(_step_boxes(rule, start, boxes), axis)
    allowed = BOUND * (whole - start).abs().max() + torch.finfo(torch.float32).eps * start.abs().max()
    return ((pieces - whole).abs().max() / allowed).item()


def _step_boxes(rule: Rule, start: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    """What becomes of boxes of a tensor in a step; of rules that finish steps, by the steps that they would finish."""
    library = library_for(start.device)
    if isinstance(library, str):
        raise RuntimeError(library)
    layout, grad = TensorLayout.whole(tuple(start.shape)), _uneven_gradient(start, 0)
    group = {"maximize": False, "weight_decay": 0.0, "weight_decay_policy": "before"}
    buckets = []
    for box in boxes:
        mine = box.slices((0,) * start.dim())
        param = nn.Parameter(start[mine].clone())
        shapes = rule.state_shapes(layout).items()
        state = {name: param.new_zeros(param.shape if shape is None else shape) for name, shape in shapes}
        held = [Held((Piece(box),))]
        grads = [grad[mine].contiguous()]
        buckets.append(Bucket(layout, [param], [state], group, torch.float32, _RANKS, held=held, grads=grads))
        buckets[-1].cut_(box.numel)
    parts = [Part((i,), NativeStages(library, [rule], [bucket])) for i, bucket in enumerate(buckets)]
    memory = {name: value.to(start.device) for name, value in rule.initial_memory().items()}
    loss = torch.ones((), device=start.device)
    ctx = StepContext(0, 10, loss, memory=memory, constants=rule.constants(start.device, torch.float32))
    contexts, factors = [ctx] * len(parts), [(1.0, 1.0)] * len(parts)
    collected = [dict(part.stages.collect([ctx])[0]) for part in parts]
    _add_up(collected)

    def decide(sums: Sequence[Sums]) -> Sequence[Control]:
        return list(rule.control(buckets[:1], sums[:1], ctx)) * len(parts)

    with torch.no_grad():
        proposed, _ = run_stages(parts, collected, contexts, factors, decide, _add_up)
        for bucket, steps in zip(buckets, proposed, strict=True):
            for step in steps or ():
                bucket.params[0].sub_(step.view(bucket.params[0].shape))
    return [bucket.params[0].detach() for bucket in buckets]


def _add_up(sums: Sequence[Sums]) -> None:
    """Let every share of a sum be all of it."""
    for name in sums[0]:
        total = torch.stack([shares[name] for shares in sums]).sum(0)
        for shares in sums:
            shares[name].copy_(total)


def _large_numel(device: torch.device) -> int:
    """Elements of a tensor beyond 2^31 bytes, where there is memory for it."""
    if device.type != "cuda":
        return 1 << 16
    free, _ = torch.cuda.mem_get_info(device)
    return next((numel for numel in ((1 << 29) + (1 << 20), 1 << 25, 1 << 22) if 80 * numel < free), 1 << 20)
