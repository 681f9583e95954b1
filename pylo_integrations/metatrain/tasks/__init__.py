"""Families of tasks to meta-train on: what a network is, what its loss is, and where its batches come from."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from pylo_integrations.metatrain.tasks.base import Batch, Family, Model, Task
from pylo_integrations.metatrain.tasks.functions import (
    Curve,
    FewExamples,
    LowRank,
    Regression,
    SoftmaxRegression,
    Teacher,
    Trees,
)
from pylo_integrations.metatrain.tasks.images import (
    ImageAutoencoder,
    ImageConv,
    ImageDenoiser,
    ImageMLP,
    ImagePatches,
    ImageResidual,
)
from pylo_integrations.metatrain.tasks.tables import Factorisation, Modular, Recall
from pylo_integrations.metatrain.tasks.texts import TextAttention, TextGRU, TextMLP, TextRNN
from pylo_integrations.paths import check_file

__all__ = ["FAMILIES", "Batch", "Family", "Model", "Task", "find_family"]

FAMILIES: Mapping[str, type[Family]] = {
    family.kind: family
    for family in (
        ImageMLP,
        ImageConv,
        ImageAutoencoder,
        ImagePatches,
        ImageResidual,
        ImageDenoiser,
        Teacher,
        Regression,
        Curve,
        FewExamples,
        SoftmaxRegression,
        Trees,
        LowRank,
        TextMLP,
        TextAttention,
        TextRNN,
        TextGRU,
        Factorisation,
        Modular,
        Recall,
    )
}
"""The families of this package by kind."""


def find_family(kind: str, folder: Path) -> type[Family]:
    """A family by its kind, or by ``file.py:ClassName``, the file being relative to ``folder``.

    A file is run to find its class, so use only files that you trust.

    Raises:
        ValueError: There is none, or the file cannot be run.
        OSError: The file cannot be read.
    """
    if kind in FAMILIES:
        return FAMILIES[kind]
    file, _, name = kind.rpartition(":")
    if not file.endswith(".py"):
        raise ValueError(
            f"task family {kind!r} is unknown; choose one of {sorted(FAMILIES)}, or name your own as file.py:ClassName"
        )
    path = folder / file
    try:
        check_file(path)
    except FileNotFoundError:
        raise ValueError(f"task family {kind!r}: there is no file {path}") from None
    spec = importlib.util.spec_from_file_location(f"pylo_metatrain_family_{path.stem}", path)
    assert spec is not None and spec.loader is not None, "it is a .py file"
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"task family {kind!r}: {path} cannot be run: {type(error).__name__}: {error}") from error
    family = getattr(module, name, None)
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise ValueError(f"task family {kind!r}: {path} has no subclass of Family named {name!r}")
    return family
