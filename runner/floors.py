"""What this machine can do at best, measured on a checkpoint's own bytes: reading memory, reading its disk.

No run can be faster than the bytes that it needs at these rates. This file must not know tensors' meaning.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from runner import kernels
from runner.contents import Contents
from runner.layout import Layout
from runner.memory import Region
from runner.policy import Key
from runner.reading import Direct, Files, Mapped

_DISK_BYTES = 1 << 30
_ROUNDS = 3


def memory_read_gbps(tensors: Iterable[Tensor]) -> float | None:
    """GB/s of reading these tensors and doing nothing with them; None without compiled products.

    Args:
        tensors: In memory already; together larger than any cache, or the rate is a cache's.
    """
    compiled = kernels.active()
    found = [tensor for tensor in tensors if tensor.nbytes >= 1 << 20]
    if compiled is None or not found:
        return None
    size = sum(tensor.nbytes for tensor in found)

    def read() -> None:
        for tensor in found:
            compiled.read(tensor)

    return size / _median_s(read) / 1e9


def anonymous_read_gbps(size: int) -> float | None:
    """GB/s of reading so many bytes of new memory in huge pages; None without compiled products."""
    region = Region(size)
    tensor = torch.frombuffer(region.bytes(0, size), dtype=torch.uint8)
    tensor.fill_(1)
    return memory_read_gbps([tensor])


def disk_read_gbps(
    contents: Contents, experts: Sequence[Key], *, way: type[Direct] | type[Mapped] = Direct
) -> float | None:
    """GB/s of bringing experts in that are not in the page cache; None when there are none, or they are on a server.

    Args:
        contents: The checkpoint.
        experts: To choose from, about a gigabyte of them, far apart.
        way: How they come in.
    """
    files = contents.open_files()
    if not isinstance(files, Files):
        return None
    chosen = way(files)
    layouts: list[Layout] = []
    for key in experts[:: max(1, len(experts) // 64)]:
        layouts.append(contents.expert(key, chosen.alignment))
        if sum(layout.needed_bytes for layout in layouts) >= _DISK_BYTES:
            break
    if not layouts:
        return None
    largest = -(-max(layout.size for layout in layouts) // chosen.alignment) * chosen.alignment
    region = Region(largest * files.loads_at_once)

    def read(thread: int) -> None:
        for layout in layouts[thread :: files.loads_at_once]:
            chosen.load(layout, region, thread * largest)
            chosen.unload(layout, region, thread * largest)

    def read_all() -> None:
        list(threads.map(read, range(files.loads_at_once)))

    for layout in layouts:
        files.forget(layout)
    with ThreadPoolExecutor(files.loads_at_once) as threads:
        read_all()  # the first touch of memory is not the disk's
        return sum(layout.needed_bytes for layout in layouts) / _median_s(read_all) / 1e9


def _median_s(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
