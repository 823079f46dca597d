"""What there is to reshard: shards with their headers, the index, config and auxiliary files of a folder.

Reads headers and folder listings, never a tensor. What is found here is complete; the plan decides from it alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from manifests.errors import ManifestError
from manifests.header import Header
from manifests.inventory import SUFFIX, check_finished, read_config, read_shards
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME, OWN_FOLDERS, TEMP_SUFFIX
from manifests.safety import relative_fault, require_folder, resolve_inside

OTHER_WEIGHT_SUFFIXES = frozenset(
    {SUFFIX, ".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".npz", ".onnx", ".ot", ".pkl", ".pt", ".pth", ".tflite"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AuxiliaryFile:
    """A file to copy as it is: its relative path and size in bytes."""

    path: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceCheckpoint:
    """A checkpoint in its published form.

    Attributes:
        root: Its folder.
        shards: Headers by relative path, in source order.
        index: The bytes of model.safetensors.index.json; None when there is a single file without one.
        config: config.json.
        auxiliary: Files to copy as they are, sorted by path.
        left_out: What is not copied, each with its reason.
    """

    root: Path
    shards: Mapping[str, Header]
    index: bytes | None
    config: Mapping[str, Any]
    auxiliary: tuple[AuxiliaryFile, ...]
    left_out: tuple[str, ...]


def read_source(root: Path, freed: Mapping[str, Header] | None = None) -> SourceCheckpoint:
    """Look at a checkpoint folder.

    Args:
        root: The folder.
        freed: Headers of shards that an earlier run used up, so that they are not there any more.

    Raises:
        SourceNotFoundError: There is no checkpoint, or shards are missing.
        IncompleteError: The folder is being restored.
        ManifestError: Index, config or a header is invalid, or the folder is already resharded.
    """
    require_folder(root, "give the folder that holds the checkpoint's shards")
    if (root / MANIFEST_NAME).exists():
        raise ManifestError(f"{root}: has a {MANIFEST_NAME}, so it is already resharded; `reshard restore` undoes it")
    check_finished(root)
    shards = read_shards(root, freed)
    index_path = root / INDEX_NAME
    index = resolve_inside(root, INDEX_NAME).read_bytes() if index_path.exists() else None
    auxiliary, left_out = _list_auxiliary(root, shards)
    return SourceCheckpoint(
        root=root,
        shards=shards,
        index=index,
        config=read_config(root),
        auxiliary=auxiliary,
        left_out=left_out,
    )


def _list_auxiliary(root: Path, shards: Mapping[str, Header]) -> tuple[tuple[AuxiliaryFile, ...], tuple[str, ...]]:
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
            reason = _reason_to_leave_out(root, path)
            if reason:
                left_out.append(f"{path!r} ({reason})")
                continue
            first = path.split("/")[0]
            if first.casefold() in OWN_FOLDERS:
                raise ManifestError(
                    f"{root / path}: a resharded checkpoint needs the folder {first!r} itself; rename it"
                )
            taken.append(AuxiliaryFile(path=path, size=os.stat(resolve_inside(root, path)).st_size))
    _check_case(root, [*shards, INDEX_NAME, MANIFEST_NAME, ASIDE_NAME, JOURNAL_NAME, *(file.path for file in taken)])
    return tuple(sorted(taken, key=lambda file: file.path)), tuple(sorted(left_out))


def _fail(error: OSError) -> NoReturn:
    # Left alone, os.walk leaves out a folder that it cannot read, and nobody would miss it.
    raise error


def _check_case(root: Path, paths: list[str]) -> None:
    """Refuse what a file system that ignores case would write to one file; the manifest could not be read either."""
    seen: dict[str, str] = {}
    for path in paths:
        other = seen.setdefault(path.casefold(), path)
        if other != path:
            raise ManifestError(f"{root}: {other!r} and {path!r} differ in case alone; rename one of them")


def _reason_to_leave_out(root: Path, path: str) -> str | None:
    fault = relative_fault(path)
    if fault:
        return f"name {fault}"
    if Path(path).suffix.lower() in OTHER_WEIGHT_SUFFIXES:
        return "weights in another form"
    if path.endswith(TEMP_SUFFIX):
        return "an unfinished file"
    if not (root / path).is_file() and not (root / path).is_symlink():
        return "not a regular file"
    return None
