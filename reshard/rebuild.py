"""One damaged file of a resharded checkpoint made anew, from its own right bytes and from a source's.

The new file is written beside the old one, and takes its place when every digest of it is right and it is on disk. What
a source gives is believed as far as the damaged checkpoint's own manifest proves it, and no further.
"""

import dataclasses
import hashlib
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.checkpoint import Checkpoint, Location
from manifests.config import CONFIG_NAME
from manifests.digest import TensorHasher, sha256_hex
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError, ToolkitError
from manifests.header import HeaderTensor, encode_header
from manifests.safety import resolve_inside
from manifests.schema import Document, FileEntry, TensorEntry
from manifests.shards import MAX_INDEX_BYTES
from manifests.storage import sync_folder
from reshard.archive import pack, unpack_blocks, write_packed
from reshard.blocks import Writer, new_block, temporary_path
from reshard.documents import write_index
from reshard.generated import config_document
from reshard.openable import LocalFile, Openable, PackedFile, read_blocks
from reshard.plan import PAGE_BYTES
from reshard.progress import Progress
from reshard.saved import find_origins, read_document
from reshard.streams import Piece, Ring, Target, pump
from reshard.verify import Damage, checks_of
from reshard.web import place_of
from reshard.workers import StopFlag

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """A file that is whole again.

    Attributes:
        path: Relative path.
        tensors: Names of those that were damaged.
        taken_bytes: How much was taken from the source; the rest was still right, or follows from the manifest.
    """

    path: str
    tensors: tuple[str, ...] = ()
    taken_bytes: int


class Rebuilder:
    """Makes files of one checkpoint anew, with the help of one source. Several threads may ask it."""

    def __init__(self, checkpoint: Checkpoint, source: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._root = checkpoint.root
        self._source = source
        self._place = place_of(source.folder)
        self._is_copy = source.manifest.layout == "resharded"
        self._ring = Ring()

    def rebuild_file(
        self, file: FileEntry, damage: Sequence[Damage], progress: Progress, stop: StopFlag
    ) -> tuple[Repaired, FileEntry]:
        """Replace a file of tensors.

        Args:
            file: The file.
            damage: What `verify` found in it: all bytes outside of it are taken from the file itself, if it is plain.
            progress: Counts bytes of the new file.
            stop: Asked before each block.

        Returns:
            What was done, and the file as it is now: what is packed by another version of zstd has other bytes, but
            unpacks to what the manifest promises.

        Raises:
            IntegrityError: The source's bytes are not those of the manifest.
            ManifestError, SourceNotFoundError: The source has not this tensor.
            ToolkitError: A disk error.
        """
        if file.codec == "none":
            return self._rebuild_plain(file, damage, progress, stop), file
        return self._rebuild_packed(file, progress, stop)

    def _rebuild_plain(self, file: FileEntry, damage: Sequence[Damage], progress: Progress, stop: StopFlag) -> Repaired:
        header = self._find_header(file)
        own = LocalFile(self._root / file.path)
        wanted = [(check, check.tensor) for check in checks_of(file) if check.tensor and check.begin < check.end]
        pieces = []
        names: dict[str, None] = {}
        taken = 0
        with self._replace(file.path, file.size) as writer:
            for check, tensor in wanted:
                taken_from: Openable = own
                begin = check.begin
                if any(found.begin < check.end and check.begin < found.end for found in damage):
                    location = self._locate(tensor)
                    taken_from = self._file(location.file, location)
                    begin = location.offset + check.begin - tensor.offset
                    names[tensor.name] = None
                    taken += check.end - check.begin
                size, target = check.end - check.begin, Target(open=lambda: writer, offset=check.begin)
                pieces.append(Piece(file=taken_from, offset=begin, size=size, target=target))
            writer.write(header, 0)
            digests = pump(pieces, whole=None, digests=True, ring=self._ring, progress=progress, stop=stop)
            for (check, tensor), piece, found in zip(wanted, pieces, digests, strict=True):
                if found != (check.sha256,):
                    raise self._wrong(tensor, piece.file, piece.offset, piece.size)
        return Repaired(path=file.path, tensors=tuple(names), taken_bytes=taken)

    def _rebuild_packed(self, file: FileEntry, progress: Progress, stop: StopFlag) -> tuple[Repaired, FileEntry]:
        for other in self._source.manifest.files:
            if other.stored_sha256 == file.stored_sha256:
                self._copy(other.path, file.path, other.stored_sha256, progress, stop)
                return Repaired(path=file.path, taken_bytes=file.size), file
        header = self._find_header(file)
        plain, unpacked, stored = hashlib.sha256(header), hashlib.sha256(), hashlib.sha256()
        with self._replace(file.path, 0) as writer:
            with closing(self._read_tensors(file, plain, progress, stop)) as tensors:
                write_packed(chain([memoryview(header)], tensors), writer, size=file.unpacked_size)
            # The manifest will vouch for bytes that nobody knew before: only for what comes back right from the disk.
            path = temporary_path(writer.path)
            size = path.stat().st_size
            for block in unpack_blocks(path, size=file.unpacked_size, stored=stored):
                unpacked.update(block)
            if unpacked.digest() != plain.digest():
                raise IntegrityError(f"{path}: is not read back as it was written; the disk is damaged")
        now = dataclasses.replace(file, size=size, stored_sha256=stored.hexdigest())
        return Repaired(path=file.path, taken_bytes=file.unpacked_size - file.header_size), now

    def _read_tensors(
        self, file: FileEntry, whole: "_Hash", progress: Progress, stop: StopFlag
    ) -> Generator[memoryview, None, None]:
        """The payload of a file as the source has it, each tensor proven before the next; `whole` takes all of it."""
        buffer = self._ring.take()
        before: Openable | None = None
        try:
            with ExitStack() as opened:
                for tensor in file.tensors:
                    location = self._locate(tensor)
                    if (at := self._file(location.file, location)) != before:
                        opened.close()
                        before = at
                        reader = opened.enter_context(closing(at.open()))
                    hasher = TensorHasher()
                    for block in read_blocks(reader, buffer, location.offset, location.size):
                        stop.check()
                        hasher.update(block)
                        whole.update(block)
                        yield block
                        progress.advance(len(block))
                    if hasher.chunks() != (tensor.chunks or (tensor.digest,)):
                        raise self._wrong(tensor, at, location.offset, location.size)
        finally:
            self._ring.give(buffer)

    def rebuild_document(self, document: Document, progress: Progress, stop: StopFlag) -> tuple[Repaired, Document]:
        """Replace a file without tensors.

        Returns:
            What was done, and the document as it is now: what is packed by another version of zstd has other bytes,
            but the content that the manifest promises.

        Raises:
            IntegrityError, ManifestError, SourceNotFoundError, ToolkitError: See `rebuild_file`.
        """
        if document.role == "index":
            return Repaired(path=document.path, taken_bytes=0), self._rebuild_index(document)
        stored = None if document.role == "generated" and not self._is_copy else self._find_stored(document)
        if stored is not None:
            self._copy(stored, document.path, document.sha256, progress, stop)
            return Repaired(path=document.path, taken_bytes=document.size), document
        content = self._find_content(document)
        packed = content if document.codec == "none" else pack(content)
        with self._replace(document.path, 0) as writer:
            writer.write(packed, 0)
        progress.advance(len(packed))
        now = dataclasses.replace(document, size=len(packed), sha256=sha256_hex(packed))
        return Repaired(path=document.path, taken_bytes=len(content)), now

    @contextmanager
    def _replace(self, relative: str, size: int) -> Iterator[Writer]:
        """A writer whose file takes the place of another, durably, if nothing is raised meanwhile."""
        path = self._root / relative
        # A link in place of the file is replaced; one in place of its folder would lead the writing elsewhere.
        if not Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(self._root)):
            raise ManifestError(f"{path.parent}: a link that leaves the folder; put a folder in its place")
        with suppress(FileNotFoundError):
            os.unlink(temporary_path(path))
        writer = Writer(path, size)
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
        for folder in path.parents:
            sync_folder(folder)
            if folder == self._root:
                break

    def _find_header(self, file: FileEntry) -> bytes:
        for raw in self._headers(file):
            if sha256_hex(raw) == file.header_sha256:
                return raw
        raise IntegrityError(
            f"{self._root / file.path}: its header is damaged, and {self._place} has not the same file; give a "
            "resharded copy"
        )

    def _headers(self, file: FileEntry) -> Iterator[bytes]:
        """What may be a file's header: as we write it, or what another program wrote, here or in a copy."""
        entries = [
            HeaderTensor(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                begin=tensor.offset - file.header_size,
                end=tensor.offset - file.header_size + tensor.size,
            )
            for tensor in file.tensors
        ]
        yield encode_header(entries, align=PAGE_BYTES)
        others = [other for other in self._source.manifest.files if other.header_sha256 == file.header_sha256]
        finds = [partial(_local_file, self._root, file), *(partial(self._file, other.path, other) for other in others)]
        for find in finds:
            with suppress(ToolkitError), closing(find().open()) as reader:
                yield b"".join(bytes(block) for block in read_blocks(reader, new_block(), 0, file.header_size))

    def _locate(self, tensor: TensorEntry) -> Location:
        """Where the source has a tensor."""
        name = tensor.name
        location = self._source.locate(name)
        if location is None:
            origin = self._origins.get(name)
            came = f"; it came from {origin}" if origin else ""
            raise SourceNotFoundError(f"{self._place}: has no tensor {name!r}{came}")
        if (location.dtype, location.shape, location.size) != (tensor.dtype, tensor.shape, tensor.size):
            raise ManifestError(
                f"{location.place}: tensor {name!r} is {location.dtype} "
                f"{list(location.shape)} and not {tensor.dtype} {list(tensor.shape)}; it is another model's"
            )
        return location

    @cached_property
    def _origins(self) -> Mapping[str, str]:
        return find_origins(self._checkpoint)

    def _rebuild_index(self, document: Document) -> Document:
        """Ours follows from the manifest."""
        path = self._root / document.path
        if path.is_symlink():
            os.unlink(path)
        files = ((file.path, file.tensors) for file in self._checkpoint.manifest.files if file.codec == "none")
        now = write_index(
            ((path, ((tensor.name, tensor.size) for tensor in tensors)) for path, tensors in files), self._root
        )
        sync_folder(self._root)
        return now

    def _find_stored(self, document: Document) -> str | None:
        """A file of the source that has the bytes of a document as they are stored."""
        if self._is_copy:
            for other in self._source.manifest.documents:
                if other.sha256 == document.sha256:
                    return other.path
        elif document.codec == "none":
            return document.source_name or document.path
        return None

    def _file(self, name: str, stored: FileEntry | Location) -> Openable:
        """A file of the source, read as if it were plain."""
        if stored.codec == "none":
            return self._place.file(name)
        if self._place.root is None:
            raise ToolkitError(
                f"{self._place.where(name)}: is packed, and is unpacked from this machine's disks alone; give a copy "
                "that is not packed, or download this one"
            )
        return _local_file(self._place.root, stored)

    def _copy(self, name: str, path: str, sha256: str | None, progress: Progress, stop: StopFlag) -> None:
        """Copy a file of the source as it is stored."""
        hasher = hashlib.sha256()
        source, size = self._place.file(name), self._place.size(name)
        with self._replace(path, size) as writer:
            piece = Piece(file=source, offset=0, size=size, target=Target(open=lambda: writer, offset=0))
            pump([piece], whole=hasher, digests=False, ring=self._ring, progress=progress, stop=stop)
            if hasher.hexdigest() != sha256:
                raise IntegrityError(f"{source}: is not the file that {self._root} had; give another copy")

    def _wrong(self, tensor: TensorEntry, file: Openable, begin: int, size: int) -> IntegrityError:
        return IntegrityError(
            f"{file}: bytes {begin}-{begin + size} are not those that {self._root} had of tensor {tensor.name!r}; give "
            "another copy"
        )

    def _generate(self, document: Document) -> bytes:
        """A file that GGUF files have inside."""
        if document.path == CONFIG_NAME:
            return config_document(self._source.config)
        return self._source.auxiliary.read(document.path, max_bytes=document.content_size) or b""

    def _find_content(self, document: Document) -> bytes:
        """What a packed document holds, from a source that has it in another form."""
        if self._is_copy:
            for other in self._source.manifest.documents:
                if other.content_sha256 == document.content_sha256:
                    return read_document(self._source, other)
            raise SourceNotFoundError(f"{self._place}: has no document with the content of {document.path}")
        name = document.source_name or document.path
        if document.role == "generated":
            content = self._generate(document)
        elif document.role == "source_header":
            content = self._place.header(name).rest
        else:
            self._source.folder.require(name)
            content = self._source.folder.read(name, max_bytes=MAX_INDEX_BYTES) or b""
        if sha256_hex(content) != document.content_sha256:
            raise IntegrityError(
                f"{self._place.where(name)}: is not the file that {document.path} in {self._root} was made from; give "
                "another copy"
            )
        return content


def _local_file(root: Path, stored: FileEntry | Location) -> Openable:
    path = resolve_inside(root, stored.path if isinstance(stored, FileEntry) else stored.file)
    return LocalFile(path) if stored.codec == "none" else PackedFile(path, stored.unpacked_size)
