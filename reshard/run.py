"""A whole reshard in order: what is there already, the small files, the bytes, the manifest last.

A folder with a manifest is complete. What fails before that is continued by the same command, from the last shard that
the journal records; a run that got as far as no shard leaves the destination as it was found.
"""

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.config import model_facts
from manifests.digest import CHUNK_BYTES
from manifests.errors import ResourceError, ToolkitError
from manifests.paths import ASIDE_NAME, MANIFEST_NAME
from manifests.schema import Document, Manifest, Shard, Source
from manifests.storage import save, sync_folder
from reshard.consume import check_consumable, free_file, peak_bytes, reshard_steps, same_disk
from reshard.described import file_entry
from reshard.destination import (
    Hold,
    check_apart,
    check_empty,
    check_inodes,
    check_room,
    hold_folder,
    sync_folders,
    used_bytes,
)
from reshard.documents import header_paths, write_index, write_kept
from reshard.earlier import (
    Earlier,
    describe_selection,
    describe_source,
    find_earlier,
    require_plain,
    require_same_documents,
    require_same_source,
    require_same_task,
    require_taken_bytes,
)
from reshard.forecast import made_paths, needed_inodes
from reshard.journal import CONSUMES, Journal, end_journal
from reshard.lock import lock_folder
from reshard.plan import Plan, SelectionError
from reshard.progress import Progress
from reshard.resume import check_claims
from reshard.source import SourceCheckpoint
from reshard.transfer import Durable, MovedShard, transfer

MANIFEST_BYTES_PER_TENSOR = 800
"""An upper estimate, for the check of free space: in DeepSeek-V3's manifest and journal a tensor takes about 500."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run did.

    Attributes:
        files: Files with tensors in the finished checkpoint.
        documents: Its other files, but for the manifest.
        file_bytes: Bytes of the files with tensors.
        moved_bytes: Payload that this run wrote.
        kept_bytes: Payload that was there already.
    """

    files: int
    documents: int
    file_bytes: int
    moved_bytes: int
    kept_bytes: int


def needed_bytes(source: SourceCheckpoint, plan: Plan) -> int:
    """Bytes that the destination will take, a little over-estimated. Holes of the source take none."""
    tensors = sum(len(file.tensors) for file in plan.files)
    headers = sum(len(header.rest) for header in source.shards.values()) + len(source.index or b"")
    auxiliary = sum(file.size for file in source.auxiliary) + sum(map(len, source.generated.values()))
    holes = sum(source.place.hole_bytes(shard) for shard in source.shards)
    payload = max(0, plan.payload_bytes - holes)
    # Our index and the manifest; the saved headers are smaller than the originals.
    return (
        plan.output_bytes - plan.payload_bytes
        + payload
        + auxiliary + headers + len(source.index or b"")
        + tensors * MANIFEST_BYTES_PER_TENSOR
    )  # fmt: skip


def consume_peak_bytes(source: SourceCheckpoint, plan: Plan, jobs: int = 1) -> int:
    """The most that a run which consumes its source takes beyond the source itself."""
    shard_bytes = {shard: header.file_bytes for shard, header in source.shards.items()}
    beside = needed_bytes(source, plan) - plan.output_bytes
    return max(0, beside) + peak_bytes(reshard_steps(plan, shard_bytes), jobs)


def still_needed_bytes(
    source: SourceCheckpoint, plan: Plan, destination: Path | None, durable: Durable, *, consume: bool, jobs: int
) -> int:
    """Bytes that must be free. What an earlier run has taken is no longer free, and is no longer needed.

    Args:
        source: What to reshard.
        plan: How.
        destination: The folder; None for a new one beside the source.
        durable: What an earlier run has taken.
        consume: Whether the source is freed.
        jobs: Shards that are read at the same time.
    """
    used = 0 if destination is None else used_bytes(destination, made_paths(source, plan))
    needed = needed_bytes(source, plan)
    if consume and (destination is None or same_disk(source.root, destination)):
        # Holes are not subtracted: a little too careful, and simple.
        needed = consume_peak_bytes(source, plan, jobs)
        there = {shard for shard in source.shards if source.place.has(shard)}
        freed = sum(header.file_bytes for shard, header in source.shards.items() if shard not in there)
        # Taken without --consume: there twice until its shard is freed, and no part of the peak.
        twice = sum(
            tensor.size
            for file in plan.files
            for tensor in file.tensors
            if tensor.shard in there and tensor.name in durable.tensors
        )
        used = max(0, used - freed - twice)
    return max(0, needed - used)


def needed_by_consuming(source: SourceCheckpoint, plan: Plan, destination: Path | None, durable: Durable) -> int | None:
    """Bytes that must be free for a run that frees its source; None where it would be refused or gain nothing."""
    try:
        check_consume(source, plan)
    except ToolkitError:
        return None
    if destination is not None and not same_disk(source.root, destination):
        return None
    return still_needed_bytes(source, plan, destination, durable, consume=True, jobs=1)


def check_consume(source: SourceCheckpoint, plan: Plan) -> None:
    """Refuse to consume a source that would be lost or not freed.

    Raises:
        SelectionError: Only a part is taken, or it is on a server.
        ToolkitError: A shard is a link or has several names.
    """
    if source.place.root is None:
        raise SelectionError(f"--consume frees files of this machine, and {source.place} is on a server: leave it out")
    if plan.left_out_tensors:
        raise SelectionError(
            "--consume frees the whole source, so it takes the whole checkpoint: leave out --layers and --experts"
        )
    check_consumable(source.root, [shard for shard in source.shards if source.place.has(shard)])


def reshard_checkpoint(
    source: SourceCheckpoint,
    plan: Plan,
    destination: Path,
    *,
    jobs: int,
    progress: Progress,
    consume: bool = False,
    paranoid: bool = False,
    known: Earlier | None = None,
) -> Outcome:
    """Write a resharded checkpoint: into an empty or new folder, or on from where an earlier run stopped.

    Args:
        source: What to reshard.
        plan: How.
        destination: The folder.
        jobs: Shards that are read at the same time, or connections to a server.
        progress: Counts payload bytes.
        consume: Whether to free each shard when all of it is durable.
        paranoid: Whether to hash what an earlier run left before trusting it.
        known: What was found in the destination when the plan was made.

    Raises:
        LockedError: Another process writes there.
        ToolkitError: The destination holds something else, or overlaps the source, or a disk error.
        ResourceError: Too little free space, found before anything is written where possible.
        ManifestError, IntegrityError: The source changed or is damaged, or the destination is.
    """
    check_apart(source.path, destination)
    if consume:
        check_consume(source, plan)
    with ExitStack() as locks:
        if consume:
            locks.enter_context(lock_folder(source.root))
        hold = locks.enter_context(hold_folder(destination))
        run = _Run(source, plan, destination, jobs=jobs, progress=progress, consume=consume, paranoid=paranoid)
        outcome = run.execute(hold, known)
    sync_folder(destination.parent)
    return outcome


class _Run:
    """One run into one folder that is held."""

    def __init__(
        self,
        source: SourceCheckpoint,
        plan: Plan,
        destination: Path,
        *,
        jobs: int,
        progress: Progress,
        consume: bool,
        paranoid: bool,
    ) -> None:
        self._source = source
        self._plan = plan
        self._destination = destination
        self._jobs = jobs
        self._progress = progress
        self._consume = consume
        self._paranoid = paranoid

    def execute(self, hold: Hold, known: Earlier | None) -> Outcome:
        """From what is there to a complete checkpoint."""
        earlier = find_earlier(self._source.place.root, self._destination, known)
        if earlier.is_finished:
            # Stopped between the last two steps; then this may still be a wider run than that one.
            sync_folder(self._destination)
            end_journal(self._destination)
            earlier = find_earlier(self._source.place.root, self._destination)
        durable = earlier.durable
        if self._has_all(earlier):
            sync_folder(self._destination)
            end_journal(self._destination)
            assert earlier.manifest is not None
            return Outcome(
                files=len(earlier.manifest.files),
                documents=len(earlier.manifest.documents),
                file_bytes=sum(file.size for file in earlier.manifest.files),
                moved_bytes=0,
                kept_bytes=self._kept_bytes(durable),
            )
        # What an earlier run wrote is hashed once more before a source is freed on the strength of it.
        doubted = {shard for shard in self._source.shards if self._consume and self._is_there(shard)}
        if durable.tensors or earlier.journal is not None:
            check_claims(
                self._plan,
                self._destination,
                durable,
                doubted_shards=doubted,
                gone_shards={shard for shard in self._source.shards if not self._is_there(shard)},
                paranoid=self._paranoid,
                progress=self._progress,
            )
        kept = self._kept_bytes(durable)
        self._check_room(durable)
        if earlier.journal is None and earlier.manifest is None:
            check_inodes(self._destination, needed_inodes(self._source, self._plan))
            hold.own()
        journal = self._open_journal(earlier)
        self._progress.skip(kept - self._read_back_bytes(durable))
        try:
            there = () if earlier.manifest is None else earlier.manifest.documents
            documents = write_kept(self._source, self._destination, there)
            sync_folders(self._destination)
            self._move(durable, journal, hold)
            hold.keep()
            if self._consume:
                # A shard that came back after a crash would be taken for one that was never freed.
                sync_folder(self._source.root)
            self._finish(documents, durable)
        finally:
            journal.close()
        end_journal(self._destination)
        return Outcome(
            files=len(self._plan.files),
            documents=len(documents) + 1,  # and our index
            file_bytes=self._plan.output_bytes,
            moved_bytes=self._plan.payload_bytes - kept,
            kept_bytes=kept,
        )

    def _check_room(self, durable: Durable) -> None:
        wanted = still_needed_bytes(
            self._source, self._plan, self._destination, durable, consume=self._consume, jobs=self._jobs
        )
        try:
            check_room(self._destination, wanted)
        except ResourceError as error:
            least = needed_by_consuming(self._source, self._plan, self._destination, durable)
            if self._consume or least is None or least >= wanted:
                raise
            how = f"--consume, which deletes each shard when it is done, needs {least:,}"
            raise ResourceError(f"{error}; {how}") from error

    def _has_all(self, earlier: Earlier) -> bool:
        """Whether nothing is left to do; refuses what is there when it is not what this run can go on with."""
        if earlier.journal is not None:
            require_same_task(earlier, self._source, self._plan, self._destination)
            require_taken_bytes(earlier, self._source, self._plan, self._destination, self._progress)
            if earlier.manifest is not None:
                require_same_documents(earlier, self._source, self._destination)
        elif earlier.manifest is not None:
            require_same_source(earlier, self._source, self._plan, self._destination)
            require_same_documents(earlier, self._source, self._destination)
            wider = earlier.widen(self._plan.selection)
            if wider == earlier.manifest.selection:
                return True
            require_plain(earlier.manifest, self._destination)
            if wider != self._plan.selection:
                # What is there and not planned would be missing in the new manifest.
                raise ToolkitError(f"{self._destination}: was widened while this run was planned; run again")
        else:
            check_empty(self._destination)
        return False

    def _open_journal(self, earlier: Earlier) -> Journal:
        if earlier.journal is None:
            return Journal.create(
                self._destination,
                {
                    "task": "run",
                    "selection": describe_selection(self._plan.selection),
                    "consume": self._consume,
                    "widens": earlier.manifest_sha256,
                    "shards": describe_source(self._source),
                },
            )
        journal = earlier.journal.reopen()
        try:
            if self._consume and not earlier.consumes:
                journal.append(CONSUMES)
        except BaseException:
            journal.close()
            raise
        return journal

    def _move(self, durable: Durable, journal: Journal, hold: Hold) -> None:
        if self._consume:
            # Recorded by an earlier run, which was stopped before it freed them; hashed again by now.
            for shard in durable.shards:
                if self._is_there(shard):
                    self._free(shard, durable)

        def commit(moved: MovedShard) -> None:
            if moved.is_wrong:
                names = [tensor.name for tensor in self._source.shards[moved.name].tensors]
                journal.append({"wrong": moved.name, "tensors": names})
                return
            record: dict[str, Any] = {
                "shard": moved.name,
                "sha256": moved.sha256,
                "tensors": {name: list(chunks) for name, chunks in moved.tensors.items()},
            }
            if begun := {name: list(chunks) for name, chunks in moved.begun.items() if name not in durable.lost}:
                record["begun"] = begun
            journal.append(record)
            hold.keep()
            if not moved.is_done:
                return
            size = self._source.shards[moved.name].file_bytes
            self._progress.event("shard", name=moved.name, sha256=moved.sha256, bytes=size)
            if self._consume:
                self._free(moved.name, durable)

        transfer(
            self._source.place,
            self._source.shards,
            self._plan,
            self._destination,
            durable,
            commit=commit,
            jobs=self._jobs,
            progress=self._progress,
        )

    def _free(self, shard: str, durable: Durable) -> None:
        """Free a shard, if all that it held is durable by name."""
        header = self._source.shards[shard]
        if shard in durable.shards and all(tensor.name in durable.tensors for tensor in header.tensors):
            free_file(self._source.root / shard)

    def _finish(self, documents: list[Document], durable: Durable) -> None:
        """The documents that depend on the outcome, and the manifest, behind which an older one steps aside first."""
        if (self._destination / MANIFEST_NAME).exists():
            os.rename(self._destination / MANIFEST_NAME, self._destination / ASIDE_NAME)
            sync_folder(self._destination)
        index = write_index(
            ((file.path, ((tensor.name, tensor.size) for tensor in file.tensors)) for file in self._plan.files),
            self._destination,
        )
        sync_folder(self._destination)
        paths = header_paths(self._source.shards)
        manifest = Manifest(
            layout="resharded",
            model=model_facts(self._source.config),
            selection=self._plan.selection,
            files=(),
            documents=tuple(sorted([*documents, index], key=lambda document: document.path)),
            source=Source(
                kind=self._source.kind,
                shards=tuple(
                    Shard(name=shard, size=header.file_bytes, sha256=durable.shards.get(shard), header=paths[shard])
                    for shard, header in self._source.shards.items()
                ),
            ),
        )
        # One by one: all entries of a large checkpoint at once would take more memory than moving it.
        save(
            manifest,
            self._destination,
            files=(file_entry(file, lambda tensor: durable.tensors[tensor.name]) for file in self._plan.files),
        )

    def _kept_bytes(self, durable: Durable) -> int:
        whole = sum(
            tensor.size for file in self._plan.files for tensor in file.tensors if tensor.name in durable.tensors
        )
        return whole + sum(len(chunks) * CHUNK_BYTES for chunks in durable.begun.values())

    def _read_back_bytes(self, durable: Durable) -> int:
        """How much of what is kept passes by once more, because the sha256 of a shard from afar needs it."""
        if not self._source.place.is_far:
            return 0
        unhashed = self._plan.complete_shards - durable.shards.keys()
        tensors = (tensor for file in self._plan.files for tensor in file.tensors if tensor.shard in unhashed)
        whole = sum(tensor.size for tensor in tensors if tensor.name in durable.tensors)
        return whole + sum(len(chunks) * CHUNK_BYTES for chunks in durable.begun.values())

    def _is_there(self, shard: str) -> bool:
        return self._source.place.has(shard)
