"""Ways in which one rank may differ from the others, and what ranks of the tests do about them; see workers."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from typing import Any

import torch
from sharded_cases import collectives, digest, full_tensors, loss_of, make, net, wrap
from thetas import theta_for
from torch import Tensor, nn

from pylo_integrations import DisagreementError, Theta
from pylo_integrations.options import USUAL

LAYOUTS = ["shard_step", "ddp", "fsdp2", "fsdp1"]
"""Of ``ddp``, the rule sees the loss; otherwise such ranks have nothing to exchange."""

RULES = {"shard_step": "celo2", "ddp": "velo", "fsdp2": "small_fc_lopt", "fsdp1": "celo"}
OTHER_RULES = {"shard_step": "velo", "ddp": "celo", "fsdp2": "celo2", "fsdp1": "small_fc_lopt"}

Pairs = list[tuple[str, nn.Parameter]]


def pairs_of(model: nn.Module) -> Pairs:
    return list(model.named_parameters())


def swapped(pairs: Pairs) -> Pairs:
    """Two tensors of equal shape change places."""
    first, second = (i for i, (name, _) in enumerate(pairs) if "norm" in name)
    pairs[first], pairs[second] = pairs[second], pairs[first]
    return pairs


def in_two_groups(pairs: Pairs) -> list[dict[str, Any]]:
    return [{"params": pairs[:2]}, {"params": pairs[2:]}]


def other_theta(name: str) -> Theta:
    theta = theta_for(name)
    return Theta.from_arrays(name, {key: 1.01 * value for key, value in theta.arrays.items()}, provenance="for a test")


@dataclasses.dataclass(frozen=True)
class Built:
    """An optimizer that one rank builds otherwise.

    Attributes:
        options: As it has them, from the layout.
        arrange: What it makes of the named parameters.
        names: Whether the others give names.
        rule: Whether it has another rule.
        said: What the message must have.
    """

    said: tuple[str, ...]
    options: Callable[[str], dict[str, Any]] = lambda layout: {}
    arrange: Callable[[Pairs], Any] = list
    names: bool = True
    rule: bool = False


BUILT = {
    "order": Built(("norm.weight", "norm.bias"), arrange=swapped),
    "order without names": Built((), arrange=swapped, names=False),
    "subset": Built(("down.bias", "none on rank"), arrange=lambda pairs: pairs[:-1]),
    "groups": Built(("parameter groups: 1", "2 on rank"), arrange=in_two_groups),
    "names": Built(("other.", "conv.weight"), arrange=lambda pairs: [(f"other.{name}", p) for name, p in pairs]),
    "rule": Built(("rule: ",), rule=True),
    "theta": Built(("theta: sha256",), options=lambda layout: {"weights": other_theta(RULES[layout])}),
    "rule's constant": Built(("step_mult of the rule",), options=lambda layout: {"step_mult": 0.5}),
    "max_grad_norm": Built(("max_grad_norm: ", "0.25"), options=lambda layout: {"max_grad_norm": 0.25}),
    "on_nonfinite": Built(("on_nonfinite: ", "'zero'"), options=lambda layout: {"on_nonfinite": "zero"}),
    "stochastic_rounding": Built(("stochastic_rounding",), options=lambda layout: {"stochastic_rounding": True}),
    "lr at first": Built(("lr of group 0: ", "0.5 on rank"), options=lambda layout: {"lr": 0.5}),
    "lr 0 at first": Built(("lr of group 0: ", "0.0 on rank"), options=lambda layout: {"lr": 0.0}),
    "all at once": Built(
        ("lr of group 0", "weight_decay of group 0", "max_grad_norm", "down.bias"),
        options=lambda layout: {"lr": 0.5, "weight_decay": 0.1, "max_grad_norm": 1.0},
        arrange=lambda pairs: pairs[:-1],
    ),
}


def without(layout: str, what: str) -> bool:
    """Whether a difference cannot arise under a layout."""
    # Nothing tells whole replicas without names apart, nor is anything mixed up; not all rules have a constant.
    return (what == "order without names" and layout == "ddp") or (what == "rule's constant" and layout == "ddp")


Undo = Callable[[], None]


def option(name: str, value: Any) -> Callable[[Any, nn.Module], Undo]:
    def spoil(optimizer: Any, model: nn.Module) -> Undo:
        group = optimizer.param_groups[0]
        before = group.get(name, USUAL.get(name))
        group[name] = value
        return lambda: group.__setitem__(name, before)

    return spoil


def attribute(name: str, value: Any) -> Callable[[Any, nn.Module], Undo]:
    def spoil(optimizer: Any, model: nn.Module) -> Undo:
        before = getattr(optimizer, name)
        setattr(optimizer, name, value)
        return lambda: setattr(optimizer, name, before)

    return spoil


def horizon(optimizer: Any, model: nn.Module) -> Undo:
    optimizer.set_num_steps(77)
    return lambda: optimizer.set_num_steps(100)


def iteration(optimizer: Any, model: nn.Module) -> Undo:
    optimizer._progress.iteration += 1

    def undo() -> None:
        optimizer._progress.iteration -= 1

    return undo


def group(optimizer: Any, model: nn.Module) -> Undo:
    optimizer.add_param_group({"params": [("more", nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)))]})
    return lambda: optimizer.param_groups.pop() and None


def regrouped(optimizer: Any, model: nn.Module) -> Undo:
    params = optimizer.param_groups[0]["params"]
    names = optimizer.param_groups[0]["param_names"]
    last = params.pop(), names.pop()
    born = optimizer._born[0].pop()

    def undo() -> None:
        optimizer._born[0].append(born)
        params.append(last[0])
        names.append(last[1])

    return undo


def frozen(optimizer: Any, model: nn.Module) -> Undo:
    param = optimizer.param_groups[0]["params"][0]
    grad = param.grad
    param.requires_grad_(False)
    param.grad = None

    def undo() -> None:
        param.requires_grad_(True)
        param.grad = grad

    return undo


def ungraded(optimizer: Any, model: nn.Module) -> Undo:
    param = optimizer.param_groups[0]["params"][0]
    grad, param.grad = param.grad, None
    return lambda: setattr(param, "grad", grad)


def watched(optimizer: Any, model: nn.Module) -> Undo:
    optimizer.enable_telemetry()
    return optimizer.disable_telemetry


def idle(optimizer: Any, model: nn.Module) -> Undo:
    """Neither gradients nor a loss: alone, a rank would take that for nothing to step."""
    step, grads = optimizer.step, {param: param.grad for param in model.parameters()}
    model.zero_grad()
    optimizer.step = lambda loss: step()

    def undo() -> None:
        del optimizer.step
        for param, grad in grads.items():
            param.grad = grad

    return undo


SPOILT: dict[str, tuple[Callable[[Any, nn.Module], Undo], tuple[str, ...]]] = {
    "lr": (option("lr", 0.75), ("lr of group 0: ", "0.75 on rank")),
    "weight_decay": (option("weight_decay", 0.125), ("weight_decay of group 0: ", "0.125 on rank")),
    "weight_decay_policy": (option("weight_decay_policy", "l2"), ("weight_decay_policy of group 0", "'l2' on rank")),
    "maximize": (option("maximize", True), ("maximize of group 0: ", "True on rank")),
    "base_lr": (option("base_lr", 3.0), ("base_lr of group 0: ", "3.0 on rank")),
    "axes": (option("axes", "in_out"), ("axes of group 0: ", "'in_out' on rank")),
    "state_dtype": (option("state_dtype", "bfloat16"), ("state_dtype of group 0: ", "'bfloat16' on rank")),
    "max_grad_norm": (attribute("max_grad_norm", 0.25), ("max_grad_norm: ", "0.25 on rank")),
    "on_nonfinite": (attribute("on_nonfinite", "error"), ("on_nonfinite: ", "'error' on rank")),
    "num_steps": (horizon, ("num_steps: ", "77 on rank", "100 on rank")),
    "iteration": (iteration, ("steps taken: ",)),
    "another group": (group, ("parameter groups: ", "more float64 (2, 3)")),
    "a parameter less": (regrouped, ("down.bias", "none on rank")),
    "frozen": (frozen, ("parameter 0 of group 0", "frozen on rank")),
    "no gradient": (ungraded, ("parameters without a gradient", "0 of group 0 on rank")),
    "telemetry": (watched, ("telemetry: ", "True on rank")),
    "nothing to step": (idle, ("this step: ", "neither gradients nor a loss on rank 1")),
}


def is_allowed(layout: str, what: str) -> bool:
    """Whether ranks may differ so under a layout."""
    # Shards without a gradient count as zero; sums of whole replicas are complete without the others.
    needs_nothing = RULES[layout] in ("celo2", "small_fc_lopt")
    is_zero = layout != "ddp" and (what == "no gradient" or (what == "nothing to step" and needs_nothing))
    return is_zero or (what == "telemetry" and layout == "ddp")


# -- ranks -------------------------------------------------------------------------------------------------------------


def model_of(layout: str, world: int) -> Any:
    return wrap(net(), layout.replace("shard_step", "ddp"), world)


def local_copies(model: nn.Module) -> list[Tensor]:
    return [getattr(p.detach(), "_local_tensor", p.detach()).clone() for p in model.parameters()]


class Training:
    """A model of a layout and its gradients."""

    def __init__(self, layout: str, rank: int, world: int) -> None:
        self.layout, self.rank, self.world = layout, rank, world
        self.model = model_of(layout, world)
        self.steps = 0

    def optimizer(self, name: str, params: Any, **options: Any) -> Any:
        if self.layout == "shard_step":
            options["shard_step"] = True
        made = make(name, params, **options)
        made.bind_model(self.model)
        return made

    def backward(self) -> Tensor:
        """The loss."""
        self.model.zero_grad()
        loss = loss_of(self.model, self.steps, self.rank)
        loss.backward()
        self.steps += 1
        return loss.detach()

    def digest(self) -> str:
        return digest(full_tensors(self.model).values())

    def refused(self, optimizer: Any, loss: Tensor, error: type[Exception] = DisagreementError) -> str:
        """The message of the step, after checking that it changed nothing."""
        before, states = local_copies(self.model), {p: dict(s) for p, s in optimizer.state.items()}
        copies = {p: {k: full_local(v) for k, v in s.items()} for p, s in states.items()}
        counts = optimizer.iteration, optimizer.nonfinite_steps
        try:
            optimizer.step(loss=loss)
        except error as raised:
            told = f"{type(raised).__name__}: {raised}"
        else:
            return "it stepped"
        assert all(torch.equal(p, q) for p, q in zip(before, local_copies(self.model), strict=True))
        assert optimizer.state.keys() == states.keys()
        for p, state in copies.items():
            assert all(torch.equal(value, full_local(optimizer.state[p][key])) for key, value in state.items())
        assert (optimizer.iteration, optimizer.nonfinite_steps) == counts
        return told


def full_local(value: Any) -> Tensor:
    return getattr(value, "_local_tensor", value).clone()


def built_case(rank: int, world: int, layout: str, what: str) -> tuple[str, int, str]:
    """The last rank builds its optimizer otherwise; then it does as the others do."""
    training, way = Training(layout, rank, world), BUILT[what]
    loss, name = training.backward(), RULES[layout]
    usual: Any = pairs_of(training.model)
    params, options = usual, {}
    if rank == world - 1:
        params, options = way.arrange(list(usual)), way.options(layout)
        name = OTHER_RULES[layout] if way.rule else name
    if not way.names:
        params = [p for _, p in params]
    told = training.refused(training.optimizer(name, params, **options), loss)
    optimizer = training.optimizer(RULES[layout], usual)
    for _ in range(2):
        optimizer.step(loss=training.backward())
    return told, optimizer.iteration, training.digest()


def spoilt_case(rank: int, world: int, layout: str, what: str, first: bool) -> tuple[str, int, str]:
    """The last rank changes something, before the first step or after two; then it takes it back."""
    training = Training(layout, rank, world)
    optimizer = training.optimizer(RULES[layout], pairs_of(training.model))
    for _ in range(0 if first else 2):
        optimizer.step(loss=training.backward())
    loss = training.backward()
    undo = SPOILT[what][0](optimizer, training.model) if rank == world - 1 else lambda: None
    told = training.refused(optimizer, loss)
    if told != "it stepped":
        told_again = training.refused(optimizer, loss)
        assert told_again == told
        undo()
        optimizer.step(loss=loss)
    return told, optimizer.iteration, training.digest()


def sparse(optimizer: Any, model: nn.Module) -> Undo:
    param = next(p for p in model.parameters() if p.dim() == 2)
    grad = param.grad
    param.grad = grad.to_sparse()
    return lambda: setattr(param, "grad", grad)


def aimless(optimizer: Any, model: nn.Module) -> Undo:
    optimizer.set_num_steps(None)
    return lambda: optimizer.set_num_steps(100)


def misfit(optimizer: Any, model: nn.Module) -> Undo:
    """A state of fewer elements than what is here of its parameter."""
    optimizer.init_state()
    param, state = next(
        (p, state)
        for p, state in optimizer.state.items()
        if "momentum_0" in state and full_local(state["momentum_0"]).numel()
    )
    optimizer.state[param] = {**state, "momentum_0": torch.zeros(0, dtype=torch.float64)}
    return lambda: optimizer.state.__setitem__(param, state)


def lossless(optimizer: Any, model: nn.Module) -> Undo:
    """The loss is of two elements."""
    step = optimizer.step
    optimizer.step = lambda loss: step(loss=loss.expand(2))
    return lambda: optimizer.__dict__.pop("step") and None


def misremembered(optimizer: Any, model: nn.Module) -> Undo:
    """Memory of the run of another shape."""
    optimizer.init_state()
    memory = dict(optimizer._progress.memory)
    optimizer._progress.memory.update({name: value.new_zeros(7, 7) for name, value in memory.items()})
    return lambda: optimizer._progress.memory.update(memory)


def unforeseen(optimizer: Any, model: nn.Module) -> Undo:
    """What nobody looks for, in the midst of what ranks do before they exchange anything."""
    engine, collect = optimizer._engine, optimizer._engine._contexts

    def failing(*args: Any) -> Any:
        raise MemoryError("no memory left")

    engine._contexts = failing
    return lambda: setattr(engine, "_contexts", collect)


RAISING: dict[str, tuple[Callable[[Any, nn.Module], Undo], str]] = {
    "sparse gradient": (sparse, "TypeError: the gradient of parameter"),
    "no horizon": (aimless, "needs to know how many steps"),
    "state": (misfit, "the state "),
    "lr": (option("lr", None), "lr=None"),
    "max_grad_norm": (attribute("max_grad_norm", -1.0), "max_grad_norm=-1.0"),
    "loss": (lossless, "loss"),
    "memory": (misremembered, "the memory of the run"),
    "in the midst": (unforeseen, "MemoryError: no memory left"),
}


def raising_case(rank: int, world: int, layout: str, what: str, first: bool) -> tuple[str, int, str]:
    """The last rank raises before it would talk to the others."""
    training = Training(layout, rank, world)
    optimizer = training.optimizer(RULES[layout], pairs_of(training.model))
    for _ in range(0 if first else 2):
        optimizer.step(loss=training.backward())
    loss = training.backward()
    undo = RAISING[what][0](optimizer, training.model) if rank == world - 1 else lambda: None
    optimizer.init_state()
    told = training.refused(optimizer, loss, Exception)
    undo()
    optimizer.step(loss=loss)
    return told, optimizer.iteration, training.digest()


def gradient_case(rank: int, world: int, what: str) -> str:
    """Replicas share their steps, but not their gradients; or tensors of equal values change places."""
    names = ["a", "b"]
    params = [nn.Parameter(torch.zeros(4, 3)) for _ in names]
    for i, p in enumerate(params):
        p.grad = torch.full_like(p, 1.0 + i + (rank if what == "apart" else 0))
    optimizer = make("small_fc_lopt", params[::-1] if what == "swapped" and rank else params, shard_step=True)
    try:
        optimizer.step()
    except DisagreementError as error:
        assert not any(p.any() for p in params) and not optimizer.state
        return str(error)
    return "it stepped"


def lost_case(rank: int, world: int, how: str) -> None:
    """The last rank takes no third step."""
    optimizer = make("velo", [nn.Parameter(torch.ones(6, 3))], shard_step=True)
    for step in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        if rank == world - 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL) if how == "killed" else os._exit(1)
        optimizer.step(loss=1.0)


def allowed_case(rank: int, world: int) -> tuple[list[list[str]], int, str]:
    """What ranks may do differently, and what all of them may change at any time."""
    alone = [nn.Parameter(torch.full((2 + rank, 3), 1.0 + rank))]
    replicas = make("celo2" if rank else "small_fc_lopt", alone, lr=0.5 + rank, shard_step=False)
    counted = []
    for _ in range(1 + rank):
        alone[0].grad = torch.ones_like(alone[0])
        with collectives() as names:
            replicas.step()
        counted.append(names)
    training = Training("fsdp2", rank, world)
    pairs = pairs_of(training.model)
    options = {"backend": "reference" if rank else "auto", "chunk_bytes": 2**20 + rank}
    optimizer = training.optimizer("small_fc_lopt", pairs[:4], **options)
    optimizer.step(loss=training.backward())
    optimizer.add_param_group({"params": pairs[4:], "lr": 0.5})
    for frozen_at in (False, True, False):
        training.model.requires_grad_(not frozen_at)
        training.model.zero_grad()
        loss = training.backward() if not frozen_at else torch.zeros(())
        for _ in range(2):
            optimizer.step(loss=loss)
    return counted, optimizer.iteration, training.digest()
