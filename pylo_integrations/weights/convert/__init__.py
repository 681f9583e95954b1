"""Other people's weights as theta: one module per foreign format, and what to do with their arrays.

No foreign code, no pickle and no framework: files are read as data, within bounds.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylo_integrations.paths import LARGEST_CONFIG
from pylo_integrations.profiles import PROFILES, architecture_of
from pylo_integrations.weights.convert.errors import ConversionError, naming, read_bytes
from pylo_integrations.weights.convert.flax import read_flax
from pylo_integrations.weights.convert.pytorch import name_some, read_config, read_module
from pylo_integrations.weights.published import FLAX_FILE, PYTORCH_FILE
from pylo_integrations.weights.theta import Theta

__all__ = ["OPTIMIZERS", "ConversionError", "Foreign", "check_config", "convert", "find_file", "read_foreign"]

CONFIG_FILE = "config.json"
VELO_INPUTS, CELO_INPUTS = 30, 18
"""Features that enter the LSTM (docs/mathematics.md, "VeLO", "Celo")."""

_FOREIGN = {profile.converts_as: profile for profile in PROFILES.values() if profile.converts_as}

OPTIMIZERS = tuple(_FOREIGN)
"""Optimizers that foreign weights may be for: what ``architecture`` accepts."""

_BY_MODULES = {modules: name for name, profile in _FOREIGN.items() for modules in profile.modules}


@dataclass(frozen=True)
class Foreign:
    """Foreign weights, understood but not yet checked by the rule.

    Attributes:
        optimizer: The one they are for, of :data:`OPTIMIZERS`.
        arrays: By the reference's tree-path names, weights (inputs, outputs).
        provenance: File names and digests.
    """

    optimizer: str
    arrays: Mapping[str, Tensor]
    provenance: str

    @property
    def architecture(self) -> str:
        """The rule they are for."""
        return architecture_of(self.optimizer)


def convert(*sources: str | os.PathLike[str], architecture: str | None = None, **about: Any) -> Theta:
    """Theta from files in a published layout.

    Args:
        sources: A Flax checkpoint (``theta.state``), a ``model.safetensors``, or a folder with either. VeLO's two
            PyTorch modules are two sources, in any order.
        architecture: One of :data:`OPTIMIZERS`. It is recognised from the arrays, except that MuLO's and ELO's PyTorch
            modules look the same: without it they are taken for MuLO's, with a warning.
        about: ``licence`` and ``training`` of :class:`Theta`.

    Raises:
        FileNotFoundError: No such file, or none of a known name in the folder.
        OSError: A file cannot be read: permissions, or it is a FIFO or a device.
        ConversionError: A pickle, a damaged or hostile file, an unknown layout, or arrays that fit no rule; the message
            begins with the file's name.
    """
    foreign = read_foreign(*sources, architecture=architecture)
    try:
        return Theta.from_arrays(foreign.optimizer, foreign.arrays, provenance=foreign.provenance, **about)
    except ValueError as error:
        raise ConversionError(f"{' and '.join(map(str, sources))}: {error}") from error


def read_foreign(*sources: str | os.PathLike[str], architecture: str | None = None) -> Foreign:
    """Arrays of foreign files and what they are for; arguments and errors are those of :func:`convert`."""
    if architecture is not None and architecture not in OPTIMIZERS:
        raise ConversionError(f"architecture={architecture!r} has no rule here; known: {', '.join(OPTIMIZERS)}")
    paths = [find_file(source) for source in sources]
    parts = [_read(path) for path in paths]
    names = " and ".join(map(str, paths))
    kinds = tuple(sorted(part.kind for part in parts))
    recognised = kinds[0] if len(kinds) == 1 and kinds[0] in OPTIMIZERS else _BY_MODULES.get(kinds)
    if recognised is None:
        raise ConversionError(
            f"{names}: {' and '.join(kinds) or 'no file'} does not make one theta; VeLO's PyTorch modules, VeLO_RNN "
            "and VeLO_MLP, make one together, all other files alone"
        )
    if kinds == ("MetaMLP",) and architecture is None:
        warnings.warn(
            f"{names}: MuLO's and ELO's files look the same, and their decays are not in them; taken for MuLO's. Pass "
            "architecture='mulo' or 'elo'",
            stacklevel=2,
        )
    optimizer = architecture or recognised
    if architecture_of(optimizer) != architecture_of(recognised):
        raise ConversionError(f"{names}: holds weights of {recognised}, not of architecture={architecture!r}")
    arrays = {name: torch.tensor(values) for name, values in _FOREIGN[optimizer].decays.items()}
    for part in parts:
        arrays.update(part.arrays)
    origin = " and ".join(f"{path.name} (sha256 {part.sha256})" for path, part in zip(paths, parts, strict=True))
    return Foreign(optimizer, arrays, f"converted from {origin}")


def find_file(source: str | os.PathLike[str]) -> Path:
    """The file with weights: ``source``, or the one with a published name in the folder ``source``.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(source)
    if not path.is_dir():
        return path
    for name in (FLAX_FILE, PYTORCH_FILE, "params"):
        if (path / name).exists():
            return path / name
    raise FileNotFoundError(f"{path} has no {FLAX_FILE}, {PYTORCH_FILE} or params; give the path of the file")


def check_config(path: Path) -> None:
    """Whether a ``config.json`` is that of one of the published modules.

    Raises:
        ConversionError: It is not.
    """
    with naming(path):
        read_config(read_bytes(path, LARGEST_CONFIG))


class _Part(NamedTuple):
    kind: str  # class name of a PyTorch module, or one of OPTIMIZERS
    arrays: Mapping[str, Tensor]
    sha256: str


def _read(path: Path) -> _Part:
    with naming(path):
        data = read_bytes(path)
        sha256 = hashlib.sha256(data).hexdigest()
        if path.suffix != ".safetensors":
            arrays = read_flax(data)
            return _Part(_recognise(arrays), arrays, sha256)
    config = {}
    beside = path.with_name(CONFIG_FILE)
    if beside.exists():
        with naming(beside):
            config = read_config(read_bytes(beside, LARGEST_CONFIG))
    with naming(path):
        return _Part(*read_module(data, config), sha256)


def _recognise(arrays: Mapping[str, Tensor]) -> str:
    """The optimizer that arrays with tree-path names are for."""
    groups = any(name.startswith("ff_mod_stack/") for name in arrays)
    mixing = arrays.get("rnn_params/linear/w")
    inputs = mixing.shape[0] if mixing is not None and mixing.dim() else None
    if "nn/~/w0" in arrays:
        return "small_fc"
    if inputs == VELO_INPUTS:
        return "velo"
    if inputs == CELO_INPUTS:
        return "celo" if groups else "celo_adam"
    if inputs is None and groups:
        return "celo2"
    raise ConversionError(f"holds {name_some(arrays)}: weights of no optimizer that this package has a rule for")
