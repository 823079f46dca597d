"""Any checkpoint as tensors with locations: a resharded folder, a plain folder of shards, GGUF files, one file.

A checkpoint that was not resharded is described in place: the same `Manifest` type, made from headers. So whoever reads
tensors needs one kind of description, wherever the bytes lie. Opening reads headers or the manifest, never a tensor.
"""

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from manifests import gguf_files, hub, remote, urls
from manifests.checkpoint import Checkpoint
from manifests.config import model_facts, read_config
from manifests.errors import IncompleteError, SourceNotFoundError
from manifests.folder import Folder, LocalFolder
from manifests.header import Header
from manifests.in_place import describe_in_place
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.questions import Watch
from manifests.readable import NOT_FOUND
from manifests.schema import ModelFacts
from manifests.shards import MAX_INDEX_BYTES, SUFFIX, check_index, parse_weight_map, read_header, source_order
from manifests.storage import load


def open(path: str | Path, watch: Watch | None = None) -> Checkpoint:
    """Open a resharded checkpoint, a plain checkpoint folder, a GGUF model, or one ``.safetensors`` or ``.gguf`` file.

    What is an address is read from its server; see `manifests.remote`.

    A folder with a manifest or with safetensors files is that, whatever GGUF files are beside them. One file of a split
    GGUF model is described alone, as one shard is.

    Args:
        path: Its path or its address.
        watch: Is told how far the headers are that a server is asked for.

    Raises:
        SourceNotFoundError: Nothing of the kind is there, or a shard is missing.
        IncompleteError: It is being written, or was when its writer was stopped.
        ManifestError: The manifest, the index or a header is invalid, or they contradict each other.
        RemoteError: A server cannot be reached, or does not do what is asked.
    """
    return _open(path, gguf_files.read_file, watch)


def open_set(path: str | Path, watch: Watch | None = None) -> Checkpoint:
    """As `open`, but one file of a split GGUF model stands for all of them where all are there."""
    return _open(path, gguf_files.read_set_or_file, watch)


def open_model(path: str | Path) -> Checkpoint:
    """As `open`, but one file of a split GGUF model stands for all of them, which must be there."""
    return _open(path, gguf_files.read_set)


def _open(
    path: str | Path, read_gguf: Callable[[Folder, str], gguf_files.GgufModel], watch: Watch | None = None
) -> Checkpoint:
    if urls.is_url(path):
        if not urls.is_hub(str(path)) or not hub.is_offline(str(path)):
            folder, name = remote.find(str(path))
            if name is not None:
                return _open_file(folder, name, read_gguf)
            return remote.open_remote(folder, watch)
        path = hub.downloaded(str(path))
    path = Path(path)
    if path.is_file():
        return _open_file(LocalFolder(path.parent), path.name, read_gguf)
    return _open_folder(path)


def _open_file(folder: Folder, name: str, read_gguf: Callable[[Folder, str], gguf_files.GgufModel]) -> Checkpoint:
    if name.endswith(gguf_files.SUFFIX):
        return gguf_files.open_gguf(folder, read_gguf(folder, name))
    if name.endswith(SUFFIX):
        return Checkpoint(folder, describe_in_place({name: read_header(folder, name)}, ModelFacts()))
    raise SourceNotFoundError(f"{folder.where(name)}: not a {SUFFIX} or {gguf_files.SUFFIX} file and not a folder")


def _open_folder(path: Path) -> Checkpoint:
    if not path.is_dir():
        raise SourceNotFoundError(f"{path}: no such file or folder")
    if (path / MANIFEST_NAME).exists():
        return Checkpoint(LocalFolder(path), load(path))
    check_finished(path)
    folder = LocalFolder(path)
    if names := find_gguf(path):
        return gguf_files.open_gguf(folder, gguf_files.read_folder(folder, names))
    return Checkpoint(folder, describe_in_place(read_shards(path), model_facts(read_config(folder))))


def find_gguf(folder: Path) -> list[str]:
    """Names of the GGUF files of a folder, sorted; none where it has safetensors, for it is then that checkpoint's."""
    if (folder / INDEX_NAME).exists() or any(entry.suffix == SUFFIX for entry in folder.iterdir()):
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix == gguf_files.SUFFIX and entry.is_file())


def check_finished(folder: Path) -> None:
    """Refuse a folder without a manifest that a run or a restore is writing or taking apart.

    Raises:
        IncompleteError: With what finishes it.
    """
    if (folder / JOURNAL_NAME).exists():
        raise IncompleteError(f"{folder}: is not finished; the same `reshard` command that began it goes on with it")
    if (folder / ASIDE_NAME).exists():
        raise IncompleteError(
            f"{folder}: is being taken apart by `reshard restore --consume`; the same command goes on with it"
        )


def read_shards(root: Path, absent: Mapping[str, Header] | None = None) -> dict[str, Header]:
    """The headers of a plain checkpoint's shards, by relative path in source order, checked against its index.

    Args:
        root: The checkpoint's folder.
        absent: Headers of shards that need not be there any more.

    Raises:
        SourceNotFoundError: No checkpoint here, or shards of the index are missing.
        ManifestError: Index and shards contradict each other, or one of them is invalid.
    """
    absent = absent or {}
    folder = LocalFolder(root)
    raw = folder.read(INDEX_NAME, max_bytes=MAX_INDEX_BYTES)
    if raw is None and absent:
        return dict(absent)
    if raw is None:
        names = sorted(entry.name for entry in root.iterdir() if entry.suffix == SUFFIX and entry.is_file())
        if not names:
            raise SourceNotFoundError(
                f"{root}: no {MANIFEST_NAME}, no {INDEX_NAME} and no {SUFFIX} or {gguf_files.SUFFIX} file here"
            )
        if len(names) > 1:
            raise SourceNotFoundError(
                f"{root}: {len(names)} {SUFFIX} files but no {INDEX_NAME}; download the index, or name one file"
            )
        return {names[0]: read_header(folder, names[0])}
    weight_map = parse_weight_map(raw, what=folder.where(INDEX_NAME))
    names = source_order(weight_map.values())
    missing = [name for name in names if name not in absent and not _is_file(root / name)]
    if missing:
        used_up = ", or use the folder that `reshard run --consume` made of them" if len(missing) == len(names) else ""
        raise SourceNotFoundError(
            f"{root}: {len(missing)} of {len(names)} shards are missing, first {missing[0]}; download them{used_up}"
        )
    shards = {name: absent.get(name) or read_header(folder, name) for name in names}
    check_index(str(root), weight_map, shards)
    return shards


def _is_file(path: Path) -> bool:
    """As os.path.isfile, which also takes a failing disk for an absent file."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in NOT_FOUND:
            return False
        raise
