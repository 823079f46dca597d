"""What a reshard will take, before anything happens: inodes, open files, time. Knows plans; it measures nothing.

Bytes are in `run.needed_bytes`, which the run itself asks for.
"""

import os
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from manifests.paths import INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME, TEMP_SUFFIX
from manifests.safety import resolve_inside
from reshard.documents import INDEX_PATH, header_paths
from reshard.plan import Plan
from reshard.source import SourceCheckpoint
from reshard.transfer import OTHER_OPEN_FILES

HASHES_PER_BYTE = 2
"""One for the tensor and one for the shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """How long a reshard takes, and what takes as long: ``the disk``, ``reading``, ``writing`` or ``hashing``."""

    seconds: float
    limit: str


def needed_inodes(source: SourceCheckpoint, plan: Plan) -> int:
    """Files and folders that a run makes in a new destination, itself included."""
    return len(made_paths(source, plan))


def missing_inodes(source: SourceCheckpoint, plan: Plan, destination: Path) -> int:
    """Those of them that an earlier run has not made yet. An unfinished file has its inode already."""
    there = set()
    for folder, _, names in os.walk(destination):
        below = os.path.relpath(folder, destination)
        there.add(below)
        there |= {os.path.normpath(f"{below}/{name.removesuffix(TEMP_SUFFIX)}") for name in names}
    return len(made_paths(source, plan) - there)


def made_paths(source: SourceCheckpoint, plan: Plan) -> set[str]:
    """Relative paths of all files and folders that a run makes."""
    files = {*(file.path for file in plan.files), *(file.path for file in source.auxiliary), *source.generated}
    files |= {*header_paths(source.shards).values(), INDEX_NAME, MANIFEST_NAME, JOURNAL_NAME}
    if source.index is not None:
        files.add(INDEX_PATH)
    nearest = {file.rpartition("/")[0] for file in files}
    folders = {str(above) for folder in nearest for above in (PurePosixPath(folder), *PurePosixPath(folder).parents)}
    return files | folders


def open_files(plan: Plan, jobs: int) -> int:
    """The most files that a run may have open, if no file of a shard is finished before all of them are begun."""
    begun: dict[str, set[str]] = defaultdict(set)
    for file in plan.files:
        for tensor in file.tensors:
            begun[tensor.shard].add(file.path)
    # Each of them twice: past the cache and through it.
    return 2 * jobs * max(map(len, begun.values()), default=0) + OTHER_OPEN_FILES


def hole_bytes(source: SourceCheckpoint, shards: Collection[str] | None = None) -> int:
    """Bytes of the source's shards that are holes; of these shards alone when they are given."""
    names = source.shards if shards is None else shards
    return sum(source.place.hole_bytes(name) for name in names)


def largest_shard(source: SourceCheckpoint) -> Path | None:
    """The file to measure the source's disk with; None when an earlier run has used up all of them, or it has none."""
    there = [] if source.place.root is None else [name for name in source.shards if source.place.has(name)]
    return resolve_inside(source.root, max(there, key=lambda name: source.shards[name].file_bytes)) if there else None


def hashing_cores(jobs: int) -> int:
    """The cores that hashing can use: those that this process may use, and one for each hash under way."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, HASHES_PER_BYTE * jobs)


def estimate_reshard(
    read_bytes: int,
    write_bytes: int,
    *,
    holes: int,
    read_rate: float,
    write_rate: float | None,
    shares_disk: bool,
    hash_rate: float,
    cores: int,
) -> Estimate:
    """The time of a reshard: that of the slowest of its stages, which run side by side.

    Args:
        read_bytes: Payload that is read, all of which is hashed.
        write_bytes: Payload that is written.
        holes: Bytes of both that are holes, which are hashed alone.
        read_rate: Bytes per second.
        write_rate: Bytes per second; None when it is not known: then as fast as reading.
        shares_disk: Whether reading and writing wait for each other.
        hash_rate: Bytes per second of one core.
        cores: How many hash.
    """
    reading = max(0, read_bytes - holes) / read_rate
    writing = max(0, write_bytes - holes) / (write_rate or read_rate)
    hashing = HASHES_PER_BYTE * read_bytes / (hash_rate * cores)
    if shares_disk:
        stages = {"the disk": reading + writing, "hashing": hashing}
    else:
        stages = {"reading": reading, "writing": writing, "hashing": hashing}
    limit = max(stages, key=stages.__getitem__)
    return Estimate(seconds=stages[limit], limit=limit)


def share_of_disk(moved_bytes: int, seconds: float, *, read_rate: float, shares_disk: bool) -> float:
    """What a run read and wrote in a second, as a share of what the source's disk gave just before when it only read.

    Both directions count where they share that disk, and reading alone where they do not.
    """
    return (2 if shares_disk else 1) * moved_bytes / seconds / read_rate
