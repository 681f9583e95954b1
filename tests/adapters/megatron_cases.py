"""What the ranks of the tests of Megatron-Core run; see pylo_integrations.workers.

Megatron asks for CUDA by name wherever it makes a tensor, even on ranks of gloo. What it asks for is given to it on the
CPU; nothing else of it is changed.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from thetas import create
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pylo_integrations.catalog import get_optimizer_info
from pylo_integrations.sharding.pieces import parameter_names
from pylo_integrations.state import from_canonical, to_canonical

BATCH, LENGTH, VOCABULARY = 4, 8, 16  # examples of a step, whoever sees them
WEIGHT_DECAY, DECAY = 0.1, 10  # steps until the learning rate is a tenth


class OnCPU(TorchFunctionMode):
    """Has tensors that are asked for on CUDA be on the CPU, and those of the CPU pass for CUDA's by type."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


@contextmanager
def megatron(tensor_parallel: int) -> Iterator[None]:
    """Its process groups, on CPUs."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    no_generators = mock.patch.object(CudaRNGStatesTracker, "fork", lambda self, name="": nullcontext())
    no_device = mock.patch.multiple("torch.cuda", current_device=lambda: "cpu", synchronize=lambda: None)
    with no_generators, no_device, OnCPU():
        parallel_state.initialize_model_parallel(tensor_parallel)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()


def gpt(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A gated GPT of Megatron's: the same one however many ranks divide it."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=12,
        ffn_hidden_size=10,
        num_attention_heads=2,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        params_dtype=dtype,
    )
    model = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, LENGTH, share_embeddings_and_output_weights=False)
    with torch.no_grad():  # a bias of zeros says nothing of where its elements are
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                whole = torch.linspace(-0.1, 0.1, param.numel() * parts_of(param))
                param.copy_(slice_by_hand(whole, param))
    return model


def wrapped_gpt(dtype: torch.dtype = torch.float32) -> nn.Module:
    """In Megatron's DDP, and what it has around models in half precision."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    model = gpt(dtype)
    wrapped = model if dtype == torch.float32 else Float16Module(model.config, model)
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(), wrapped)


def inside(model: nn.Module) -> nn.Module:
    """The model within wrappers, of which Megatron's checkpoints are."""
    return inside(model.module) if hasattr(model, "module") else model


def parts_of(param: Tensor) -> int:
    from megatron.core import parallel_state

    return (
        parallel_state.get_tensor_model_parallel_world_size() if getattr(param, "tensor_model_parallel", False) else 1
    )


def slice_by_hand(whole: Tensor, param: Tensor) -> Tensor:
    """What a rank has of a whole tensor, by Megatron's convention."""
    if (parts := parts_of(param)) == 1:
        return whole
    from megatron.core import parallel_state

    chunks = whole.chunk(parts * param.partition_stride, param.partition_dim)
    return torch.cat(chunks[parallel_state.get_tensor_model_parallel_rank() :: parts], param.partition_dim)


def wholes(model: nn.Module) -> dict[str, Tensor]:
    """The whole parameters of a model, by names without wrappers, put together by Megatron's convention."""
    from megatron.core import parallel_state

    found = {}
    for param in model.parameters():
        mine, parts = param.detach(), parts_of(param)
        if parts > 1:
            local = [torch.empty_like(mine) for _ in range(parts)]
            dist.all_gather(local, mine.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            by_rank = [part.chunk(param.partition_stride, param.partition_dim) for part in local]
            mine = torch.cat([chunk for run in zip(*by_rank, strict=True) for chunk in run], param.partition_dim)
        found[parameter_names(model)[param]] = mine.clone()
    return found


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def forward_step(batches: Iterator[tuple[Tensor, Tensor]], model: nn.Module) -> tuple[Tensor, Any]:
    tokens, labels = next(batches)
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    losses = model(tokens, torch.arange(LENGTH).expand_as(tokens), mask, labels=labels)
    return losses, lambda losses: (losses.float().mean(), {})


class Run:
    """A model in training as Megatron trains it."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, clip_grad: float = 0.0, **options: Any) -> None:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
        from megatron.core.utils import get_model_config

        from pylo_integrations.megatron import megatron_optimizer

        self.model = wrapped_gpt(dtype)
        lr = get_optimizer_info(name).lr
        config = OptimizerConfig(
            lr=lr,
            min_lr=lr / 10,
            weight_decay=WEIGHT_DECAY,
            clip_grad=clip_grad,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            initial_loss_scale=2.0**8,
        )
        options = {"weights": theta_of(name), "num_steps": 20, **options}
        self.optimizer = megatron_optimizer([self.model], name, config=config, **options)
        decay = WEIGHT_DECAY, WEIGHT_DECAY, DECAY, "constant"
        self.schedule = OptimizerParamScheduler(self.optimizer, 0.0, lr, lr / 10, 0, DECAY, "linear", *decay)
        self.config = get_model_config(self.model)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads

    @property
    def learned(self) -> Any:
        return self.optimizer.optimizer

    def step(self, number: int, micro_batches: int = 1, spoil: bool = False) -> bool:
        """Whether the step was taken. Data-parallel ranks divide the batch."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        tokens, labels = (part.chunk(size)[rank] for part in batch(number))
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True),
            model=[self.model],
            num_microbatches=micro_batches,
            seq_length=LENGTH,
            micro_batch_size=len(tokens) // micro_batches,
            forward_only=False,
        )
        if spoil:
            next(self.model.parameters()).main_grad.view(-1)[0] = torch.inf
        taken, _, _ = self.optimizer.step()
        if taken:
            self.schedule.step(1)
        return bool(taken)

    def end(self) -> dict[str, Any]:
        return {"params": wholes(self.model), "iteration": self.learned.iteration}


def theta_of(name: str) -> Any:
    return create([nn.Parameter(torch.zeros(2, 2))], name).theta


def plain_case(rank: int, world: int, name: str, steps: range, canonical: Any = None, params: Any = None) -> Any:
    """One process, and nothing of Megatron but the model."""
    with megatron(1):
        model = gpt()
        with torch.no_grad():
            for param, key in parameter_names(model).items():
                param.copy_((params or wholes(model))[key])
        spec = get_optimizer_info(name)
        groups = []
        for group in spec.param_groups(model):  # Megatron leaves vectors without decay, and nothing else
            for pair in group["params"]:
                groups.append({**group, "params": [pair], "weight_decay": WEIGHT_DECAY * (pair[1].dim() > 1)})
        optimizer = spec.cls(groups, **spec.defaults, weights=theta_of(name), num_steps=20)
        if canonical is not None:
            from_canonical(optimizer, model, canonical)
        for step in steps:
            for group in optimizer.param_groups:
                group["lr"] = spec.lr * (0.1 + 0.9 * (1 - step / DECAY))
            losses, mean = forward_step(iter([batch(step)]), model)
            loss, _ = mean(losses)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step(loss=loss)
        return wholes(model), to_canonical(optimizer, model)


def steps_case(rank: int, world: int, name: str, parts: int, micro_batches: int = 1, **options: Any) -> dict[str, Any]:
    with megatron(parts):
        run = Run(name, **options)
        for step in range(3):
            assert run.step(step, micro_batches)
        lrs = [group["lr"] for group in run.optimizer.param_groups]
        [shape] = {tuple(p.shape) for p, name in parameter_names(run.model).items() if name.endswith("fc1.weight")}
        return {**run.end(), "lrs": lrs, "fc1": shape, "kind": type(run.optimizer).__mro__[2].__name__}


def overrides_case(rank: int, world: int, name: str, pattern: str, override: dict[str, float]) -> dict[str, Any]:
    """Learning rate and weight decay of every parameter after three steps, with Megatron's overrides for some."""
    from megatron.core.optimizer import ParamKey

    with megatron(world):
        run = Run(name, config_overrides={ParamKey(name=pattern): override})
        for step in range(3):
            assert run.step(step)
        return {
            name: (group["lr"], group["weight_decay"])
            for group in run.optimizer.param_groups
            for name in group["param_names"]
        }


def overflow_case(rank: int, world: int, name: str) -> dict[str, Any]:
    """Only the first rank overflows; its loss is forgotten on both."""
    with megatron(2):
        run = Run(name, torch.float16)
        taken = [run.step(0)]
        before = wholes(run.model)
        taken.append(run.step(1, spoil=rank == 0))
        after = wholes(run.model)
        waiting = run.learned.loss_window.take()
        reached = run.learned.iteration
        taken.append(run.step(2))
        unchanged = all(torch.equal(before[key], after[key]) for key in before)
        return {"taken": taken, "unchanged": unchanged, "waiting": waiting, "reached": reached, **run.end()}


def resume_case(rank: int, world: int, name: str, parts: int, folder: str, half: bool) -> dict[str, Any]:
    """Four steps; and the last two once more, from a state dict, and from a checkpoint of Megatron's."""
    from megatron.core import dist_checkpointing

    dtype = torch.bfloat16 if half else torch.float32
    with megatron(parts):
        run = Run(name, dtype)
        for step in range(2):
            run.step(step)
        own = copy.deepcopy({"model": inside(run.model).state_dict(), "optimizer": run.optimizer.state_dict()})
        schedule = run.schedule.state_dict()
        sharded = inside(run.model).sharded_state_dict()
        optimizer = run.optimizer.sharded_state_dict(sharded)
        multiprocessing.current_process()._config["daemon"] = False  # Megatron's writer starts a process
        dist_checkpointing.save({"model": sharded, "optimizer": optimizer}, folder)
        for step in range(2, 4):
            run.step(step)
        ends = [run.end()]
        for way in ("state_dict", "sharded"):
            again = Run(name, dtype)
            if way == "sharded":
                sharded = inside(again.model).sharded_state_dict()
                wanted = {"model": sharded, "optimizer": again.optimizer.sharded_state_dict(sharded, is_loading=True)}
                own = dist_checkpointing.load(wanted, folder)
            inside(again.model).load_state_dict(own["model"])
            again.optimizer.load_state_dict(own["optimizer"])
            again.schedule.load_state_dict(schedule)
            for step in range(2, 4):
                again.step(step)
            ends.append(again.end())
        return {"ends": ends}


def leave_case(rank: int, world: int, name: str, parts: int) -> dict[str, Any]:
    """Four steps, and the canonical state after two of them."""
    with megatron(parts):
        run = Run(name)
        for step in range(4):
            if step == 2:
                middle = to_canonical(run.optimizer, run.model), wholes(run.model)
            run.step(step)
        return {**run.end(), "middle": middle}


def arrive_case(rank: int, world: int, name: str, parts: int, canonical: Any, params: Any) -> dict[str, Any]:
    """Two steps from a canonical state, on any number of ranks."""
    with megatron(parts):
        run = Run(name)
        with torch.no_grad():
            for param, key in parameter_names(run.model).items():
                param.copy_(slice_by_hand(params[key], param))
        from_canonical(run.optimizer, run.model, canonical)
        run.schedule.step(2)
        for step in range(2, 4):
            run.step(step)
        return run.end()


def refused_case(rank: int, world: int) -> dict[str, str]:
    """What is told of setups that cannot be right."""
    from megatron.core.optimizer import OptimizerConfig

    from pylo_integrations.megatron import megatron_optimizer

    told = {}
    with megatron(2):
        model = wrapped_gpt()
        before = wholes(model)

        def ask(case: str, name: str = "celo2", chunks: int = 1, **fields: Any) -> None:
            config = OptimizerConfig(lr=1e-3, min_lr=0.0)
            for field, value in fields.items():
                setattr(config, field, value)
            try:
                megatron_optimizer([model] * chunks, name, config=config)
            except Exception as error:
                told[case] = f"{type(error).__name__}: {error}"

        ask("distributed", use_distributed_optimizer=True)
        ask("offload", optimizer_cpu_offload=True)
        ask("precision", use_precision_aware_optimizer=True)
        ask("pipeline", chunks=2)
        ask("unknown", name="adam")
        model.config.num_moe_experts = 2
        ask("experts")
        model.config.num_moe_experts = None
        model.config.calculate_per_token_loss = True
        ask("per token", name="velo")
        model.config.calculate_per_token_loss = False
        model.ddp_config.use_megatron_fsdp = True
        ask("fsdp")
        assert all(torch.equal(before[key], value) for key, value in wholes(model).items()), "something was written"
    return told
