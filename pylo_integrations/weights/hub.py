"""The Hugging Face hub: published theta by repository, and files out of and into repositories.

Everything goes through the ``huggingface_hub`` client, so its cache, its tokens, ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT``
apply. The client is imported when it is first needed: it is slow to import, and most runs never need it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

THETA_FILE = "theta.safetensors"
FLAX_FILE = "theta.state"
PYTORCH_FILE = "model.safetensors"


@dataclass(frozen=True)
class Repository:
    """A repository with a published theta, or a part of one.

    Attributes:
        name: ``<owner>/<repository>``.
        filename: The file with the weights; its name tells the layout.
        revision: Commit that is loaded unless another is asked for; None for the newest.
        sha256: Digest of the file at that commit; None if unknown.
    """

    name: str
    filename: str
    revision: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Published:
    """A theta that its authors published.

    Attributes:
        name: What to call it.
        optimizer: The optimizer it is for, one of :data:`pylo_integrations.weights.convert.OPTIMIZERS`; None
            if this package has no rule for it.
        repositories: Where its parts are.
        description: One line.
    """

    name: str
    optimizer: str | None
    repositories: tuple[Repository, ...]
    description: str


PUBLISHED = (
    Published(
        "mulo",
        "mulo",
        (Repository("btherien/mulo", PYTORCH_FILE),),
        "muLO, for models in maximal-update parametrisation",
    ),
    Published(
        "velo",
        "velo",
        (Repository("Pauljanson002/VeLO_RNN", PYTORCH_FILE), Repository("Pauljanson002/VeLO_MLP", PYTORCH_FILE)),
        "Google's VeLO as PyTorch modules",
    ),
    Published("velo_4000", "velo", (Repository("amoudgl/velo-4000", FLAX_FILE),), "Google's VeLO, 4000 TPU-months"),
    Published("velo_s", "velo", (Repository("amoudgl/velo-s", FLAX_FILE),), "VeLO at reduced width, by Celo's authors"),
    Published("celo", "celo", (Repository("amoudgl/celo", FLAX_FILE),), "learned MLP and learned schedule"),
    Published("celo_adam", "celo_adam", (Repository("amoudgl/celo-adam", FLAX_FILE),), "learned schedule over Adam"),
    Published(
        "adafac_mlp_lopt",
        "small_fc",
        (Repository("amoudgl/adafac-mlp-lopt", FLAX_FILE),),
        "small_fc_lopt by Celo's authors",
    ),
    Published(
        "rnn_mlp_lopt",
        None,
        (Repository("amoudgl/rnn-mlp-lopt", FLAX_FILE),),
        "RNN over tensors and MLP over parameters, by Celo's authors",
    ),
    Published("elo", "elo", (Repository("DiamondXL/elo", PYTORCH_FILE),), "small_fc's network with plain decays"),
    Published("elo_celo2", "elo_celo2", (Repository("DiamondXL/elo-celo2", PYTORCH_FILE),), "ELO with CELO2's rule"),
)
"""All published theta. No revision or digest is pinned: the hub could not be reached when this was written."""


def find_published(repository: str) -> Published | None:
    """The published theta that (a part of) lies in a repository."""
    return next((entry for entry in PUBLISHED if repository in {part.name for part in entry.repositories}), None)


def fetch(
    repository: str,
    filenames: Sequence[str],
    revision: str | None = None,
    sha256: str | None = None,
    *,
    local_files_only: bool = False,
) -> Path:
    """A file of a repository, from the cache or the hub.

    Args:
        repository: ``<owner>/<repository>``.
        filenames: The first of these that the repository has is fetched.
        revision: Branch, tag or commit; by default the main branch.
        sha256: Digest that the file must have.
        local_files_only: Look in the cache only.

    Returns:
        Its path in the cache, ``.../snapshots/<commit>/<filename>``.

    Raises:
        FileNotFoundError: Not cached and the hub cannot be reached or is switched off; or the hub has no such
            repository, revision or file, or not for you.
        OSError: The download failed midway.
        ValueError: Not a repository name; or another digest.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    address = f"hub:{repository}@{revision}" if revision else f"hub:{repository}"
    unreachable: Exception | None = None
    for filename in filenames:
        try:
            with _naming(f"{address}: fetching {filename}"):
                found = hf_hub_download(repository, filename, revision=revision, local_files_only=local_files_only)
        except LocalEntryNotFoundError as error:
            unreachable = unreachable or error
            local_files_only = True  # having once waited in vain for the hub
        except EntryNotFoundError:
            continue
        else:
            return _verified(Path(found), address, sha256)
    if unreachable is None:
        raise FileNotFoundError(f"{address} has no {' or '.join(filenames)}")
    at_revision = f" --revision {revision}" if revision else ""
    raise FileNotFoundError(
        f"{address} is not in the local cache and the hub cannot be reached (no network, HF_HUB_OFFLINE is set, or "
        f"HF_ENDPOINT is no hub). On a machine with network run `pylo weights convert {address} {THETA_FILE}`, bring "
        "the file and pass its path as weights=; or, where the cache is shared, run `hf download "
        f"{repository} {filenames[0]}{at_revision}`"
    ) from unreachable


def _verified(path: Path, address: str, sha256: str | None) -> Path:
    if sha256 is not None:
        actual = hashlib.sha256(path.read_bytes()).hexdigest()
        if actual != sha256:
            raise ValueError(
                f"{address}: {path} has sha256 {actual}, expected {sha256}. It is damaged or has been replaced: delete "
                "it from the cache and fetch it again; if it stays so, do not use it"
            )
    return path


def upload(path: Path, repository: str, filename: str, *, private: bool, message: str) -> str:
    """Commit a file to a repository, which is created if there is none.

    Args:
        path: The file here.
        repository: ``<owner>/<repository>``.
        filename: Its name there.
        private: Whether a new repository is hidden from others.
        message: Of the commit.

    Returns:
        The commit, to be used as a revision.

    Raises:
        OSError: Not logged in, no right to write there, or no connection.
        ValueError: Not a repository name.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _naming(f"hub:{repository}: pushing {filename}"):
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_file(
            path_or_fileobj=path, path_in_repo=filename, repo_id=repository, commit_message=message
        )
    return str(commit.oid)


@contextmanager
def _naming(action: str) -> Iterator[None]:
    """Names the action in what the client raises, as one of our documented types.

    Its own types depend on its version: transport errors are those of requests, httpx or httpx2.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except EntryNotFoundError:
        raise
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{action} failed: there is no such repository or revision, or not for you. {error}"
        ) from error
    except HfHubHTTPError as error:
        raise OSError(f"{action} failed: {error}. If it is about rights, log in with `hf auth login`") from error
    except ValueError as error:
        raise ValueError(f"{action} failed: {error}") from error
    except Exception as error:
        raise OSError(f"{action} failed: {type(error).__name__}: {error}; try again") from error
