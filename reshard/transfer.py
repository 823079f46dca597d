"""Move every byte of a plan: one read and one write, hashed in that pass, in bounded memory.

A shard is read front to back, so the shard's own sha256 comes with it; each tensor goes to its place in its output
file. An expert that is cut across two shards is written in two parts. An output file is fsynced and gets its name as
soon as its last tensor is in, on a thread of its own; when a shard ends, everything that it touched is durable.
"""

import hashlib
import resource
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from manifests.errors import ManifestError
from manifests.header import Header
from manifests.safety import resolve_inside
from manifests.storage import sync_folder
from reshard.blocks import Reader, Writer
from reshard.plan import Plan, PlannedFile, PlannedTensor
from reshard.progress import Progress
from reshard.streams import Piece, Ring, Target, pump
from reshard.workers import PoisonLock, StopFlag, run_all, thread_limit_named

OTHER_OPEN_FILES = 256
"""Sources, libraries, the terminal: room beside the output files."""


@dataclass(slots=True)
class Durable:
    """What is on disk for good: chunk digests by tensor name, and the sha256 of the shards that were read whole.

    `lost` are the digests of tensors that were on disk and are no longer: what is taken again must be the same.
    """

    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    lost: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MovedShard:
    """A shard that was moved and is durable: its sha256 if all of it was read, and its tensors' chunk digests."""

    name: str
    sha256: str | None
    tensors: Mapping[str, tuple[str, ...]]


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
        self._adopts = self._missing < len(plan.tensors)
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
    root: Path,
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
        root: Folder of the source.
        shards: Its headers, in source order.
        plan: What to do.
        destination: Folder to write to.
        durable: What is there already, and what is noted there as shards are done.
        commit: Called for one shard at a time, when all that was written of it is durable.
        jobs: Shards that are read at the same time.
        progress: Counts payload bytes.

    Raises:
        ManifestError: A shard is no longer what its header said when the plan was made, or holds other bytes than
            what was taken from it before.
        IntegrityError: A shard ends early.
        ResourceError: The disk is full.
    """
    _allow_open_files(len(plan.files))
    outputs: dict[str, _Output] = {}
    work = plan.by_shard()
    lock = threading.Lock()
    commit_lock = PoisonLock()
    ring = Ring()

    def output_of(file: PlannedFile) -> _Output:
        with lock:
            if file.path not in outputs:
                outputs[file.path] = _Output(file, destination, durable, finisher, progress)
            return outputs[file.path]

    def move(shard: str, stop: StopFlag) -> None:
        is_whole = shard in plan.complete_shards and shard not in durable.shards
        tensors = [tensor for tensor in work.pop(shard, []) if is_whole or tensor.name not in durable.tensors]
        targets = {
            tensor.name: output_of(plan.files[tensor.file]) for tensor in tensors if tensor.name not in durable.tensors
        }

        def target_of(tensor: PlannedTensor) -> Target | None:
            output = targets.get(tensor.name)
            if output is None:
                return None
            # What was lost is no part of the file until it is known to be what it was.
            written = None if tensor.name in durable.lost else output.written
            return Target(open=output.open, offset=tensor.output_offset, written=written)

        path = resolve_inside(root, shard)
        hasher = hashlib.sha256(shards[shard].raw) if is_whole else None
        pieces = [(tensor.name, _piece(path, tensor, target_of(tensor))) for tensor in tensors]
        stream = _with_gaps(pieces, path, shards[shard]) if is_whole else pieces
        with _unchanging(path, shards[shard]):
            digests = pump(
                [piece for _, piece in stream], whole=hasher, digests=True, ring=ring, progress=progress, stop=stop
            )
        found = {name: chunks for (name, _), chunks in zip(stream, digests, strict=True) if name}
        for name, chunks in found.items():
            if durable.tensors.get(name, durable.lost.get(name, chunks)) != chunks:
                raise ManifestError(
                    f"{path}: tensor {name!r} has other bytes than were taken before; the source was changed, or is "
                    "another model with the same layout"
                )
        for name in durable.lost.keys() & targets.keys():
            targets[name].written()
        folders = set()
        finished = []
        for output in set(targets.values()):
            if output.settle():
                finished.append(output.plan.path)
            folders |= {folder for folder in output.path.parents if folder.is_relative_to(destination)}
        with lock:
            for name in finished:
                outputs.pop(name, None)  # the other part of a cut expert may have been the last
        with commit_lock:
            for folder in sorted(folders):
                sync_folder(folder)
            moved = MovedShard(name=shard, sha256=hasher.hexdigest() if hasher else None, tensors=found)
            durable.tensors.update(found)
            if moved.sha256 is not None:
                durable.shards[shard] = moved.sha256
            commit(moved)

    with ThreadPoolExecutor(max_workers=1) as finisher:
        try:
            run_all(move, pending_shards(shards, plan, durable), workers=jobs)
        finally:
            finisher.shutdown()
            for output in outputs.values():
                output.close()


def _piece(path: Path, tensor: PlannedTensor, target: Target | None) -> Piece:
    return Piece(path=path, offset=tensor.source_offset, size=tensor.size, target=target)


def _with_gaps(pieces: list[tuple[str, Piece]], path: Path, header: Header) -> list[tuple[str, Piece]]:
    """All of a shard behind its header: its own sha256 is of what is between its tensors, too, which has no name."""
    start = len(header.raw)
    gaps = [("", Piece(path=path, offset=start + gap.begin, size=len(gap.content))) for gap in header.gaps]
    # An empty tensor lies where its neighbour begins, and comes before it.
    return sorted([*pieces, *gaps], key=lambda named: (named[1].offset, named[1].size)) if gaps else pieces


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


@contextmanager
def _unchanging(path: Path, header: Header) -> Iterator[None]:
    """While a shard is read: it must be the file that was planned from, and stay it."""
    before = path.stat()
    with closing(Reader(path)) as reader:
        # Byte for byte as far as a header can tell.
        if b"".join(bytes(block) for block in reader.blocks(0, len(header.raw))) != header.raw:
            raise ManifestError(f"{path}: changed since its header was read; run again")
    yield
    after = path.stat()
    is_same = (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    if not is_same or after.st_size != header.file_bytes:
        raise ManifestError(f"{path}: changed while it was read; run again when nothing writes to it")
