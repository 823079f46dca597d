"""Where a source is: what `run`, `verify` and `repair` ask of it, be it a folder of this machine or one on a server.

One form for both, so that nobody else asks which it is: only what can be done to a folder of this machine alone, such
as freeing its files, needs the path of it. A folder on a server is `reshard.web`'s.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from manifests import gguf_files
from manifests.errors import ManifestError
from manifests.folder import Folder, LocalFolder
from manifests.header import Header
from manifests.safety import resolve_inside
from manifests.shards import read_header
from reshard.blocks import Reader, data_bytes
from reshard.openable import LocalFile, Openable
from reshard.workers import StopFlag

Range = tuple[int, int]
"""First byte and the one behind the last."""


class Place(Protocol):
    """The folder of a source; as text it is its own name for messages.

    Attributes:
        root: Its path; None when it is not on this machine.
        is_far: Whether its bytes are worth more than reading them back from where they were written to, so that
            nothing is asked twice.
    """

    root: Path | None
    is_far: bool

    def where(self, name: str) -> str:
        """A file's full name for messages."""

    def has(self, name: str) -> bool:
        """Whether a shard is there; one may have been used up."""

    def size(self, name: str) -> int:
        """Bytes of a file.

        Raises:
            SourceNotFoundError: There is none.
        """

    def hole_bytes(self, name: str) -> int:
        """How many bytes of a shard are known to be holes."""

    def state(self, name: str) -> Mapping[str, Any]:
        """What tells one state of a shard from another, as a journal records it."""

    def sha256(self, name: str) -> str | None:
        """What the place itself says that the sha256 of a file is; None when it does not."""

    def file(self, name: str) -> Openable:
        """A file, to be read here and there.

        Raises:
            ManifestError, SourceNotFoundError: See `manifests.safety.resolve_inside`.
        """

    def header(self, name: str) -> Header:
        """The header of a shard, read now.

        Raises:
            ManifestError: It has none that can be read.
        """

    def divide(self, jobs: int, shards: int) -> int:
        """How many of so many shards are read at the same time when so many jobs are allowed."""

    def reading(
        self, name: str, header: Header, ranges: Iterable[Range], *, connections: int, stop: StopFlag
    ) -> AbstractContextManager[Openable]:
        """A shard while it is read front to back: it must be the file that was planned from, and stay it.

        Args:
            name: The shard.
            header: As it was planned from.
            ranges: What will be read of it, in order. Nothing else may be asked of the file that is given.
            connections: How many there may be to a server.
            stop: Ends the waiting for bytes that do not come.

        Raises:
            ManifestError, IntegrityError: It changed.
        """


def header_of(folder: Folder, name: str) -> Header:
    """The header of a shard of a folder, see `Place.header`."""
    if not name.endswith(gguf_files.SUFFIX):
        return read_header(folder, name)
    (header,) = gguf_files.read_file(folder, name).shards.values()
    return gguf_files.with_gaps(folder, name, header)


class LocalPlace:
    """A folder of this machine; see `Place`."""

    is_far = False

    def __init__(self, root: Path) -> None:
        self.root: Path | None = root
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def where(self, name: str) -> str:
        """See `Place`."""
        return str(self._root / name)

    def has(self, name: str) -> bool:
        """See `Place`."""
        return (self._root / name).exists()

    def size(self, name: str) -> int:
        """See `Place`."""
        return resolve_inside(self._root, name).stat().st_size

    def hole_bytes(self, name: str) -> int:
        """See `Place`."""
        path = self._root / name
        return path.stat().st_size - data_bytes(path) if path.exists() else 0

    def state(self, name: str) -> Mapping[str, Any]:
        """See `Place`; one that is gone has no time."""
        path = self._root / name
        return {"mtime_ns": os.stat(path).st_mtime_ns if path.exists() else None}

    def sha256(self, name: str) -> str | None:
        """See `Place`; nothing is known but by reading it."""
        return None

    def file(self, name: str) -> LocalFile:
        """See `Place`."""
        return LocalFile(resolve_inside(self._root, name))

    def header(self, name: str) -> Header:
        """See `Place`."""
        return header_of(LocalFolder(self._root), name)

    def divide(self, jobs: int, shards: int) -> int:
        """See `Place`."""
        return jobs

    @contextmanager
    def reading(
        self, name: str, header: Header, ranges: Iterable[Range], *, connections: int, stop: StopFlag
    ) -> Iterator[Openable]:
        """See `Place`."""
        file = self.file(name)
        before = file.path.stat()
        with closing(Reader(file.path)) as reader:
            # Byte for byte as far as a header can tell.
            if b"".join(bytes(block) for block in reader.blocks(0, len(header.raw))) != header.raw:
                raise ManifestError(f"{file}: changed since its header was read; run again")
        yield file
        after = file.path.stat()
        is_same = (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        if not is_same or after.st_size != header.file_bytes:
            raise ManifestError(f"{file}: changed while it was read; run again when nothing writes to it")
