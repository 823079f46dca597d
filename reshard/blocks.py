"""Reading a byte range in blocks, writing a whole file safely: the only place where payload meets the disk.

Both go past the page cache (O_DIRECT) where the file system allows: a third of the processor time, no other program's
cache evicted, and no flood of dirty pages at the end. Everything else is buffered: small files, and the ends of ranges
that do not fill a page. Holes of a sparse file are found by asking for them and are not read.
"""

import ctypes
import errno
import mmap
import os
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from manifests.errors import IntegrityError, ResourceError, ToolkitError
from manifests.paths import TEMP_SUFFIX

BLOCK_BYTES = 4 << 20
"""What is read and written at once; larger gains nothing, smaller loses to the latency of each request."""

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

WRITES_AT_ONCE = 3
"""Of one stream: with one, the disk has nothing to write between the end of a write and the begin of the next."""

ALIGN_BYTES = max(4096, mmap.PAGESIZE)
"""O_DIRECT wants offsets, lengths and memory in whole pages; and no page may be written in both ways."""

DIRECT_MIN_BYTES = 1 << 20
"""Smaller files and ranges are buffered: the cache collects them, and one request each would cost more."""

_ZEROS = memoryview(bytes(BLOCK_BYTES))


def new_block() -> memoryview:
    """Memory for one block."""
    return aligned_buffer(BLOCK_BYTES)


def aligned_buffer(size: int) -> memoryview:
    """Page-aligned memory for O_DIRECT, in huge pages where the system has them."""
    # Private: shared memory, which is the default, gets no huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class Reader:
    """One open file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._buffer = memoryview(b"")
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise open_error(path, error) from error
        found = os.fstat(self._descriptor)
        self._has_holes = found.st_blocks * 512 < found.st_size
        try:
            self._direct = _open_direct(path, os.O_RDONLY) if found.st_size >= DIRECT_MIN_BYTES else None
        except OSError as error:
            os.close(self._descriptor)
            raise open_error(path, error) from error

    def close(self) -> None:
        """Close the file."""
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
        os.close(self._descriptor)

    def blocks(self, begin: int, size: int) -> Iterator[memoryview]:
        """Yield the bytes of a range, at most a block at a time. A block is valid until the next is asked for.

        Raises:
            IntegrityError: The file ends before the range does.
            ToolkitError: The disk reports an error.
        """
        wanted = min(size + 2 * ALIGN_BYTES, BLOCK_BYTES)
        if len(self._buffer) < wanted:
            # Most files of a small checkpoint are smaller than a block, and touching one takes as long as reading it.
            self._buffer = aligned_buffer(wanted)
        end = begin + size
        while begin < end:
            block, _ = self.read(self._buffer, begin, end)
            yield block
            begin += len(block)

    def read(self, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        """Read the next bytes of a range into a page-aligned buffer, as many as one request gives.

        Returns:
            The bytes from begin on, at least one, and whether they are a hole (zeros that take no space). They lie in
            the buffer, not always at its start.

        Raises:
            IntegrityError, ToolkitError: See `blocks`.
        """
        try:
            if self._has_holes:
                hole, end = self._find_hole(begin, end)
                if hole:
                    return _ZEROS[: min(hole, BLOCK_BYTES)], True
            if self._direct is not None and end - begin >= ALIGN_BYTES:
                lead = begin % ALIGN_BYTES
                length = min(len(buffer) // ALIGN_BYTES * ALIGN_BYTES, _round_up(lead + end - begin))
                count = self._read_direct(self._direct, buffer[:length], begin - lead)
                if count > lead:
                    return buffer[lead : min(count, lead + end - begin)], False
            view = buffer[: end - begin]
            count = os.preadv(self._descriptor, [view], begin)
        except OSError as error:
            raise ToolkitError(f"{self._path}: cannot be read at byte {begin}: {error.strerror}") from error
        if count == 0:
            raise IntegrityError(f"{self._path}: ends at byte {begin}, expected {end}; it was cut while in use")
        return view[:count], False

    def _read_direct(self, descriptor: int, view: memoryview, offset: int) -> int:
        try:
            return os.preadv(descriptor, [view], offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # Opened so, but not read so: some file systems say it late.
            os.close(descriptor)
            self._direct = None
            return 0

    def _find_hole(self, begin: int, end: int) -> tuple[int, int]:
        """How many bytes from begin on are a hole; and where the data at begin ends, at most at end."""
        try:
            data = os.lseek(self._descriptor, begin, os.SEEK_DATA)
            if data > begin:
                return min(data, end) - begin, end
            return 0, min(end, os.lseek(self._descriptor, begin, os.SEEK_HOLE))
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            # No data from here on: a hole up to the end of the file, if that is not before begin.
            return max(0, min(end, os.fstat(self._descriptor).st_size) - begin), end


class Writer:
    """One output file under a temporary name; it gets its own name only when all of it is on disk."""

    def __init__(self, path: Path, size: int = 0, *, adopt: bool = False) -> None:
        """Create the file, or open what an interrupted run left of it.

        Args:
            path: Where the finished file will stand.
            size: Its size in bytes where known: what is then never written is a hole.
            adopt: Whether to go on with the temporary file that is there.
        """
        self.path = path
        self.keeps_holes = size > 0 and not adopt
        """Whether what is not written reads as zeros, so that a hole need not be written."""
        self._temporary = temporary_path(path)
        self._is_open = False
        self._lock = threading.Lock()
        self._direct: int | None = None
        self._may_be_direct = True
        self._sync_failure: OSError | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY if adopt else os.O_WRONLY | os.O_CREAT | os.O_EXCL
            self._descriptor = os.open(self._temporary, flags, 0o644)
        except OSError as error:
            raise write_error(self._temporary, error) from error
        self._is_open = True
        if size and not adopt:
            try:
                os.ftruncate(self._descriptor, size)
            except OSError as error:
                self.abandon()
                raise write_error(self._temporary, error) from error

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Put data at an offset, through the page cache.

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

    def write_pages(self, view: memoryview, offset: int) -> None:
        """Put whole pages of page-aligned memory at a page-aligned offset, past the page cache where possible.

        Raises:
            ResourceError, ToolkitError: See `write`.
        """
        while view and len(view) % ALIGN_BYTES == 0:
            try:
                direct = self._find_direct()
                if direct is None:
                    break
                count = os.pwrite(direct, view, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise write_error(self.path, error) from error
                self._may_be_direct = False
                break
            view, offset = view[count:], offset + count
        # All of it where O_DIRECT is not to be had; else what a short write left unaligned.
        self.write(view, offset)

    def _find_direct(self) -> int | None:
        """The descriptor that goes past the page cache, opened when it is first needed."""
        with self._lock:  # two shards of one file come on two threads
            if self._direct is None and self._may_be_direct:
                self._direct = _open_direct(self._temporary, os.O_WRONLY)
                self._may_be_direct = self._direct is not None
            return self._direct if self._may_be_direct else None

    def sync(self) -> None:
        """Make durable what was written so far. A failure is final: the kernel may have dropped the pages."""
        # Asked again, the kernel would say that all is well: it has forgotten the pages that it could not write.
        if self._sync_failure is not None:
            raise write_error(self.path, self._sync_failure) from self._sync_failure
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._sync_failure = error
            raise write_error(self.path, error) from error

    def finish(self) -> None:
        """Make the bytes durable and give the file its name. The folder is the caller's to sync."""
        self.sync()
        try:
            self.close()
            os.rename(self._temporary, self.path)
        except OSError as error:
            raise write_error(self.path, error) from error

    def abandon(self) -> None:
        """Close and remove what was written."""
        self.close()
        self._temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Close, and leave the temporary file as it is."""
        # Closed once only: another thread may have been given the same number since.
        if self._is_open:
            self._is_open = False
            if self._direct is not None:
                os.close(self._direct)
                self._direct = None
            os.close(self._descriptor)


class PageWriter:
    """Collects what arrives in file order, so that it is written in large runs of whole pages.

    One at a time, of one file: whatever does not follow the bytes before begins a new run.
    """

    def __init__(self, later: Callable[[Callable[[], None]], None] | None = None) -> None:
        """Begin with nothing.

        Args:
            later: Makes each write, in any order, while the next bytes are collected; at once when it is not given.
        """
        self._later = later or _at_once
        # So that one is filled while the others are written. Made when they are needed: a stream of small tensors
        # needs little of them.
        self._spare: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._unmade = WRITES_AT_ONCE + 1
        self._buffer = memoryview(b"")
        self._writer: Writer | None = None
        # The buffer holds bytes begin to end of the file; its first byte stands for the page that holds begin.
        self._begin = 0
        self._end = 0

    def put(self, writer: Writer, data: memoryview, offset: int) -> None:
        """Take the next bytes; what they fill is written."""
        if writer is not self._writer or offset != self._end:
            self.flush()
            self._writer, self._begin, self._end = writer, offset, offset
        while data:
            if not self._buffer:
                self._buffer = self._take_buffer()
            base = self._begin - self._begin % ALIGN_BYTES
            at = self._end - base
            count = min(len(data), len(self._buffer) - at)
            copy_bytes(data[:count], self._buffer[at : at + count])
            self._end += count
            data = data[count:]
            if self._end - base == len(self._buffer):
                self._write_out()

    def flush(self) -> None:
        """Write what is still held."""
        if self._writer is not None and self._end > self._begin:
            self._write_out()

    def _take_buffer(self) -> memoryview:
        if self._unmade and self._spare.empty():
            self._unmade -= 1
            return aligned_buffer(_round_up(BLOCK_BYTES))
        return self._spare.get()

    def _write_out(self) -> None:
        assert self._writer is not None
        writer, buffer, begin, end = self._writer, self._buffer, self._begin, self._end
        self._buffer, self._begin = memoryview(b""), end

        def write() -> None:
            try:
                _write_run(writer, buffer, begin, end)
            finally:
                self._spare.put(buffer)

        self._later(write)


def copy_bytes(data: memoryview, target: memoryview) -> None:
    """Copy bytes, and let the other threads go on meanwhile, which an assignment of slices does not."""
    if data.readonly:
        # The zeros of a hole, and what the compressor makes: Python gives no address for them.
        target[:] = data
    elif data:
        ctypes.memmove(_address(target), _address(data), len(data))


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _at_once(call: Callable[[], None]) -> None:
    call()


def _write_run(writer: Writer, buffer: memoryview, begin: int, end: int) -> None:
    """Write the bytes begin to end of a file from a buffer whose first byte stands for the page that holds begin."""
    base = begin - begin % ALIGN_BYTES
    first, last = _round_up(begin), end - end % ALIGN_BYTES
    if last - first < min(DIRECT_MIN_BYTES, BLOCK_BYTES):
        writer.write(buffer[begin - base : end - base], begin)
        return
    # A page that is not whole belongs to two runs, so both write their part of it through the cache.
    writer.write(buffer[begin - base : first - base], begin)
    writer.write_pages(buffer[first - base : last - base], first)
    writer.write(buffer[last - base : end - base], last)


def data_bytes(path: Path) -> int:
    """Bytes of a file that are not holes: what a copy of it takes on disk."""
    found = os.stat(path)
    if found.st_blocks * 512 >= found.st_size:
        return found.st_size
    total = end = 0
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while end < found.st_size:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            total += end - begin
    except OSError as error:
        if error.errno != errno.ENXIO:  # nothing but a hole behind
            raise
    finally:
        os.close(descriptor)
    return total


def temporary_path(path: Path) -> Path:
    """Where a file stands until all of it is on disk."""
    return path.with_name(path.name + TEMP_SUFFIX)


def open_error(path: Path, error: OSError) -> ToolkitError:
    """The sentence for a file that cannot be opened to be read. Even that can need space: on layered file systems."""
    if error.errno in NO_SPACE:
        return ResourceError(f"{path}: cannot be opened: {error.strerror}")
    return _too_many(path, error) or ToolkitError(f"{path}: cannot be opened: {error.strerror}")


def write_error(path: Path, error: OSError) -> ToolkitError:
    """The sentence for a failed write."""
    if error.errno in NO_SPACE:
        return ResourceError(f"{path}: no space left to write it ({error.strerror}); free some and run again")
    return _too_many(path, error) or ToolkitError(f"{path}: cannot be written: {error.strerror}")


def _too_many(path: Path, error: OSError) -> ToolkitError | None:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return ResourceError(f"{path}: too many files are open; allow more (ulimit -n) or take fewer --jobs")
    return None


def _open_direct(path: Path, flags: int) -> int | None:
    """A descriptor that goes past the page cache, or None where there is no such thing."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, flags | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
            return None
        raise


def _round_up(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES
