"""Functions of Python's standard library as prompts and completions, and a small model that knows prose only."""

from __future__ import annotations

import ast
import random
import string
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
import trl
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

SOURCES = Path(sysconfig.get_path("stdlib"))


@dataclass
class Recipe:
    """Text, and the model that is made where none is given."""

    max_functions: int = field(default=3000, metadata={"help": "read no more functions than that"})
    eval_functions: int = field(default=64, metadata={"help": "held out for evaluation"})
    max_chars: int = field(default=300, metadata={"help": "leave out functions that are longer"})
    base_steps: int = field(default=200, metadata={"help": "of training the small Llama on prose"})
    hidden_size: int = field(default=64, metadata={"help": "its width"})
    num_hidden_layers: int = field(default=2, metadata={"help": "its depth"})


def load_data(recipe: Recipe) -> tuple[list[dict[str, str]], str]:
    """Functions as prompt (docstring, then signature) and completion (body), in a fixed random order; what they are."""
    functions = []
    for path in sorted(SOURCES.glob("*.py")):
        source = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)) and len(node.body) > 1:
                lines = source.splitlines()
                head = "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]).strip()
                body = "\n".join(lines[node.body[0].end_lineno : node.end_lineno])
                if head and len(text + head + body) <= recipe.max_chars:
                    functions.append({"prompt": f"{text}\n{head}\n", "completion": body})
    random.Random(0).shuffle(functions)
    functions = functions[: recipe.max_functions]
    if len(functions) <= recipe.eval_functions:
        raise ValueError(f"{len(functions)} functions in {SOURCES}, but eval_functions={recipe.eval_functions}")
    return functions, f"data: {len(functions)} functions of Python's standard library, {SOURCES}"


def held_out(functions: list[dict[str, str]], count: int) -> tuple[Dataset, Dataset]:
    """To train on, and to evaluate with."""
    return Dataset.from_list(functions[count:]), Dataset.from_list(functions[:count])


def texts_of(functions: list[dict[str, str]]) -> Dataset:
    """The docstrings alone, each with its line of code taken off."""
    return Dataset.from_list([{"text": one["prompt"].rstrip().rpartition("\n")[0]} for one in functions])


def load_tokenizer() -> Any:
    """Printable characters, one a token."""
    letters = {text: i for i, text in enumerate(["<pad>", "<eos>", "<unk>", *string.printable])}
    plain = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def small_llama(recipe: Recipe, tokenizer: Any, prose: Dataset, args: trl.SFTConfig) -> Any:
    """A Llama trained on prose, in a folder of the output folder named by its options; later runs read it."""
    size = f"{recipe.hidden_size}x{recipe.num_hidden_layers}"
    folder = Path(args.output_dir, f"base-{size}-{recipe.max_functions}-{recipe.base_steps}-{args.seed}")
    if (folder / "config.json").is_file():
        print(f"base model: read from {folder}", flush=True)
        return transformers.AutoModelForCausalLM.from_pretrained(folder)
    print(f"base model: a small Llama, trained on the docstrings for {recipe.base_steps} steps", flush=True)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=2 * recipe.hidden_size,
            num_hidden_layers=recipe.num_hidden_layers,
            num_attention_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    settings = trl.SFTConfig(
        str(folder),
        optim="celo2",
        learning_rate=3e-4,
        max_steps=recipe.base_steps,
        max_length=args.max_length,
        per_device_train_batch_size=args.per_device_train_batch_size,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        bf16=args.bf16,
        use_cpu=args.use_cpu,
        disable_tqdm=args.disable_tqdm,
        dataloader_pin_memory=args.dataloader_pin_memory,
        seed=args.seed,
    )
    trainer = trl.SFTTrainer(model, args=settings, train_dataset=prose, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    return model


def load_model(model_args: trl.ModelConfig) -> tuple[Any, Any]:
    """A model of yours, from a folder or the hub, and its tokenizer."""
    name = model_args.model_name_or_path
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=model_args.dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer
