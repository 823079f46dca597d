"""The way back: the source checkpoint byte for byte, each shard proven by the sha256 that the source had.

`check` does the same reading and hashing and writes nothing: what one runs before deleting the original.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import IntegrityError
from manifests.header import Header
from manifests.inventory import Checkpoint, Location
from manifests.safety import resolve_inside
from manifests.schema import Document, Shard
from manifests.storage import sync_folder
from reshard.blocks import Reader, Writer
from reshard.destination import all_or_nothing, check_destination, check_room, sync_folders, write_file
from reshard.progress import Progress
from reshard.saved import read_document, read_saved_headers, require_source
from reshard.workers import StopFlag, run_all


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredShard:
    """One shard that was rebuilt, or could be: its name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


def restore(checkpoint: Checkpoint, out: Path, *, jobs: int, progress: Progress) -> list[RestoredShard]:
    """Write the source checkpoint into an empty or new folder: shards, index, auxiliary files.

    Raises:
        IncompleteError: Only a part was resharded.
        IntegrityError: The rebuilt bytes are not the source's.
        ToolkitError, ResourceError: See `check_destination` and `check_room` in `reshard.destination`.
    """
    headers = read_saved_headers(checkpoint)
    documents = [document for document in checkpoint.manifest.documents if document.source_name is not None]
    needed = sum(shard.size for shard in require_source(checkpoint).shards)
    check_destination(checkpoint.root, out)
    check_room(out, needed + sum(document.content_size for document in documents))
    with all_or_nothing(out):
        restored = _rebuild(checkpoint, headers, out, jobs=jobs, progress=progress)
        for document in documents:
            if document.role != "source_header" and document.source_name is not None:
                _rebuild_document(checkpoint, document, out / document.source_name)
        sync_folders(out)
    sync_folder(out.parent)
    return restored


def check(checkpoint: Checkpoint, *, jobs: int, progress: Progress) -> list[RestoredShard]:
    """Prove that `restore` would give the source's bytes, by hashing every shard from the destination.

    Raises:
        IncompleteError, IntegrityError: See `restore`.
    """
    headers = read_saved_headers(checkpoint)
    restored = _rebuild(checkpoint, headers, None, jobs=jobs, progress=progress)
    for document in checkpoint.manifest.documents:
        if document.source_name is not None:
            _rebuild_document(checkpoint, document, None)
    return restored


def _rebuild(
    checkpoint: Checkpoint, headers: Mapping[str, Header], out: Path | None, *, jobs: int, progress: Progress
) -> list[RestoredShard]:
    # Found before the workers start, so that they share finished tables only.
    places = {
        tensor.source_name: checkpoint.find(tensor.name)
        for file in checkpoint.manifest.files
        for tensor in file.tensors
    }

    def rebuild(shard: Shard, stop: StopFlag) -> RestoredShard:
        header = headers[shard.name]
        pieces = [place for tensor in header.tensors if (place := places[tensor.name]) is not None]
        return _rebuild_shard(shard, header, pieces, out, progress, stop)

    return run_all(rebuild, require_source(checkpoint).shards, workers=jobs)


def _rebuild_shard(
    shard: Shard, header: Header, pieces: list[Location], out: Path | None, progress: Progress, stop: StopFlag
) -> RestoredShard:
    """Stream one shard: its saved header, then its tensors in their original order from wherever they lie now."""
    hasher = hashlib.sha256(header.raw)
    with _maybe_writer(None if out is None else out / shard.name) as writer:
        if writer is not None:
            writer.write(header.raw, 0)
        position = len(header.raw)
        for block in _payload(pieces):
            stop.check()
            hasher.update(block)
            if writer is not None:
                writer.write(block, position)
            position += len(block)
            progress.advance(len(block))
        digest = hasher.hexdigest()
        if shard.sha256 is not None and digest != shard.sha256:
            raise IntegrityError(
                f"{shard.name}: its rebuilt bytes have sha256 {digest}, the source had {shard.sha256}; "
                "run `reshard verify` to find the damaged file"
            )
        if writer is not None:
            writer.finish()
    return RestoredShard(name=shard.name, size=position, sha256=digest)


def _rebuild_document(checkpoint: Checkpoint, document: Document, target: Path | None) -> None:
    """Prove one document, and write it where a target is given."""
    if document.codec != "none":
        content = read_document(checkpoint, document)
        if target is not None:
            write_file(target, content)
        return
    # Block by block: an auxiliary file may be of any size.
    hasher = hashlib.sha256()
    path = resolve_inside(checkpoint.root, document.path)
    with closing(Reader(path)) as reader, _maybe_writer(target) as writer:
        position = 0
        for block in reader.blocks(0, document.size):
            hasher.update(block)
            if writer is not None:
                writer.write(block, position)
            position += len(block)
        if path.stat().st_size != document.size or hasher.hexdigest() != document.sha256:
            raise IntegrityError(f"{path}: its bytes are not those in the manifest; it is damaged")
        if writer is not None:
            writer.finish()


def _payload(pieces: list[Location]) -> Iterator[memoryview]:
    """The bytes of tensors one after the other; neighbours in one file share its open file."""
    reader: Reader | None = None
    path: Path | None = None
    try:
        for piece in pieces:
            if reader is None or path != piece.path:
                if reader is not None:
                    reader.close()
                    reader = None
                reader, path = Reader(piece.path), piece.path
            yield from reader.blocks(piece.offset, piece.size)
    finally:
        if reader is not None:
            reader.close()


@contextmanager
def _maybe_writer(path: Path | None) -> Iterator[Writer | None]:
    """A writer that leaves nothing behind after a failure; None when nothing is to be written."""
    if path is None:
        yield None
        return
    writer = Writer(path)
    try:
        yield writer
    except BaseException:
        writer.abandon()
        raise
