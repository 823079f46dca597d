"""What a destination holds of what is asked for, and what is left for a run to do: one look for `plan` and `doctor`.

It refuses what the run would refuse, takes no lock and writes nothing. A file with the right size is believed here;
what the run finds damaged in it is done again, and comes on top.
"""

import dataclasses
import heapq
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Literal

from reshard.blocks import temporary_path
from reshard.earlier import (
    Earlier,
    require_plain,
    require_same_documents,
    require_same_source,
    require_same_task,
)
from reshard.finished import require_whole
from reshard.forecast import missing_inodes, needed_inodes
from reshard.plan import Plan
from reshard.resume import require_sources
from reshard.run import still_needed_bytes
from reshard.source import SourceCheckpoint
from reshard.transfer import Durable, pending_shards

SAMPLE_TENSORS = 512
"""Compared of a source at the most. The run compares more; in DeepSeek-V3 that is 18,000 small reads, seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Remaining:
    """What is there and what is left.

    Attributes:
        state: ``new`` with nothing there, ``interrupted`` with a run to go on with, ``part`` with a checkpoint to add
            to, or ``complete``.
        kept_bytes: Payload that is there.
        write_bytes, write_files: Payload and files with tensors that are left to write.
        read_bytes: Payload that is read for that: more, where a shard's own sha256 is still to be found.
        shards: What it is read from.
        durable: What is believed to be there.
    """

    state: Literal["new", "interrupted", "part", "complete"]
    kept_bytes: int = 0
    write_bytes: int = 0
    write_files: int = 0
    read_bytes: int = 0
    shards: tuple[str, ...] = ()
    durable: Durable = field(default_factory=Durable)


def find_remaining(source: SourceCheckpoint, plan: Plan, earlier: Earlier, destination: Path | None) -> Remaining:
    """Compare a plan with what was found in its destination, which is None when there is none yet.

    Raises:
        ManifestError: The interrupted run there had another source or selection.
        ToolkitError: A checkpoint there was made from another source, or is packed.
        IntegrityError: What a freed shard gave is not there any more, or a file of a finished checkpoint.
    """
    if destination is None or (earlier.journal is None and earlier.manifest is None):
        return _count(source, plan, Durable(), "new")
    is_interrupted = earlier.journal is not None and not earlier.is_finished
    if is_interrupted:
        require_same_task(earlier, source, plan, destination)
        if earlier.manifest is not None:
            require_same_documents(earlier, source, destination)
    elif earlier.manifest is not None:
        require_same_source(_sampled(earlier, plan), source, plan, destination)
        require_same_documents(earlier, source, destination)
        if earlier.widen(plan.selection) == earlier.manifest.selection:
            require_whole(earlier.manifest, destination)
            return Remaining(state="complete", kept_bytes=plan.payload_bytes)
        require_plain(earlier.manifest, destination)
    durable = _believed(source, plan, earlier.durable, destination)
    return _count(source, plan, durable, "interrupted" if is_interrupted else "part")


def needed_room(
    source: SourceCheckpoint, plan: Plan, destination: Path | None, remaining: Remaining, *, consume: bool
) -> int:
    """Bytes that must be free, as the run reckons. What the run throws away first is neither free nor needed here."""
    if remaining.state == "complete":
        return 0
    return still_needed_bytes(source, plan, destination, remaining.durable, consume=consume, jobs=1)


def left_inodes(source: SourceCheckpoint, plan: Plan, destination: Path, remaining: Remaining) -> int:
    """Files and folders that are left to make."""
    if remaining.state == "complete":
        return 0
    if remaining.state == "new":
        return needed_inodes(source, plan)
    return missing_inodes(source, plan, destination)


def _sampled(earlier: Earlier, plan: Plan) -> Earlier:
    """The same with the smallest tensors alone: norms, routers and scales differ between any two models."""
    held = (tensor for file in plan.files for tensor in file.tensors if tensor.name in earlier.durable.tensors)
    names = [tensor.name for tensor in heapq.nsmallest(SAMPLE_TENSORS, held, key=attrgetter("size"))]
    durable = Durable(tensors={name: earlier.durable.tensors[name] for name in names})
    return dataclasses.replace(earlier, durable=durable)


def _believed(source: SourceCheckpoint, plan: Plan, durable: Durable, destination: Path) -> Durable:
    """The claims on files that are there with their size."""
    gone = {shard for shard in source.shards if not source.place.has(shard)}
    tensors: dict[str, tuple[str, ...]] = {}
    for file in plan.files:
        claimed = [tensor.name for tensor in file.tensors if tensor.name in durable.tensors]
        path = destination / file.path
        where = path if path.exists() else temporary_path(path)
        if claimed and _size(where) == file.size:
            tensors.update((name, durable.tensors[name]) for name in claimed)
        require_sources(where, file, tensors, gone)
    return Durable(tensors=tensors, shards=durable.shards)


def _size(path: Path) -> int | None:
    """Asked once: a run that is under way may take it away between two questions."""
    try:
        return path.stat().st_size
    except OSError:
        return None


def _count(
    source: SourceCheckpoint, plan: Plan, durable: Durable, state: Literal["new", "interrupted", "part"]
) -> Remaining:
    unhashed = plan.complete_shards - durable.shards.keys()
    kept = write = read = files = 0
    for file in plan.files:
        is_whole = True
        for tensor in file.tensors:
            if tensor.name in durable.tensors:
                kept += tensor.size
                read += tensor.size if tensor.shard in unhashed else 0
            else:
                write += tensor.size
                read += tensor.size
                is_whole = False
        files += not is_whole
    return Remaining(
        state=state,
        kept_bytes=kept,
        write_bytes=write,
        write_files=files,
        read_bytes=read,
        shards=tuple(pending_shards(source.shards, plan, durable)),
        durable=durable,
    )
