"""Train a vision transformer with a learned optimizer, then with AdamW on the same seed and batches, and compare.

Examples:
    python train.py                                     small ViT on small pictures: minutes on two CPU cores
    python train.py --optimizer adamw --baseline null   AdamW only
    python train.py --optimizer celo2 --model.settings.celo2.lr=5e-4 --trainer.max_steps=300
    python train.py --ckpt_path last                    go on where it was interrupted
    python train.py --preset vit_b16 --data-dir DIR     ViT-B/16 on a folder of images
    torchrun --nproc-per-node=2 train.py --config launch/ddp.yaml   on two devices, likewise fsdp2.yaml
"""

from __future__ import annotations

import argparse
import logging
import math
import shutil
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import timm
    from comparison import History, Run, make_table, plot, verdict
    from images import ImageData
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from lightning.pytorch.utilities.rank_zero import rank_zero_only
    from torch import Tensor
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.nn.functional import cross_entropy
    from torch.optim import AdamW, Optimizer
    from torch.optim.lr_scheduler import LambdaLR
    from torchmetrics.classification import MulticlassAccuracy

    from pylo_integrations import get_optimizer_info, list_optimizers, param_groups, unwrap_optimizer
    from pylo_integrations.cli.brief_help import shorten_help
    from pylo_integrations.lightning import LearnedOptimizerCallback, configure_optimizers
    from pylo_integrations.telemetry import TelemetryMode
except ModuleNotFoundError as error:
    sys.exit(f"this recipe needs {error.name}: pip install 'pylo-integrations[recipes]', in a clone '.[recipes]'")

HERE = Path(__file__).parent
PRESETS = sorted(path.stem for path in HERE.glob("*.yaml"))
SHOWN = {
    *("config", "print_config", "preset", "optimizer", "baseline", "data_dir", "telemetry", "output", "ckpt_path"),
    *("seed_everything", "model.settings", "model.warmup", "model.backbone", "model.options"),
    *("data.batch_size", "data.image_size", "trainer.accelerator", "trainer.devices", "trainer.strategy"),
    *("trainer.precision", "trainer.max_steps", "trainer.val_check_interval", "trainer.gradient_clip_val"),
}
"""Options that `--help` tells of."""


@dataclass
class Settings:
    """How to use an optimizer.

    Attributes:
        lr: Peak learning rate; by default that of the optimizer.
        weight_decay: Decoupled weight decay.
        options: Further arguments of its constructor, e.g. `{weights: theta.safetensors}`.
    """

    lr: float | None = None
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)


class Classifier(LightningModule):
    """A model of timm, trained to classify images.

    Args:
        optimizer: One of `pylo list`, or `adamw`.
        settings: How to use each optimizer.
        warmup: Part of the run in which the learning rate rises linearly, before it falls to 0 as a cosine; optimizers
            with a learned schedule have neither.
        backbone: Name of the model in timm.
        options: Further arguments of `timm.create_model`.
        image_size: Height and width of the images.
        channels: Of the images.
        num_classes: Classes to tell apart.
        telemetry: Whether a learned optimizer logs what it does, for each parameter group or `per_parameter`.
    """

    def __init__(
        self,
        optimizer: str,
        settings: dict[str, Settings],
        warmup: float = 0.05,
        backbone: str = "vit_tiny_patch16_224",
        options: dict[str, Any] | None = None,
        image_size: int = 28,
        channels: int = 1,
        num_classes: int = 10,
        telemetry: TelemetryMode = False,
    ) -> None:
        super().__init__()
        self.telemetry: TelemetryMode = telemetry
        self.save_hyperparameters()
        self.optimizer, self.settings, self.warmup = optimizer, settings.get(optimizer, Settings()), warmup
        self.model = timm.create_model(
            backbone, img_size=image_size, in_chans=channels, num_classes=num_classes, **(options or {})
        )
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")

    def configure_model(self) -> None:
        # ModelParallelStrategy brings a mesh of devices. Lightning calls this again for every stage.
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return
        for module in [*getattr(self.model, "blocks", []), self.model]:
            fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = cross_entropy(self.model(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        scores = self.model(images)
        self.accuracy(scores, labels)
        loss = cross_entropy(scores, labels)
        self.log("validation_loss", loss, batch_size=len(labels), prog_bar=True, sync_dist=True)
        self.log("validation_accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> Any:
        settings, lr = self.settings, {} if self.settings.lr is None else {"lr": self.settings.lr}
        if self.optimizer != "adamw":
            info = get_optimizer_info(self.optimizer)
            return configure_optimizers(
                self,
                self.optimizer,
                **lr,
                weight_decay=settings.weight_decay,
                scheduler=None if info.needs_horizon or info.anneals else self.schedule,
                telemetry=self.telemetry,
                **settings.options,
            )
        optimizer = AdamW(param_groups(self, settings.weight_decay), **lr, **settings.options)
        scheduler = self.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def schedule(self, optimizer: Optimizer, num_steps: int) -> LambdaLR:
        warmup = max(1, round(self.warmup * num_steps))

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 + 0.5 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, num_steps - warmup)))

        return LambdaLR(optimizer, factor)


class Recipe(LightningCLI):
    """One run, as the command line and the preset describe it."""

    def __init__(self, preset: str, args: list[str]) -> None:
        self.history = History()
        super().__init__(
            Classifier,
            ImageData,
            run=False,
            args=args,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            trainer_defaults={
                "callbacks": [LearnedOptimizerCallback(), self.history],
                "use_distributed_sampler": False,  # the data know how to share
                "enable_model_summary": False,
                "enable_progress_bar": False,  # the history prints a line for every validation
            },
            save_config_kwargs={"config_filename": "config.yaml", "overwrite": True},
            parser_kwargs={
                "usage": "%(prog)s [options]",
                "description": __doc__,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                "default_config_files": [str(HERE / f"{preset}.yaml")],
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        names = ", ".join(["adamw", *list_optimizers()])
        parser.add_argument("--preset", choices=PRESETS, default="tiny", help="what to start from")
        parser.add_argument("--optimizer", default="pace", help=names)
        parser.add_argument("--baseline", type=str | None, default="adamw", help="optimizer to compare with, or null")
        parser.add_argument("--data_dir", "--data-dir", type=str | None, help="images, see docs/recipes.md")
        parser.add_argument(
            "--telemetry", type=TelemetryMode, default=False, help="true, or per_parameter; pylo plot draws it"
        )
        parser.add_argument("--output", default="runs/vit", help="each optimizer gets a folder in it")
        parser.add_argument(
            "--ckpt_path", type=str | None, help="checkpoint to go on from; `last`: each run from its own"
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("optimizer", "model.optimizer")
        parser.link_arguments("telemetry", "model.telemetry")
        parser.link_arguments("data_dir", "data.data_dir")
        parser.link_arguments("seed_everything", "data.seed")
        for name in ("image_size", "channels", "num_classes"):
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        shorten_help(parser, SHOWN)

    def before_instantiate_classes(self) -> None:
        for key in ("optimizer", "baseline"):
            name = self.config[key]
            if name not in ("adamw", None):
                try:
                    get_optimizer_info(name)
                except ValueError as error:
                    self.parser.error(f"--{key}: {error}; or adamw")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        folder = Path(self.config.output, self.config.optimizer)
        if self.config.ckpt_path is None and (folder / self.save_config_kwargs["config_filename"]).exists():
            rank_zero_only(shutil.rmtree)(folder)  # an earlier run of ours, which this one replaces
        if self.config.trainer.logger in (None, True):
            # A continued run gets a CSV file of its own: CSVLogger empties the one it finds.
            kwargs["logger"] = [TensorBoardLogger(folder, name="", version=""), CSVLogger(folder, name="csv")]
        return super().instantiate_trainer(default_root_dir=folder, **kwargs)

    def train(self) -> Run:
        name, trainer = self.config.optimizer, self.trainer
        data = self.datamodule
        counts = f"{len(data.training)} images to train on, {len(data.validation)} to validate"
        say(f"\n== {name} ==\ndata: {data.title} ({data.origin}): {counts}")
        trainer.fit(self.model, self.datamodule, ckpt_path=self.config.ckpt_path)
        if not trainer.fast_dev_run:
            # ModelCheckpoint saves every so many steps; the end of the run need not be one of them.
            trainer.save_checkpoint(Path(trainer.checkpoint_callback.dirpath, "last.ckpt"))
        results = trainer.validate(self.model, self.datamodule, verbose=False)
        final = results[0] if results else {}  # none with --trainer.limit_val_batches=0
        learned = unwrap_optimizer(trainer.optimizers[0])
        theta = None if learned is None else learned.theta
        group = trainer.optimizers[0].param_groups[0]
        return Run(
            name,
            lr=group.get("initial_lr", group["lr"]),
            steps=trainer.global_step,
            **self.history.state_dict(),
            validation_loss=final.get("validation_loss", math.nan),
            validation_accuracy=final.get("validation_accuracy", math.nan),
            note="" if theta is None else f"theta {theta.name}, {theta.provenance}",
        )


@rank_zero_only
def say(text: str) -> None:
    """Print it once, however many processes there are."""
    print(text, flush=True)


@rank_zero_only
def conclude(runs: list[Run], title: str, output: Path) -> None:
    """Write and print the comparison."""
    output.mkdir(parents=True, exist_ok=True)  # as a dry run with --trainer.fast_dev_run=true leaves nothing there
    table = "\n\n".join([make_table(runs), *(verdict(runs[0], baseline) for baseline in runs[1:])])
    (output / "comparison.md").write_text(f"{table}\n", encoding="utf-8")
    plot(runs, title, output / "comparison.png")
    say(f"\n{table}\n\nWritten to {output}: comparison.md, comparison.png, and a folder for each optimizer.")
    say("Next: `pylo try train.py:train` asks the same of a training function of your own; docs/cli.md tells how.")


def be_quiet() -> None:
    """Of what Lightning says, leave what went wrong: not its advertisements, nor what it deprecates of torch's."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for category in (DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category, module=r"lightning\.")
    warnings.filterwarnings("ignore", ".*does not have many workers.*")  # the pictures are in memory
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")


def main() -> None:
    be_quiet()
    # LightningCLI takes arguments in a list, as the second run needs, but then warns about those in sys.argv.
    arguments, sys.argv = sys.argv[1:], sys.argv[:1]
    chooser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    chooser.add_argument("--preset", choices=PRESETS, default="tiny")
    preset = chooser.parse_known_args(arguments)[0].preset

    first = Recipe(preset, arguments)
    runs = [first.train()]
    baseline, checkpoint = first.config.baseline, first.config.ckpt_path
    if baseline not in (None, first.config.optimizer):
        changes = [f"--optimizer={baseline}"]
        if checkpoint not in (None, "last"):
            changes.append("--ckpt_path=null")  # it is the other optimizer's
        runs.append(Recipe(preset, [*arguments, *changes]).train())

    title = f"{first.config.model.backbone} ({preset}) on {first.datamodule.title}, seed {first.config.seed_everything}"
    conclude(runs, title, Path(first.config.output))


if __name__ == "__main__":
    main()
