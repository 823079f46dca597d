"""What a disk asks of memory, and a file of Python that goes through `os` as it is now."""

from __future__ import annotations

import ctypes
import errno
import io
import os
from collections.abc import Sequence
from typing import Any

PAGE = 4096
real_lseek = os.lseek
"""Python asks for the position of each file that it opens; that is no business of the disk."""


class _PyBuffer(ctypes.Structure):
    _fields_ = (("buf", ctypes.c_void_p), ("rest", ctypes.c_byte * 120))


def address_of(data: Any) -> int:
    """Where the bytes of a buffer lie in memory, also of one that cannot be written."""
    found = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(found), 0)
    address = found.buf or 0
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))
    return address


class File(io.RawIOBase):
    """A file that reads and writes through `os` as it is now."""

    def __init__(self, descriptor: int, access: int) -> None:
        self._descriptor, self._access = descriptor, access

    def fileno(self) -> int:
        return self._descriptor

    def readable(self) -> bool:
        return self._access != os.O_WRONLY

    def writable(self) -> bool:
        return self._access != os.O_RDONLY

    def seekable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        data = os.read(self._descriptor, len(target))
        target[: len(data)] = data
        return len(data)

    def write(self, data: Any) -> int:
        return os.write(self._descriptor, data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return real_lseek(self._descriptor, offset, whence)

    def truncate(self, size: int | None = None) -> int:
        size = self.tell() if size is None else size
        os.ftruncate(self._descriptor, size)
        return size

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


def half(size: int, flags: int) -> int:
    """A part of a request that is neither all nor nothing where there is a choice; whole pages past the page cache."""
    if flags & os.O_DIRECT:
        return size // PAGE // 2 * PAGE or size
    return size // 2 or size


def front(buffers: Sequence[memoryview], size: int) -> list[memoryview]:
    """The first bytes of several buffers."""
    front = []
    for buffer in buffers:
        front.append(buffer[:size])
        size -= len(front[-1])
    return front


def require_pages(buffers: Sequence[Any], offset: int = 0) -> None:
    """Refuse what O_DIRECT refuses on the strictest disk."""
    for buffer in buffers:
        if address_of(buffer) % PAGE or len(memoryview(buffer).cast("B")) % PAGE or offset % PAGE:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
