"""Where theta comes from: an object, arrays, a file, this package, or the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeAlias

from pylo_integrations.weights.theta import Theta

Weights: TypeAlias = "Theta | str | os.PathLike[str] | Mapping[str, Any]"
"""A theta, a path, ``"builtin:<name>"``, ``"hub:<owner>/<repo>[@revision]"``, or arrays by the reference's names."""

HUB_FILENAME = "theta.safetensors"
_BUILTIN = files(__package__) / "builtin"


def builtin_names() -> list[str]:
    """Names that ``"builtin:<name>"`` accepts."""
    return sorted(Path(entry.name).stem for entry in _BUILTIN.iterdir() if entry.name.endswith(".safetensors"))


def load_theta(weights: Weights, name: str, *, local_files_only: bool = False) -> Theta:
    """Resolve a ``weights`` argument.

    Args:
        weights: See :data:`Weights`.
        name: Catalogue name or architecture that plain arrays are for.
        local_files_only: Look for a hub repository in the local cache only.

    Raises:
        FileNotFoundError: No such file or builtin; or a hub repository that is neither cached nor reachable.
        ValueError: The contents do not fit, see :class:`Theta`.
        TypeError: None of the accepted forms.
    """
    if isinstance(weights, Theta):
        return weights
    if isinstance(weights, Mapping):
        return Theta.from_arrays(name, weights)
    if isinstance(weights, str) and weights.startswith("builtin:"):
        return _from_package(weights.removeprefix("builtin:"))
    if isinstance(weights, str) and weights.startswith("hub:"):
        return _from_hub(weights.removeprefix("hub:"), local_files_only)
    if isinstance(weights, (str, os.PathLike)):
        return Theta.load(weights)
    raise TypeError(
        f"weights must be a Theta, a path, 'builtin:<name>', 'hub:<owner>/<repo>[@revision]' or a mapping of arrays, "
        f"not {type(weights).__name__}"
    )


def _from_package(name: str) -> Theta:
    if name not in builtin_names():
        raise FileNotFoundError(f"weights='builtin:{name}' is not shipped; this version has {builtin_names()}")
    with as_file(_BUILTIN / f"{name}.safetensors") as path:
        return Theta.load(path)


def _from_hub(address: str, local_files_only: bool) -> Theta:
    from huggingface_hub import hf_hub_download  # slow to import, and most runs never need it
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = address.partition("@")
    if repo.count("/") != 1:
        raise ValueError(f"weights='hub:{address}' must read 'hub:<owner>/<repo>' or 'hub:<owner>/<repo>@<revision>'")
    try:
        path = hf_hub_download(repo, HUB_FILENAME, revision=revision or None, local_files_only=local_files_only)
    except LocalEntryNotFoundError as error:
        at_revision = f" --revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"weights='hub:{address}' is not in the local cache and the hub cannot be reached (no network, or "
            f"HF_HUB_OFFLINE is set). On a machine with network run `hf download {repo} {HUB_FILENAME}{at_revision}` "
            "and bring the file, then pass its path as weights=; or use weights shipped with the package: "
            f"{[f'builtin:{name}' for name in builtin_names()]}"
        ) from error
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"weights='hub:{address}': the hub has no {HUB_FILENAME} there that you may read: {error}"
        ) from error
    return Theta.load(path)
