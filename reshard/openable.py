"""Files that are read block by block, wherever they lie: what a stream, a proof or a copy takes its bytes from.

A file is opened by whoever reads it, and closed when another one's turn comes. Knows files of this machine; those of a
server (`reshard.web`) take the same form.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from manifests.errors import ToolkitError
from reshard.archive import UnpackingReader
from reshard.blocks import Reader, temporary_path


class BlockReader(Protocol):
    """An open file."""

    def read(self, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        """Give the next bytes of a range, at least one, and whether they are a hole; see `reshard.blocks.Reader`."""

    def close(self) -> None:
        """Close it."""


class Openable(Protocol):
    """A file that can be opened; as text it is its name for messages. Two that are equal are one file."""

    def open(self) -> BlockReader:
        """Open it.

        Raises:
            ToolkitError: It cannot be opened.
        """


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> Reader:
        """See `Openable`."""
        return Reader(self.path)


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A compressed file of this machine, read as if it were not, and the bytes that it unpacks to."""

    path: Path
    unpacked_size: int

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> UnpackingReader:
        """See `Openable`."""
        return UnpackingReader(self.path, self.unpacked_size)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file that is being written: it may get its own name at any time."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def open(self) -> Reader:
        """See `Openable`."""
        # In this order: it is renamed from the one to the other, so it is found under one of them.
        try:
            return Reader(temporary_path(self.path))
        except ToolkitError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        return Reader(self.path)


def read_blocks(reader: BlockReader, buffer: memoryview, begin: int, size: int) -> Iterator[memoryview]:
    """The bytes of a range, a block at a time, each valid until the next is asked for.

    Raises:
        IntegrityError, ToolkitError: See `reshard.blocks.Reader.read`.
    """
    end = begin + size
    while begin < end:
        block, _ = reader.read(buffer, begin, end)
        yield block
        begin += len(block)
