"""Episodes: the networks of one task, many copies at once, each trained by its own theta.

A *member* is one network in training. What makes this fast, and equal to the optimizer, is that a rule works on stacks
of tensors anyway (:mod:`pylo_integrations.sharding.blocks`): here the stack runs over members, and each brings its own
theta. Gradients come from ``torch.func``; the rule's whole-model decisions, which are small, are mapped over members.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from pylo_integrations.decay import keep_and_scale
from pylo_integrations.metatrain.learners import Arrays, Learner
from pylo_integrations.metatrain.seeds import generator_of, seed_of
from pylo_integrations.metatrain.tasks import Batch, Task
from pylo_integrations.rules.base import Control, Rule, StepContext
from pylo_integrations.schedules import SHAPES, Shape
from pylo_integrations.sharding.blocks import Block, Bucket, Sums
from pylo_integrations.sharding.layout import Box, TensorLayout
from pylo_integrations.sharding.pieces import Piece
from pylo_integrations.step.stages import Part, ReferenceStages, run_stages

SplitName = Literal["train", "validation", "both"]


@dataclass(frozen=True)
class Objective:
    """What meta-training lowers: the mean over the last steps of an episode of ``log(floor + loss / first loss)``.

    The ratio is cut at ``ceiling``, which also stands for a loss that is not finite.

    Attributes:
        split: Whether the loss is that of the training batch, before the step, or of a validation batch, or both
            count, by half each.
        floor: Losses below this fraction of the first do not count for much.
        ceiling: Losses above this multiple of the first count as this.
        tail: Steps before this part of the horizon do not count; 0 for all, near 1 for where the run ends.
    """

    split: SplitName = "train"
    floor: float = 0.01
    ceiling: float = 3.0
    tail: float = 0.0

    def __call__(self, losses: Tensor, first: Tensor) -> Tensor:
        """Of every member, ``(members,)``."""
        ratio = losses / first.clamp_min(1e-12)
        ratio = ratio.nan_to_num(self.ceiling, self.ceiling, self.ceiling).clamp(0, self.ceiling)
        return torch.log(self.floor + ratio)


@dataclass(frozen=True)
class Reparametrisation:
    """Random factors between what is trained and what the network uses, so that a theta meets many scales.

    A third of the members gets none, a third one for all tensors, a third one for every tensor.

    Attributes:
        low: Of the factor's decimal logarithm, which is uniform.
        high: Of the same.
    """

    low: float = -0.3
    high: float = 0.9

    def draw(self, tensors: int, generator: torch.Generator) -> list[float]:
        """Factors for one member."""
        choice = int(torch.randint(3, (), generator=generator))
        exponents = self.low + (self.high - self.low) * torch.rand(tensors, generator=generator)
        if choice < 2:
            exponents = exponents[:1].expand(tensors) * choice
        factors: list[float] = (10**exponents).tolist()
        return factors


# -- blocks of members -----------------------------------------------------------------------------------------------


class _Stack(Bucket):
    """Parameters of equal layout and options, of every member, stacked: ``(parameters * members, *shape)``.

    States are stacked alike. Nothing is written in place, so that steps can be differentiated.
    """

    def __init__(
        self,
        layout: TensorLayout,
        group: Mapping[str, Any],
        param: Tensor,
        grad: Tensor | None,
        values: dict[str, Tensor],
    ) -> None:
        super().__init__(layout, [], [], group, param.dtype)
        self.param, self.grad, self.values = param, grad, values
        self.blocks = [_StackBlock(self)]

    def __len__(self) -> int:
        return len(self.param)

    @property
    def device(self) -> torch.device:
        return self.param.device

    def stack(self, name: str) -> Tensor:
        return self.values[name].clone()

    def unstack_(self, name: str, value: Tensor) -> None:
        self.values[name] = value


class _StackBlock(Block):
    """All of a :class:`_Stack`."""

    bucket: _Stack

    def __init__(self, stack: _Stack) -> None:
        box = Box((0,) * len(stack.layout.shape), stack.layout.shape)
        super().__init__(stack, slice(0, len(stack)), Piece(box), box)

    @property
    def param(self) -> Tensor:
        return self.bucket.param.unsqueeze(1)

    @property
    def raw_grad(self) -> Tensor:
        assert self.bucket.grad is not None
        return self.bucket.grad.unsqueeze(1)

    def load(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self.bucket.values[name] for name in names], dim=1)

    def store_(self, names: Sequence[str], value: Tensor) -> None:
        self.bucket.values.update(zip(names, value.unbind(1), strict=True))


@dataclass(frozen=True)
class _Slot:
    """Which parameters a stack holds."""

    names: tuple[str, ...]
    layout: TensorLayout
    group: Mapping[str, Any]
    rule: Rule


def _slots(learner: Learner, model: nn.Module, base: nn.Module | None) -> list[_Slot]:
    slots: dict[tuple[Any, ...], tuple[list[str], TensorLayout, Mapping[str, Any], Rule]] = {}
    for group in learner.param_groups(model, base):
        for name, param in group["params"]:
            layout = TensorLayout.whole(param.shape, group["axes"])
            rule = learner.rule.rule_for(layout, group)
            key = (rule, layout, group["lr"], group["rule"])
            slots.setdefault(key, ([], layout, {**group, "params": ()}, rule))[0].append(name)
    return [_Slot(tuple(names), layout, group, rule) for names, layout, group, rule in slots.values()]


# -- an episode ------------------------------------------------------------------------------------------------------


@dataclass
class _Networks:
    """What changes from step to step."""

    params: dict[str, Tensor]
    states: list[dict[str, Tensor]]
    memory: dict[str, Tensor]
    first: Tensor | None = None


@dataclass
class Episode:
    """Training of one task from initialisation to horizon.

    Members that have the same *seed* start equal and see the same batches. There are ``len(seeds) * copies``, copies
    outermost: with two copies, member ``i`` and member ``len(seeds) + i`` are twins.

    Attributes:
        learner: Who steps.
        task: What is trained.
        objective: What is measured.
        horizon: Steps to take in all.
        seeds: Of initialisation and batches.
        copies: Members that share a seed.
        reparametrisation: None to use the parameters as they are.
        schedule: Of the learning rate.
        device: Where.
        dtype: Of parameters, states and theta.
        iteration: Steps taken.
    """

    learner: Learner
    task: Task
    objective: Objective
    horizon: int
    seeds: Sequence[int]
    copies: int = 1
    reparametrisation: Reparametrisation | None = None
    schedule: Shape = "constant"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    iteration: int = 0

    def __post_init__(self) -> None:
        models = [self._model(seed) for seed in self.seeds]
        self._skeleton = models[0]
        base = None if self.task.base is None else self.task.base()
        self._slots = _slots(self.learner, self._skeleton, base)
        names = [name for slot in self._slots for name in slot.names]
        self._scales = self._draw_scales(names)
        params = [dict(model.named_parameters()) for model in models]
        stacked = {name: self._over_copies(torch.stack([mine[name].detach() for mine in params])) for name in names}
        stacked = {name: value.to(self.device, self.dtype) for name, value in stacked.items()}
        stacked = {
            name: value / self._along(self._scales[name], value) if self._scales else value
            for name, value in stacked.items()
        }
        self._now = _Networks(stacked, [], {})
        self._gradients = vmap(grad_and_value(self._loss))
        self._losses = vmap(self._loss)

    @property
    def members(self) -> int:
        """How many networks are trained at once."""
        return len(self.seeds) * self.copies

    @property
    def params(self) -> dict[str, Tensor]:
        """Parameters of all members by name, each ``(members, *shape)``."""
        return self._now.params

    def unroll(self, arrays: Arrays, steps: int) -> Tensor:
        """Take steps; returns the objective before each, ``(steps, members)``.

        Args:
            arrays: Theta of every member, ``(members, ...)`` each.
            steps: How many.
        """
        arrays = {name: array.to(self.device, self.dtype) for name, array in arrays.items()}
        constants = self.learner.constants(arrays, self.device, self.dtype)
        tiled = [self._tiled(arrays, slot) for slot in self._slots]
        if not self._now.states:
            self._now.states = self._initial_states(arrays)
        return torch.stack([self._step(constants, tiled) for _ in range(steps)])

    def validation_loss(self, batches: int = 4) -> Tensor:
        """Mean loss of every member on validation batches, ``(members,)``; the same batches at any time."""
        losses = [
            self._losses(self.params, self._scales, self._batch("final", index, True)) for index in range(batches)
        ]
        return torch.stack(losses).mean(0)

    # -- what a checkpoint holds -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All that changes from step to step but :attr:`iteration`, by name."""
        now = self._now
        found = {f"param/{name}": value for name, value in now.params.items()}
        found |= {f"memory/{name}": value for name, value in now.memory.items()}
        for index, values in enumerate(now.states):
            found |= {f"state/{index}/{name}": value for name, value in values.items()}
        return found if now.first is None else found | {"first": now.first}

    def restore(self, tensors: Mapping[str, Tensor], iteration: int) -> None:
        """Go on from what :meth:`tensors` returned at ``iteration``."""
        params: dict[str, Tensor] = {}
        memory: dict[str, Tensor] = {}
        states: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            value = value.to(self.device)
            if kind == "param":
                params[name] = value
            elif kind == "memory":
                memory[name] = value
            elif kind == "state":
                index, _, name = name.partition("/")
                states.setdefault(int(index), {})[name] = value
        first = tensors.get("first")
        ordered = [states[index] for index in sorted(states)]
        self._now = _Networks(params, ordered, memory, None if first is None else first.to(self.device))
        self.iteration = iteration

    def detach_(self) -> None:
        """Cut the graph of the steps taken so far."""
        now = self._now
        now.params = {name: value.detach() for name, value in now.params.items()}
        now.states = [{name: value.detach() for name, value in values.items()} for values in now.states]
        now.memory = {name: value.detach() for name, value in now.memory.items()}

    # -- one step --------------------------------------------------------------------------------------------------

    def _step(self, constants: Mapping[str, Tensor], tiled: Sequence[Mapping[str, Tensor]]) -> Tensor:
        now = self._now
        counts = self.iteration >= self.objective.tail * self.horizon
        grads, losses = self._gradients(now.params, self._scales, self._batch("train", self.iteration, False))
        measured = [losses] if self.objective.split != "validation" else []
        if self.objective.split != "train":
            # What does not count is not computed, but for the first, which all are divided by.
            seen = counts or now.first is None
            batch = self._batch("validation", self.iteration, True) if seen else None
            measured.append(losses if batch is None else self._losses(now.params, self._scales, batch))
        if now.first is None:
            now.first = torch.stack(measured).mean(0).detach()
        self._update(grads, losses, constants, tiled)
        self.iteration += 1
        return torch.stack([self.objective(each, now.first) for each in measured]).mean(0) * counts

    def _update(
        self,
        grads: Mapping[str, Tensor],
        losses: Tensor,
        constants: Mapping[str, Tensor],
        tiled: Sequence[Mapping[str, Tensor]],
    ) -> None:
        """A step of every member, through the same stages as an optimizer's."""
        now, rules = self._now, [slot.rule for slot in self._slots]
        stacks = [
            _Stack(
                slot.layout,
                slot.group,
                self._gather(now.params, slot),
                _without_nonfinite(self._gather(grads, slot)),
                dict(values),
            )
            for slot, values in zip(self._slots, now.states, strict=True)
        ]
        contexts = [
            StepContext(
                self.iteration,
                self.horizon,
                None,
                constants=mine,
                local=self.learner.local,
                counts=slot.rule.counts,
            )
            for mine, slot in zip(tiled, self._slots, strict=True)
        ]

        def decide(sums: Sequence[Sums]) -> list[Control]:
            controls = self._control(stacks, sums, losses, constants)
            for slot, ctx in zip(self._slots, contexts, strict=True):  # what later stages read of it
                ctx.memory.update({name: _repeated(value, slot) for name, value in now.memory.items()})
            return controls

        stages = ReferenceStages(rules, stacks)
        factor = SHAPES[self.schedule](self.iteration / self.horizon)
        factors = [keep_and_scale(slot.group, slot.rule.lr_mult * factor) for slot in self._slots]
        proposed, _ = run_stages(
            [Part(tuple(range(len(stacks))), stages)],
            stages.collect(contexts),
            contexts,
            factors,
            decide,
        )
        params: dict[str, Tensor] = {}
        for slot, stack, steps, (keep, scale), ctx in zip(
            self._slots, stacks, proposed, factors, contexts, strict=True
        ):
            assert steps is not None, "torch's functions leave the steps to us"
            (block,), (step,) = stack.blocks, steps
            if slot.rule.finishes:
                step = slot.rule.finish(step, slot.layout, ctx).to(self.dtype)
            new = (block.param * keep - step * scale).squeeze(1)
            params.update(zip(slot.names, new.view(len(slot.names), self.members, *new.shape[1:]), strict=True))
        now.params = {name: value.reshape(now.params[name].shape) for name, value in params.items()}
        now.states = [stack.values for stack in stacks]
        self._conclude([ctx.counted for ctx in contexts], losses, constants)

    def _conclude(
        self, counted: Sequence[Mapping[str, list[Tensor]]], losses: Tensor, constants: Mapping[str, Tensor]
    ) -> None:
        """What the rule remembers of what it counted, mapped over members."""
        totals: dict[str, Tensor] = {}
        for name, values in itertools.chain.from_iterable(each.items() for each in counted):
            for value in values:
                totals[name] = totals.get(name, 0) + self._by_member(value).sum(1)
        if not totals:
            return

        def conclude(
            constants: dict[str, Tensor], loss: Tensor, memory: dict[str, Tensor], totals: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            ctx = StepContext(self.iteration, self.horizon, loss.float(), memory=memory, constants=constants)
            return {**memory, **self.learner.rule.conclude(totals, ctx)}

        self._now.memory = vmap(conclude)(dict(constants), losses, self._now.memory, totals)

    def _control(
        self, stacks: Sequence[_Stack], sums: Sequence[Sums], losses: Tensor, constants: Mapping[str, Tensor]
    ) -> list[Control]:
        """Whole-model decisions, mapped over members."""
        learner = self.learner
        controls: list[Control] = [{}] * len(stacks)
        mine = [i for i, slot in enumerate(self._slots) if slot.rule is learner.rule]
        if not mine or type(learner.rule).control is Rule.control:
            return controls
        kept = tuple(learner.rule.initial_state())

        def decide(
            constants: dict[str, Tensor],
            loss: Tensor,
            memory: dict[str, Tensor],
            sums: list[dict[str, Tensor]],
            states: list[dict[str, Tensor]],
        ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], list[dict[str, Tensor]]]:
            memory, states = dict(memory), [dict(values) for values in states]
            buckets = [
                _Stack(stacks[i].layout, stacks[i].group, loss.new_empty(len(self._slots[i].names)), None, values)
                for i, values in zip(mine, states, strict=True)
            ]
            ctx = StepContext(self.iteration, self.horizon, loss.float(), memory=memory, constants=constants)
            decided = learner.rule.control(buckets, sums, ctx)
            return [dict(control) for control in decided], memory, states

        decided, self._now.memory, states = vmap(decide)(
            dict(constants),
            losses,
            self._now.memory,
            [{name: self._by_member(value) for name, value in sums[i].items()} for i in mine],
            [{name: self._by_member(stacks[i].values[name]) for name in kept} for i in mine],
        )
        for i, control, values in zip(mine, decided, states, strict=True):
            count = len(self._slots[i].names)
            controls[i] = {name: self._by_tensor(value.to(self.dtype), count) for name, value in control.items()}
            stacks[i].values.update({name: self._by_tensor(value, count) for name, value in values.items()})
        return controls

    # -- shapes ----------------------------------------------------------------------------------------------------

    def _gather(self, named: Mapping[str, Tensor], slot: _Slot) -> Tensor:
        """``(parameters * members, *shape)``, members innermost."""
        first = named[slot.names[0]]
        joined = first if len(slot.names) == 1 else torch.cat([named[name] for name in slot.names])
        return joined.reshape(-1, *slot.layout.shape)

    def _by_member(self, value: Tensor) -> Tensor:
        return value.reshape(-1, self.members, *value.shape[1:]).transpose(0, 1)

    def _by_tensor(self, value: Tensor, count: int) -> Tensor:
        return value.expand(-1, count, *value.shape[2:]).transpose(0, 1).flatten(0, 1)

    def _tiled(self, arrays: Arrays, slot: _Slot) -> Mapping[str, Tensor]:
        """The constants of every tensor of a stack."""
        constants = self.learner.constants(
            arrays, self.device, self.dtype, lambda rule: rule.rule_for(slot.layout, slot.group)
        )
        if self.learner.make_rule is None:
            return constants
        return {name: _repeated(value, slot) for name, value in constants.items()}

    def _initial_states(self, arrays: Arrays) -> list[dict[str, Tensor]]:
        initial = self.learner.initial_state(arrays)
        states = []
        for slot in self._slots:
            count = len(slot.names)
            shapes = slot.rule.state_shapes(slot.layout)
            states.append(
                {
                    name: self._by_tensor(initial[name].unsqueeze(1), count)
                    if name in initial
                    else torch.zeros(
                        count * self.members,
                        *(slot.layout.shape if shape is None else shape),
                        device=self.device,
                        dtype=self.dtype,
                    )
                    for name, shape in shapes.items()
                }
            )
        return states

    # -- the task --------------------------------------------------------------------------------------------------

    def _model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("model", seed))
            return self.task.model()

    def _loss(self, params: Mapping[str, Tensor], scales: Mapping[str, Tensor], batch: Batch) -> Tensor:
        used = {name: value * scales[name] for name, value in params.items()} if scales else dict(params)
        return self.task.loss(lambda *inputs: functional_call(self._skeleton, used, inputs), batch)

    def _batch(self, purpose: str, index: int, validation: bool) -> Batch:
        generator = generator_of(purpose, self.seeds[0], index)
        batch = self.task.batches(generator, len(self.seeds), validation)
        return tuple(
            self._over_copies(part).to(self.device, self.dtype if part.is_floating_point() else None) for part in batch
        )

    def _draw_scales(self, names: Sequence[str]) -> dict[str, Tensor]:
        if self.reparametrisation is None:
            return {}
        rows = torch.tensor(
            [self.reparametrisation.draw(len(names), generator_of("scale", seed)) for seed in self.seeds]
        )
        rows = self._over_copies(rows).to(self.device, self.dtype)
        return dict(zip(names, rows.unbind(1), strict=True))

    def _over_copies(self, value: Tensor) -> Tensor:
        return value.repeat(self.copies, *(1,) * (value.dim() - 1))

    @staticmethod
    def _along(scale: Tensor, like: Tensor) -> Tensor:
        return scale.view(-1, *(1,) * (like.dim() - 1))


def _repeated(value: Tensor, slot: _Slot) -> Tensor:
    """What every member has, ``(members, ...)``, for every tensor of a stack."""
    return value.repeat(len(slot.names), *(1,) * (value.dim() - 1))


def _without_nonfinite(grad: Tensor) -> Tensor:
    return grad.nan_to_num(0.0, 0.0, 0.0)
