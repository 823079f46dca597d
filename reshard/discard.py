"""Starting again: what an interrupted run or restore left is removed. A folder that it made is emptied.

Refuses when a part of the source is not there, be it used up or elsewhere: then what is here may be the only copy.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.digest import sha256_hex
from manifests.errors import SourceNotFoundError, ToolkitError
from manifests.paths import ASIDE_NAME, JOURNAL_NAME, MANIFEST_NAME, TEMP_SUFFIX, parse_path
from manifests.schema import Manifest
from manifests.storage import decode, load, sync_folder
from reshard.destination import empty_folder
from reshard.documents import write_index
from reshard.earlier import check_begin
from reshard.journal import is_consuming, read_begin, read_journal
from reshard.lock import lock_folder


def discard(source: Path | None, destination: Path) -> None:
    """Remove what an interrupted command left in a destination; a checkpoint that it was widening stays.

    Args:
        source: Where the command read from; None when that is on a server.
        destination: The folder it wrote to. Without a journal in it nothing happens.

    Raises:
        LockedError: The command is still running.
        ToolkitError: A part of the source exists only here.
        SourceNotFoundError: A part of the source is not where it is said to be.
    """
    if not (destination / JOURNAL_NAME).exists():
        return
    with lock_folder(destination):
        if not check_discardable(source, destination):
            return
        begin = read_begin(destination)
        kept = _manifest_before(destination, begin.get("widens"))
        if kept is None:
            empty_folder(destination)
        else:
            _remove_added(destination, kept)


def check_discardable(source: Path | None, destination: Path) -> bool:
    """Refuse to remove what could not be made again; whether there is anything to remove.

    Raises:
        ToolkitError, SourceNotFoundError: See `discard`.
    """
    if not (destination / JOURNAL_NAME).exists():
        return False
    begin = read_begin(destination)
    if begin.get("task") not in ("run", "restore"):
        raise ToolkitError(
            f"{destination}: `reshard {begin.get('task')}` was interrupted here; give it again to finish it"
        )
    may_have_freed = _may_have_freed(destination)
    if source is not None:
        _require_whole(source, destination, begin, may_have_freed=may_have_freed)
    elif may_have_freed:
        raise ToolkitError(
            f"{destination}: --consume may have freed a part of what was read into it, whose bytes are then only here; "
            "give the command that began it without --discard to finish it"
        )
    return True


def _may_have_freed(destination: Path) -> bool:
    try:
        contents = read_journal(destination)
    except ToolkitError:  # damaged further on, where it may say so
        return True
    return contents is not None and is_consuming(contents)


def _require_whole(source: Path, destination: Path, begin: Mapping[str, Any], *, may_have_freed: bool) -> None:
    """Refuse when a file of the source is gone.

    Where it may have been freed, refuse too when this is not the source: another model's have the same names.
    """
    if begin.get("task") == "restore":
        manifest = source / MANIFEST_NAME
        is_there = manifest.exists()
        is_same = is_there and sha256_hex(manifest.read_bytes()) == begin.get("manifest")
        others = [MANIFEST_NAME] if is_there and not is_same else []
        gone = [] if others and may_have_freed else _missing_files(source) if is_there else [MANIFEST_NAME]
    else:
        check_begin(begin, destination)
        shards = {shard["name"]: (shard["size"], shard.get("mtime_ns")) for shard in begin["shards"]}
        gone = [name for name in shards if not (source / name).exists()]
        others = [name for name in shards if name not in gone and _stamp(source / name) != shards[name]]
    if gone and not may_have_freed:
        raise SourceNotFoundError(
            f"{source}: has no {gone[0]}, from which {destination} was being made, so it could not be made again; "
            "nothing was discarded"
        )
    if gone:
        raise ToolkitError(
            f"{destination}: --consume may have freed {gone[0]} of {source}, whose bytes are then only here; give the "
            "same command without --discard to finish it"
        )
    if others and may_have_freed:
        raise ToolkitError(
            f"{source / others[0]}: is not the file that was read into {destination}, which --consume may have freed; "
            f"give its folder, or delete {destination} yourself if nothing in it is needed"
        )


def _missing_files(folder: Path) -> list[str]:
    """Files of a resharded checkpoint that are not there, or not with their size."""
    files = [(file.path, folder / file.path, file.size) for file in load(folder).files]
    return [name for name, path, size in files if not (path.is_file() and path.stat().st_size == size)]


def _stamp(path: Path) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _manifest_before(destination: Path, widens: object) -> Manifest | None:
    """The manifest of what was here before the run began, back in its place."""
    if widens is None:
        return None
    if not (destination / MANIFEST_NAME).exists():
        os.rename(destination / ASIDE_NAME, destination / MANIFEST_NAME)
        sync_folder(destination)
    return decode((destination / MANIFEST_NAME).read_bytes(), what=str(destination / MANIFEST_NAME))


def _remove_added(destination: Path, kept: Manifest) -> None:
    """Remove the files that the manifest does not name and that only we write; the journal last."""
    named = {file.path for file in kept.files}
    for folder, _, names in os.walk(destination):
        for name in names:
            path = (Path(folder) / name).relative_to(destination).as_posix()
            if path.endswith(TEMP_SUFFIX) or (parse_path(path) is not None and path not in named):
                os.unlink(destination / path)
    write_index(
        ((file.path, ((tensor.name, tensor.size) for tensor in file.tensors)) for file in kept.files), destination
    )
    sync_folder(destination)
    (destination / ASIDE_NAME).unlink(missing_ok=True)
    os.unlink(destination / JOURNAL_NAME)
    sync_folder(destination)
