"""The Hugging Face hub: files out of and into repositories.

Everything goes through the ``huggingface_hub`` client, so its cache, its tokens, ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT``
apply. The client is imported when it is first needed: it is slow to import, and most runs never need it.

Two things it does are not what a user of this package wants. It makes paths in its cache of what the hub answers, so an
answer could name a file anywhere; every answer is looked at before it goes on, where the client reads it and not in its
session, which it makes anew as it likes. And it tries an unreachable hub for half
a minute, with a line for every attempt; whether the hub can be reached is found out first, in one attempt.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pylo_integrations.paths import LARGEST_THETA
from pylo_integrations.weights.published import PUBLISHED, THETA_FILE, Published, Repository

__all__ = ["PUBLISHED", "Published", "Repository", "fetch", "find_published", "upload"]

CONNECT_SECONDS = 2.0
"""How long to wait for a connection with the hub; for its answer, as long as the client does (HF_HUB_ETAG_TIMEOUT)."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,127}")  # no separator, no drive, nothing hidden, not too long
_COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")

_asking = threading.RLock()  # whose turn it is to look at answers


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
        OSError: The download failed midway, or the cache cannot be read.
        ValueError: Not a repository name; another digest; a larger file than any theta; or the hub's answer is
            malformed in a way that would have the client write outside its cache.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    address = f"hub:{repository}@{revision}" if revision else f"hub:{repository}"
    unreachable: Exception | None = None
    for filename in filenames:
        try:
            with _naming(f"{address}: fetching {filename}"), _looking_at_answers(repository):
                if not local_files_only:
                    unreachable = _why_unreachable(repository, filename, revision)
                    local_files_only = unreachable is not None
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
    _check_cache(Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}"))
    at_revision = f" --revision {revision}" if revision else ""
    why = " ".join(str(unreachable).split())[:200]
    raise FileNotFoundError(
        f"{address} is not in the local cache and the hub cannot be reached (no network, HF_HUB_OFFLINE is set, or "
        f"HF_ENDPOINT is no hub). On a machine with network run `pylo weights convert {address} {THETA_FILE}`, bring "
        "the file and pass its path as weights=; or, where the cache is shared, run `hf download "
        f"{repository} {filenames[0]}{at_revision}`. What happened: {type(unreachable).__name__}: {why}"
    ) from unreachable


def _why_unreachable(repository: str, filename: str, revision: str | None) -> Exception | None:
    """What one attempt to ask the hub about a file meets; None if it answers, be it with a refusal.

    Raises:
        EntryNotFoundError: The repository has no such file.
        ValueError: Not a repository name, or an answer that :func:`_looking_at_answers` refuses.
    """
    from huggingface_hub import constants, file_download, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    timeout: Any = (CONNECT_SECONDS, constants.HF_HUB_ETAG_TIMEOUT)  # to connect, to read
    url = hf_hub_url(repository, filename, revision=revision)
    try:
        metadata = file_download.get_hf_file_metadata(url, timeout=timeout)
    except (EntryNotFoundError, ValueError):
        raise
    except HfHubHTTPError as error:  # overloaded or down; the client would go on asking
        return error if error.response.status_code in (408, 429) or error.response.status_code >= 500 else None
    except Exception as error:  # transport errors are those of requests, httpx or httpx2
        return error
    if metadata.commit_hash is None or metadata.etag is None:
        return ConnectionError(f"{metadata.location} answers, but not as a hub does")
    return None


@contextmanager
def _looking_at_answers(repository: str) -> Iterator[None]:
    """Within, what the client hears of files of a repository passes :func:`_check_answer` before it acts on it.

    Whatever session it has, and however often it makes a new one, it asks through one public function.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.errors import EntryNotFoundError

    with _asking:
        ask = file_download.get_hf_file_metadata

        @functools.wraps(ask)
        def ask_and_look(url: str, *args: Any, **kwargs: Any) -> Any:
            is_ours = f"/{repository}/resolve/" in url  # other threads ask about other files
            try:
                answer = ask(url, *args, **kwargs)
            except EntryNotFoundError as error:
                if is_ours and (response := getattr(error, "response", None)) is not None:
                    _check_answer(url, response.headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT))
                raise
            if is_ours:
                _check_answer(url, answer.commit_hash, answer.etag, answer.size)
            return answer

        file_download.get_hf_file_metadata = ask_and_look
        try:
            yield
        finally:
            file_download.get_hf_file_metadata = ask


def _check_answer(url: str, commit: str | None, etag: str | None = None, size: int | None = None) -> None:
    """Refuse an answer about a file of which the client would make paths.

    It stores a file as ``blobs/<etag>``, links to it from ``snapshots/<commit>``, and notes a missing one below
    ``.no_exist/<commit>``. Without a commit it does nothing.

    Raises:
        ValueError: The etag or the commit is none, or the file is too large.
    """
    if commit is None:
        return
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{url} answers with the commit {commit!r:.100}, which is none. Do not trust this endpoint")
    if etag is not None and not _FILE_NAME.fullmatch(etag):
        raise ValueError(
            f"{url} answers with the etag {etag!r:.100}, which cannot be a file's name in the cache. Do not trust this "
            "endpoint"
        )
    if size is not None and not 0 <= size <= LARGEST_THETA:
        raise ValueError(f"{url} announces {size!s:.40} bytes; a theta has at most {LARGEST_THETA}")


def _check_cache(folder: Path) -> None:
    """Raise PermissionError if what the cache has of a repository is closed to us; the client takes it for absent."""

    def closed(error: OSError) -> None:
        if isinstance(error, PermissionError):
            raise PermissionError(f"the cache of the hub at {error.filename!r} cannot be read: no permission")

    for _ in os.walk(folder, onerror=closed):
        pass


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
    except PermissionError as error:  # of the cache
        raise PermissionError(f"{action} failed: {error}") from error
    except Exception as error:
        raise OSError(f"{action} failed: {type(error).__name__}: {error}; try again") from error
