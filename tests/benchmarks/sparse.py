"""A checkpoint of any size as sparse files: real headers, holes for payload, and random patches in the payload.

Patches lie at both ends of every shard, across the borders of tensors and inside of them, so that a byte that is read
from a wrong place, or written to one, is seen. Comparing asks the file system for holes and reads only what is data
on either side: whole files are compared, whatever their size.

It knows files and holes; it must not know how a checkpoint is resharded.
"""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

from layouts import Layout, ShardLayout

from manifests.header import HeaderTensor
from manifests.paths import INDEX_NAME

PAGE_BYTES = 4096
EDGE_BYTES = 512
"""At least so much of a tensor's end and of its neighbour's start is random."""

INNER_BYTES = 64 << 10
"""Length of a patch inside of a tensor and at the ends of a file."""

_POOL_BYTES = 16 << 20
_COMPARE_BYTES = 4 << 20


def write_sparse(folder: Path, layout: Layout, *, random_bytes: int) -> None:
    """Write config.json, a tokenizer.json, the index and all shards into an existing folder.

    Args:
        folder: Where to.
        layout: What.
        random_bytes: Bytes of all patches together; the same number gives the same files.
    """
    (folder / "config.json").write_text(json.dumps(layout.config, indent=2), encoding="utf-8")
    tokens = {f"token-{number}": number for number in range(1000)}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": {"vocab": tokens}}), encoding="utf-8")
    (folder / INDEX_NAME).write_bytes(layout.index)
    # Patches are cut from one pool at random places: making each anew would take longer than writing it.
    pool = memoryview(random.Random("patches").randbytes(_POOL_BYTES))
    for shard in layout.shards:
        chance = random.Random(shard.name)
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.size)
            for begin, end in choose_patches(shard, random_bytes * shard.size // layout.size):
                for offset in range(begin, end, INNER_BYTES):
                    start = chance.randrange(_POOL_BYTES - INNER_BYTES)
                    length = min(end - offset, INNER_BYTES)
                    os.pwrite(file.fileno(), pool[start : start + length], offset)
            os.pwrite(file.fileno(), shard.header, 0)


def choose_patches(shard: ShardLayout, budget: int) -> list[tuple[int, int]]:
    """Ranges of whole pages of one shard that are to be random: apart, in order, of `budget` bytes at most.

    The two ends come always; then borders of tensors for up to three quarters of the budget, which are all borders
    where it is 6 MB for DeepSeek's 586 tensors; the rest lies inside of large tensors.
    """
    chance = random.Random(f"{shard.name} {budget}")
    start = len(shard.header)
    pages = {*_pages(start, start + INNER_BYTES), *_pages(shard.size - INNER_BYTES, shard.size)}
    pages = {page for page in pages if 0 <= page * PAGE_BYTES < shard.size}
    borders = [start + tensor.begin for tensor in shard.tensors[1:]]
    chance.shuffle(borders)
    for border in borders:
        edge = {*_pages(border - EDGE_BYTES, border + EDGE_BYTES)}
        if len(pages | edge) * PAGE_BYTES > budget * 3 // 4:
            break
        pages |= edge
    large = [tensor for tensor in shard.tensors if tensor.end - tensor.begin > 4 * INNER_BYTES]
    # Patches may overlap, so the number of tries is bounded, not the number of pages.
    for _ in range(max(0, budget // INNER_BYTES) if large else 0):
        begin = start + _random_place(chance, large)
        inner = {*_pages(begin, begin + INNER_BYTES)}
        if len(pages | inner) * PAGE_BYTES > budget:
            break
        pages |= inner
    return _merge(sorted(pages), shard.size)


def first_difference(left: Path, right: Path) -> int | None:
    """The first byte at which two files differ; None when they are equal. Holes are zeros and are not read."""
    with left.open("rb") as one, right.open("rb") as other:
        sizes = os.fstat(one.fileno()).st_size, os.fstat(other.fileno()).st_size
        found = first_difference_in(one.fileno(), 0, other.fileno(), 0, min(sizes))
    return min(sizes) if found is None and sizes[0] != sizes[1] else found


def first_difference_in(left: int, left_offset: int, right: int, right_offset: int, size: int) -> int | None:
    """The same for ranges of two open files; counted from the start of the ranges."""
    position = 0
    while position < size:
        ends = []
        starts = []
        for descriptor, offset in ((left, left_offset), (right, right_offset)):
            begin, end = _next_data(descriptor, offset + position)
            starts.append(begin - offset)
            ends.append(end - offset)
        position = min(starts)
        # Up to the next border of either side's data: what is then read is data on one side at least.
        end = min(size, position + _COMPARE_BYTES, *(border for border in starts + ends if border > position))
        if position >= size:
            return None
        ours = os.pread(left, end - position, left_offset + position)
        theirs = os.pread(right, end - position, right_offset + position)
        if ours != theirs or len(ours) != end - position:
            length = min(len(ours), len(theirs))
            return position + next((i for i in range(length) if ours[i] != theirs[i]), length)
        position = end
    return None


def allocated_bytes(*folders: Path) -> int:
    """What all files below some folders take on the disk, holes left out, a file under two names counted once.

    Files may come, go and be renamed meanwhile.
    """
    blocks: dict[tuple[int, int], int] = {}
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                try:
                    found = os.lstat(os.path.join(parent, name))
                except FileNotFoundError:
                    continue
                blocks[found.st_dev, found.st_ino] = found.st_blocks
    return 512 * sum(blocks.values())


def _next_data(descriptor: int, offset: int) -> tuple[int, int]:
    """The next range of data at or behind an offset; past all ends where there is none."""
    try:
        begin = os.lseek(descriptor, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return 1 << 62, 1 << 62
    return begin, os.lseek(descriptor, begin, os.SEEK_HOLE)


def _random_place(chance: random.Random, tensors: list[HeaderTensor]) -> int:
    tensor = chance.choice(tensors)
    return chance.randrange(tensor.begin, tensor.end - INNER_BYTES)


def _pages(begin: int, end: int) -> range:
    """Numbers of the pages that a range touches."""
    return range(begin // PAGE_BYTES, -(-end // PAGE_BYTES))


def _merge(pages: list[int], size: int) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for page in pages:
        begin, end = page * PAGE_BYTES, min(size, (page + 1) * PAGE_BYTES)
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = ranges[-1][0], end
        else:
            ranges.append((begin, end))
    return ranges
