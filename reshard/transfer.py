"""Move every byte of a plan: one read and one write, hashed in that pass, in bounded memory.

A shard is read front to back, so the shard's own sha256 comes with it; each tensor goes to its place in its output
file. An expert that is cut across two shards is written in two parts. An output file is fsynced and gets its name as
soon as its last tensor is in, on a thread of its own; when a shard ends, everything that it touched is durable.

A shard that comes from afar is made durable in parts on the way, each of some seconds: what was fetched once is not
fetched again. Where its sha256 still needs what an earlier run has fetched, that is read back from the output.
"""

import hashlib
import resource
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from manifests.digest import CHUNK_BYTES
from manifests.errors import IntegrityError, ManifestError
from manifests.header import Header
from manifests.storage import sync_folder
from reshard.blocks import Writer
from reshard.openable import Openable, OutputFile
from reshard.places import Place, Range
from reshard.plan import Plan, PlannedFile, PlannedTensor
from reshard.progress import Progress
from reshard.streams import Piece, Ring, Target, pump
from reshard.workers import PoisonLock, StopFlag, run_all, thread_limit_named

OTHER_OPEN_FILES = 256
"""Sources, libraries, the terminal: room beside the output files."""

PART_SECONDS = 5.0
"""What comes from afar in this time is made durable at once: more would be fetched twice after an interruption."""

LEAST_PART_BYTES = CHUNK_BYTES
"""However slow it comes, and before it is known how fast: digests are of chunks."""


@dataclass(slots=True)
class Durable:
    """What is on disk for good: chunk digests by tensor name, and the sha256 of the shards that were read whole.

    `lost` are the digests of tensors that were on disk and are no longer: what is taken again must be the same.
    `begun` are those of the first chunks of tensors that came from afar and did not come to their end.
    """

    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    lost: dict[str, tuple[str, ...]] = field(default_factory=dict)
    begun: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Take:
    """One piece of a shard's stream.

    Attributes:
        name: Of its tensor; nothing for what has no name.
        at: Where it is in the shard, which is not always where it is read.
        piece: As said.
        is_end: Whether it is the end of the tensor.
    """

    name: str
    at: int
    piece: Piece
    is_end: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedShard:
    """A shard, or the next part of one, that was moved and is durable.

    Attributes:
        name: Of the shard.
        sha256: Its own, if all of it was read and this is its end.
        tensors: Chunk digests of those that are durable now.
        begun: Those of the first chunks of a tensor of which no more is.
        is_done: Whether nothing more of the shard is to come.
        is_wrong: Whether its sha256 is not the one that its source publishes: then nothing of it is right.
    """

    name: str
    sha256: str | None
    tensors: Mapping[str, tuple[str, ...]]
    begun: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    is_done: bool = True
    is_wrong: bool = False


class _Output:
    """One output file while its tensors arrive, from several workers if it must be."""

    def __init__(
        self,
        plan: PlannedFile,
        destination: Path,
        durable: Durable,
        finisher: ThreadPoolExecutor,
        progress: Progress,
    ) -> None:
        self.plan = plan
        self.path = destination / plan.path
        self._missing = sum(1 for tensor in plan.tensors if tensor.name not in durable.tensors)
        self._adopts = any(tensor.name in durable.tensors or tensor.name in durable.begun for tensor in plan.tensors)
        self._finisher = finisher
        self._progress = progress
        self._finished: Future[None] | None = None
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        self._failure: BaseException | None = None

    def open(self) -> Writer:
        """The file's writer; the first caller creates the file and writes its header."""
        with self._lock:
            if self._failure is not None:
                # Not once more: that would fail otherwise, and hide why.
                raise self._failure
            if self._writer is None:
                try:
                    self._writer = self._create()
                except BaseException as error:
                    self._failure = error
                    raise
                layer = self.plan.place.layer
                self._progress.at("model" if layer is None else f"layer {layer}")
            return self._writer

    def _create(self) -> Writer:
        writer = Writer(self.path, self.plan.size, adopt=self._adopts)
        try:
            writer.write(self.plan.header, 0)
        except BaseException:
            # Nobody may go on with a file that has no header.
            writer.close()
            raise
        return writer

    def written(self) -> None:
        """Note a tensor as written; the last one finishes the file."""
        with self._lock:
            self._missing -= 1
            if self._missing == 0 and self._writer is not None:
                with thread_limit_named():
                    self._finished = self._finisher.submit(self._writer.finish)

    def settle(self) -> bool:
        """Make durable what was written; return whether the file is finished."""
        with self._lock:
            if self._finished is None:
                # Under the lock: who finishes the file closes it.
                if self._writer is not None:
                    self._writer.sync()
                return False
            finished = self._finished
        finished.result()
        return True

    def close(self) -> None:
        """Close, and leave what is there for a later run."""
        if self._writer is not None:
            self._writer.close()


def pending_shards(shards: Collection[str], plan: Plan, durable: Durable) -> list[str]:
    """The shards that are still to be read, in source order.

    A shard is read when a tensor of it is not durable, or when all of it is taken and its sha256 is not known. One
    whose tensors are all left out is never read.
    """
    missing = {tensor.shard for file in plan.files for tensor in file.tensors if tensor.name not in durable.tensors}
    unhashed = plan.complete_shards - durable.shards.keys()
    return [shard for shard in shards if shard in missing or shard in unhashed]


def transfer(
    place: Place,
    shards: Mapping[str, Header],
    plan: Plan,
    destination: Path,
    durable: Durable,
    *,
    commit: Callable[[MovedShard], None],
    jobs: int,
    progress: Progress,
) -> None:
    """Write what is missing of the output files of a plan below destination.

    Args:
        place: Folder of the source.
        shards: Its headers, in source order.
        plan: What to do.
        destination: Folder to write to.
        durable: What is there already, and what is noted there as shards are done.
        commit: Called for one shard at a time, when all that was written of it, or of a part of it, is durable.
        jobs: Shards that are read at the same time, or connections.
        progress: Counts payload bytes.

    Raises:
        ManifestError: A shard is no longer what its header said when the plan was made, or holds other bytes than
            what was taken from it before.
        IntegrityError: A shard ends early, or is not what its source says that it is.
        RemoteError: The server that has it cannot be reached any more.
        ResourceError: The disk is full.
    """
    _allow_open_files(len(plan.files))
    pending = pending_shards(shards, plan, durable)
    workers = place.divide(jobs, len(pending))
    with ThreadPoolExecutor(max_workers=1) as finisher:
        mover = _Mover(
            place, shards, plan, destination, durable, finisher, commit, connections=jobs // workers, progress=progress
        )
        try:
            run_all(mover.move, pending, workers=workers)
        finally:
            finisher.shutdown()
            mover.close()


class _Mover:
    """What the workers of one transfer share."""

    def __init__(
        self,
        place: Place,
        shards: Mapping[str, Header],
        plan: Plan,
        destination: Path,
        durable: Durable,
        finisher: ThreadPoolExecutor,
        commit: Callable[[MovedShard], None],
        *,
        connections: int,
        progress: Progress,
    ) -> None:
        self._place = place
        self._shards = shards
        self._plan = plan
        self._destination = destination
        self._durable = durable
        self._finisher = finisher
        self._commit = commit
        self._connections = connections
        self._progress = progress
        self._work = plan.by_shard()
        self._outputs: dict[str, _Output] = {}
        self._lock = threading.Lock()
        self._commit_lock = PoisonLock()
        self._ring = Ring()

    def close(self) -> None:
        """Close what is open, and leave what is there for a later run."""
        for output in self._outputs.values():
            output.close()

    def move(self, shard: str, stop: StopFlag) -> None:
        """Move what is missing of a shard."""
        place, durable, header = self._place, self._durable, self._shards[shard]
        is_whole = shard in self._plan.complete_shards and shard not in durable.shards
        tensors = [t for t in self._work.pop(shard, []) if is_whole or t.name not in durable.tensors]
        targets = {t.name: self._output_of(self._plan.files[t.file]) for t in tensors if t.name not in durable.tensors}
        gaps = _gaps(header) if is_whole else []
        ranges = self._ranges(tensors, targets, gaps)
        hasher = hashlib.sha256(header.raw) if is_whole else None
        begun: dict[str, tuple[str, ...]] = {}
        with place.reading(shard, header, ranges, connections=self._connections, stop=stop) as file:
            takes = [take for tensor in tensors for take in self._takes(tensor, file, targets.get(tensor.name))]
            stream = _with_gaps(takes, file, gaps)
            for part, is_last in _parts(stream) if place.is_far else [(stream, True)]:
                digests = pump(
                    [take.piece for take in part],
                    whole=hasher,
                    digests=True,
                    ring=self._ring,
                    progress=self._progress,
                    stop=stop,
                )
                found = _collect(part, digests, begun)
                if not is_last:
                    self._settle(
                        MovedShard(name=shard, sha256=None, tensors=found, begun=dict(begun), is_done=False), targets
                    )
        moved = MovedShard(name=shard, sha256=hasher.hexdigest() if hasher else None, tensors=found)
        self._require_published(moved)
        self._settle(moved, targets)

    def _output_of(self, file: PlannedFile) -> _Output:
        with self._lock:
            if file.path not in self._outputs:
                self._outputs[file.path] = _Output(
                    file, self._destination, self._durable, self._finisher, self._progress
                )
            return self._outputs[file.path]

    def _there(self, tensor: PlannedTensor, *, is_missing: bool) -> int:
        """How many of a tensor's first bytes are read back from its output, because they would come from afar."""
        if not self._place.is_far:
            return 0
        return len(self._durable.begun.get(tensor.name, ())) * CHUNK_BYTES if is_missing else tensor.size

    def _ranges(self, tensors: Sequence[PlannedTensor], targets: Collection[str], gaps: Sequence[Range]) -> list[Range]:
        """What is read of a shard for these tensors and gaps, neighbours together."""
        wanted = list(gaps)
        for tensor in tensors:
            there = self._there(tensor, is_missing=tensor.name in targets)
            wanted.append((tensor.source_offset + there, tensor.source_offset + tensor.size))
        ranges: list[Range] = []
        for begin, end in sorted(wanted):
            if ranges and ranges[-1][1] == begin:
                ranges[-1] = ranges[-1][0], end
            elif begin < end:
                ranges.append((begin, end))
        return ranges

    def _takes(self, tensor: PlannedTensor, file: Openable, output: _Output | None) -> Iterator[_Take]:
        """The pieces that make a tensor: what is read back, and what is read of its shard and written."""
        there = self._there(tensor, is_missing=output is not None)
        if there:
            written = OutputFile(self._destination / self._plan.files[tensor.file].path)
            piece = Piece(file=written, offset=tensor.output_offset, size=there)
            yield _Take(tensor.name, tensor.source_offset, piece, is_end=there == tensor.size)
        # What comes from afar is cut where its digests are, so that no part must wait for all of a large tensor.
        step = CHUNK_BYTES if self._place.is_far else tensor.size
        for begin in range(there, tensor.size, step) if tensor.size else [0]:
            size = min(step, tensor.size - begin)
            is_end = begin + size == tensor.size
            target = None
            if output is not None:
                # What was lost is no part of the file until it is known to be what it was.
                notify = output.written if is_end and tensor.name not in self._durable.lost else None
                target = Target(open=output.open, offset=tensor.output_offset + begin, written=notify)
            piece = Piece(file=file, offset=tensor.source_offset + begin, size=size, target=target)
            yield _Take(tensor.name, tensor.source_offset + begin, piece, is_end=is_end)

    def _require_published(self, moved: MovedShard) -> None:
        """Refuse a shard that is not what its source publishes, and take back what was said of its parts."""
        published = self._place.sha256(moved.name)
        if None in (moved.sha256, published) or moved.sha256 == published:
            return
        with self._commit_lock:
            self._commit(MovedShard(name=moved.name, sha256=None, tensors={}, is_wrong=True))
        raise IntegrityError(
            f"{self._place.where(moved.name)}: its sha256 is {moved.sha256}, and {published} is published; nothing of "
            "it is kept, run again to fetch it anew"
        )

    def _settle(self, moved: MovedShard, targets: Mapping[str, _Output]) -> None:
        """Make durable what was written of a shard, and say so."""
        durable, found = self._durable, moved.tensors
        for name, chunks in found.items():
            if durable.tensors.get(name, durable.lost.get(name, chunks)) != chunks:
                where = self._place.where(moved.name)
                raise _changed(where, name, is_read_back=self._place.is_far and name not in targets)
            if (before := durable.begun.get(name)) is not None and chunks[: len(before)] != before:
                raise _changed(self._place.where(moved.name), name, is_read_back=True)
        for name in durable.lost.keys() & targets.keys() & found.keys():
            targets[name].written()
        folders = set()
        finished = []
        for output in {targets[name] for name in (*found, *moved.begun) if name in targets}:
            if output.settle():
                finished.append(output.plan.path)
            folders |= {folder for folder in output.path.parents if folder.is_relative_to(self._destination)}
        with self._lock:
            for name in finished:
                self._outputs.pop(name, None)  # the other part of a cut expert may have been the last
        with self._commit_lock:
            for folder in sorted(folders):
                sync_folder(folder)
            durable.tensors.update(found)
            if moved.sha256 is not None:
                durable.shards[moved.name] = moved.sha256
            self._commit(moved)


def _gaps(header: Header) -> list[Range]:
    """What is between the tensors of a shard: its own sha256 is of that, too."""
    start = len(header.raw)
    return [(start + gap.begin, start + gap.begin + len(gap.content)) for gap in header.gaps]


def _with_gaps(takes: list[_Take], file: Openable, gaps: Sequence[Range]) -> list[_Take]:
    """The stream of a shard with what has no name in its place."""
    unnamed = [_Take("", begin, Piece(file=file, offset=begin, size=end - begin)) for begin, end in gaps]
    # An empty tensor lies where its neighbour begins, and comes before it.
    return sorted([*takes, *unnamed], key=lambda take: (take.at, take.piece.size)) if unnamed else takes


def _collect(
    part: Sequence[_Take], digests: Sequence[tuple[str, ...]], begun: dict[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """The digests of the tensors that came to their end in a part; `begun` holds those of the one that did not."""
    found: dict[str, tuple[str, ...]] = {}
    for take, chunks in zip(part, digests, strict=True):
        if not take.name:
            continue
        so_far = begun.pop(take.name, ()) + chunks
        (found if take.is_end else begun)[take.name] = so_far
    return found


def _parts(stream: Sequence[_Take]) -> Iterator[tuple[Sequence[_Take], bool]]:
    """A stream in parts that each take about as long as `PART_SECONDS`, and whether it is the last."""
    first, limit = 0, LEAST_PART_BYTES
    while True:
        size, last = 0, first
        while last < len(stream) and size < limit:
            size += stream[last].piece.size
            last += 1
        began = time.monotonic()
        yield stream[first:last], last == len(stream)
        if last == len(stream):
            return
        limit = max(LEAST_PART_BYTES, int(PART_SECONDS * size / max(time.monotonic() - began, 1e-3)))
        first = last


def _changed(where: str, tensor: str, *, is_read_back: bool) -> ManifestError | IntegrityError:
    if is_read_back:
        return IntegrityError(
            f"{where}: tensor {tensor!r}, which was fetched from it before, is damaged on disk since; run again with "
            "--paranoid, which fetches anew what is damaged"
        )
    return ManifestError(
        f"{where}: tensor {tensor!r} has other bytes than were taken before; the source was changed, or is another "
        "model with the same layout"
    )


def _allow_open_files(outputs: int) -> None:
    """Raise this process's own limit as far as it may be raised.

    A shard that was written by the stock library is sorted by dtype: the first scale of every expert comes before
    its last weight, so all the files of its experts are open at once, each of them twice. Kimi-K2 has 384 of them in
    each shard.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * outputs + OTHER_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
