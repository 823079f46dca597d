"""The small files beside a source's tensors: which are copied as they are, and which are left out and why.

A folder of this machine is listed; of one on the Hub the Hub tells what it holds; on any other server nobody lists, so
the names that checkpoints use are asked for. The rules are the same for all. Reads names and sizes, nothing else.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from manifests.errors import ManifestError
from manifests.folder import Folder, LocalFolder
from manifests.header import Header
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME, OWN_FOLDERS, TEMP_SUFFIX
from manifests.questions import each
from manifests.remote import REQUESTS_AT_ONCE, RemoteFolder
from manifests.safety import relative_fault, resolve_inside
from manifests.shards import SUFFIX

OTHER_WEIGHT_SUFFIXES = frozenset(
    {SUFFIX, ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot", ".pkl", ".pt", ".pth", ".tflite"}
)

USUAL_NAMES = (
    ".gitattributes",
    "LICENSE",
    "LICENSE-CODE",
    "LICENSE-MODEL",
    "LICENSE.md",
    "LICENSE.txt",
    "README.md",
    "README_WEIGHTS.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "configuration.json",
    "configuration_deepseek.py",
    "configuration_kimi.py",
    "generation_config.json",
    "merges.txt",
    "modeling_deepseek.py",
    "modeling_kimi.py",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tiktoken.model",
    "tokenization_deepseek_fast.py",
    "tokenization_kimi.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""What published checkpoints call their small files, as far as they stand beside the shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryFile:
    """A file to copy as it is: its relative path and size in bytes."""

    path: str
    size: int


Found = tuple[tuple[AuxiliaryFile, ...], tuple[str, ...]]
"""Files to copy, sorted by path; and what is left out, each with its reason."""


def list_small(folder: Folder, shards: Mapping[str, Header]) -> Found:
    """The small files of a folder, wherever it lies.

    Raises:
        ManifestError, RemoteError: See below.
    """
    if isinstance(folder, LocalFolder):
        return list_folder(folder.root, shards)
    assert isinstance(folder, RemoteFolder)
    if folder.files is None:
        return ask_for_usual(folder)
    return list_repository(folder, {name: listed.size for name, listed in folder.files.items()}, shards)


def list_folder(root: Path, shards: Mapping[str, Header]) -> Found:
    """The small files of a folder of this machine.

    Raises:
        ManifestError: A file or folder has a name that a resharded checkpoint needs itself, or two names are one where
            case is ignored.
    """
    taken: list[AuxiliaryFile] = []
    left_out: list[str] = []
    for folder, folders, files in os.walk(root, onerror=_fail):
        below = Path(folder).relative_to(root)
        for name in sorted(folders):
            if name.startswith(".") or (Path(folder) / name).is_symlink():
                folders.remove(name)
                kind = "hidden folder" if name.startswith(".") else "link to a folder"
                left_out.append(f"{(below / name).as_posix()} ({kind})")
        for name in files:
            path = (below / name).as_posix()
            if path in shards or path == INDEX_NAME:
                continue
            reason = _reason_to_leave_out(path) or _irregular(root / path)
            if reason:
                left_out.append(f"{path!r} ({reason})")
                continue
            _check_folder(path, str(root / path))
            taken.append(AuxiliaryFile(path=path, size=os.stat(resolve_inside(root, path)).st_size))
    return _sorted(str(root), shards, taken, left_out)


def list_repository(folder: RemoteFolder, files: Mapping[str, int], shards: Mapping[str, Header]) -> Found:
    """The small files of a folder on a server that tells what it holds.

    Args:
        folder: The folder.
        files: Sizes by relative path, as the server says; nothing of it is believed before it was looked at.
        shards: What is no small file.

    Raises:
        ManifestError: See `list_folder`.
    """
    taken: list[AuxiliaryFile] = []
    left_out: dict[str, None] = {}
    for path, size in files.items():
        if path in shards or path == INDEX_NAME:
            continue
        reason = _reason_to_leave_out(path)
        hidden = _hidden_folder(path) if relative_fault(path) is None else None
        if hidden or reason:
            left_out[f"{hidden} (hidden folder)" if hidden else f"{path!r} ({reason})"] = None
            continue
        _check_folder(path, folder.where(path))
        taken.append(AuxiliaryFile(path=path, size=size))
    return _sorted(str(folder), shards, taken, list(left_out))


def ask_for_usual(folder: RemoteFolder) -> Found:
    """The small files of a folder on a server that lists nothing: those with the names that checkpoints use.

    Raises:
        RemoteError: The server cannot be reached, or does not do what is asked.
    """
    there = zip(USUAL_NAMES, each(folder.size, USUAL_NAMES, at_once=REQUESTS_AT_ONCE), strict=True)
    unseen = "other small files, if there are any (the server does not list what it has)"
    return tuple(AuxiliaryFile(path=name, size=size) for name, size in there if size is not None), (unseen,)


def _sorted(where: str, shards: Collection[str], taken: list[AuxiliaryFile], left_out: list[str]) -> Found:
    own = (INDEX_NAME, MANIFEST_NAME, ASIDE_NAME, JOURNAL_NAME)
    _check_case(where, [*shards, *own, *(file.path for file in taken)])
    return tuple(sorted(taken, key=lambda file: file.path)), tuple(sorted(left_out))


def _check_folder(path: str, where: str) -> None:
    first = path.split("/", maxsplit=1)[0]
    if first.casefold() in OWN_FOLDERS:
        raise ManifestError(f"{where}: a resharded checkpoint needs the folder {first!r} itself; rename it")


def _hidden_folder(path: str) -> str | None:
    """The outermost hidden folder that a file is in."""
    parts = path.split("/")
    hidden = next((number for number, part in enumerate(parts[:-1]) if part.startswith(".")), None)
    return None if hidden is None else "/".join(parts[: hidden + 1])


def _fail(error: OSError) -> NoReturn:
    # Left alone, os.walk leaves out a folder that it cannot read, and nobody would miss it.
    raise error


def _check_case(where: str, paths: list[str]) -> None:
    """Refuse what a file system that ignores case would write to one file; the manifest could not be read either."""
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            raise ManifestError(f"{where}: {other!r} and {path!r} differ in case alone; rename one of them")


def _reason_to_leave_out(path: str) -> str | None:
    fault = relative_fault(path)
    if fault:
        return f"name {fault}"
    if Path(path).suffix.lower() in OTHER_WEIGHT_SUFFIXES:
        return "weights in another form"
    return "an unfinished file" if path.endswith(TEMP_SUFFIX) else None


def _irregular(path: Path) -> str | None:
    return None if path.is_file() or path.is_symlink() else "not a regular file"
