"""Read everything that a manifest describes and name what is damaged: file, tensor, byte range."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from manifests.digest import CHUNK_BYTES, TensorHasher
from manifests.errors import ManifestError, SourceNotFoundError, ToolkitError
from manifests.inventory import Checkpoint
from manifests.paths import MANIFEST_NAME
from manifests.safety import resolve_inside
from manifests.schema import Document, FileEntry, Shard, TensorEntry
from reshard.blocks import Reader
from reshard.progress import Progress
from reshard.saved import require_source
from reshard.workers import StopFlag, run_all


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


def verify(checkpoint: Checkpoint, *, jobs: int, progress: Progress) -> list[Damage]:
    """Hash every byte below the manifest; return all findings, empty when everything is as described."""
    require_source(checkpoint)

    def look(entry: FileEntry | Document, stop: StopFlag) -> list[Damage]:
        try:
            path = resolve_inside(checkpoint.root, entry.path)
            if path.stat().st_size != entry.size:
                message = f"has {path.stat().st_size} bytes, the manifest says {entry.size}"
                return [Damage(path=entry.path, tensor=None, begin=0, end=entry.size, message=message)]
            reader = Reader(path)
            try:
                if isinstance(entry, Document):
                    return _verify_document(entry, reader, progress, stop)
                return _verify_file(entry, reader, progress, stop)
            finally:
                reader.close()
        except ToolkitError as error:
            return [Damage(path=entry.path, tensor=None, begin=0, end=entry.size, message=str(error))]

    entries: list[FileEntry | Document] = [*checkpoint.manifest.files, *checkpoint.manifest.documents]
    return [damage for found in run_all(look, entries, workers=jobs) for damage in found]


def verify_against(checkpoint: Checkpoint, source: Path, *, jobs: int, progress: Progress) -> list[Damage]:
    """Compare the recorded sha256 of every source shard and auxiliary file with the files in a source folder.

    Raises:
        SourceNotFoundError: There is no such folder.
        ManifestError: The folder is itself resharded.
    """
    if not source.is_dir():
        raise SourceNotFoundError(f"{source}: no such folder; give the folder that holds the original shards")
    if (source / MANIFEST_NAME).exists():
        raise ManifestError(f"{source}: is resharded itself; give the folder that holds the original shards")

    def look(entry: Shard | Document, stop: StopFlag) -> list[Damage]:
        name = entry.name if isinstance(entry, Shard) else entry.source_name or entry.path
        size = entry.size if isinstance(entry, Shard) else entry.content_size
        expected = entry.sha256 if isinstance(entry, Shard) else entry.content_sha256
        try:
            path = resolve_inside(source, name)
            reader = Reader(path)
            try:
                found = _hash_range(reader, 0, path.stat().st_size, progress, stop)
            finally:
                reader.close()
        except ToolkitError as error:
            return [Damage(path=name, tensor=None, begin=0, end=size, message=str(error))]
        if found != expected:
            message = f"the source's sha256 is {found}, the manifest recorded {expected}"
            return [Damage(path=name, tensor=None, begin=0, end=size, message=message)]
        return []

    entries: list[Shard | Document] = [s for s in require_source(checkpoint).shards if s.sha256 is not None]
    entries += [d for d in checkpoint.manifest.documents if d.role in ("auxiliary", "source_index")]
    return [damage for found in run_all(look, entries, workers=jobs) for damage in found]


def _verify_file(file: FileEntry, reader: Reader, progress: Progress, stop: StopFlag) -> list[Damage]:
    if file.codec != "none":
        # The stored bytes prove the unpacked ones.
        if _hash_range(reader, 0, file.size, progress, stop) == file.stored_sha256:
            return []
        return [Damage(path=file.path, tensor=None, begin=0, end=file.size, message="its bytes are damaged")]
    findings = []
    if _hash_range(reader, 0, file.header_size, progress, stop) != file.header_sha256:
        findings.append(
            Damage(path=file.path, tensor=None, begin=0, end=file.header_size, message="its header is damaged")
        )
    for tensor in file.tensors:
        findings += _verify_tensor(file.path, tensor, reader, progress, stop)
    return findings


def _verify_tensor(path: str, tensor: TensorEntry, reader: Reader, progress: Progress, stop: StopFlag) -> list[Damage]:
    hasher = TensorHasher()
    for block in reader.blocks(tensor.offset, tensor.size):
        stop.check()
        hasher.update(block)
        progress.advance(len(block))
    expected = tensor.chunks or (tensor.digest,)
    return [
        Damage(
            path=path,
            tensor=tensor.name,
            begin=tensor.offset + number * CHUNK_BYTES,
            end=tensor.offset + min(tensor.size, (number + 1) * CHUNK_BYTES),
            message="its bytes are damaged",
        )
        for number, (found, known) in enumerate(zip(hasher.chunks(), expected, strict=True))
        if found != known
    ]


def _verify_document(document: Document, reader: Reader, progress: Progress, stop: StopFlag) -> list[Damage]:
    if _hash_range(reader, 0, document.size, progress, stop) == document.sha256:
        return []
    return [Damage(path=document.path, tensor=None, begin=0, end=document.size, message="its bytes are damaged")]


def _hash_range(reader: Reader, begin: int, size: int, progress: Progress, stop: StopFlag) -> str:
    hasher = hashlib.sha256()
    for block in reader.blocks(begin, size):
        stop.check()
        hasher.update(block)
        progress.advance(len(block))
    return hasher.hexdigest()
