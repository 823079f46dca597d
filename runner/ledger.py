"""How many bytes the cache takes of its disk: one number, shared by all processes that use it.

Room is written down before it is taken and again when it was given back, so the number is never too low; what a killed
process had written down is found out by the next that is alone there. What is no number that was written here is
counted anew.
"""

import os
import struct
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from runner import filesystem

_NUMBER = struct.Struct("<qq")
"""The number, and all of its bits the other way round."""

_COUNT, _EVICTION, _USERS = 0, 1, 2
"""Bytes of the file that are locked: while the number changes, while somebody evicts, while a process is there."""


class Ledger:
    """The number, and who uses the cache.

    Args:
        path: Its file; made when there is none.
        count: Finds out what the cache takes, where that is not written down.
    """

    def __init__(self, path: Path, count: Callable[[], int]) -> None:
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        self._recount = count
        # Locks of one open file do not keep threads apart.
        self._counting, self._evicting = threading.Lock(), threading.Lock()
        filesystem.lock(self._descriptor, filesystem.SHARED, _USERS, 1)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Whether nobody else uses the cache; then nobody comes until this ends."""
        is_alone = filesystem.lock(self._descriptor, filesystem.EXCLUSIVE, _USERS, 1, wait=False)
        try:
            yield is_alone
        finally:
            filesystem.lock(self._descriptor, filesystem.SHARED, _USERS, 1)

    @property
    def bytes(self) -> int:
        """The number."""
        with self._locked(self._counting, _COUNT):
            return self._read()

    def take(self, size: int, bound: int | None) -> bool:
        """Write down so many bytes more, unless there would be more than the bound then; whether it was done."""
        with self._locked(self._counting, _COUNT):
            total = self._read() + size
            if bound is not None and total > bound:
                return False
            self._write(total)
            return True

    def give(self, size: int) -> None:
        """Write down so many bytes less."""
        with self._locked(self._counting, _COUNT):
            self._write(max(0, self._read() - size))

    def set(self, total: int) -> None:
        """Write down what was counted."""
        with self._locked(self._counting, _COUNT):
            self._write(total)

    @contextmanager
    def evicting(self) -> Iterator[None]:
        """One at a time, of all threads and processes."""
        with self._locked(self._evicting, _EVICTION):
            yield

    @contextmanager
    def _locked(self, own: threading.Lock, byte: int) -> Iterator[None]:
        with own:
            filesystem.lock(self._descriptor, filesystem.EXCLUSIVE, byte, 1)
            try:
                yield
            finally:
                filesystem.lock(self._descriptor, filesystem.FREE, byte, 1)

    def _read(self) -> int:
        raw = os.pread(self._descriptor, _NUMBER.size, 0)
        if len(raw) == _NUMBER.size:
            total, check = _NUMBER.unpack(raw)
            if total >= 0 and check == ~total:
                return int(total)
        return self._recount()

    def _write(self, total: int) -> None:
        os.pwrite(self._descriptor, _NUMBER.pack(total, ~total), 0)
