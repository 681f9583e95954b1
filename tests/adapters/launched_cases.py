"""What the ranks of the tests of distributed adapters run; see pylo_integrations.workers.

Accelerate and the Hugging Face Trainer shard only what they take for accelerators. So here the CPU ranks pass for GPUs
in the one place where that is decided; everything after it is as a user gets it, but for gloo in the place of NCCL.
"""

from __future__ import annotations

import functools
import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sharded_cases import digest, full_tensors
from thetas import is_absent, theta_for
from torch import Tensor, nn

from pylo_integrations import get_optimizer_info, unwrap_optimizer


@functools.cache
def stays(framework: str) -> None:
    """Imports a framework for good: after every run they collect garbage, and would look through what is imported."""
    importlib.import_module(framework)
    gc.collect()
    gc.freeze()


@contextmanager
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its state for the life of a process, which serves many tests here."""
    from accelerate.state import AcceleratorState

    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def pass_for_accelerators() -> None:
    """To be called after Accelerate has looked at the processes, before it looks at how to shard."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 knows no cpu:0


@contextmanager
def counted_steps() -> Iterator[list[int]]:
    """The iteration that every learned optimizer reaches with each step, but for torch's probes of its state."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    reached: list[int] = []

    def note(optimizer: Any, *args: Any) -> None:
        learned = unwrap_optimizer(optimizer)
        if learned is not None and learned.iteration:
            reached.append(learned.iteration)

    handle = register_optimizer_step_post_hook(note)
    try:
        yield reached
    finally:
        handle.remove()


def moved(trained: dict[str, Tensor], start: nn.Module) -> float:
    """How far training took any parameter from where ``start`` has it."""
    return max(
        (trained[name].double() - p.detach().double()).abs().max().item() for name, p in start.named_parameters()
    )


def end_of(optimizer: Any, trained: dict[str, Tensor]) -> str:
    """A digest of everything that a run ends with on every rank."""
    return digest([*trained.values(), *(value for _, value in sorted(optimizer._progress.memory.items()))])


# -- Hugging Face Trainer ----------------------------------------------------------------------------------------------


def fsdp_options(wrapper: str, state_dict_type: str) -> dict[str, Any]:
    if wrapper == "ddp":
        return {}
    if wrapper.startswith("zero"):
        sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        stage = {"stage": int(wrapper.removeprefix("zero"))}
        return {"deepspeed": {**sizes, "gradient_clipping": "auto", "zero_optimization": stage}}
    config = {
        "version": {"fsdp1": 1, "fsdp2": 2}[wrapper],
        "state_dict_type": state_dict_type,
        "transformer_layer_cls_to_wrap": ["GPT2Block"],
        "reshard_after_forward": "full_shard" if wrapper == "fsdp1" else True,
        "sync_module_states": False,  # needs an accelerator
    }
    return {"fsdp": True, "fsdp_config": config}


def hf_trainer(wrapper: str, name: str, folder: str, stock: bool = False, state_dict_type: str = "", **options: Any):
    """A Trainer on the model of test_adapter_hf in float64, set up for ``wrapper``."""
    import transformers
    from test_adapter_hf import gpt2, texts

    from pylo_integrations import hf

    weights = os.path.join(folder, f"theta{torch.distributed.get_rank()}.safetensors")
    if is_absent(get_optimizer_info(name).cls):
        theta_for(name).save(weights, overwrite=True)
        options["optim_args"] = ",".join(filter(None, (f"weights={weights}", options.get("optim_args"))))
    defaults: dict[str, Any] = {
        "output_dir": folder,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 0.7,
        "max_grad_norm": 0.5,
        **fsdp_options(wrapper, state_dict_type),
    }
    if stock:
        hf.install()
        defaults["optim"] = name
    args = transformers.TrainingArguments(**{**defaults, **options})
    if wrapper.startswith("fsdp"):
        pass_for_accelerators()
    trainer_class, given = (transformers.Trainer, {}) if stock else (hf.Trainer, {"optimizers": name})
    in_float32 = wrapper == "fsdp1" or wrapper.startswith("zero")  # which cannot clip float64; has such masters
    model = gpt2().to(torch.float32 if in_float32 else torch.float64)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # ranks draw differently
    return trainer_class(model, args, train_dataset=texts(), **given)


def hf_case(
    rank: int,
    world: int,
    wrapper: str,
    name: str,
    folder: str,
    stock: bool = False,
    resume: bool = False,
    state_dict_type: str = "FULL_STATE_DICT",
    **options: Any,
) -> dict[str, Any]:
    """Train; with ``resume``, once more from the checkpoint in the middle."""
    stays("test_adapter_hf")
    import transformers
    from test_adapter_hf import gpt2

    from pylo_integrations import hf

    transformers.logging.set_verbosity_error()
    saving = {"save_strategy": "steps", "save_steps": 2} if resume else {}
    results = []
    try:
        for checkpoint in [None, f"{folder}/checkpoint-2"][: 2 if resume else 1]:
            with fresh_accelerate(), counted_steps() as reached:
                trainer = hf_trainer(wrapper, name, folder, stock, state_dict_type, **saving, **options)
                trainer.train(resume_from_checkpoint=checkpoint)
            optimizer = unwrap_optimizer(trainer.optimizer)
            trained = full_tensors(trainer.model_wrapped)
            results.append(
                {
                    "params": {key: tensor.numpy() for key, tensor in trained.items()},
                    "digest": end_of(optimizer, trained),
                    "reached": reached,
                    "moved": moved(trained, gpt2()),
                    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                    "steps": (optimizer.iteration, optimizer.num_steps),
                    "kinds": sorted({type(p).__name__ for group in optimizer.param_groups for p in group["params"]}),
                }
            )
    finally:
        if stock:
            hf.uninstall()
    return {"runs": results}


def replicas_case(rank: int, world: int, name: str, backend: str, folder: str) -> dict[str, Any]:
    """Train under DDP in float32 with what a Trainer has by default, each rank on losses and dropout of its own."""
    stays("test_adapter_hf")
    import transformers
    from plans import native_parts
    from test_adapter_hf import gpt2, texts
    from toy_loss_rule import toy_loss_optimizer

    from pylo_integrations import hf

    transformers.logging.set_verbosity_error()
    with fresh_accelerate(), toy_loss_optimizer():
        args = transformers.TrainingArguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            ddp_backend="gloo",
            optim_args=f"backend={backend}",
        )
        trainer = hf.Trainer(gpt2(), args, train_dataset=texts(), optimizers=name)
        start = digest(p.detach() for p in trainer.model.parameters())
        trainer.train()
        optimizer = unwrap_optimizer(trainer.optimizer)
        return {
            "world": args.world_size,
            "start": start,
            "end": digest(p.detach() for p in trainer.model.parameters()),
            "iteration": optimizer.iteration,
            "native": bool(native_parts(optimizer)),
            "seen": getattr(optimizer.rule, "seen_losses", None),
            "logged": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }


# -- Accelerate --------------------------------------------------------------------------------------------------------


def batches(count: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count * 4, 2, 5, 5, generator=generator, dtype=torch.float64)
    return list(zip(x.split(4), x[:, 0, 0, :3].split(4), strict=True))


def accelerate_case(
    rank: int,
    world: int,
    wrapper: str,
    name: str,
    folder: str,
    accumulation: int = 1,
    resume: bool = False,
    state_dict_type: str = "FULL_STATE_DICT",
    attached: bool = True,
    shard_step: bool = False,
) -> dict[str, Any]:
    """A hand-written loop of one epoch; with ``resume``, its second half once more from ``save_state``."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.parallelism_config import ParallelismConfig
    from sharded_cases import make, net
    from torch.utils.data import DataLoader, TensorDataset

    from pylo_integrations.accelerate import attach, count_steps

    options: dict[str, Any] = {"cpu": True, "gradient_accumulation_steps": accumulation}
    results = []
    for half in (False, True)[: 2 if resume else 1]:
        with fresh_accelerate(), counted_steps() as reached:
            if wrapper != "ddp":
                pass_for_accelerators()
                options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                    fsdp_version=1 if wrapper.startswith("fsdp1") else 2,
                    use_orig_params=wrapper == "fsdp1",
                    sync_module_states=False,
                    state_dict_type=state_dict_type,
                    auto_wrap_policy="transformer_based_wrap",
                    transformer_cls_names_to_wrap=["LayerNorm", "Linear"],
                )
            if wrapper == "hsdp":
                options["parallelism_config"] = ParallelismConfig(dp_replicate_size=2, dp_shard_size=world // 2)
            accelerator = Accelerator(**options)
            model: nn.Module = net()
            loader = DataLoader(TensorDataset(*map(torch.cat, zip(*batches(), strict=True))), batch_size=4 // world)
            if wrapper.startswith("fsdp1"):  # Accelerate wants it in this order
                model = accelerator.prepare(model)
                optimizer = accelerator.prepare(make(name, model.named_parameters(), shard_step=shard_step))
                loader = accelerator.prepare(loader)
            else:
                optimizer = make(name, model.named_parameters(), shard_step=shard_step)
                model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            learned = unwrap_optimizer(optimizer)
            steps = count_steps(accelerator, loader)
            if attached:
                attach(accelerator, optimizer, num_steps=steps)
            else:
                learned.set_num_steps(steps)
                learned.bind_model(model)
            if half:
                accelerator.load_state(f"{folder}/state")
                assert learned.iteration == steps // 2
            for index, (x, y) in enumerate(loader):
                if half and index < len(loader) // 2:
                    continue
                if resume and not half and index == len(loader) // 2:
                    accelerator.save_state(f"{folder}/state")
                with accelerator.accumulate(model):
                    loss = (model(x) - y).square().mean()
                    accelerator.backward(loss)
                    optimizer.step(*([] if attached else [lambda loss=loss: loss]))
                    optimizer.zero_grad()
            trained = full_tensors(model)
            results.append(
                {
                    "params": {key: tensor.numpy() for key, tensor in trained.items()},
                    "digest": end_of(learned, trained),
                    "reached": reached,
                    "moved": moved(trained, net()),
                    "steps": (learned.iteration, steps),
                }
            )
    return {"runs": results}


@contextmanager
def full_states_stay_where_they_are() -> Iterator[None]:
    """FSDP1 offloads whole states to the CPU. If they are there, torch merges all into one, of its own Adam too."""
    from torch.distributed.fsdp import api

    original = api.FullOptimStateDictConfig
    api.FullOptimStateDictConfig = lambda **options: original(**{**options, "offload_to_cpu": False})
    try:
        yield
    finally:
        api.FullOptimStateDictConfig = original


# -- Lightning ---------------------------------------------------------------------------------------------------------


def lightning_case(
    rank: int,
    world: int,
    strategy: str,
    name: str,
    folder: str,
    accumulation: int = 1,
    resume: bool = False,
    distributed_checkpoint: bool = True,
    shard_step: bool = False,
) -> dict[str, Any]:
    """Two epochs; with ``resume``, the second once more from a checkpoint, since Lightning cannot skip batches."""
    stays("lightning.pytorch")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
    from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
    from sharded_cases import net
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.utils.data import DataLoader, TensorDataset

    from pylo_integrations.lightning import LearnedOptimizerCallback, configure_optimizers

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = None

        def configure_model(self) -> None:
            if self.net is not None:
                return
            self.net = net()
            if strategy == "tensor_parallel":
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)
            if strategy == "fsdp2":
                fully_shard(self.net.up, mesh=self.device_mesh["data_parallel"])
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, index):
            return (self.net(batch[0]) - batch[1]).square().mean()

        def configure_optimizers(self):
            options = {"weights": theta_for(name)} if is_absent(get_optimizer_info(name).cls) else {}
            return configure_optimizers(self, name, scheduler="cosine", shard_step=shard_step, **options)

        def train_dataloader(self):
            data = TensorDataset(*map(torch.cat, zip(*batches(), strict=True)))
            return DataLoader(data, batch_size=4 if strategy == "tensor_parallel" else 4 // world)

    class FSDPOnCPU(FSDPStrategy):
        """As its base, which passes no index of a device, and FSDP then wants an accelerator."""

        def _setup_model(self, model):
            return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)

    results = []
    half = len(batches()) // accumulation
    for checkpoint in (None, f"{folder}/step={half}.ckpt")[: 2 if resume else 1]:
        strategies: dict[str, Any] = {
            "ddp": lambda: DDPStrategy(process_group_backend="gloo"),
            "fsdp2": lambda: ModelParallelStrategy(
                data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=distributed_checkpoint
            ),
            "tensor_parallel": lambda: ModelParallelStrategy(
                data_parallel_size=1, tensor_parallel_size=world, save_distributed_checkpoint=distributed_checkpoint
            ),
            "fsdp1": lambda: FSDPOnCPU(
                auto_wrap_policy={nn.LayerNorm, nn.Linear},
                state_dict_type="sharded" if distributed_checkpoint else "full",
            ),
        }
        saver = ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=True)
        check = _AcceleratorConnector._check_strategy_and_fallback
        if strategy == "fsdp1":  # refuses a CPU
            _AcceleratorConnector._check_strategy_and_fallback = lambda self: None
        try:
            trainer = Trainer(
                accelerator="cpu",
                devices=world,
                strategy=strategies[strategy](),
                max_epochs=2,
                accumulate_grad_batches=accumulation,
                callbacks=[LearnedOptimizerCallback(), *([saver] if resume and checkpoint is None else [])],
                enable_checkpointing=resume and checkpoint is None,
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
        finally:
            _AcceleratorConnector._check_strategy_and_fallback = check
        module = Module()
        with counted_steps() as reached, full_states_stay_where_they_are():
            trainer.fit(module, ckpt_path=checkpoint)
        learned = unwrap_optimizer(trainer.optimizers[0])
        trained = {name.removeprefix("net."): p for name, p in full_tensors(trainer.strategy.model).items()}
        results.append(
            {
                "params": {key: tensor.numpy() for key, tensor in trained.items()},
                "digest": end_of(learned, trained),
                "reached": reached,
                "moved": moved(trained, net()),
                "steps": (learned.iteration, learned.num_steps),
            }
        )
    return {"runs": results}


# -- verl --------------------------------------------------------------------------------------------------------------


def verl_case(rank: int, world: int, overrides: list[str]) -> dict[str, Any]:
    """Three steps of what verl makes of its own configuration with ``overrides``, under FSDP2."""
    import verl.trainer
    from hydra import compose, initialize_config_dir
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import build_optimizer

    folder = os.path.join(os.path.dirname(verl.trainer.__file__), "config")
    with initialize_config_dir(folder, version_base=None):
        actor = compose("ppo_trainer", overrides).actor_rollout_ref.actor
    assert actor.strategy == "fsdp2"
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    before = full_tensors(net)
    optimizer = build_optimizer(net.parameters(), omega_conf_to_dataclass(actor.optim))
    for step in range(3):
        net(torch.full((2, 6), 1.0 + step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = full_tensors(net)
    return {
        "class": type(optimizer).__name__,
        "lr": optimizer.param_groups[0]["lr"],
        "iteration": optimizer.iteration,
        "moved": sorted(name for name in before if not torch.equal(before[name], after[name])),
    }


# -- learning rates ----------------------------------------------------------------------------------------------------


@contextmanager
def noted_rates() -> Iterator[list[float]]:
    """The learning rate of every step of a learned optimizer."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    rates: list[float] = []

    def note(optimizer: Any, *args: Any) -> None:
        if (learned := unwrap_optimizer(optimizer)) is not None:
            rates.append(float(learned.param_groups[0]["lr"]))

    handle = register_optimizer_step_pre_hook(note)
    try:
        yield rates
    finally:
        handle.remove()


def rates_case(rank: int, world: int, adapter: str, kinds: list[str], folder: str) -> dict[str, list[float]]:
    """Learning rates of a run of six optimizer steps, by scheduler of test_schedulers."""
    from scheduler_cases import MAKERS

    rates = {}
    for kind in kinds:
        torch.manual_seed(0)
        with noted_rates() as rates[kind], fresh_accelerate():
            RATES[adapter](world, MAKERS[kind], folder)
    return rates


def rated_net() -> tuple[nn.Module, Any]:
    from thetas import create

    model = nn.Linear(3, 1)
    return model, create(model, "celo2", num_steps=6)


def rated_loader(world: int) -> Any:
    """Twelve batches, of which frameworks give every rank its share."""
    from torch.utils.data import DataLoader

    return DataLoader(torch.arange(12 * 4 * 3.0).reshape(-1, 3) / 100, batch_size=4 // world)


def step_scheduler(scheduler: Any, loss: Tensor) -> None:
    inner = getattr(scheduler, "scheduler", scheduler)
    scheduler.step(*([1.0] if isinstance(inner, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))


def rates_of_plain(world: int, make: Any, folder: str) -> None:
    model, optimizer = rated_net()
    model = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    scheduler = make(optimizer)
    for batch in list(rated_loader(1))[::2]:
        loss = model(batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(loss=loss)
        step_scheduler(scheduler, loss)


def rates_of_accelerate(world: int, make: Any, folder: str, prepare: Any = None) -> None:
    from accelerate import Accelerator

    from pylo_integrations.accelerate import attach, count_steps, prepare_scheduler

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(*rated_net(), rated_loader(world))
    num_steps = count_steps(accelerator, loader)
    assert num_steps == 6
    scheduler = (prepare or prepare_scheduler)(accelerator, make(optimizer))
    attach(accelerator, optimizer, num_steps)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            step_scheduler(scheduler, loss)
            optimizer.zero_grad()


def rates_of_accelerates_prepare(world: int, make: Any, folder: str) -> None:
    rates_of_accelerate(world, make, folder, lambda accelerator, scheduler: accelerator.prepare(scheduler))


def rates_of_fabric(world: int, make: Any, folder: str) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import DDPStrategy

    from pylo_integrations.lightning import attach

    strategy = DDPStrategy(process_group_backend="gloo") if world > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    model, optimizer = fabric.setup(*rated_net())
    scheduler = make(unwrap_optimizer(optimizer))
    with attach(fabric, optimizer, num_steps=6):
        for index, batch in enumerate(fabric.setup_dataloaders(rated_loader(world))):
            with fabric.no_backward_sync(model, enabled=index % 2 == 0):
                loss = model(batch).square().mean()
                fabric.backward(loss / 2)
            if index % 2:
                optimizer.step()
                step_scheduler(scheduler, loss)
                optimizer.zero_grad()


def rates_of_lightning(world: int, make: Any, folder: str) -> None:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy

    from pylo_integrations.lightning import LearnedOptimizerCallback, configure_optimizers

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(3, 1)

        def training_step(self, batch, index):
            self.log("loss", 1.0)
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            def build(optimizer: Any, num_steps: int) -> Any:
                assert num_steps == 6
                return make(optimizer)

            chosen = configure_optimizers(self, "celo2", scheduler=build)
            chosen["lr_scheduler"]["monitor"] = "loss"
            return chosen

        def train_dataloader(self):
            return rated_loader(world)

    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=DDPStrategy(process_group_backend="gloo") if world > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[LearnedOptimizerCallback()],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(Module())


def rates_of_hf(world: int, make: Any, folder: str) -> None:
    import transformers
    from test_adapter_hf import gpt2, texts

    from pylo_integrations import hf

    transformers.logging.set_verbosity_error()
    args = transformers.TrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=4 // world,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = hf.Trainer(gpt2(), args, train_dataset=texts(48), optimizers=("celo2", make))
    trainer.train()
    assert trainer.state.max_steps == 6


RATES = {
    "plain": rates_of_plain,
    "accelerate": rates_of_accelerate,
    "accelerate's own prepare": rates_of_accelerates_prepare,
    "fabric": rates_of_fabric,
    "lightning": rates_of_lightning,
    "hf": rates_of_hf,
}
