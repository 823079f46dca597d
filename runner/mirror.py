"""One file of a checkpoint on a server, as far as its bytes are here: a sparse file with every byte at its own offset.

Behind the bytes, at the next page, stands a table with an entry for each piece: its begin, its end, whether every token
needs it, the Unix time when it was last used, 0 while it is not here, and a check of all of these. A piece is written
and durable before its entry says so, and its entry is durably 0 before it is freed: what a crash leaves is never taken
for the server's bytes, nor is what a damaged entry speaks of. Whoever uses pieces holds a shared lock of their entries,
whoever writes or frees them an exclusive one. This file knows bytes and pieces; it must not know servers.
"""

import errno
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

from runner import filesystem
from runner.layout import PAGE_BYTES
from runner.pieces import Piece
from runner.reading import open_for_reading

MAGIC = b"xprtmir2"
TEMP_SUFFIX = ".new"

_ENTRY = struct.Struct("<qqIIII")
"""Begin, end, whether it is dense, 0, and in one word, as somebody may read while it is written: used, check."""

_CHECKED = struct.Struct("<qqII")
_LATEST = (1 << 32) - 1
_FOOTER = struct.Struct("<8sqq")
_BLOCK_ENTRIES = 340
"""Extents that a block of a file system's own tables holds: a file of more pieces may take another."""


class Entry(NamedTuple):
    """What the table says of a piece; `used` is 0 while it is not here, or its check is wrong."""

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
        self._size = size
        self._table = _up(size)
        self._entries = entries

    @classmethod
    def open(cls, path: Path) -> Self | None:
        """The mirror that is there; None when what is there is none.

        Raises:
            FileNotFoundError: Nothing is there.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None  # a link, which nobody here made
            raise
        try:
            found_there = os.fstat(descriptor)
            if not stat.S_ISREG(found_there.st_mode):
                return None
            end = found_there.st_size
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
        temporary = path.with_name(temporary_name())
        table = b"".join(_pack(Entry(piece.begin, piece.end, piece.is_dense, 0)) for piece in pieces)
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
        return [
            Entry(begin, end, bool(is_dense), used if check == _check(begin, end, is_dense, used) else 0)
            for begin, end, is_dense, _, used, check in _ENTRY.iter_unpack(raw)
        ]

    def fits(self, pieces: Sequence[Piece]) -> bool:
        """Whether it has these pieces."""
        found = self.entries()
        return len(found) == len(pieces) and all(
            entry[:3] == (piece.begin, piece.end, piece.is_dense) for entry, piece in zip(found, pieces, strict=True)
        )

    @property
    def is_in_order(self) -> bool:
        """Whether no piece has a byte of another's or one outside the file: who frees it frees no other."""
        end = 0
        for entry in self.entries():
            if not end <= entry.begin < entry.end:
                return False
            end = entry.end
        return end <= self._size

    @property
    def identity(self) -> tuple[int, int]:
        """What no other file has that is there at the same time."""
        found = os.fstat(self.descriptor)
        return found.st_dev, found.st_ino

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
        # 0 says that it is not here, whatever a clock that was never set may show.
        now = max(1, min(now, _LATEST))
        found = self.entries(numbers)
        marked = [entry._replace(used=now) if entry.used or absent else entry for entry in found]
        if marked != found:
            raw = b"".join(map(_pack, marked))
            _write(self.descriptor, memoryview(raw), self._at(numbers.start))

    def write(self, view: memoryview, offset: int) -> None:
        """Put bytes of the server's file in their place; they count when `mark` says so, behind `sync`."""
        _write(self.descriptor, view, offset)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fdatasync(self.descriptor)

    def clear(self, numbers: range) -> int:
        """Give back the disk's room of pieces, of which this object holds an exclusive lock and no lock of others.

        Returns:
            What they took, as `kept_bytes` counts it.
        """
        entries = self.entries(numbers)
        raw = b"".join(_pack(entry._replace(used=0)) for entry in entries)
        _write(self.descriptor, memoryview(raw), self._at(numbers.start))
        # A power cut must not leave an entry that speaks of a hole.
        os.fdatasync(self.descriptor)
        # The pages that they shared with pieces that went before them go now, unless somebody is writing these.
        first, last = numbers.start, numbers.stop - 1
        table, begin, end = self.entries(), _down(entries[0].begin), _up(entries[-1].end)
        while first > 0 and table[first - 1].end > begin and self._is_free(first - 1):
            first -= 1
        while last + 1 < len(table) and table[last + 1].begin < end and self._is_free(last + 1):
            last += 1
        self.punch(range(first, last + 1))
        return kept_bytes(entries)

    def punch(self, numbers: range) -> None:
        """Free the bytes of pieces that are not here, of which an exclusive lock is held, but pages shared with others.

        Raises:
            OSError: The file system cannot.
        """
        table, first = self.entries(), numbers.start
        while first < numbers.stop:
            last = first
            while last + 1 < numbers.stop and table[last + 1].begin <= _up(table[last].end):
                last += 1
            begin, end = table[first].begin, table[last].end
            # Pages at the ends go too where no other piece has a part of them.
            if first == 0 or table[first - 1].end <= _down(begin):
                begin = _down(begin)
            if last + 1 == len(table) or table[last + 1].begin >= _up(end):
                end = _up(end)
            filesystem.punch(self.descriptor, begin, end - begin)
            first = last + 1

    def _is_free(self, number: int) -> bool:
        """Whether a piece is not here, and stays so as long as its lock is held, which it is then."""
        one = range(number, number + 1)
        return self.lock(one, filesystem.EXCLUSIVE, wait=False) and not self.entries(one)[0].used

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


def temporary_name() -> str:
    """A name for a file that is being written; numbers of processes are not theirs alone where there are containers."""
    return f"{secrets.token_hex(8)}{TEMP_SUFFIX}"


def own_bytes(entries: int) -> int:
    """What a mirror takes of a disk beside its pieces, at most: table, file system's tables, a part of its folder."""
    table = _up(entries * _ENTRY.size + _FOOTER.size)
    return table + (2 + entries // _BLOCK_ENTRIES) * PAGE_BYTES


def kept_bytes(entries: Sequence[Entry]) -> int:
    """What those pieces take that are here, at most."""
    return sum(entry.disk_bytes for entry in entries if entry.used)


def _pack(entry: Entry) -> bytes:
    return _ENTRY.pack(*entry[:3], 0, entry.used, _check(*entry))


def _check(begin: int, end: int, is_dense: int, used: int) -> int:
    return zlib.crc32(_CHECKED.pack(begin, end, is_dense, used)) if used else 0


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
