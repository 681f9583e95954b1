"""What the ranks of the tests of DeepSpeed run; see pylo_integrations.workers."""

from __future__ import annotations

import os
from typing import Any

import torch
from launched_cases import fresh_accelerate, hf_case
from sharded_cases import digest
from thetas import create
from torch import Tensor, nn

from pylo_integrations.state import from_canonical, to_canonical

BATCH = 8  # examples of a step, whoever sees them
HALF: dict[str, Any] = {"bf16": {"enabled": True}, "fp16": {"enabled": True, "initial_scale_power": 8}}


class Net(nn.Module):
    """Tensors that partitions cut anywhere, in groups of every kind; and a frozen one, which ZeRO leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 5)
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(self.embedding(tokens)))))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, 11, (BATCH,), generator=generator), torch.randn(BATCH, 5, generator=generator)


def loss_of(model: Any, tokens: Tensor, wanted: Tensor) -> Tensor:
    return ((model(tokens).float() - wanted) ** 2).mean()


def params_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def plain_run(name: str, steps: range, canonical: Any = None, params: Any = None, half: Any = None, **options: Any):
    """One process without DeepSpeed; in half precision with masters in float32, as DeepSpeed has them."""
    model = net()
    model.load_state_dict({**model.state_dict(), **(params or {})})
    optimizer = create(model, name, num_steps=20, **options)
    if canonical is not None:
        from_canonical(optimizer, model, canonical)
    rounded = net().to(half) if half else model
    for step in steps:
        with torch.no_grad():
            for param, master in zip(rounded.parameters(), model.parameters(), strict=True):
                param.copy_(master)
        loss = loss_of(rounded, *batch(step))
        rounded.zero_grad()
        loss.backward()
        for param, master in zip(rounded.parameters(), model.parameters(), strict=True):
            master.grad = None if param.grad is None else param.grad.float()
        optimizer.step(loss=loss)
    return params_of(model), optimizer, model


def deepspeed() -> Any:
    """The package, on CPUs that pass for devices with float16, without communication kernels that it would compile."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().is_fp16_supported = lambda: True
    return deepspeed


def config_of(stage: int, **config: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own counts
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # which is 1 where nothing is said
        **config,
    }


def start(
    name: str, stage: int, canonical: Any = None, params: Any = None, options: Any = None, **config: Any
) -> tuple[Any, Any]:
    from pylo_integrations.deepspeed import attach

    model = net()
    model.load_state_dict({**model.state_dict(), **(params or {})})
    optimizer = create(model, name, **(options or {}))
    engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer, config=config_of(stage, **config))
    attach(engine, num_steps=20)
    attach(engine)  # adds nothing
    if canonical is not None:
        from_canonical(optimizer, engine, canonical)
    return engine, optimizer


def take_steps(engine: Any, steps: range, share: tuple[int, int], spoil: tuple[int, int] | None = None) -> None:
    """Steps on this rank's share of every batch, cut into as many micro-batches as gradients accumulate over.

    Args:
        engine: Of DeepSpeed.
        steps: By the number of their batch.
        share: Rank, and number of ranks that divide a batch.
        spoil: Step and rank whose loss is infinite.
    """
    rank, world = share
    for step in steps:
        tokens, wanted = (part.chunk(world)[rank] for part in batch(step))
        pieces = engine.gradient_accumulation_steps()
        for tokens_now, wanted_now in zip(tokens.chunk(pieces), wanted.chunk(pieces), strict=True):
            loss = loss_of(engine, tokens_now, wanted_now)
            engine.backward(loss * float("inf") if (step, rank) == spoil else loss)
            engine.step()


def end_of(engine: Any, optimizer: Any) -> dict[str, Any]:
    params = params_of(engine.module)
    masters = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    return {
        "params": params,
        "digest": digest(value.float() for value in params.values()),
        "iteration": optimizer.iteration,
        "shapes": [tuple(master.shape) for master in masters],
    }


def steps_case(
    rank: int, world: int, name: str, stage: int, accumulate: int = 1, reload: bool = False, **options: Any
) -> dict[str, Any]:
    engine, optimizer = start(name, stage, gradient_accumulation_steps=accumulate, options=options)
    take_steps(engine, range(2), (rank, world))
    if reload:
        engine.offload_states()
        engine.reload_states()
    take_steps(engine, range(2, 4), (rank, world))
    return end_of(engine, optimizer)


def half_case(rank: int, world: int, name: str, stage: int, dtype: str) -> dict[str, Any]:
    """All ranks see the whole batch, since halves of it have gradients that are rounded otherwise."""
    engine, optimizer = start(name, stage, **{dtype: HALF[dtype]})
    take_steps(engine, range(3), (0, 1))
    return end_of(engine, optimizer)


def overflow_case(rank: int, world: int, name: str, stage: int, accumulate: int) -> dict[str, Any]:
    engine, optimizer = start(name, stage, gradient_accumulation_steps=accumulate, fp16=HALF["fp16"])
    heard = []
    take = type(optimizer._stepping).take_loss

    def listen(self: Any, given: Any, result: Any) -> Any:
        heard.append(take(self, given, result))
        return heard[-1]

    type(optimizer._stepping).take_loss = listen
    try:
        take_steps(engine, range(1), (rank, world))
        before = params_of(engine.module)
        take_steps(engine, range(1, 2), (rank, world), spoil=(1, 1))
        after = params_of(engine.module)
        reached = optimizer.iteration
        take_steps(engine, range(2, 3), (rank, world))
    finally:
        type(optimizer._stepping).take_loss = take
    return {
        **end_of(engine, optimizer),
        "skipped": all(torch.equal(before[key], after[key]) for key in before) and engine.skipped_steps == 1,
        "reached": reached,
        "heard": [float(loss) for loss in heard],
    }


def resume_case(rank: int, world: int, name: str, stage: int, folder: str) -> dict[str, Any]:
    """Four steps, and the last two once more from DeepSpeed's own checkpoint."""
    engine, optimizer = start(name, stage)
    take_steps(engine, range(2), (rank, world))
    engine.save_checkpoint(folder, tag="middle")
    canonical, params = to_canonical(optimizer, engine), params_of(engine.module)
    take_steps(engine, range(2, 4), (rank, world))
    resumed, again = start(name, stage)
    resumed.load_checkpoint(folder, tag="middle")
    take_steps(resumed, range(2, 4), (rank, world))
    return {"whole": end_of(engine, optimizer), "resumed": end_of(resumed, again), "middle": (canonical, params)}


def other_size_case(rank: int, world: int, name: str, stage: int, folder: str) -> str:
    engine, _ = start(name, stage)
    try:
        engine.load_checkpoint(folder, tag="middle")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def leave_case(rank: int, world: int, stage: int, folder: str, code: str, half: dict[str, Any]) -> dict[str, Any]:
    """Four steps; after the second ``code`` of the page saves. All ranks see the whole batch, as in ``half_case``."""
    engine, optimizer = start("pace", stage, options={"weight_decay": 0.01, "weights": "builtin:pace"}, **half)
    take_steps(engine, range(2), (0, 1))
    exec(code, {"engine": engine, "optimizer": optimizer})
    told = ""
    try:
        from deepspeed.checkpoint import DeepSpeedCheckpoint
        from deepspeed.checkpoint.ds_to_universal import extract_zero_shards

        extract_zero_shards(f"{folder}/universal", DeepSpeedCheckpoint(f"{folder}/now"), (0, 0, rank))
    except Exception as error:
        told = repr(error)
    take_steps(engine, range(2, 4), (0, 1))
    return {**end_of(engine, optimizer), "told": told}


def come_back_case(rank: int, world: int, stage: int, code: str, half: dict[str, Any]) -> dict[str, Any]:
    """The last two steps, from where ``code`` of the page loads."""
    names: dict[str, Any] = {"model": net(), "config": config_of(stage, **half), "deepspeed": deepspeed()}
    torch.nn.init.zeros_(names["model"].first.weight)
    exec(code, names)
    assert names["optimizer"].iteration == 2
    take_steps(names["engine"], range(2, 4), (0, 1))
    return end_of(names["engine"], names["optimizer"])


def arrive_case(
    rank: int, world: int, name: str, stage: int, steps: range, canonical: Any, params: Any
) -> dict[str, Any]:
    engine, optimizer = start(name, stage, canonical, params)
    take_steps(engine, steps, (rank, world))
    return {**end_of(engine, optimizer), "left": (to_canonical(optimizer, engine), params_of(engine.module))}


def hf_zero_case(rank: int, world: int, **options: Any) -> dict[str, Any]:
    deepspeed()
    return hf_case(rank, world, **options)


def accelerate_case(rank: int, world: int, name: str, stage: int, folder: str) -> dict[str, Any]:
    """Four steps of two micro-batches, and the last two once more from ``save_state``."""
    deepspeed()
    from accelerate import Accelerator, DeepSpeedPlugin
    from torch.utils.data import DataLoader

    from pylo_integrations.accelerate import attach

    runs = []
    for again in (False, True):
        with fresh_accelerate():
            plugin = DeepSpeedPlugin(hf_ds_config=config_of(stage, gradient_accumulation_steps=2))
            accelerator = Accelerator(cpu=True, deepspeed_plugin=plugin, gradient_accumulation_steps=2)
            model = net()
            optimizer = create(model, name)
            # Accelerate wants batch sizes; ours are of the steps.
            engine, wrapped, _ = accelerator.prepare(model, optimizer, DataLoader([0], batch_size=1))
            attach(accelerator, wrapped, num_steps=20)
            if again:
                accelerator.load_state(folder)
            for step in range(2 if again else 0, 4):
                tokens, wanted = (part.chunk(world)[rank].chunk(2) for part in batch(step))
                for pair in zip(tokens, wanted, strict=True):
                    with accelerator.accumulate(engine):
                        accelerator.backward(loss_of(engine, *pair))
                        wrapped.step()
                        wrapped.zero_grad()
                if step == 1 and not again:
                    accelerator.save_state(folder)
            runs.append(end_of(engine, optimizer))
    return {"whole": runs[0], "resumed": runs[1]}


def refused_case(rank: int, world: int) -> dict[str, str]:
    """Stage 3; an optimizer with state; and a step of one that was not attached."""
    from pylo_integrations.deepspeed import attach

    told = {}
    for case, stage in (("stage 3", 3), ("unattached", 2), ("with state", 2)):
        model = net()
        optimizer = create(model, "small_fc_lopt")
        if case == "with state":
            loss_of(model, *batch(0)).backward()
            optimizer.step()
        engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer, config=config_of(stage))
        before = params_of(model)
        try:
            if case == "unattached":
                take_steps(engine, range(1), (rank, world))
            else:
                attach(engine)
        except Exception as error:
            told[case] = f"{type(error).__name__}: {error}"
        assert all(torch.equal(before[key], value) for key, value in params_of(model).items()), "something was written"
    return told
