"""Read everything that a manifest describes and name what is damaged: file, tensor, byte range.

A finding's range is what cannot be trusted; every other byte that the manifest describes was read and is right. So
`reshard.repair` takes the ranges, and no more, from elsewhere.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from manifests.checkpoint import Checkpoint
from manifests.digest import CHUNK_BYTES, sha256_hex
from manifests.errors import ManifestError, RemoteError, ToolkitError
from manifests.paths import MANIFEST_NAME
from manifests.remote import find, is_resharded
from manifests.safety import require_folder, resolve_inside
from manifests.schema import Document, FileEntry, Shard, TensorEntry
from reshard.blocks import Reader
from reshard.destination import hash_readable
from reshard.places import Place
from reshard.progress import Progress
from reshard.saved import require_source
from reshard.source import local_path, source_root
from reshard.streams import Ring
from reshard.web import place_of
from reshard.workers import StopFlag, run_all, unless_stopped

if TYPE_CHECKING:
    from hashlib import _Hash

READERS_PER_JOB = 2
"""While one reads, another hashes: with one, the disk rests as long as the hash takes."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """One finding.

    Attributes:
        path: Relative path of the file.
        tensor: Name of the tensor, None for headers and documents.
        begin, end: The byte range in the file that holds the damage.
        message: One sentence.
    """

    path: str
    tensor: str | None
    begin: int
    end: int
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A byte range of a file and the sha256 that the manifest knows of it; its tensor, None for all else."""

    begin: int
    end: int
    sha256: str | None
    tensor: TensorEntry | None


def checks_of(entry: FileEntry | Document) -> list[Check]:
    """All that can be checked by itself, in the order of the file, without a gap."""
    if isinstance(entry, Document):
        return [Check(begin=0, end=entry.size, sha256=entry.sha256, tensor=None)]
    if entry.codec != "none":
        # The stored bytes prove the unpacked ones.
        return [Check(begin=0, end=entry.size, sha256=entry.stored_sha256, tensor=None)]
    checks = [Check(begin=0, end=entry.header_size, sha256=entry.header_sha256, tensor=None)]
    for tensor in entry.tensors:
        for number, sha256 in enumerate(tensor.chunks or (tensor.digest,)):
            begin, end = number * CHUNK_BYTES, min(tensor.size, (number + 1) * CHUNK_BYTES)
            checks.append(Check(begin=tensor.offset + begin, end=tensor.offset + end, sha256=sha256, tensor=tensor))
    return checks


def verify(checkpoint: Checkpoint, *, jobs: int, progress: Progress) -> list[Damage]:
    """Hash every byte below the manifest; return all findings in its order, none when everything is as described."""
    require_source(checkpoint)
    entries: list[FileEntry | Document] = [*checkpoint.manifest.files, *checkpoint.manifest.documents]

    def look(entry: FileEntry | Document, buffer: memoryview, stop: StopFlag) -> list[Damage]:
        if isinstance(entry, FileEntry) and entry.layer is not None:
            progress.at(f"layer {entry.layer}")
        try:
            path = resolve_inside(checkpoint.root, entry.path)
            with closing(Reader(path)) as reader:
                return list(_verify_file(entry, path.stat().st_size, _Cursor(reader, buffer), progress, stop))
        except ToolkitError as error:
            return [
                Damage(
                    path=entry.path,
                    tensor=None,
                    begin=0,
                    end=entry.size,
                    message=_sentence(error, checkpoint.root / entry.path),
                )
            ]

    return _run(look, entries, jobs)


def source_folder(checkpoint: Checkpoint, source: Path | str) -> Path | None:
    """The folder of a source to compare with, which is named itself or by one of its GGUF files.

    None when it is not on this machine.

    Raises:
        ToolkitError: The file is none of those that the checkpoint was made from, so comparing it would be for nothing.
    """
    path, folder = local_path(source), source_root(source)
    if path is not None and folder != path:
        _check_named(checkpoint, path.name, str(path))
    return folder


def verify_against(checkpoint: Checkpoint, source: Path, *, jobs: int, progress: Progress) -> list[Damage]:
    """Compare the recorded sha256 of every source shard and auxiliary file with the files in a source folder.

    For a source on a server see `verify_published`.

    Raises:
        SourceNotFoundError: There is no such folder.
        ManifestError: The folder is itself resharded.
    """
    require_folder(source, "give the folder that holds the original shards")
    if (source / MANIFEST_NAME).exists():
        raise ManifestError(f"{source}: is resharded itself; give the folder that holds the original shards")

    def look(entry: Shard | Document, buffer: memoryview, stop: StopFlag) -> list[Damage]:
        name = entry.name if isinstance(entry, Shard) else entry.source_name or entry.path
        size = entry.size if isinstance(entry, Shard) else entry.content_size
        expected = entry.sha256 if isinstance(entry, Shard) else entry.content_sha256
        hasher = hashlib.sha256()
        try:
            path = resolve_inside(source, name)
            with closing(Reader(path)) as reader:
                found = path.stat().st_size
                _hash(_Cursor(reader, buffer), 0, found, found, hasher, progress, stop)
        except ToolkitError as error:
            return [Damage(path=name, tensor=None, begin=0, end=size, message=_sentence(error, source / name))]
        if hasher.hexdigest() != expected:
            message = f"the source's sha256 is {hasher.hexdigest()}, the manifest recorded {expected}"
            return [Damage(path=name, tensor=None, begin=0, end=size, message=message)]
        return []

    entries: list[Shard | Document] = [s for s in require_source(checkpoint).shards if s.sha256 is not None]
    entries += [d for d in checkpoint.manifest.documents if d.role in ("auxiliary", "source_index")]
    return _run(look, entries, jobs)


def find_published(checkpoint: Checkpoint, address: str) -> Place:
    """The folder on a server that `verify_published` is to compare with, before anything is read for that.

    Raises:
        ManifestError: It is itself resharded.
        SourceNotFoundError: It is no address that can be read.
        ToolkitError: It is of a file of which the checkpoint was not made.
        RemoteError: The server cannot be reached.
    """
    folder, name = find(address)
    if name is not None:
        _check_named(checkpoint, name, folder.where(name))
    elif is_resharded(folder):
        raise ManifestError(f"{folder}: is resharded itself; give the folder that holds the original shards")
    return place_of(folder)


def _check_named(checkpoint: Checkpoint, name: str, where: str) -> None:
    """Refuse a file that is none of those that the checkpoint was made from: comparing it would be for nothing."""
    names = [shard.name for shard in require_source(checkpoint).shards]
    if name not in names:
        raise ToolkitError(
            f"{where}: is none of the files that {checkpoint.root} was made from; give its {names[0]}, or the folder "
            "that has it"
        )


def verify_published(checkpoint: Checkpoint, place: Place, *, jobs: int, progress: Progress) -> list[Damage]:
    """Compare what was recorded of the source with what a server says of it: no shard is fetched for that.

    Shards are compared by the sha256 that the server publishes, and by their headers and sizes where it does not; small
    files by their bytes.

    Raises:
        RemoteError: The server cannot be reached.
    """
    headers = {document.path: document.content_sha256 for document in checkpoint.manifest.documents}

    def look(entry: Shard | Document, buffer: memoryview, stop: StopFlag) -> list[Damage]:
        return unless_stopped(partial(compare, entry), stop)

    def compare(entry: Shard | Document) -> list[Damage]:
        name = entry.name if isinstance(entry, Shard) else entry.source_name or entry.path
        size = entry.size if isinstance(entry, Shard) else entry.content_size
        progress.at(name)
        try:
            found = place.size(name)
            message = f"the source has {found} bytes, the manifest recorded {size}" if found != size else None
            if message is None and isinstance(entry, Document):
                message = _other("the source's sha256", hash_readable(place.file(name), size), entry.content_sha256)
                progress.advance(size)
            elif message is None and isinstance(entry, Shard):
                published = place.sha256(name)
                if published is not None and entry.sha256 is not None:
                    message = _other("the published sha256", published, entry.sha256)
                else:
                    header = sha256_hex(place.header(name).rest)
                    message = _other("the sha256 of the source's header", header, headers[entry.header])
        except RemoteError:
            raise
        except ToolkitError as error:
            message = str(error).removeprefix(f"{place.where(name)}: ")
        return [] if message is None else [Damage(path=name, tensor=None, begin=0, end=size, message=message)]

    entries: list[Shard | Document] = [*require_source(checkpoint).shards]
    entries += [d for d in checkpoint.manifest.documents if d.role in ("auxiliary", "source_index")]
    return _run(look, entries, jobs)


def _other(what: str, found: str, recorded: str) -> str | None:
    return None if found == recorded else f"{what} is {found}, the manifest recorded {recorded}"


def find_unnamed(checkpoint: Checkpoint) -> list[str]:
    """Relative paths of all files in the folder that the manifest does not name: no damage, but no part of it."""
    manifest = checkpoint.manifest
    named = {MANIFEST_NAME, *(file.path for file in manifest.files), *(entry.path for entry in manifest.documents)}
    found = (Path(folder, name) for folder, _, names in os.walk(checkpoint.root) for name in names)
    return sorted({path.relative_to(checkpoint.root).as_posix() for path in found} - named)


def _run(look: Callable[[T, memoryview, StopFlag], list[Damage]], entries: Sequence[T], jobs: int) -> list[Damage]:
    """Look at every entry, with a block that is used again: fresh memory for each file costs as much as reading it."""
    workers = jobs * READERS_PER_JOB
    ring = Ring(workers)

    def work(entry: T, stop: StopFlag) -> list[Damage]:
        buffer = ring.take()
        try:
            return look(entry, buffer, stop)
        finally:
            ring.give(buffer)

    return [damage for found in run_all(work, entries, workers=workers) for damage in found]


class _Cursor:
    """The bytes of a file by rising range. What follows is read along: small ranges do not cost a request each."""

    def __init__(self, reader: Reader, buffer: memoryview) -> None:
        self._reader = reader
        self._buffer = buffer
        self._block = memoryview(b"")
        self._begin = 0

    def read(self, begin: int, end: int, limit: int) -> memoryview:
        """Bytes from begin on, at most up to end, at least one; up to limit may be read along.

        Raises:
            IntegrityError, ToolkitError: See `Reader.read`.
        """
        at = begin - self._begin
        if not 0 <= at < len(self._block):
            self._block, _ = self._reader.read(self._buffer, begin, limit)
            self._begin, at = begin, 0
        return self._block[at : at + end - begin]


def _verify_file(
    entry: FileEntry | Document, size: int, cursor: _Cursor, progress: Progress, stop: StopFlag
) -> Iterator[Damage]:
    for check in checks_of(entry):
        if check.end > size and check.end > check.begin:
            message = f"the file has {size} bytes, the manifest says {entry.size}"
            yield _damage(entry, check, message)
            continue
        hasher = hashlib.sha256()
        try:
            _hash(cursor, check.begin, check.end, entry.size, hasher, progress, stop)
        except ToolkitError as error:
            yield _damage(entry, check, str(error))
            continue
        if hasher.hexdigest() != check.sha256:
            is_header = isinstance(entry, FileEntry) and entry.codec == "none" and check.tensor is None
            yield _damage(entry, check, "its header is damaged" if is_header else "its bytes are damaged")
    if size > entry.size:
        message = f"the file has {size} bytes, the manifest says {entry.size}"
        yield Damage(path=entry.path, tensor=None, begin=entry.size, end=size, message=message)


def _sentence(error: ToolkitError, path: Path) -> str:
    """An error without its path in front: that stands beside it."""
    return str(error).removeprefix(f"{path}: ")


def _damage(entry: FileEntry | Document, check: Check, message: str) -> Damage:
    tensor = None if check.tensor is None else check.tensor.name
    return Damage(path=entry.path, tensor=tensor, begin=check.begin, end=check.end, message=message)


def _hash(
    cursor: _Cursor, begin: int, end: int, limit: int, hasher: "_Hash", progress: Progress, stop: StopFlag
) -> None:
    while begin < end:
        stop.check()
        try:
            data = cursor.read(begin, end, limit)
        except ToolkitError:
            # What was to be read along may be what cannot be read; then it is no fault of this range.
            data = cursor.read(begin, end, end)
        hasher.update(data)
        progress.advance(len(data))
        begin += len(data)
