"""Copy files as fast as the disk can: one thread reads, one writes, both past the page cache. The limit to measure by.

    python raw_copy.py SOURCE_FOLDER DESTINATION_FOLDER

Nothing is hashed, nothing checked. Every copy is fsynced. The file system must allow O_DIRECT.
"""

from __future__ import annotations

import mmap
import os
import queue
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

PAGE_BYTES = 4096
BLOCK_BYTES = 8 << 20
BLOCKS = 6
"""More of them, or larger ones, gain nothing."""


class _Filled(NamedTuple):
    """The next bytes of a file, in a block of the ring; no bytes stand for the end of the file."""

    block: memoryview
    count: int
    target: Path


def copy(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Copy each first path to the second, which must not exist."""
    free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
    filled: queue.SimpleQueue[_Filled | None] = queue.SimpleQueue()
    failures: list[BaseException] = []
    for block in ring(BLOCKS, BLOCK_BYTES):
        free.put(block)
    writer = threading.Thread(target=_write, args=(filled, free, failures))
    writer.start()
    try:
        for source, target in pairs:
            _read(source, target, free, filled)
    finally:
        filled.put(None)
        writer.join()
    if failures:
        raise failures[0]


def ring(count: int, size: int) -> list[memoryview]:
    """Page-aligned blocks in huge pages, touched, so that no page is given by the host while time is taken."""
    memory = mmap.mmap(-1, count * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    for offset in range(0, count * size, PAGE_BYTES):
        view[offset] = 0
    return [view[index * size : (index + 1) * size] for index in range(count)]


def _read(
    source: Path, target: Path, free: queue.SimpleQueue[memoryview], filled: queue.SimpleQueue[_Filled | None]
) -> None:
    descriptor = os.open(source, os.O_RDONLY | os.O_DIRECT)
    try:
        size, offset, count = os.fstat(descriptor).st_size, 0, 1
        while count:
            block = free.get()
            # Asking at the end, which need not be a whole page, would be refused.
            count = os.preadv(descriptor, [block], offset) if offset < size else 0
            filled.put(_Filled(block, count, target))
            offset += count
    finally:
        os.close(descriptor)


def _write(
    filled: queue.SimpleQueue[_Filled | None], free: queue.SimpleQueue[memoryview], failures: list[BaseException]
) -> None:
    descriptor, offset = None, 0
    while (item := filled.get()) is not None:
        try:
            if failures:
                continue  # only hand the blocks back: the reader waits for them
            if descriptor is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT
                descriptor, offset = os.open(item.target, flags, 0o644), 0
            if item.count:
                _write_pages(descriptor, item.block[: -(-item.count // PAGE_BYTES) * PAGE_BYTES], offset)
                offset += item.count
            else:
                os.ftruncate(descriptor, offset)
                os.fsync(descriptor)
                os.close(descriptor)
                descriptor = None
        except OSError as error:
            failures.append(error)
        finally:
            free.put(item.block)


def _write_pages(descriptor: int, pages: memoryview, offset: int) -> None:
    while pages:
        count = os.pwrite(descriptor, pages, offset)
        pages, offset = pages[count:], offset + count


def _main() -> None:
    source, destination = map(Path, sys.argv[1:])
    destination.mkdir()
    copy([(path, destination / path.name) for path in sorted(source.glob("*.safetensors"))])


if __name__ == "__main__":
    _main()
