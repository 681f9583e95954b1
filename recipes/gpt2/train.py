"""Train GPT-2 from nothing with a learned optimizer, through the Hugging Face Trainer.

Examples:
    python train.py                                 preset tiny: minutes on two CPU cores
    python train.py gpt2 --data book.txt            preset gpt2: 124 million parameters
    python train.py my.yaml --max_steps 50          your own file, and options that override it
    python train.py --optim adamw_torch --learning_rate 0.003 --lr_scheduler_type cosine
    python train.py --resume_from_checkpoint last   go on where it was interrupted
    accelerate launch --config_file launch/fsdp2.yaml train.py gpt2   on several devices, likewise ddp, hsdp, fsdp1
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

try:
    from language_model import load_data, make_model, parse
    from transformers import Trainer, TrainerCallback, set_seed

    from pylo_integrations import unwrap_optimizer
    from pylo_integrations.bench.share import OptimizerShare
except ModuleNotFoundError as error:
    sys.exit(f"this recipe needs {error.name}: pip install 'pylo-integrations[recipes]', in a clone '.[recipes]'")


class Clock(TrainerCallback):
    """Times the steps of this process; the Trainer's own rates count the steps before a resume as well."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first_step, self.seconds = state.global_step, 0.0
        optimizer = kwargs["optimizer"]
        self.share = OptimizerShare(getattr(optimizer, "optimizer", optimizer))  # Accelerate wraps it

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.share.begin()
        self._began = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += perf_counter() - self._began
        self.share.end()


def main() -> None:
    recipe, args = parse(sys.argv[1:], __doc__)
    training, evaluation, description = load_data(recipe)
    is_first = args.process_index == 0
    set_seed(args.seed)
    model, clock = make_model(recipe), Clock()
    if is_first:
        print(description)
        print(f"model: GPT-2 with {model.num_parameters():,} parameters; optimizer: {args.optim.value}", flush=True)
    trainer = Trainer(model, args, train_dataset=training, eval_dataset=evaluation, callbacks=[clock])
    checkpoint = args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if checkpoint == "last" else checkpoint)
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if not is_first:
        return

    steps = trainer.state.global_step - clock.first_step
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] or [math.nan]
    learned = unwrap_optimizer(trainer.optimizer)
    summary = {
        "optimizer": args.optim.value,
        "steps": trainer.state.global_step,
        "train loss, first logged": losses[0],
        "train loss, last logged": losses[-1],
        "eval loss": eval_loss,
        "perplexity": math.exp(eval_loss),
        "tokens/s": steps * batch * recipe.n_positions / clock.seconds if steps else None,
        "ms/step": 1000 * clock.seconds / steps if steps else None,
        "optimizer, % of a step": None if math.isnan(clock.share.value) else 100 * clock.share.value,
    }
    if learned is not None and learned.theta is not None:
        summary["theta"] = f"{learned.theta.name}, {learned.theta.provenance}"
    Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    print()
    for name, value in summary.items():
        print(f"{name:25}{f'{value:.4g}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
