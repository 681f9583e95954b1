"""Random things that users do between steps, and steps compared with those of an optimizer without a past.

A :class:`Session` trains a few small tensors. Between steps it does what training code, frameworks and mistakes do to
parameters, gradients, state, groups and checkpoints. Every step is also taken by a *twin*: an optimizer that is made
anew from copies of everything and has never cached anything. Both end with the same bits, or both raise the same kind
of error and the session's tensors are what they were. Parameters and their state lie between guards that nobody may
overwrite.

As a program it goes on for as long as one likes, under sanitizers too, see "Sanitizers" in docs/contributing.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
import io
import math
import pickle
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from thetas import create
from torch import Tensor, nn

from pylo_integrations import CheckpointError, LearnedOptimizer, get_optimizer_info, list_optimizers
from pylo_integrations.formats import FORMATS
from pylo_integrations.ops import loader, select
from pylo_integrations.progress import Progress

SHAPES = [(), (1,), (7,), (64,), (1, 5), (6, 1), (5, 3), (9, 17), (16, 16), (3, 2, 5), (4, 3, 3, 3), (2, 1, 3, 2, 2)]
LARGE = (64, 65)
"""Of a tensor whose state may be stored in few bits."""

DTYPES = [torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64]
GUARD = 16
"""Elements before and after a guarded tensor."""

SENTINEL = 1.375
"""What they hold, cast to the dtype."""

SANE_LR = 10.0
"""Learning rates above may overflow what was finite."""


class Mismatch(AssertionError):
    """A step differs from its twin's; the message has what led there."""


def copy_of(tensor: Tensor) -> Tensor:
    """A tensor with other memory, the same strides and, unlike gradients need, the same lazy flags."""
    if tensor.layout == torch.strided and tensor.is_neg():
        return torch._neg_view(resolved_copy_of(tensor.detach().neg()))
    return resolved_copy_of(tensor)


def resolved_copy_of(tensor: Tensor) -> Tensor:
    """A tensor with other memory, the same strides and no lazy flags."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.numel() == 0 or tensor._is_zerotensor():
        return tensor.clone()
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    span = tensor.as_strided((extent,), (1,), tensor.storage_offset()).clone()
    return span.as_strided(tensor.shape, tensor.stride())


def bits(tensor: Tensor) -> bytes:
    """What a tensor holds, NaNs included."""
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    flat.view(tensor.shape).copy_(tensor.detach().to_dense())
    return flat.view(torch.uint8).numpy().tobytes()


class Session:
    """One optimizer and its tensors.

    Args:
        seed: Of everything.
        name: Of the catalogue entry.
        backend: Of the optimizer.
    """

    def __init__(self, seed: int, name: str, backend: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.name = name
        self.spec = get_optimizer_info(name)
        self.log: list[str] = []
        self.guards: list[tuple[Tensor, int]] = []
        self.saved: list[Any] = []
        self.steps = 0
        self.options: dict[str, Any] = {
            "backend": backend,
            "chunk_bytes": self.random.choice([2**28, 2**28, 20_000]),
            "stochastic_rounding": self.random.random() < 0.2,
            "on_nonfinite": self.random.choice(["skip", "zero", "error"]),
            "max_grad_norm": self.random.choice([None, None, 1.0]),
            "state_dtype": self.random.choice([*["float32"] * 6, "bfloat16", "int8"]),
        }
        self.params = [self.parameter() for _ in range(self.random.randint(1, 6))]
        cut = self.random.randint(0, len(self.params))
        self.optimizer = create(
            [{"params": part} for part in (self.params[:cut], self.params[cut:])], name, **self.options
        )
        if self.random.random() < 0.2:
            self.optimizer.enable_telemetry()

    # -- tensors -------------------------------------------------------------------------------------------------------

    def normal(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tuple(shape), generator=self.generator).to(dtype)

    def guarded(self, values: Tensor) -> Tensor:
        """A copy of ``values`` between guards; without, where memory is not one piece (sparse tensors)."""
        if values.layout != torch.strided:
            return values.clone()
        n = values.numel()
        base = torch.full((n + 2 * GUARD,), SENTINEL, dtype=values.dtype)
        self.guards = [*self.guards[-200:], (base, n)]
        inside = base[GUARD : GUARD + n].view(values.shape)
        return inside.copy_(values)

    def parameter(self) -> nn.Parameter:
        shapes = SHAPES if self.options["state_dtype"] == "float32" else [*SHAPES, LARGE, LARGE]
        values = self.normal(self.random.choice(shapes), self.random.choice(DTYPES))
        return nn.Parameter(self.guarded(values))

    def one(self) -> nn.Parameter:
        return self.random.choice(self.params)

    def state_of(self, param: Tensor) -> dict[str, Any]:
        return self.optimizer.state.get(param, {})

    def give_gradients(self) -> None:
        for param in self.params:
            if self.random.random() < 0.9:
                param.grad = self.normal(param.shape).to(param.dtype)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def everything(self) -> list[tuple[tuple[int, ...], bytes]]:
        """What a step may change, by value."""
        states = [v for p in self.params for v in self.state_of(p).values() if isinstance(v, Tensor)]
        return [(tuple(t.shape), bits(t)) for t in (*self.params, *states)]

    def twin(self) -> tuple[LearnedOptimizer, list[Tensor]]:
        """An optimizer without a past, over copies."""
        copies: dict[int, nn.Parameter] = {}
        for param in self.params:
            twin = copies[id(param)] = nn.Parameter(copy_of(param), requires_grad=param.requires_grad)
            if param.grad is not None:
                # Whatever p.grad = ... refuses was put there behind its back.
                twin.grad = None
                # A step reads a lazy one from a dense copy, whose norm is summed in another order than over gaps.
                grad = param.grad.clone() if param.grad.is_neg() else resolved_copy_of(param.grad)
                self.force_gradient(twin, grad)
        own = self.optimizer
        groups = [{"params": [copies[id(p)] for p in group["params"]]} for group in own.param_groups]
        fresh = create(groups, self.name, **self.options)
        for group, theirs in zip(fresh.param_groups, own.param_groups, strict=True):
            params = group["params"]
            group.clear()  # of options too that the session's group has lost
            group.update({**theirs, "params": params})
        for param in self.params:
            if param in own.state:
                state = own.state[param]
                fresh.state[copies[id(param)]] = {
                    k: copy_of(v) if isinstance(v, Tensor) else v for k, v in state.items()
                }
        fresh._born = copy.deepcopy(own._born)  # what distinguishes a wrapper's flattened parameter from a reshaped one
        progress = own._progress
        memory = {name: value.clone() for name, value in progress.memory.items()}
        fresh._progress.assign(Progress(progress.iteration, progress.num_steps, progress.nonfinite_steps, memory))
        fresh._progress.has_begun = progress.has_begun  # it was given its states together with that
        return fresh, [copies[id(param)] for param in self.params]

    @staticmethod
    def force_gradient(param: Tensor, grad: Tensor) -> None:
        """Set a gradient that does not fit its parameter, as replacing ``p.data`` after ``backward()`` does."""
        if grad.shape == param.shape and grad.dtype == param.dtype:
            param.grad = grad
            return
        param.grad = None
        data = param.data
        param.data = torch.empty(grad.shape, dtype=grad.dtype)
        param.grad = grad
        param.data = data

    def is_finite(self) -> bool:
        tensors = [t for p in self.params for t in (p, p.grad, *self.state_of(p).values()) if isinstance(t, Tensor)]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        numbers = [lr for lr in rates if isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.numel() == 1)]
        sane = len(numbers) == len(rates) and all(0 <= float(lr) <= SANE_LR for lr in numbers)
        return sane and all(bool(t.to_dense().double().abs().lt(1e4).all()) for t in tensors if not t.is_complex())

    def attempt(self, optimizer: LearnedOptimizer, loss: Any) -> type[BaseException] | None:
        try:
            optimizer.step(loss=loss)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            self.error = error
            return type(error)
        return None

    def step(self) -> None:
        """Take a step beside a twin."""
        loss: Any = self.random.choice([2.0, torch.tensor(1.5), 0.5]) if self.random.random() < 0.95 else None
        self.steps += 1
        fresh, copies = self.twin()
        before, finite = self.everything(), self.is_finite()
        iteration = self.optimizer.iteration
        mine, theirs = self.attempt(self.optimizer, loss), self.attempt(fresh, loss)
        self.log.append(f"step(loss={loss}) -> {mine.__name__ if mine else 'taken'}")
        self.check(mine is theirs, f"the session's step: {mine}, the twin's: {theirs} ({getattr(self, 'error', '')})")
        for base, n in self.guards:
            ends = torch.cat([base[:GUARD], base[GUARD + n :]])
            expected = torch.full_like(ends, SENTINEL)
            self.check(torch.equal(ends, expected), "a guard was overwritten")
        if mine is not None:
            self.check(mine is not KeyError, f"an error without a message for people: {self.error!r}")
            same = self.optimizer.iteration == iteration
            self.check(same and self.unchanged(before), f"{self.error!r} was raised after something was written")
            self.heal()
            return
        for i, (param, other) in enumerate(zip(self.params, copies, strict=True)):
            self.check(
                bits(param) == bits(other), f"parameter {i} of shape {tuple(param.shape)} differs from the twin's"
            )
            state, twin_state = self.state_of(param), fresh.state.get(other, {})
            if param.grad is None and not (state and twin_state):
                continue  # an optimizer's first step makes states of all parameters, later ones of those they step
            self.check(
                state.keys() == twin_state.keys(), f"states {list(state)} and {list(twin_state)} of parameter {i}"
            )
            for name, value in state.items():
                same = not isinstance(value, Tensor) or bits(value) == bits(twin_state[name])
                formats = [
                    (t.shape, t.stride(), t.dtype) for t in (param, value, twin_state[name]) if isinstance(t, Tensor)
                ]
                self.check(same, f"state {name} of parameter {i} differs from the twin's: {formats}")
        self.check(self.optimizer.iteration == fresh.iteration, "iterations differ")
        if finite:
            for i, param in enumerate(self.params):
                self.check(bool(param.isfinite().all()), f"parameter {i} was finite")

    def unchanged(self, before: list[tuple[tuple[int, ...], bytes]]) -> bool:
        # A state may have been created, or cast to the dtype that it has to have: parameters are compared, and those
        # states that are as long as before.
        after = self.everything()
        count = len(self.params)
        if after[:count] != before[:count]:
            return False
        return len(after) != len(before) or all(
            a == b or (a[0] == b[0] and len(a[1]) != len(b[1])) for a, b in zip(after, before, strict=True)
        )

    def check(self, holds: bool, message: str) -> None:
        if not holds:
            raise Mismatch(message)

    def heal(self) -> None:
        """Undo what makes steps impossible, as a user would after an error."""
        for param in self.params:
            param.grad = None
        damaged = self.random.choice([self.params, [p for p in self.params if self.random.random() < 0.5]])
        for param in damaged:
            self.optimizer.state.pop(param, None)
        for group in self.optimizer.param_groups:
            group.update(lr=self.spec.lr, weight_decay=0.0, weight_decay_policy="before", maximize=False)
            group.update(axes="out_in", rule="learned", base_lr=self.spec.lr)
            if str(group.get("state_dtype")) not in FORMATS:
                group.pop("state_dtype", None)
        if damaged is not self.params and self.attempts_to_heal():
            self.optimizer.state.clear()

    def attempts_to_heal(self) -> bool:
        return self.random.random() < 0.5

    def run(self, steps: int) -> None:
        """Act and step."""
        for _ in range(steps):
            if self.random.random() < 0.85:
                self.give_gradients()
            for _ in range(self.random.choice([0, 0, 1, 1, 2, 3])):
                action = self.random.choice(ACTIONS)
                self.log.append(action.__name__)
                action(self)
            self.step()


# -- what users do -----------------------------------------------------------------------------------------------------

Action = Callable[[Session], None]
ACTIONS: list[Action] = []


def action(function: Action) -> Action:
    ACTIONS.append(function)
    return function


@action
def new_storage(s: Session) -> None:
    p = s.one()
    p.data = s.guarded(p.data)


@action
def other_memory_format(s: Session) -> None:
    p = s.one()
    if p.dim() >= 2:
        p.data = p.data.transpose(0, -1).contiguous().transpose(0, -1)


@action
def gaps_in_memory(s: Session) -> None:
    p = s.one()
    if p.dim() >= 1:
        p.data = p.data.repeat_interleave(2, -1)[..., ::2]


@action
def other_dtype(s: Session) -> None:
    p = s.one()
    p.grad = None
    p.data = s.guarded(p.data.to(s.random.choice(DTYPES)))


@action
def other_dtype_after_backward(s: Session) -> None:
    p = s.one()
    p.data = s.guarded(p.data.to(s.random.choice(DTYPES)))


@action
def reshaped(s: Session) -> None:
    p = s.one()
    p.data = p.data.reshape(s.random.choice([(-1, 1), (1, -1), (-1,)]))


@action
def grown_or_shrunk(s: Session) -> None:
    p = s.one()
    p.data = s.guarded(s.normal(s.random.choice(SHAPES), p.dtype))


@action
def edited_in_place(s: Session) -> None:
    with torch.no_grad():
        s.one().mul_(0.9)


@action
def frozen(s: Session) -> None:
    p = s.one()
    p.requires_grad_(not p.requires_grad)
    if not p.requires_grad and s.random.random() < 0.7:
        p.grad = None


@action
def no_gradient(s: Session) -> None:
    s.one().grad = None


@action
def no_gradients(s: Session) -> None:
    immutable = any(p.grad is not None and p.grad._is_zerotensor() for p in s.params)
    s.optimizer.zero_grad(set_to_none=s.random.random() < 0.5 or immutable)


@action
def odd_values_of_a_gradient(s: Session) -> None:
    p = s.one()
    if p.grad is not None and p.grad.numel() and p.grad.layout == torch.strided:
        s.force_gradient(p, p.grad.clone())
        p.grad[(0,) * p.grad.dim()] = s.random.choice([math.nan, math.inf, -math.inf, 0.0, 1e-30])


@action
def gradient_of_other_form(s: Session) -> None:
    p = s.one()
    values = s.normal(p.shape)
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda g: g.double(),
        lambda g: g.half(),
        lambda g: g.bfloat16(),
        lambda g: torch._neg_view(g),
        lambda g: torch.complex(g, g).conj().imag,
        lambda g: torch._efficientzerotensor(g.shape),
        lambda g: g.to_sparse(),
        lambda g: g.mean().expand(g.shape),
        lambda g: g.repeat_interleave(2, -1)[..., ::2] if g.dim() else g,
        lambda g: g.transpose(0, -1).contiguous().transpose(0, -1) if g.dim() > 1 else g,
        lambda g: g.reshape(-1),
        lambda g: s.normal(s.random.choice(SHAPES)),
        lambda g: g.flip(0) if g.dim() else g,
        lambda g: torch.complex(g, g),
    ]
    grad = s.random.choice(forms)(values)
    s.force_gradient(p, grad)


@action
def one_gradient_for_two(s: Session) -> None:
    p, q = s.one(), s.one()
    if p.grad is not None and p.shape == q.shape and p.dtype == q.dtype:
        s.force_gradient(q, p.grad)


@action
def parameter_with_a_lazy_flag(s: Session) -> None:
    p = s.one()
    if p.numel():
        p.data = torch._neg_view(p.data.neg())


@action
def state_cloned(s: Session) -> None:
    state = s.state_of(s.one())
    for name, value in state.items():
        if isinstance(value, Tensor):
            state[name] = s.guarded(value)


@action
def state_of_other_form(s: Session) -> None:
    state = s.state_of(s.one())
    tensors = [name for name, value in state.items() if isinstance(value, Tensor) and value.layout == torch.strided]
    if not tensors:
        return
    name = s.random.choice(tensors)
    forms: list[Callable[[Tensor], Any]] = [
        lambda v: v.half(),
        lambda v: v.double(),
        lambda v: v.reshape(-1),
        lambda v: v[:1] if v.dim() else v,
        lambda v: v.reshape(-1, 1),
        lambda v: torch.cat([v.reshape(-1), v.reshape(-1)]),
        lambda v: torch._neg_view(v.neg()),
        lambda v: v.transpose(0, -1).contiguous().transpose(0, -1) if v.dim() > 1 else v,
        lambda v: v.repeat_interleave(2, -1)[..., ::2] if v.dim() else v,
        lambda v: v.mean().expand(v.shape),
        lambda v: torch.zeros(0),
        lambda v: None,
        lambda v: 0.0,
        lambda v: v.to(torch.int64),
        lambda v: v.to_sparse(),
    ]
    state[name] = s.random.choice(forms)(state[name].clone())


@action
def all_of_a_state_cast(s: Session) -> None:
    p = s.one()
    if p in s.optimizer.state:
        dtype = s.random.choice(DTYPES)
        state = s.optimizer.state[p]
        s.optimizer.state[p] = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in state.items()}


@action
def state_entry_lost(s: Session) -> None:
    state = s.state_of(s.one())
    if state:
        del state[s.random.choice(list(state))]


@action
def state_emptied(s: Session) -> None:
    if s.random.random() < 0.5:
        s.state_of(s.one()).clear()
    else:
        s.optimizer.state.clear()


@action
def state_touched(s: Session) -> None:
    len(s.optimizer.state[s.one()])


@action
def foreign_state(s: Session) -> None:
    p = s.one()
    s.optimizer.state[p]["foreign"] = s.random.choice([s.normal(p.shape), s.normal((3,)), 7, "x", None])


@action
def states_swapped(s: Session) -> None:
    p, q = s.one(), s.one()
    if p in s.optimizer.state and q in s.optimizer.state:
        s.optimizer.state[p], s.optimizer.state[q] = s.optimizer.state[q], s.optimizer.state[p]
        if p is not q and s.optimizer.state[p] is s.optimizer.state[q]:
            s.optimizer.state[q] = dict(s.optimizer.state[q])


@action
def other_lr(s: Session) -> None:
    group = s.random.choice(s.optimizer.param_groups)
    group["lr"] = s.random.choice([s.spec.lr, 0.5 * s.spec.lr, torch.tensor(s.spec.lr), 0.0, s.spec.lr / 1000])


@action
def impossible_option(s: Session) -> None:
    group = s.random.choice(s.optimizer.param_groups)
    key = s.random.choice(["lr", "weight_decay", "weight_decay_policy", "axes", "rule", "state_dtype"])
    group[key] = s.random.choice([None, math.nan, math.inf, -1.0, "0.1", [0.1], torch.ones(2)])


@action
def other_option(s: Session) -> None:
    group = s.random.choice(s.optimizer.param_groups)
    key, values = s.random.choice(
        [
            ("weight_decay", [0.0, 0.01, 0.1]),
            ("weight_decay_policy", ["before", "after", "before_independent", "after_independent", "l2"]),
            ("maximize", [True, False]),
            ("axes", ["out_in", "in_out"]),
            ("rule", s.optimizer.rule.choices),
        ]
    )
    group[key] = s.random.choice(values)


@action
def stored_otherwise(s: Session) -> None:
    """What the state is not yet, unless it is converted."""
    s.random.choice(s.optimizer.param_groups)["state_dtype"] = s.random.choice(list(FORMATS))
    if s.random.random() < 0.8:
        try:
            s.optimizer.load_state_dict(s.optimizer.state_dict())
        except CheckpointError as error:  # of what other actions did
            s.log.append(f"not converted: {error}")


@action
def another_parameter(s: Session) -> None:
    if len(s.params) < 10:
        p = s.parameter()
        s.params.append(p)
        if s.random.random() < 0.5:
            s.optimizer.add_param_group({"params": [p]})
        else:
            s.optimizer.param_groups[0]["params"].append(p)


@action
def parameters_reordered(s: Session) -> None:
    s.random.shuffle(s.random.choice(s.optimizer.param_groups)["params"])


@action
def parameter_replaced(s: Session) -> None:
    old, new = s.one(), s.parameter()
    s.optimizer.state.pop(old, None)  # or torch's state_dict() fails, of any optimizer
    for group in s.optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    s.params[next(i for i, p in enumerate(s.params) if p is old)] = new


@action
def saved(s: Session) -> None:
    s.saved.append((copy.deepcopy(s.optimizer.state_dict()), [p.detach().clone() for p in s.params]))


@action
def loaded(s: Session) -> None:
    state_dict = s.optimizer.state_dict() if not s.saved else s.random.choice(s.saved)[0]
    try:
        s.optimizer.load_state_dict(copy.deepcopy(state_dict))
    except CheckpointError:
        s.log[-1] += ": refused"


@action
def through_a_file(s: Session) -> None:
    file = io.BytesIO()
    torch.save(s.optimizer.state_dict(), file)
    file.seek(0)
    try:
        s.optimizer.load_state_dict(torch.load(file, weights_only=True))
    except (CheckpointError, pickle.UnpicklingError):
        s.log[-1] += ": refused"


@action
def deep_copied(s: Session) -> None:
    s.params, s.optimizer = copy.deepcopy((s.params, s.optimizer))
    s.guards.clear()


@action
def pickled(s: Session) -> None:
    s.params, s.optimizer = pickle.loads(pickle.dumps((s.params, s.optimizer)))
    s.guards.clear()


@action
def other_horizon(s: Session) -> None:
    s.optimizer.set_num_steps(s.random.choice([1, 10, 1000, 2**40]))


@action
def other_number_of_threads(s: Session) -> None:
    torch.set_num_threads(s.random.choice([1, 2]))


@action
def telemetry_switched(s: Session) -> None:
    s.random.choice([s.optimizer.enable_telemetry, s.optimizer.disable_telemetry])()


@action
def loss_observed(s: Session) -> None:
    s.optimizer.observe_loss(s.random.choice([1.0, torch.tensor(0.5)]))
    s.optimizer.clear_observed_loss()


# -- as a program ------------------------------------------------------------------------------------------------------


def run_session(seed: int, steps: int = 25) -> int:
    """Run one session, of the entry and backend that the seed says; returns how many steps it attempted.

    Raises:
        Mismatch: With what led to it.
    """
    kinds = [(name, backend) for name in list_optimizers() for backend in ("auto", "reference")]
    session = Session(seed, *kinds[seed % len(kinds)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            session.run(steps)
        except Exception as error:
            what = f"{session.name} {session.options}, seed {seed}"
            raise Mismatch(
                "\n  ".join([f"{type(error).__name__}: {error}", what, "after", *session.log[-25:]])
            ) from error
    return session.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the first session")
    parser.add_argument("--library", type=Path, help="a libpylo_cpu.so, for example one with sanitizers")
    parser.add_argument("--isa", choices=list(loader.ISAS), help="instruction set, by default the best one")
    args = parser.parse_args()
    if args.library:
        loader.find_library = lambda: args.library  # type: ignore[assignment]
    library = loader.load()
    if isinstance(library, str):
        sys.exit(library)
    if args.isa:
        if args.isa not in library.isas():
            sys.exit(f"{args.isa} does not run here; {library.isas()} do")
        select.NativeStages = functools.partial(select.NativeStages, isa=args.isa)  # type: ignore[misc, assignment]
    end, seed, steps, wrong = time.monotonic() + args.seconds, args.seed, 0, 0
    while time.monotonic() < end:
        try:
            steps += run_session(seed)
        except Mismatch:  # hours are long: see what else there is
            traceback.print_exc()
            wrong += 1
        seed += 1
    told = f"in {wrong} sessions one was not" if wrong else "every step was its twin's"
    print(f"{seed - args.seed} sessions, {steps} steps: {told}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
