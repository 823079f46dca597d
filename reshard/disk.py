"""How fast disks, servers and processor are here: what `forecast` computes from, and what `run` compares itself with.

Disks are measured as a run uses them: in its blocks, past the page cache where the file system allows. Only what says
so writes, and it removes what it wrote. Knows files and folders; it must not know checkpoints.
"""

import hashlib
import os
import statistics
import time
from contextlib import closing
from pathlib import Path

from reshard.blocks import BLOCK_BYTES, Reader, Writer, aligned_buffer
from reshard.openable import Openable

SAMPLE_BYTES = 256 << 20
READ_SECONDS = 0.5
ARRIVAL_SECONDS = 1.5
WRITE_SECONDS = 0.7
HASH_SECONDS = 0.15
FSYNCS = 9

SYNC_BLOCKS = 8
"""Blocks between two fsyncs of the write test, about one expert's: without them a cache would be measured."""


def measure_read_rate(path: Path, *, sample_bytes: int = SAMPLE_BYTES) -> float | None:
    """Bytes per second of reading a file from its start; holes of a sparse file are passed over.

    Returns:
        None when the file holds too little data to tell.

    Raises:
        ToolkitError: It cannot be read.
    """
    size = path.stat().st_size
    buffer = aligned_buffer(BLOCK_BYTES)
    position = done = 0
    seconds = 0.0
    with closing(Reader(path)) as reader:
        while position < size and done < sample_bytes and seconds < READ_SECONDS:
            began = time.perf_counter()
            data, is_hole = reader.read(buffer, position, size)
            position += len(data)
            if not is_hole:
                seconds += time.perf_counter() - began
                done += len(data)
    return done / seconds if done >= BLOCK_BYTES else None


def measure_arrival_rate(file: Openable, begin: int, end: int) -> float | None:
    """Bytes per second at which a range of a file, which is not empty, arrives from elsewhere: after the first block.

    Returns:
        None when it ends too early to tell.

    Raises:
        ToolkitError: It cannot be read.
    """
    buffer = aligned_buffer(BLOCK_BYTES)
    with closing(file.open()) as reader:
        data, _ = reader.read(buffer, begin, end)
        first = position = begin + len(data)
        began = time.perf_counter()
        while position < end and time.perf_counter() - began < ARRIVAL_SECONDS:
            data, _ = reader.read(buffer, position, end)
            position += len(data)
        seconds = time.perf_counter() - began
    return (position - first) / seconds if position - first >= BLOCK_BYTES else None


def measure_write_rate(folder: Path, *, most_bytes: int = SAMPLE_BYTES) -> float | None:
    """Bytes per second of writing a file into a folder and having it on disk; the file is removed again.

    Returns:
        None when so few bytes do not tell.

    Raises:
        ResourceError: The disk is full.
        ToolkitError: It cannot be written.
    """
    step = SYNC_BLOCKS * BLOCK_BYTES
    size = min(most_bytes, SAMPLE_BYTES) // step * step
    if not size:
        return None
    # Zeros might be stored as holes, or compressed away.
    buffer = aligned_buffer(BLOCK_BYTES)
    buffer[:] = os.urandom(BLOCK_BYTES)
    writer = Writer(folder / "write-rate", size)
    try:
        done, began = 0, time.perf_counter()
        while done < size and time.perf_counter() - began < WRITE_SECONDS:
            for _ in range(SYNC_BLOCKS):
                writer.write_pages(buffer, done)
                done += BLOCK_BYTES
            writer.sync()
        return done / (time.perf_counter() - began)
    finally:
        writer.abandon()


def measure_fsync_seconds(folder: Path) -> float:
    """What it takes to have one page on disk: the median of some; the file is removed again.

    Raises:
        ResourceError, ToolkitError: See `measure_write_rate`.
    """
    writer = Writer(folder / "fsync")
    try:
        taken = []
        for number in range(FSYNCS):
            writer.write(os.urandom(4096), number * 4096)
            began = time.perf_counter()
            writer.sync()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken)
    finally:
        writer.abandon()


def measure_hash_rate() -> float:
    """Bytes per second of sha256 on one core."""
    data = bytes(1 << 20)
    hasher = hashlib.sha256()
    done, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < HASH_SECONDS:
        hasher.update(data)
        done += len(data)
    return done / seconds
