"""Fine-tune a language model on functions of Python's standard library: LoRA by PEFT, TRL's SFTTrainer.

Without a model, a small Llama is trained first, on the docstrings of the same functions: prose, and no code.

Examples:
    python train.py                                         preset tiny: minutes on two CPU cores
    python train.py --use_peft false --learning_rate 3e-4   all parameters
    python train.py --optim adamw_torch --learning_rate 0.01
    python train.py --model_name_or_path my-model --output_dir runs/mine
    python train.py --config my.yaml --max_steps 50         your own file, and options that override it
    python train.py --resume_from_checkpoint last           go on where it was interrupted
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path

try:
    import datasets
    import trl
    import yaml
    from data import Recipe, held_out, load_data, load_model, load_tokenizer, small_llama, texts_of
    from transformers import set_seed
    from transformers.trainer_utils import get_last_checkpoint

    from pylo_integrations import get_optimizer_info, list_optimizers, unwrap_optimizer
    from pylo_integrations.cli.brief_help import shorten_help
    from pylo_integrations.hf import install
except ModuleNotFoundError as error:
    sys.exit(
        f"this recipe needs {error.name}: pip install 'pylo-integrations[recipes]' trl peft, "
        "in a clone '.[recipes]' trl peft"
    )

HERE = Path(__file__).parent
PRESET = HERE / "tiny.yaml"
SHOWN = {"model_name_or_path", "dtype", "resume_from_checkpoint", "optim_args", "weight_decay", "use_cpu", "bf16"}
"""Options that `--help` tells of, beside those of `Recipe` and of the preset."""


def parse(arguments: list[str]) -> tuple[Recipe, trl.SFTConfig, trl.ModelConfig]:
    """Read a command line: options of `Recipe`, `SFTConfig` and `ModelConfig`, over those of `--config FILE.yaml`."""
    install()  # makes --optim celo2 known, also to the parser
    parser = trl.TrlParser(
        (Recipe, trl.SFTConfig, trl.ModelConfig),
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    preset_options = yaml.safe_load(PRESET.read_text(encoding="utf-8"))
    shorten_help(parser, {*SHOWN, *preset_options, *(field.name for field in dataclasses.fields(Recipe))})
    # TRL's parser knows no --config=FILE.
    arguments = [
        part for each in arguments for part in (each.split("=", 1) if each.startswith("--config=") else [each])
    ]
    given = {argument.partition("=")[0] for argument in arguments}
    preset = [] if "--config" in given else ["--config", str(PRESET)]
    recipe, args, model_args = parser.parse_args_and_config([*preset, *arguments])
    optim = getattr(args.optim, "value", args.optim)
    if preset and optim != "celo2" and optim in list_optimizers() and "--learning_rate" not in given:
        args.learning_rate = get_optimizer_info(optim).lr  # that of the preset is celo2's
    if args.resume_from_checkpoint == "last":
        args.resume_from_checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        if args.resume_from_checkpoint is None:
            parser.error(f"there is no checkpoint in {args.output_dir}: leave --resume_from_checkpoint out")
    return recipe, args, model_args


def be_quiet() -> None:
    """Leave out what TRL and transformers deprecate of each other's, and bars for work of a second."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl)\.")
    datasets.disable_progress_bars()


def main() -> None:
    be_quiet()
    recipe, args, model_args = parse(sys.argv[1:])
    functions, description = load_data(recipe)
    print(description, flush=True)
    set_seed(args.seed)
    if model_args.model_name_or_path is None:
        tokenizer = load_tokenizer()
        model = small_llama(recipe, tokenizer, texts_of(functions), args)
    else:
        model, tokenizer = load_model(model_args)
    set_seed(args.seed)  # whether the small Llama was trained just now or before
    training, evaluation = held_out(functions, recipe.eval_functions)
    trainer = trl.SFTTrainer(
        model,
        args=args,
        train_dataset=training,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        peft_config=trl.get_peft_config(model_args),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if not trainer.is_world_process_zero():
        return

    learned = unwrap_optimizer(trainer.optimizer)
    trained = [param.numel() for param in trainer.model.parameters() if param.requires_grad]
    summary = {
        "optimizer": getattr(args.optim, "value", args.optim),
        "learning rate": args.learning_rate,
        "trained parameters": sum(trained),
        "steps": trainer.state.global_step,
        "eval loss, before": before,
        "eval loss, after": after,
    }
    if learned is not None and learned.theta is not None:
        summary["theta"] = f"{learned.theta.name}, {learned.theta.provenance}"
    Path(args.output_dir, "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    print()
    for name, value in summary.items():
        print(f"{name:22}{f'{value:.4g}' if isinstance(value, float) else value}")


if __name__ == "__main__":
    main()
