"""Freeing a source as it is used up: what may be freed, and how much disk is taken at the worst moment.

Files are freed whole and never before what replaces them is durable, hashed and journalled; a shard's sha256 is known
only when all of it was read, so nothing is gained by freeing parts of one.
"""

import heapq
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import ToolkitError
from manifests.storage import sync_folder
from reshard.filesystem import existing_folder
from reshard.plan import Plan


def check_consumable(root: Path, names: Collection[str]) -> None:
    """Refuse files that are not this folder's alone: freeing them would free nothing, or take them from others.

    Raises:
        ToolkitError: A file is a link, lies behind one, or has a second name; or nothing can be removed here.
    """
    real_root = Path(os.path.realpath(root))
    for folder in sorted({(root / name).parent for name in names}):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ToolkitError(f"{folder}: no file can be removed from it, which --consume would do; run without it")
    for name in names:
        path = root / name
        if Path(os.path.realpath(path)) != real_root / name:
            raise ToolkitError(
                f"{path}: is a link, as in a hub's cache, whose files other folders share; --consume frees only files "
                "that lie in the folder itself, run without it"
            )
        if path.stat().st_nlink > 1:
            raise ToolkitError(
                f"{path}: has {path.stat().st_nlink} names (hard links), so freeing it would free no space; "
                "remove the others, or run without --consume"
            )


def same_disk(source: Path, destination: Path) -> bool:
    """Whether what is freed in one folder is free for the other. The destination need not exist yet."""
    return os.stat(source).st_dev == os.stat(existing_folder(destination)).st_dev


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One shard's part in the disk that is taken.

    Attributes:
        written: Bytes that are written for it.
        freed: Bytes that are freed when it and all shards before it are done.
        held: Bytes that cannot be freed while it alone is under way.
    """

    written: int
    freed: int
    held: int


def peak_bytes(steps: Iterable[Step], jobs: int) -> int:
    """The most that is taken at once beyond what was there before.

    Shards are begun in order, but a slow one may be under way while many after it are done: with several jobs, the
    shards that free most are taken for slow.
    """
    taken = peak = 0
    slow: list[int] = []
    for step in steps:
        taken += step.written
        peak = max(peak, taken + sum(slow))
        taken -= step.freed
        slow = heapq.nlargest(jobs - 1, [*slow, step.held])
    return peak


def reshard_steps(plan: Plan, shard_bytes: Mapping[str, int]) -> list[Step]:
    """What a resharding that consumes its source writes and frees, shard by shard."""
    written: dict[str, int] = defaultdict(int)
    order = {shard: number for number, shard in enumerate(shard_bytes)}
    for file in plan.files:
        written[min((tensor.shard for tensor in file.tensors), key=order.__getitem__)] += file.header_size
        for tensor in file.tensors:
            written[tensor.shard] += tensor.size
    return [Step(written=written[shard], freed=size, held=size) for shard, size in shard_bytes.items()]


def restore_steps(shards: Sequence[tuple[int, Collection[str]]], file_bytes: Mapping[str, int]) -> list[Step]:
    """What a restore that consumes the resharded files writes and frees, shard by shard.

    Args:
        shards: Size in bytes of each, and the files that it needs.
        file_bytes: Size of each file.
    """
    freed_by = last_users([files for _, files in shards])
    return [
        Step(
            written=size,
            freed=sum(file_bytes[file] for file in freed),
            held=sum(file_bytes[file] for file in files),
        )
        for (size, files), freed in zip(shards, freed_by, strict=True)
    ]


def last_users(needs: Sequence[Iterable[str]]) -> list[list[str]]:
    """For each step the files that no later step needs."""
    last: dict[str, int] = {}
    for number, files in enumerate(needs):
        for file in files:
            last[file] = number
    freed: list[list[str]] = [[] for _ in needs]
    for file, number in last.items():
        freed[number].append(file)
    return freed


def free_file(path: Path) -> None:
    """Remove a file durably; one that is gone already is fine."""
    path.unlink(missing_ok=True)
    sync_folder(path.parent)
