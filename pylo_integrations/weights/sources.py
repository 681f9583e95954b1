"""Where theta comes from: an object, arrays, a file, this package, or the Hugging Face hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any, TypeAlias

from pylo_integrations.weights import hub
from pylo_integrations.weights.convert import CONFIG_FILE, check_config, convert
from pylo_integrations.weights.published import FLAX_FILE, PYTORCH_FILE, THETA_FILE, Published
from pylo_integrations.weights.theta import Theta

Weights: TypeAlias = Theta | str | os.PathLike[str] | Mapping[str, Any]
"""A theta, a path, ``"builtin:<name>"``, ``"hub:<owner>/<repo>[@revision]"``, or arrays by the reference's names."""

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
        OSError: A download failed midway; or a file, or the cache of the hub, cannot be read.
        ValueError: The contents do not fit, see :class:`Theta`, or are in no known layout, see
            :func:`~pylo_integrations.weights.convert.convert`; or have another digest than the catalogue pins.
        TypeError: None of the accepted forms.
    """
    if isinstance(weights, Theta):
        return weights
    if isinstance(weights, Mapping):
        return Theta.from_arrays(name, weights)
    if isinstance(weights, str) and weights.startswith("builtin:"):
        return _from_package(weights.removeprefix("builtin:"))
    if isinstance(weights, str) and weights.startswith("hub:"):
        try:
            return _from_hub(weights.removeprefix("hub:"), partial(hub.fetch, local_files_only=local_files_only))
        except FileNotFoundError as error:
            shipped = [f"builtin:{name}" for name in builtin_names()]
            raise FileNotFoundError(f"weights={weights!r}: {error}. Without a network there are {shipped}") from error
    if isinstance(weights, (str, os.PathLike)):
        try:
            return Theta.load(weights)
        except FileNotFoundError as error:
            if weights in builtin_names():
                raise FileNotFoundError(f"{error}, or 'builtin:{weights}'") from None
            raise
    raise TypeError(
        f"weights must be a Theta, a path, 'builtin:<name>', 'hub:<owner>/<repo>[@revision]' or a mapping of arrays, "
        f"not {type(weights).__name__}"
    )


def _from_package(name: str) -> Theta:
    if name not in builtin_names():
        raise FileNotFoundError(f"weights='builtin:{name}' is not shipped; this version has {builtin_names()}")
    with as_file(_BUILTIN / f"{name}.safetensors") as path:
        return Theta.load(path)


def _from_hub(address: str, fetch: Callable[..., Path]) -> Theta:
    repository, _, revision = address.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ValueError(f"weights='hub:{address}' must read 'hub:<owner>/<repo>' or 'hub:<owner>/<repo>@<revision>'")
    if published := hub.find_published(repository):
        return _from_published(published, repository, revision, fetch)
    path = fetch(repository, (THETA_FILE, FLAX_FILE, CONFIG_FILE), revision or None)
    commit = path.parent.name
    if path.name == THETA_FILE:
        return Theta.load(path)
    if path.name == CONFIG_FILE:
        check_config(path)  # before fetching what may be a language model
        path = fetch(repository, (PYTORCH_FILE,), commit)
    return _from_repositories({repository: path}, None)


def _from_published(published: Published, repository: str, revision: str, fetch: Callable[..., Path]) -> Theta:
    """A published theta, all parts at their pinned revisions but for ``repository`` at ``revision`` if given."""
    if published.optimizer is None:
        raise ValueError(f"weights='hub:{repository}' are for {published.name}, which this package has no rule for")
    paths = {}
    for part in published.repositories:
        if revision and part.name == repository:
            paths[part.name] = fetch(part.name, (part.filename,), revision)
        else:
            paths[part.name] = fetch(part.name, (part.filename,), part.revision, part.sha256)
    return _from_repositories(paths, published.optimizer)


def _from_repositories(paths: Mapping[str, Path], optimizer: str | None) -> Theta:
    theta = convert(*paths.values(), architecture=optimizer)
    # The client's cache keeps files in a folder named after the commit.
    origin = ", ".join(f"huggingface.co/{repository}@{path.parent.name}" for repository, path in paths.items())
    return replace(theta, provenance=f"{origin}: {theta.provenance}")
