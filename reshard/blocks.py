"""Reading a byte range in blocks, writing a whole file safely: the only place where bytes meet the disk.

Memory is one block a worker, whatever the size of the files.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from manifests.errors import IntegrityError, ResourceError, ToolkitError
from manifests.storage import TEMP_SUFFIX

BLOCK_BYTES = 8 << 20


class Reader:
    """One open file and one buffer, reused for every block; it grows to what the largest range asks for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Most files of a small checkpoint are smaller than a block, and clearing one takes as long as reading it.
        self._buffer = memoryview(bytearray(0))
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise ToolkitError(f"{path}: cannot be opened: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def blocks(self, begin: int, size: int) -> Iterator[memoryview]:
        """Yield the bytes of a range, at most a block at a time. A block is valid until the next is asked for.

        Raises:
            IntegrityError: The file ends before the range does.
            ToolkitError: The disk reports an error.
        """
        if len(self._buffer) < min(size, BLOCK_BYTES):
            self._buffer = memoryview(bytearray(min(size, BLOCK_BYTES)))
        end = begin + size
        while begin < end:
            view = self._buffer[: min(BLOCK_BYTES, end - begin)]
            try:
                count = os.preadv(self._descriptor, [view], begin)
            except OSError as error:
                raise ToolkitError(f"{self._path}: cannot be read at byte {begin}: {error.strerror}") from error
            if count == 0:
                raise IntegrityError(f"{self._path}: ends at byte {begin}, expected {end}; it was cut while in use")
            yield view[:count]
            begin += count


class Writer:
    """One output file under a temporary name; it gets its own name only when all of it is on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + TEMP_SUFFIX)
        self._is_open = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except OSError as error:
            raise write_error(self._temporary, error) from error
        self._is_open = True

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Put data at an offset.

        Raises:
            ResourceError: The disk is full.
            ToolkitError: The disk reports another error.
        """
        view = memoryview(data)
        while view:
            try:
                count = os.pwrite(self._descriptor, view, offset)
            except OSError as error:
                raise write_error(self.path, error) from error
            view, offset = view[count:], offset + count

    def finish(self) -> None:
        """Make the bytes durable and give the file its name. The folder is the caller's to sync."""
        try:
            os.fsync(self._descriptor)
            self._close()
            os.rename(self._temporary, self.path)
        except OSError as error:
            raise write_error(self.path, error) from error

    def abandon(self) -> None:
        """Close and remove what was written."""
        self._close()
        self._temporary.unlink(missing_ok=True)

    def _close(self) -> None:
        # Closed once only: another thread may have been given the same number since.
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)


def write_error(path: Path, error: OSError) -> ToolkitError:
    """The sentence for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(f"{path}: no space left to write it ({error.strerror}); free some and run again")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{path}: too many files are open; allow more (ulimit -n) or take fewer --jobs")
    return ToolkitError(f"{path}: cannot be written: {error.strerror}")
