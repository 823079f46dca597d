"""Move every byte of a plan: one read and one write, hashed in that pass, in bounded memory.

A worker takes a shard and reads it front to back, so the shard's own sha256 comes with it; each tensor goes to its
place in its output file. An expert that is cut across two shards is written by two workers. An output file gets its
name when its last tensor is in and fsynced.
"""

import hashlib
import resource
import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manifests.digest import TensorHasher, file_digest, sha256_hex, tensor_digest
from manifests.errors import ManifestError
from manifests.header import Header
from manifests.safety import resolve_inside
from manifests.schema import FileEntry, TensorEntry
from reshard.blocks import Reader, Writer
from reshard.plan import Plan, PlannedFile, PlannedTensor
from reshard.progress import Progress
from reshard.workers import StopFlag, run_all

OTHER_OPEN_FILES = 256
"""Sources, libraries, the terminal: room beside the output files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transferred:
    """What a transfer wrote: entries for the manifest, and the sha256 of each shard that was read whole."""

    files: tuple[FileEntry, ...]
    shard_sha256: Mapping[str, str]


class _Output:
    """One output file while its tensors arrive, from several workers if it must be."""

    def __init__(self, plan: PlannedFile, destination: Path) -> None:
        self.plan = plan
        self._path = destination / plan.path
        self._lock = threading.Lock()
        self._writer: Writer | None = None
        self._chunks: dict[str, tuple[str, ...]] = {}

    def open(self) -> Writer:
        """The file's writer; the first caller creates the file and writes its header."""
        with self._lock:
            if self._writer is None:
                self._writer = Writer(self._path)
                self._writer.write(self.plan.header, 0)
            return self._writer

    def finish_tensor(self, name: str, chunks: tuple[str, ...]) -> None:
        """Note a tensor as written; the last one finishes the file."""
        with self._lock:
            self._chunks[name] = chunks
            if self._writer is not None and len(self._chunks) == len(self.plan.tensors):
                self._writer.finish()

    def abandon(self) -> None:
        """Remove what is unfinished."""
        if self._writer is not None:
            self._writer.abandon()

    def entry(self) -> FileEntry:
        """The finished file as the manifest describes it."""
        header_sha256 = sha256_hex(self.plan.header)
        tensors = tuple(self._tensor_entry(tensor) for tensor in self.plan.tensors)
        return FileEntry(
            path=self.plan.path,
            kind=self.plan.place.kind,
            layer=self.plan.place.layer,
            expert=self.plan.place.expert,
            size=self.plan.size,
            unpacked_size=self.plan.size,
            header_size=len(self.plan.header),
            header_sha256=header_sha256,
            digest=file_digest(header_sha256, (tensor.digest for tensor in tensors if tensor.digest)),
            tensors=tensors,
        )

    def _tensor_entry(self, tensor: PlannedTensor) -> TensorEntry:
        chunks = self._chunks[tensor.name]
        return TensorEntry(
            name=tensor.name,
            dtype=tensor.dtype,
            shape=tensor.shape,
            offset=tensor.output_offset,
            size=tensor.size,
            digest=tensor_digest(chunks),
            chunks=chunks if len(chunks) > 1 else (),
            logical_shape=tensor.shape,
            source_name=tensor.name,
        )


def transfer(
    root: Path, shards: Mapping[str, Header], plan: Plan, destination: Path, *, jobs: int, progress: Progress
) -> Transferred:
    """Write all output files of a plan below destination.

    Args:
        root: Folder of the source.
        shards: Its headers, in source order.
        plan: What to do.
        destination: Folder to write to.
        jobs: Shards that are read at the same time.
        progress: Counts payload bytes.

    Raises:
        ManifestError: A shard is no longer what its header said when the plan was made.
        IntegrityError: A shard ends early.
        ResourceError: The disk is full.
    """
    outputs = [_Output(file, destination) for file in plan.files]
    _allow_open_files(len(outputs))
    work: dict[str, list[tuple[PlannedTensor, _Output]]] = defaultdict(list)
    for output in outputs:
        for tensor in output.plan.tensors:
            work[tensor.shard].append((tensor, output))
    for items in work.values():
        items.sort(key=lambda item: item[0].source_offset)

    def move(shard: str, stop: StopFlag) -> tuple[str, str | None]:
        hasher = hashlib.sha256() if shard in plan.complete_shards else None
        _move_shard(resolve_inside(root, shard), shards[shard], work[shard], hasher, progress, stop)
        return shard, hasher.hexdigest() if hasher else None

    # A shard without tensors is still hashed; one whose tensors are all left out is not read.
    order = [shard for shard in shards if shard in work or shard in plan.complete_shards]
    try:
        digests = run_all(move, order, workers=jobs)
    except BaseException:
        for output in outputs:
            output.abandon()
        raise
    return Transferred(
        files=tuple(output.entry() for output in outputs),
        shard_sha256={shard: digest for shard, digest in digests if digest is not None},
    )


def _allow_open_files(outputs: int) -> None:
    """Raise this process's own limit as far as it may be raised.

    A shard that was written by the stock library is sorted by dtype: the first scale of every expert comes before
    its last weight, so all the files of its experts are open at once. Kimi-K2 has 384 of them in each shard.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = outputs + OTHER_OPEN_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _move_shard(
    path: Path,
    header: Header,
    items: list[tuple[PlannedTensor, _Output]],
    whole: "hashlib._Hash | None",
    progress: Progress,
    stop: StopFlag,
) -> None:
    before = path.stat()
    reader = Reader(path)
    try:
        # The file must still be the one that was planned from, byte for byte as far as a header can tell.
        if b"".join(bytes(block) for block in reader.blocks(0, len(header.raw))) != header.raw:
            raise ManifestError(f"{path}: changed since its header was read; run again")
        if whole is not None:
            whole.update(header.raw)
        for tensor, output in items:
            writer = output.open()
            hasher = TensorHasher()
            offset = tensor.output_offset
            for block in reader.blocks(tensor.source_offset, tensor.size):
                stop.check()
                if whole is not None:
                    whole.update(block)
                hasher.update(block)
                writer.write(block, offset)
                offset += len(block)
                progress.advance(len(block))
            output.finish_tensor(tensor.name, hasher.chunks())
        after = path.stat()
        is_same = (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
        if not is_same or after.st_size != header.file_bytes:
            raise ManifestError(f"{path}: changed while it was read; run again when nothing writes to it")
    finally:
        reader.close()
