"""Repositories of the Hugging Face Hub: ``hf://org/name@revision`` to the addresses of their files.

The Hub's own package says where its server is, who asks, and whether it may be asked at all; it honours HF_ENDPOINT,
HF_TOKEN, HF_HOME and HF_HUB_OFFLINE. This file knows repositories; it reads none of their files.
It needs the package huggingface_hub.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote

from manifests import urls
from manifests.answers import SILENCE_S
from manifests.errors import RemoteError, SourceNotFoundError, ToolkitError
from manifests.urls import HUB_SCHEME

_REPOSITORY = re.compile(
    rf"{HUB_SCHEME}://(?:models/)?(?P<id>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?"
    r"(?:/(?P<folder>.*))?",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """What the Hub says of a file: its bytes, and its sha256, which it knows of large ones."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Repository:
    """A repository, or a folder of it, in one state.

    Attributes:
        name: As it was asked for, for messages.
        url: Address of the folder, of one commit: later ones do not change it.
        file: The file in it that was asked for; None for all of it.
        commit: That commit.
        authorization: The header that the Hub is asked with; None for nobody.
        files: What the folder holds, by relative path.
    """

    name: str
    url: str
    file: str | None
    commit: str
    authorization: str | None
    files: Mapping[str, Listed]


def resolve(text: str) -> Repository:
    """Ask the Hub for a repository.

    Args:
        text: ``hf://org/name``, with ``@revision`` for a branch, tag or commit, and ``/folder`` for a part of it,
            ``/file`` for one file.

    Raises:
        SourceNotFoundError: It is no such address, or the Hub has no such repository, or does not let you see it.
        RemoteError: The Hub cannot be reached, or must not be asked (HF_HUB_OFFLINE).
        ToolkitError: The package huggingface_hub is not installed.
    """
    library = _library(text)
    repository, revision, folder = _parse(text)
    text = urls.shown(text)
    token = library.get_token()
    try:
        info = library.HfApi().model_info(
            repository, revision=revision, files_metadata=True, token=token or False, timeout=SILENCE_S
        )
    except Exception as error:
        # The package passes on what its transport raises, which is of other classes in other versions.
        raise _refusal(text, library, error) from error
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    file = None
    if folder in siblings:
        folder, _, file = folder.rpartition("/")
    files = {
        name.removeprefix(f"{folder}/"): Listed(
            size=sibling.size or 0, sha256=sibling.lfs.sha256 if sibling.lfs is not None else None
        )
        for name, sibling in siblings.items()
        if not folder or name.startswith(f"{folder}/")
    }
    if folder and not files:
        raise SourceNotFoundError(f"{text}: the repository has no such file or folder")
    endpoint = library.constants.ENDPOINT.rstrip("/")
    base = f"{endpoint}/{repository}/resolve/{info.sha}"
    return Repository(
        name=text.rstrip("/") if file is None else text.rstrip("/").rpartition("/")[0],
        url=f"{base}/{quote(folder)}" if folder else base,
        file=file,
        commit=info.sha,
        authorization=f"Bearer {token}" if token else None,
        files=files,
    )


def is_offline(text: str) -> bool:
    """Whether the Hub must not be asked.

    Raises:
        ToolkitError: The package huggingface_hub is not installed.
    """
    return bool(_library(text).constants.HF_HUB_OFFLINE)


def downloaded(text: str) -> Path:
    """The folder of a repository that was downloaded before; nothing is asked.

    Raises:
        SourceNotFoundError: It is no such address, or was not downloaded.
        ToolkitError: The package huggingface_hub is not installed.
    """
    library = _library(text)
    repository, revision, folder = _parse(text)
    text = urls.shown(text)
    try:
        found = library.snapshot_download(repository, revision=revision, local_files_only=True)
    except Exception as error:
        raise SourceNotFoundError(
            f"{text}: HF_HUB_OFFLINE is set, and it was not downloaded before; unset that, or download it"
        ) from error
    return Path(found, folder)


def _parse(text: str) -> tuple[str, str | None, str]:
    """Repository, revision and folder of an address."""
    match = _REPOSITORY.fullmatch(text.rstrip("/"))
    if match is None:
        raise SourceNotFoundError(
            f"{urls.shown(text)}: is no repository; write hf://organisation/name, with @revision if need be"
        )
    revision = None if match["revision"] is None else unquote(match["revision"])
    return match["id"], revision, unquote(match["folder"] or "").strip("/")


def _library(text: str) -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ToolkitError(
            f"{urls.shown(text)}: needs the package huggingface_hub: `pip install 'expert-reshard[hub]'`"
        ) from error
    return huggingface_hub


def _refusal(text: str, library: Any, error: Exception) -> ToolkitError:
    errors = library.errors
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceNotFoundError(f"{text}: the Hub has no such revision of it")
    if isinstance(error, errors.GatedRepoError):
        return SourceNotFoundError(f"{text}: its owners let you read it when you ask them; then set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceNotFoundError(f"{text}: the Hub has no such repository, or needs a token to show it (HF_TOKEN)")
    if isinstance(error, errors.HFValidationError):
        return SourceNotFoundError(f"{text}: is no name that a repository can have")
    first = str(error).strip().splitlines()
    return RemoteError(
        f"{text}: the Hub cannot be asked: {first[0] if first else type(error).__name__}; with HF_HUB_OFFLINE=1 what "
        "was downloaded before is used"
    )
