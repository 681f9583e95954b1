"""Theta: the weights of a learned optimizer, with everything needed to use and to judge them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from pylo_integrations.files import write_whole
from pylo_integrations.paths import check_file
from pylo_integrations.profiles import ARCHITECTURES, PROFILES, architecture_of
from pylo_integrations.rules.base import Rule
from pylo_integrations.weights import hub
from pylo_integrations.weights.published import THETA_FILE

FORMAT = "pylo_integrations.theta"
VERSION = 1

_RECORD = {
    "name": str,
    "architecture": str,
    "hyper": dict,
    "features": list,
    "provenance": str,
    "licence": str,
    "training": dict,
    "sha256": str,
}
"""What a file says besides its arrays, and of which type each entry is."""


@dataclass(frozen=True, eq=False)
class Theta:
    """Frozen, checked meta-weights. Two are equal if their :attr:`sha256` is.

    Attributes:
        architecture: The rule they are for, e.g. ``"small_fc"``.
        arrays: The weights by the reference's tree-path names (``nn/~/w0`` is (inputs, outputs)); float32, read-only.
        hyper: Constants of the rule that belong to these weights, e.g. ``{"exp_mult": 1e-3, "step_mult": 1e-2}``;
            numbers and booleans.
        name: What to call them.
        provenance: Where they come from: paper, repository and revision, or the function that made them.
        licence: SPDX identifier, or "" if unknown.
        training: Record of the meta-training (tasks, steps, seed...), JSON-serialisable; empty if there was none.

    Raises:
        ValueError: Unknown architecture or constant; arrays that do not fit the architecture; non-finite values.
    """

    architecture: str
    arrays: Mapping[str, Tensor]
    hyper: Mapping[str, float] = field(default_factory=dict)
    name: str = ""
    provenance: str = ""
    licence: str = ""
    training: Mapping[str, Any] = field(default_factory=dict)

    _rule: Rule = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"theta architecture {self.architecture!r} is unknown; known: {sorted(ARCHITECTURES)}")
        if bad := [name for name, value in self.hyper.items() if not _is_finite_number(value)]:
            raise ValueError(f"theta constants {bad} are not finite numbers")
        # torch.as_tensor() would bring tensors to the default device, which may be "meta".
        given = {n: v if isinstance(v, Tensor) else torch.as_tensor(v, device="cpu") for n, v in self.arrays.items()}
        arrays = {name: value.detach().cpu() for name, value in given.items()}
        arrays = {name: array.to(torch.float32, copy=True).contiguous() for name, array in sorted(arrays.items())}
        if bad := [name for name, array in arrays.items() if not array.isfinite().all()]:
            raise ValueError(f"theta arrays {bad} hold values that are not finite")
        object.__setattr__(self, "arrays", MappingProxyType(arrays))
        object.__setattr__(self, "hyper", MappingProxyType(dict(self.hyper)))
        object.__setattr__(self, "training", MappingProxyType(dict(self.training)))
        object.__setattr__(self, "_rule", self._make_rule({}))  # which checks names, shapes and constants

    @classmethod
    def from_arrays(
        cls, name: str, arrays: Mapping[str, Any], hyper: Mapping[str, float] | None = None, **about: Any
    ) -> Theta:
        """Theta from plain arrays under the reference's names.

        Args:
            name: A catalogue name (``"small_fc_lopt"``) or architecture (``"small_fc"``).
            arrays: Tensors or numpy arrays; geometry is read from their shapes.
            hyper: Constants of the rule; each defaults to that of the published weights of ``name``, else the rule's.
            about: ``provenance``, ``licence``, ``training``.

        Raises:
            ValueError: See :class:`Theta`.
        """
        published = PROFILES[name].hyper if name in PROFILES else {}
        return cls(architecture_of(name), arrays, {**published, **(hyper or {})}, name=name, **about)

    def rule(self, **overrides: Any) -> Rule:
        """The rule with these weights; ``overrides`` replace constants of :attr:`hyper` where not None.

        Raises:
            ValueError: An override is not a constant of this architecture.
        """
        given = {key: value for key, value in overrides.items() if value is not None}
        return self._make_rule(given) if given else self._rule

    def _make_rule(self, overrides: Mapping[str, Any]) -> Rule:
        hyper = {**self.hyper, **overrides}
        try:
            return ARCHITECTURES[self.architecture].from_arrays(self.arrays, **hyper).reduced()
        except TypeError as error:
            raise ValueError(
                f"theta hyper-parameters {sorted(hyper)} do not fit {self.architecture}: {error}"
            ) from None

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the per-parameter inputs of the network, in order."""
        return ARCHITECTURES[self.architecture].features

    @property
    def sha256(self) -> str:
        """Digest of all that changes an update: architecture, features, constants and arrays."""
        digest = hashlib.sha256(
            json.dumps([self.architecture, self.features, dict(sorted(self.hyper.items()))]).encode()
        )
        for name, array in self.arrays.items():
            digest.update(f"{name}{tuple(array.shape)}".encode())
            digest.update(array.numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.sha256 == other.sha256 if isinstance(other, Theta) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        size = sum(array.numel() for array in self.arrays.values())
        return f"Theta({self.name or self.architecture!r}, {size} weights, sha256={self.sha256[:12]})"

    def __reduce__(self) -> tuple[Any, ...]:  # a mappingproxy does not pickle
        about = (self.name, self.provenance, self.licence, dict(self.training))
        return Theta, (self.architecture, dict(self.arrays), dict(self.hyper), *about)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write one ``.safetensors`` file; it appears whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.
        """
        path = Path(path)
        record = {
            "name": self.name,
            "architecture": self.architecture,
            "hyper": dict(self.hyper),
            "features": self.features,
            "provenance": self.provenance,
            "licence": self.licence,
            "training": dict(self.training),
            "sha256": self.sha256,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "theta": json.dumps(record, sort_keys=True)}

        def write(temporary: Path) -> None:
            safetensors.torch.save_file(dict(self.arrays), str(temporary), metadata)

        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_whole(path, write, overwrite=overwrite)
        except FileExistsError as error:
            raise FileExistsError(f"{error}; pass overwrite=True to replace it") from None
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Theta:
        """Read a file written by :meth:`save`.

        Raises:
            FileNotFoundError: No such file.
            OSError: The file cannot be read: permissions, or it is a folder, a FIFO or a device.
            ValueError: Not a theta file, a newer version, another feature list, or damaged contents.
        """
        path = Path(path)
        try:
            check_file(path, "theta file")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; give the path of a .safetensors file") from None
        try:
            # Whatever the default device is: safetensors 0.4 makes its tensors there.
            with torch.device("cpu"), safetensors.safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                # Others' files may be a language model's.
                names = file.keys() if metadata.get("format") == FORMAT else []
                arrays = {name: file.get_tensor(name) for name in names}
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file: {error}. `pylo weights convert` reads some other formats"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} is a safetensors file but not a theta; if it is a published one, `pylo weights convert` makes "
                "a theta of it, else load its arrays and call Theta.from_arrays(name, arrays)"
            )
        if metadata.get("version") != str(VERSION):
            raise ValueError(
                f"{path} has theta version {metadata.get('version')}, this is {VERSION}; upgrade pylo-integrations"
            )
        try:
            record = json.loads(metadata["theta"])
            if wrong := [key for key, kind in _RECORD.items() if not isinstance(record[key], kind)]:
                raise TypeError(f"{wrong} are of another type")
        # RecursionError: deep nesting; ValueError also for an integer of thousands of digits.
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} has a damaged record: {error!r:.200}") from error
        architecture, hyper, features, sha256 = (record[key] for key in ("architecture", "hyper", "features", "sha256"))
        about = {key: record[key] for key in ("name", "provenance", "licence", "training")}
        try:
            theta = cls(architecture, arrays, hyper, **about)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if tuple(features) != theta.features:
            raise ValueError(f"{path} was trained on features {features}, this rule has {theta.features}")
        if sha256 != theta.sha256:
            raise ValueError(f"{path} is damaged: its sha256 is {theta.sha256}, its record says {sha256}")
        return theta

    @classmethod
    def from_hub(cls, repository: str, revision: str | None = None, sha256: str | None = None) -> Theta:
        """Load what :meth:`push_to_hub` wrote; ``weights="hub:..."`` also takes repositories in other layouts.

        Args:
            repository: ``<owner>/<repository>`` on the Hugging Face hub; its client's cache and settings apply.
            revision: Branch, tag or commit; by default the newest.
            sha256: :attr:`sha256` that the result must have.

        Raises:
            FileNotFoundError: Neither cached nor reachable, or not there.
            OSError: The download failed midway.
            ValueError: Not a theta, or not the expected one.
        """
        theta = cls.load(hub.fetch(repository, (THETA_FILE,), revision))
        if sha256 is not None and theta.sha256 != sha256:
            raise ValueError(f"hub:{repository} holds {theta!r} with sha256 {theta.sha256}, expected {sha256}")
        return theta

    def push_to_hub(self, repository: str, *, private: bool = False, message: str = "") -> str:
        """Commit ``theta.safetensors`` to a repository of the Hugging Face hub.

        The token is that of its client: ``hf auth login`` or ``HF_TOKEN``.

        Args:
            repository: ``<owner>/<repository>``; created if it is not there.
            private: Whether a new repository is hidden from others.
            message: Of the commit.

        Returns:
            The commit, for ``weights="hub:<owner>/<repository>@<commit>"``.

        Raises:
            OSError: Not logged in, no right to write there, or no connection.
            ValueError: Not a repository name.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = self.save(Path(folder) / THETA_FILE)
            message = message or f"{self.name or self.architecture}, sha256 {self.sha256[:12]}"
            return hub.upload(path, repository, THETA_FILE, private=private, message=message)


def _is_finite_number(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, OverflowError):
        return False
