"""What train.py and train_accelerate.py share: the configuration file, the data and the model."""

from __future__ import annotations

import hashlib
from argparse import RawDescriptionHelpFormatter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from corpus import Blocks, find_text, load_tokenizer, tokenize
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainingArguments

from pylo_integrations.cli.brief_help import shorten_help
from pylo_integrations.hf import install

HERE = Path(__file__).parent
SHOWN = {
    "resume_from_checkpoint",
    "optim_args",
    "weight_decay",
    "gradient_accumulation_steps",
    "use_cpu",
    "bf16",
    "fsdp",
}
"""Options that `--help` tells of, beside those of `Recipe` and of the configuration file."""


@dataclass
class Recipe:
    """Text and model; the defaults are those of GPT-2 with 124 million parameters."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "UTF-8 text files; without, Python's documentation or sources, whichever is installed"},
    )
    max_tokens: int | None = field(default=None, metadata={"help": "stop reading the text after so many"})
    eval_tokens: int = field(default=131072, metadata={"help": "held out for evaluation, from the end of the text"})
    n_positions: int = field(default=1024, metadata={"help": "tokens in a training example"})
    n_embd: int = field(default=768, metadata={"help": "width"})
    n_layer: int = field(default=12, metadata={"help": "depth"})
    n_head: int = field(default=12, metadata={"help": "attention heads"})


def read_config(name: str) -> dict[str, Any]:
    """The contents of a YAML file, or of the preset of that name.

    Raises:
        FileNotFoundError: There is neither.
    """
    presets = {path.stem: path for path in HERE.glob("*.yaml")}
    path = presets.get(name, Path(name))
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file {name}; presets: {', '.join(sorted(presets))}")
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config


def parse(arguments: list[str], description: str | None = None) -> tuple[Recipe, TrainingArguments]:
    """Read a command line: `[PRESET or FILE.yaml] [--option value ...]`, options of `Recipe` or `TrainingArguments`.

    Raises:
        ValueError: The file has unknown keys.
    """
    install()  # makes optim: pace known, also to the parser
    parser = HfArgumentParser(
        (Recipe, TrainingArguments),
        usage="%(prog)s [PRESET or FILE.yaml] [options]",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    has_name = arguments and not arguments[0].startswith("-")
    name, options = (arguments[0], arguments[1:]) if has_name else ("tiny", arguments)
    config = read_config(name)
    if unknown := sorted(config.keys() - {action.dest for action in parser._actions}):
        raise ValueError(f"{name}: unknown options {unknown}")
    parser.set_defaults(**config)
    shorten_help(parser, {*SHOWN, *config, *(each.name for each in fields(Recipe))})
    recipe, args = parser.parse_args_into_dataclasses(options)
    return recipe, args


def load_data(recipe: Recipe) -> tuple[Blocks, Blocks, str]:
    """Training and evaluation data, and a line that says what they are.

    Raises:
        ValueError: There is too little text.
    """
    paths, origin = find_text(recipe.data)
    tokens = tokenize(paths, load_tokenizer(), recipe.max_tokens)
    parts = tokens[: -recipe.eval_tokens], tokens[-recipe.eval_tokens :]
    training, evaluation = (Blocks(part, recipe.n_positions) for part in parts)
    if not len(training) or not len(evaluation):
        raise ValueError(
            f"{len(tokens)} tokens are too few: eval_tokens={recipe.eval_tokens} are held out, and both parts need "
            f"n_positions={recipe.n_positions} or more"
        )
    digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:12]
    return training, evaluation, f"text: {origin}: {len(tokens):,} tokens of GPT-2, sha256 {digest}"


def make_model(recipe: Recipe) -> GPT2LMHeadModel:
    """A new model, initialised from torch's generator."""
    sizes = {name: getattr(recipe, name) for name in ("n_positions", "n_embd", "n_layer", "n_head")}
    return GPT2LMHeadModel(GPT2Config(**sizes))
