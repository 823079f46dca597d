"""One file of a checkpoint on a server, as far as its bytes are here: a sparse file with every byte at its own offset.

Behind the bytes, at the next page, stands a table with an entry for each piece: its begin, its end, whether every token
needs it, and the Unix time when it was last used, 0 while it is not here. A piece is written and durable before its
entry says so, and its entry is durably 0 before it is freed: what a crash leaves is never taken for the server's bytes.
Whoever uses pieces holds a shared lock of their entries, whoever writes or frees them an exclusive one. This file knows
bytes and pieces; it must not know servers.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple, Self

from runner import filesystem
from runner.layout import PAGE_BYTES
from runner.pieces import Piece
from runner.reading import open_for_reading

MAGIC = b"xprtmir1"
TEMP_SUFFIX = ".new"

_ENTRY = struct.Struct("<qqqq")
_FOOTER = struct.Struct("<8sqq")
_BLOCK_ENTRIES = 340
"""Extents that a block of a file system's own tables holds: a file of more pieces may take another."""

_temporary = count()


class Entry(NamedTuple):
    """What the table says of a piece; `used` is 0 while it is not here."""

    begin: int
    end: int
    is_dense: bool
    used: int

    @property
    def disk_bytes(self) -> int:
        """What it takes of a disk at most; see `pieces.disk_bytes`."""
        return _up(self.end) - _down(self.begin)


class Mirror:
    """The file, open.

    Args:
        path: Where it is.
        descriptor: Of it; taken over.
        size: Bytes of the file on the server.
        entries: How many pieces it has.

    Attributes:
        path: As given.
        descriptor: As given.
    """

    def __init__(self, path: Path, descriptor: int, size: int, entries: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._table = _up(size)
        self._entries = entries

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """The mirror that is there; None when what is there is none.

        Raises:
            FileNotFoundError: Nothing is there.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            end = os.fstat(descriptor).st_size
            footer = os.pread(descriptor, _FOOTER.size, max(0, end - _FOOTER.size))
            if len(footer) == _FOOTER.size:
                magic, size, entries = _FOOTER.unpack(footer)
                if magic == MAGIC and min(size, entries) >= 0 and _whole(size, entries) == end:
                    found = cls(path, descriptor, size, entries)
                    descriptor = -1
                    return found
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    @classmethod
    def create(cls, path: Path, size: int, pieces: Sequence[Piece]) -> bool:
        """Make an empty one, if there is none: others see a whole one or none; whether there was none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{os.getpid()}-{next(_temporary)}{TEMP_SUFFIX}")
        table = b"".join(_ENTRY.pack(piece.begin, piece.end, piece.is_dense, 0) for piece in pieces)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.ftruncate(descriptor, _whole(size, len(pieces)))
            _write(descriptor, memoryview(table + _FOOTER.pack(MAGIC, size, len(pieces))), _up(size))
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            os.close(descriptor)
            os.unlink(temporary)
        return True

    def close(self) -> None:
        """End its locks too."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def entries(self, numbers: range | None = None) -> list[Entry]:
        """What the table says of some pieces, or of all."""
        wanted = range(self._entries) if numbers is None else numbers
        raw = os.pread(self.descriptor, len(wanted) * _ENTRY.size, self._at(wanted.start))
        return [Entry(begin, end, bool(is_dense), used) for begin, end, is_dense, used in _ENTRY.iter_unpack(raw)]

    def fits(self, pieces: Sequence[Piece]) -> bool:
        """Whether it has these pieces."""
        found = self.entries()
        return len(found) == len(pieces) and all(
            entry[:3] == (piece.begin, piece.end, piece.is_dense) for entry, piece in zip(found, pieces, strict=True)
        )

    def lock(self, numbers: range, kind: int, *, wait: bool = True) -> bool:
        """Lock the entries of some pieces; see `filesystem.lock`."""
        begin = self._at(numbers.start)
        return filesystem.lock(self.descriptor, kind, begin, len(numbers) * _ENTRY.size, wait=wait)

    def mark(self, numbers: range, now: int, *, absent: bool) -> None:
        """Say that pieces were used now.

        Args:
            numbers: Of them; a shared lock of them is held, an exclusive one when `absent`.
            now: Unix time.
            absent: Also of those that were not here: their bytes are here now, and durable.
        """
        found = self.entries(numbers)
        marked = [entry._replace(used=now) if entry.used or absent else entry for entry in found]
        if marked != found:
            raw = b"".join(_ENTRY.pack(*entry) for entry in marked)
            _write(self.descriptor, memoryview(raw), self._at(numbers.start))

    def write(self, view: memoryview, offset: int) -> None:
        """Put bytes of the server's file in their place; they count when `mark` says so, behind `sync`."""
        _write(self.descriptor, view, offset)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self.descriptor)

    def clear(self, numbers: range) -> int:
        """Give back the disk's room of pieces, of which an exclusive lock is held.

        Returns:
            Bytes that are free now, at least.
        """
        raw = b"".join(_ENTRY.pack(*entry._replace(used=0)) for entry in self.entries(numbers))
        _write(self.descriptor, memoryview(raw), self._at(numbers.start))
        # A power cut must not leave an entry that speaks of a hole.
        os.fdatasync(self.descriptor)
        return self.punch(numbers)

    def punch(self, numbers: range) -> int:
        """Free the bytes of pieces that are not here, of which an exclusive lock is held; see `clear`."""
        table, freed, first = self.entries(), 0, numbers.start
        while first < numbers.stop:
            last = first
            while last + 1 < numbers.stop and table[last].end == table[last + 1].begin:
                last += 1
            begin, end = table[first].begin, table[last].end
            # Pages at the ends go too where no other piece has a part of them.
            if first == 0 or table[first - 1].end <= _down(begin):
                begin = _down(begin)
            if last + 1 == len(table) or table[last + 1].begin >= _up(end):
                end = _up(end)
            filesystem.punch(self.descriptor, begin, end - begin)
            freed += max(0, _down(end) - _up(begin))
            first = last + 1
        return freed

    @property
    def is_removed(self) -> bool:
        """Whether another process removed it since it was opened, as nothing was in it."""
        return os.fstat(self.descriptor).st_nlink == 0

    def remove(self) -> int:
        """Remove it if nothing is in it and nobody uses it; how many bytes that gave."""
        everything = range(self._entries)
        if not self.lock(everything, filesystem.EXCLUSIVE, wait=False) or kept_bytes(self.entries()):
            return 0
        self.path.unlink(missing_ok=True)
        return own_bytes(self._entries)

    @contextmanager
    def reader(self, *, direct: bool) -> Iterator[tuple[int, bool]]:
        """A descriptor to read this very file, and whether it reads past the system's cache."""
        # By its number, not its name: that may lead to another file by now.
        descriptor, is_direct = open_for_reading(Path(f"/proc/self/fd/{self.descriptor}"), direct=direct)
        try:
            yield descriptor, is_direct
        finally:
            os.close(descriptor)

    def allocated_bytes(self) -> int:
        """What it takes of the disk."""
        return os.fstat(self.descriptor).st_blocks * 512

    def _at(self, number: int) -> int:
        return self._table + number * _ENTRY.size


def own_bytes(entries: int) -> int:
    """What a mirror takes of a disk beside its pieces, at most: table, file system's tables, a part of its folder."""
    table = _up(entries * _ENTRY.size + _FOOTER.size)
    return table + (2 + entries // _BLOCK_ENTRIES) * PAGE_BYTES


def kept_bytes(entries: Sequence[Entry]) -> int:
    """What those pieces take that are here, at most."""
    return sum(entry.disk_bytes for entry in entries if entry.used)


def _whole(size: int, entries: int) -> int:
    return _up(size) + entries * _ENTRY.size + _FOOTER.size


def _up(value: int) -> int:
    return -(-value // PAGE_BYTES) * PAGE_BYTES


def _down(value: int) -> int:
    return value // PAGE_BYTES * PAGE_BYTES


def _write(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of it; the system may take less at a time."""
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done
