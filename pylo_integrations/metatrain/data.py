"""The data of the task families: small, already on the machine, and split once and for all."""

from __future__ import annotations

import functools
import gzip
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from pylo_integrations.metatrain.seeds import generator_of

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
VOCABULARY = 48
VALIDATION = 5
"""One in this many examples is for validation."""


class DataError(RuntimeError):
    """A data set is not on this machine; the message says how to get it."""


@dataclass(frozen=True)
class Split:
    """Examples of a data set.

    Attributes:
        inputs: ``(examples, side, side)`` images, float32 of mean 0 and variance 1 over the data set.
        labels: ``(examples,)``, int64.
    """

    inputs: Tensor
    labels: Tensor


@functools.cache
def images(name: str) -> tuple[Split, Split]:
    """Training and validation examples of ``"digits"`` (8 x 8) or ``"fashion_mnist"`` (averaged down to 14 x 14).

    Raises:
        DataError: It is not installed.
        ValueError: Unknown name.
    """
    if name == "digits":
        inputs, labels = _digits()
    elif name == "fashion_mnist":
        inputs, labels = _fashion_mnist()
    else:
        raise ValueError(f"data {name!r} is unknown; choose 'digits' or 'fashion_mnist'")
    inputs = (inputs - inputs.mean()) / inputs.std()
    order = torch.randperm(len(inputs), generator=generator_of("split", name))
    validation, training = order[::VALIDATION], order[torch.arange(len(order)) % VALIDATION != 0]
    return Split(inputs[training], labels[training]), Split(inputs[validation], labels[validation])


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError("the digits are scikit-learn's: pip install scikit-learn") from None
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.int64)


def _fashion_mnist() -> tuple[Tensor, Tensor]:
    arrays = []
    for file, offset in (("train-images-idx3-ubyte.gz", 16), ("train-labels-idx1-ubyte.gz", 8)):
        path = FASHION_MNIST / file
        if not path.is_file():
            raise DataError(f"there is no {path}: apt-get install dataset-fashion-mnist, or use data: digits")
        with gzip.open(path) as stream:
            arrays.append(numpy.frombuffer(stream.read(), numpy.uint8, offset=offset).copy())
    labels = torch.from_numpy(arrays[1]).long()
    pixels = torch.from_numpy(arrays[0]).view(len(labels), 1, 28, 28).float() / 255
    return torch.nn.functional.avg_pool2d(pixels, 2).squeeze(1), labels


@functools.cache
def text() -> tuple[Tensor, Tensor]:
    """Training and validation text, int64 ``(characters,)``: the language reference that comes with Python.

    The :data:`VOCABULARY` - 1 most frequent characters are the classes from 0 on, all others the last class.
    """
    from pydoc_data.topics import topics

    written = "\n".join(topics[name] for name in sorted(topics)).lower()
    frequent = sorted(Counter(written).items(), key=lambda pair: (-pair[1], pair[0]))[: VOCABULARY - 1]
    classes = {character: index for index, (character, _) in enumerate(frequent)}
    encoded = torch.tensor([classes.get(character, VOCABULARY - 1) for character in written])
    training = len(encoded) * (VALIDATION - 1) // VALIDATION
    return encoded[:training], encoded[training:]
