"""What there is to reshard: shards with their headers, the index, config and auxiliary files of a folder.

Shards are safetensors files or GGUF files, which have config and tokenizer inside.
Reads headers and folder listings, never a tensor. What is found here is complete; the plan decides from it alone.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from manifests import gguf_files, gguf_tokenizer
from manifests.config import CONFIG_NAME, read_config
from manifests.errors import ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.folder import LocalFolder
from manifests.header import Header
from manifests.inventory import check_finished, find_gguf, read_shards
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME, OWN_FOLDERS, TEMP_SUFFIX
from manifests.safety import relative_fault, require_folder, resolve_inside
from manifests.shards import SUFFIX
from reshard.generated import config_document

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
        path: What was named: the folder, or a GGUF file in it, of which nothing else is taken but the rest of its set.
        kind: What its shards are, one of `manifests.schema.SOURCE_KINDS`.
        shards: Headers by relative path, in source order.
        index: The bytes of model.safetensors.index.json; None when there is a single file without one.
        config: config.json, or what GGUF files say in its place.
        auxiliary: Files to copy as they are, sorted by path.
        generated: Files that are made, by path, because a GGUF file has inside what they would say.
        left_out: What is not copied, each with its reason.
    """

    root: Path
    path: Path
    kind: str = "safetensors"
    shards: Mapping[str, Header]
    index: bytes | None
    config: Mapping[str, Any]
    auxiliary: tuple[AuxiliaryFile, ...]
    generated: Mapping[str, bytes] = field(default_factory=dict)
    left_out: tuple[str, ...]


def source_root(path: Path) -> Path:
    """The folder of a source that is named by its folder or by a GGUF file, which may have been used up."""
    return path.parent if path.suffix == gguf_files.SUFFIX and not path.is_dir() else path


def read_source(path: Path, freed: Mapping[str, Header] | None = None) -> SourceCheckpoint:
    """Look at a checkpoint.

    Args:
        path: Its folder, or a GGUF file.
        freed: Headers of shards that an earlier run used up, so that they are not there any more.

    Raises:
        SourceNotFoundError: There is no checkpoint, or shards are missing.
        IncompleteError: The folder is being restored.
        ManifestError: Index, config or a header is invalid, or the folder is already resharded.
    """
    root, freed = source_root(path), freed or {}
    if root != path:
        names = gguf_files.set_names(path.name)
        there = [name for name in names if (root / name).is_file()]
        if path.name not in freed and path.name not in there:
            raise SourceNotFoundError(f"{path}: no such file; give a GGUF file, or the folder of a checkpoint")
        return _read_gguf(path, root, there, freed)
    require_folder(root, "give the folder that holds the checkpoint's shards, or a GGUF file")
    if (root / MANIFEST_NAME).exists():
        raise ManifestError(f"{root}: has a {MANIFEST_NAME}, so it is already resharded; `reshard restore` undoes it")
    check_finished(root)
    names = find_gguf(root)
    if names or any(name.endswith(gguf_files.SUFFIX) for name in freed):
        return _read_gguf(path, root, names, freed)
    shards = read_shards(root, freed)
    index_path = root / INDEX_NAME
    index = resolve_inside(root, INDEX_NAME).read_bytes() if index_path.exists() else None
    auxiliary, left_out = _list_auxiliary(root, shards)
    return SourceCheckpoint(
        root=root,
        path=path,
        shards=shards,
        index=index,
        config=read_config(LocalFolder(root)),
        auxiliary=auxiliary,
        left_out=left_out,
    )


def _read_gguf(path: Path, root: Path, names: list[str], freed: Mapping[str, Header]) -> SourceCheckpoint:
    model = gguf_files.read_folder(root, names, freed)
    shards = {
        name: freed.get(name) or gguf_files.with_gaps(resolve_inside(root, name), header)
        for name, header in model.shards.items()
    }
    auxiliary: tuple[AuxiliaryFile, ...] = ()
    left_out: list[str] = []
    if path == root:
        found, others = _list_auxiliary(root, shards)
        # It may be another form's: of the FP8 files that this model was quantised from.
        auxiliary = tuple(file for file in found if file.path != CONFIG_NAME)
        left_out += others
        left_out += [f"{file.path} (the GGUF file says it itself)" for file in found if file not in auxiliary]
    own = {file.path for file in auxiliary}
    config, generated = _inside(
        model,
        next(iter(shards.values())),
        left_out,
        is_alone=path != root,
        has_tokenizer=gguf_tokenizer.TOKENIZER_NAME in own,
    )
    return SourceCheckpoint(
        root=root,
        path=path,
        kind="gguf",
        shards=shards,
        index=None,
        config=config,
        auxiliary=auxiliary,
        generated={name: content for name, content in generated.items() if name not in own},
        left_out=tuple(sorted(left_out)),
    )


def _inside(
    model: gguf_files.GgufModel, first: Header, left_out: list[str], *, is_alone: bool, has_tokenizer: bool
) -> tuple[Mapping[str, Any], dict[str, bytes]]:
    """The config that a GGUF model has inside, and it and the tokenizer as files; notes what cannot be had."""
    config: Mapping[str, Any] = {}
    generated: dict[str, bytes] = {}
    try:
        config = model.config()
    except UnsupportedModelError as error:
        left_out.append(f"{CONFIG_NAME} ({error})")
    try:
        generated = gguf_files.tokenizer_of(first)
    except (ManifestError, UnsupportedModelError) as error:
        # The tensors are worth having without it, and one can be put beside them; of a file that was named nothing
        # beside it is taken.
        more = ", and name their folder" if is_alone and isinstance(error, UnsupportedModelError) else ""
        if not has_tokenizer:
            left_out.append(f"the tokenizer ({error}{more})")
    if config:
        generated[CONFIG_NAME] = config_document(config)
    return config, generated


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
