"""A source on a web server: its files by range, what it says of them, and nothing of it stored here.

See `reshard.places` for what is asked of it. This file knows files and ranges; it must not know tensors.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import IntegrityError, SourceNotFoundError
from manifests.folder import Folder, LocalFolder
from manifests.header import Header
from manifests.http import RemoteFile, Stream
from manifests.remote import RemoteFolder
from reshard.fetching import FetchingReader
from reshard.openable import BlockReader
from reshard.places import LocalPlace, Place, Range, header_of
from reshard.workers import StopFlag

SHARDS_AT_ONCE = 2
"""While the last files of one are being made durable, the connections go on with another."""


def place_of(folder: Folder) -> Place:
    """The place that a folder is, of this machine or on a server."""
    if isinstance(folder, LocalFolder):
        return LocalPlace(folder.root)
    assert isinstance(folder, RemoteFolder)
    return WebPlace(folder)


class WebPlace:
    """A folder on a server; see `reshard.places.Place`."""

    is_far = True

    def __init__(self, folder: RemoteFolder) -> None:
        self.root: Path | None = None
        self._folder = folder

    def __str__(self) -> str:
        return str(self._folder)

    def where(self, name: str) -> str:
        """See `Place`."""
        return self._folder.where(name)

    def has(self, name: str) -> bool:
        """See `Place`; nobody here uses up what is on a server."""
        return True

    def size(self, name: str) -> int:
        """See `Place`."""
        size = self._folder.size(name)
        if size is None:
            raise SourceNotFoundError(f"{self.where(name)}: the server has no such file")
        return size

    def hole_bytes(self, name: str) -> int:
        """See `Place`; they arrive as zeros."""
        return 0

    def state(self, name: str) -> Mapping[str, Any]:
        """See `Place`: in the server's own words, for its clock and its address may change."""
        sha256 = self.sha256(name)
        if sha256 is not None:
            return {"state": f"sha256:{sha256}"}
        facts = self._folder.file(name).facts
        return {"state": facts.etag or facts.modified}

    def sha256(self, name: str) -> str | None:
        """See `Place`: the Hub publishes it of large files."""
        listed = (self._folder.files or {}).get(name)
        return None if listed is None else listed.sha256

    def file(self, name: str) -> "WebFile":
        """See `Place`."""
        listed = (self._folder.files or {}).get(name)
        return WebFile(self._folder.file(name), None if listed is None else listed.size)

    def header(self, name: str) -> Header:
        """See `Place`."""
        return header_of(self._folder, name)

    def divide(self, jobs: int, shards: int) -> int:
        """See `Place`; the connections are divided among the shards."""
        return min(SHARDS_AT_ONCE, shards) if jobs >= 2 * SHARDS_AT_ONCE and shards else 1

    @contextmanager
    def reading(
        self, name: str, header: Header, ranges: Iterable[Range], *, connections: int, stop: StopFlag
    ) -> Iterator["_Open"]:
        """See `Place`. That it stays what it was is seen in every answer of the server."""
        file = self._folder.file(name)
        if file.facts.size != header.file_bytes:
            raise IntegrityError(f"{self.where(name)}: changed since its header was read; run again")
        reader = FetchingReader(file, ranges, connections=connections, stop=stop)
        try:
            yield _Open(self.where(name), reader)
        finally:
            reader.close()


@dataclass(frozen=True, slots=True)
class WebFile:
    """A file on a server, and the bytes that it must have where they are known; see `reshard.openable.Openable`."""

    file: RemoteFile
    size: int | None

    def __str__(self) -> str:
        return self.file.where

    def open(self) -> "WebReader":
        """See `Openable`; nothing is asked before the first bytes are read."""
        return WebReader(self.file, self.size)


class WebReader:
    """A file on a server while it is read: what follows the bytes before comes over the same connection."""

    def __init__(self, file: RemoteFile, size: int | None) -> None:
        self._file = file
        self._size = size
        self._stream: Stream | None = None

    def read(self, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        """See `reshard.openable.BlockReader`: as many bytes as the buffer takes. Asks for no more than the range.

        Raises:
            IntegrityError: It has another size than is published.
            See `manifests.http.RemoteFile.read`.
        """
        stream = self._stream
        if stream is None or stream.position != begin or stream.end != end:
            self.close()
            stream = self._stream = self._file.stream(begin, end)
        view = buffer[: end - begin]
        stream.fill(view)
        if self._size is not None and self._file.facts.size != self._size:
            raise IntegrityError(f"{self._file.where}: has {self._file.facts.size} bytes, {self._size} are published")
        return view, False

    def close(self) -> None:
        """Give the connection back."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _Open:
    """A file that is open already, and is closed by who opened it."""

    def __init__(self, where: str, reader: BlockReader) -> None:
        self._where = where
        self._reader = reader

    def __str__(self) -> str:
        return self._where

    def open(self) -> "_Open":
        """See `Openable`."""
        return self

    def read(self, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        """See `BlockReader`."""
        return self._reader.read(buffer, begin, end)

    def close(self) -> None:
        """Nothing: it is read on."""
