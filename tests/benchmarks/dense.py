"""A checkpoint whose payload is all random, so that nothing between us and the disk can shorten it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from layouts import Layout
from raw_copy import PAGE_BYTES, ring

from manifests.paths import INDEX_NAME

_BLOCK_BYTES = 64 << 20


def write_dense(folder: Path, layout: Layout) -> None:
    """Write config.json, the index and all shards into an existing folder, past the page cache, fsynced."""
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2), encoding="utf-8")
    (folder / INDEX_NAME).write_bytes(layout.index)
    (block,) = ring(1, _BLOCK_BYTES)
    block[:] = os.urandom(_BLOCK_BYTES)
    number = 0
    for shard in layout.shards:
        descriptor = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o644)
        try:
            for offset in range(0, shard.size, _BLOCK_BYTES):
                length = min(_BLOCK_BYTES, -(-(shard.size - offset) // PAGE_BYTES) * PAGE_BYTES)
                # Every page says where it is: no two blocks are the same, and no misplaced page is.
                for page in range(0, length, PAGE_BYTES):
                    block[page : page + 8] = number.to_bytes(8, "little")
                    number += 1
                write_all(descriptor, block[:length], offset)
            os.ftruncate(descriptor, shard.size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with (folder / shard.name).open("r+b") as file:
            file.write(shard.header)
            file.flush()
            os.fsync(file.fileno())


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of data; the system may take less at a time."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
