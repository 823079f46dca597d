"""How fast this disk reads, measured on the source's own bytes, for `plan`'s estimate of time."""

import errno
import mmap
import os
import time
from pathlib import Path

SAMPLE_BYTES = 256 << 20
SAMPLE_SECONDS = 0.5
_BLOCK_BYTES = 8 << 20


def measure_read_rate(path: Path) -> float | None:
    """Bytes per second of reading from the start of a file, past the page cache where the file system allows.

    Returns:
        None when the file is too small to tell.
    """
    size = min(path.stat().st_size, SAMPLE_BYTES)
    if size < _BLOCK_BYTES:
        return None
    # O_DIRECT wants page-aligned memory, which an anonymous mapping is.
    with mmap.mmap(-1, _BLOCK_BYTES) as buffer:
        try:
            return _read(path, os.O_RDONLY | os.O_DIRECT, buffer, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return _read(path, os.O_RDONLY, buffer, size)


def _read(path: Path, flags: int, buffer: mmap.mmap, size: int) -> float:
    descriptor = os.open(path, flags)
    try:
        done, started = 0, time.perf_counter()
        while done + _BLOCK_BYTES <= size and time.perf_counter() - started < SAMPLE_SECONDS:
            done += os.preadv(descriptor, [buffer], done)
        return done / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
