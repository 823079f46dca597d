"""The way back: the source checkpoint byte for byte, each shard proven by the sha256 that the source had.

`check` does the same reading and hashing and writes nothing: what one runs before deleting the original. A restore that
is stopped is continued by the same command. One that consumes frees each file as soon as every shard that needs it is
durable; before the first, the manifest steps aside, because the folder is complete no longer.
"""

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path

from manifests import inventory
from manifests.checkpoint import Checkpoint
from manifests.digest import sha256_hex
from manifests.errors import IntegrityError, ManifestError, ToolkitError
from manifests.folder import LocalFolder
from manifests.header import Header
from manifests.paths import ASIDE_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.safety import resolve_inside
from manifests.schema import Document, Shard
from manifests.storage import decode, sync_folder
from reshard.blocks import Writer, data_bytes, temporary_path
from reshard.consume import check_consumable, free_file, peak_bytes, restore_steps, same_disk
from reshard.destination import (
    Hold,
    check_apart,
    check_empty,
    check_room,
    copy_file,
    hash_file,
    hold_folder,
    sync_folders,
    used_bytes,
    write_file,
)
from reshard.journal import CONSUMES, Journal, JournalContents, is_consuming, read_journal
from reshard.lock import lock_folder
from reshard.openable import LocalFile, PackedFile
from reshard.progress import Progress
from reshard.saved import read_document, read_saved_headers, require_source
from reshard.streams import Given, Piece, Ring, Target, pump
from reshard.verify import verify
from reshard.workers import PoisonLock, StopFlag, run_all

FINISHED = {"finished": True}
"""The record behind which only leavings of the checkpoint remain."""

SHOWN_DAMAGE = 3

FOLDER_STAYS = frozenset(
    {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.ENOENT, errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS}
)
"""Something of somebody's is in a folder, or it is a link, or gone, or the root of a disk, or not ours to remove."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestoredShard:
    """One shard that was rebuilt, or could be: its name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


def open_restored(folder: Path, out: Path) -> Checkpoint:
    """The checkpoint to restore, also one that an interrupted restore has begun to take apart.

    Raises:
        ToolkitError: See `manifests.open`.
    """
    if not (folder / MANIFEST_NAME).exists() and (out / JOURNAL_NAME).exists() and (folder / ASIDE_NAME).exists():
        path = folder / ASIDE_NAME
        return Checkpoint(LocalFolder(folder), decode(path.read_bytes(), what=str(path)))
    return inventory.open(folder)


def clean_up_restored(folder: Path, out: Path) -> bool:
    """End a restore that was stopped when all was written and only the leavings remained.

    Returns:
        Whether that was so.
    """
    contents = read_journal(out) if out.is_dir() else None
    if contents is None or contents.begin.get("task") != "restore" or (folder / MANIFEST_NAME).exists():
        return False
    if FINISHED not in contents.records:
        return False
    aside = folder / ASIDE_NAME
    if aside.exists() and sha256_hex(aside.read_bytes()) != contents.begin.get("manifest"):
        return False
    with hold_folder(out):
        # Durable first: what it says was perhaps never written to the disk.
        journal = contents.reopen()
        if aside.exists():
            _remove_rest(Checkpoint(LocalFolder(folder), decode(aside.read_bytes(), what=str(aside))))
        _remove_empty(folder)
        journal.remove()
    return True


def consume_peak_bytes(checkpoint: Checkpoint, headers: Mapping[str, Header], jobs: int) -> int:
    """The most that a restore which consumes its files takes beyond them."""
    file_of = _files_of(checkpoint)
    shards = [
        (shard.size, {file_of[tensor.name] for tensor in headers[shard.name].tensors})
        for shard in require_source(checkpoint).shards
    ]
    documents = sum(document.content_size for document in _kept_documents(checkpoint))
    file_bytes = {file.path: file.size for file in checkpoint.manifest.files}
    return documents + peak_bytes(restore_steps(shards, file_bytes), jobs)


def restore(
    checkpoint: Checkpoint,
    out: Path,
    *,
    jobs: int,
    progress: Progress,
    consume: bool = False,
    paranoid: bool = False,
) -> list[RestoredShard]:
    """Write the source checkpoint into an empty or new folder: shards, index, auxiliary files. Or go on with that.

    Args:
        checkpoint: See `open_restored`.
        out: The folder.
        jobs: Shards that are written at the same time.
        progress: Counts payload bytes.
        consume: Whether to free the checkpoint's files as they are used up.
        paranoid: Whether to hash what an earlier restore left before trusting it.

    Raises:
        IncompleteError: Only a part was resharded.
        IntegrityError: The rebuilt bytes are not the source's.
        LockedError, ToolkitError, ResourceError: See `reshard.destination`.
    """
    headers = read_saved_headers(checkpoint)
    check_apart(checkpoint.root, out)
    with ExitStack() as locks:
        if consume:
            names = [file.path for file in checkpoint.manifest.files]
            check_consumable(checkpoint.root, [name for name in names if os.path.lexists(checkpoint.root / name)])
            locks.enter_context(lock_folder(checkpoint.root))
        hold = locks.enter_context(hold_folder(out))
        restored = _Restore(checkpoint, headers, out, jobs, progress, consume=consume, paranoid=paranoid).execute(hold)
    sync_folder(out.parent)
    return restored


def check(checkpoint: Checkpoint, *, jobs: int, progress: Progress) -> list[RestoredShard]:
    """Prove that `restore` would give the source's bytes, by hashing every shard from the destination.

    Raises:
        IncompleteError, IntegrityError: See `restore`.
    """
    headers = read_saved_headers(checkpoint)
    ring = Ring()
    places = _files_of(checkpoint)

    def rebuild(shard: Shard, stop: StopFlag) -> RestoredShard:
        header = headers[shard.name]
        pieces = _pieces(checkpoint, header, None)
        with _naming_damage(checkpoint, {places[tensor.name] for tensor in header.tensors}):
            return _rebuild(shard, header, pieces, ring, progress, stop)

    restored = run_all(rebuild, require_source(checkpoint).shards, workers=jobs)
    for document in checkpoint.manifest.documents:
        if document.source_name is not None:
            _prove_document(checkpoint, document)
    return restored


class _Restore:
    """One restore into one folder that is held."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        headers: Mapping[str, Header],
        out: Path,
        jobs: int,
        progress: Progress,
        *,
        consume: bool,
        paranoid: bool,
    ) -> None:
        self._checkpoint = checkpoint
        self._headers = headers
        self._out = out
        self._jobs = jobs
        self._progress = progress
        self._consume = consume
        self._paranoid = paranoid
        self._shards = require_source(checkpoint).shards
        file_of = _files_of(checkpoint)
        self._files = {name: {file_of[tensor.name] for tensor in header.tensors} for name, header in headers.items()}

    def execute(self, hold: Hold) -> list[RestoredShard]:
        """From what is there to the whole source."""
        contents = read_journal(self._out)
        done: dict[str, RestoredShard] = {}
        if contents is None:
            check_empty(self._out)
        else:
            self._require_same(contents)
            done = self._recorded(contents)
        self._check_room(done)
        if contents is not None:
            journal = contents.reopen()
        else:
            hold.own()
            journal = Journal.create(
                self._out, {"task": "restore", "manifest": self._manifest_name(), "consume": self._consume}
            )
        self._progress.skip(sum(shard.size for shard in done.values()))
        try:
            for document in _kept_documents(self._checkpoint):
                _restore_document(self._checkpoint, document, self._out)
            sync_folders(self._out)
            if self._consume:
                hold.keep()
                if contents is not None and not is_consuming(contents):
                    journal.append(CONSUMES)
                self._set_aside()
            self._rebuild_all(done, journal, hold)
            if self._consume:
                journal.append(FINISHED)
                _remove_rest(self._checkpoint)
                _remove_empty(self._checkpoint.root)
        finally:
            journal.close()
        hold.keep()
        os.unlink(self._out / JOURNAL_NAME)
        sync_folder(self._out)
        return [done[shard.name] for shard in self._shards]

    def _rebuild_all(self, done: dict[str, RestoredShard], journal: Journal, hold: Hold) -> None:
        users = Counter(file for shard in self._shards if shard.name not in done for file in self._files[shard.name])
        if self._consume:
            self._free(file.path for file in self._checkpoint.manifest.files if not users[file.path])
        lock = PoisonLock()
        ring = Ring()

        def rebuild(shard: Shard, stop: StopFlag) -> None:
            self._progress.at(shard.name)
            target = self._out / shard.name
            target.unlink(missing_ok=True)
            temporary_path(target).unlink(missing_ok=True)
            writer = Writer(target, shard.size)
            try:
                header = self._headers[shard.name]
                writer.write(header.raw, 0)
                pieces = _pieces(self._checkpoint, header, writer)
                with _naming_damage(self._checkpoint, self._files[shard.name]):
                    restored = _rebuild(shard, header, pieces, ring, self._progress, stop)
                writer.finish()
            except BaseException:
                writer.abandon()
                raise
            with lock:
                sync_folders(self._out)
                journal.append({"shard": shard.name, "sha256": restored.sha256})
                hold.keep()
                done[shard.name] = restored
                self._progress.event("shard", name=shard.name, sha256=restored.sha256, bytes=restored.size)
                for file in self._files[shard.name]:
                    users[file] -= 1
                if self._consume:
                    self._free(file for file in self._files[shard.name] if not users[file])

        run_all(rebuild, [shard for shard in self._shards if shard.name not in done], workers=self._jobs)

    def _require_same(self, contents: JournalContents) -> None:
        if contents.begin.get("task") != "restore" or contents.begin.get("manifest") != self._manifest_name():
            raise ManifestError(
                f"{self._out}: another command was interrupted here; finish that first, or choose another folder"
            )

    def _recorded(self, contents: JournalContents) -> dict[str, RestoredShard]:
        """The shards that are recorded and still there; hashed again where files may yet be freed for them."""
        found = {}
        recorded = {str(record.get("shard")): record.get("sha256") for record in contents.records}
        for shard in self._shards:
            path = self._out / shard.name
            sha256 = recorded.get(shard.name)
            gone = [file for file in self._files[shard.name] if not (self._checkpoint.root / file).exists()]
            is_there = path.exists() and path.stat().st_size == shard.size
            # One whose record was lost has only its own bytes to speak for it, if they cannot be made again.
            if is_there and (isinstance(sha256, str) or gone):
                is_doubted = (
                    self._paranoid
                    or not isinstance(sha256, str)
                    or (self._consume and len(gone) < len(self._files[shard.name]))
                )
                if shard.sha256 is not None and (not is_doubted or hash_file(path) == shard.sha256):
                    found[shard.name] = RestoredShard(name=shard.name, size=shard.size, sha256=shard.sha256)
            if shard.name not in found and gone:
                raise IntegrityError(
                    f"{self._out / shard.name}: is damaged, and {gone[0]}, which it was made from, was freed; "
                    "put the shard back from another copy"
                )
        return found

    def _check_room(self, done: Mapping[str, RestoredShard]) -> None:
        """What an earlier restore has taken is no longer free, and is no longer needed."""
        documents = _kept_documents(self._checkpoint)
        names = [document.source_name or document.path for document in documents]
        used = used_bytes(self._out, [*(shard.name for shard in self._shards), *names, JOURNAL_NAME])
        files = self._checkpoint.manifest.files
        there = [file for file in files if (self._checkpoint.root / file.path).exists()]
        if self._consume and same_disk(self._checkpoint.root, self._out):
            needed = consume_peak_bytes(self._checkpoint, self._headers, self._jobs)
            freed = sum(file.size for file in files) - sum(file.size for file in there)
            # Restored without --consume: there twice until its files are freed, and no part of the peak.
            used = max(0, used - max(freed, sum(shard.size for shard in done.values())))
        else:
            holes = sum(file.size - data_bytes(self._checkpoint.root / file.path) for file in there)
            needed = max(0, sum(shard.size for shard in self._shards) - holes)
            needed += sum(document.content_size for document in documents)
        check_room(self._out, max(0, needed - used))

    def _set_aside(self) -> None:
        root = self._checkpoint.root
        if (root / MANIFEST_NAME).exists():
            os.rename(root / MANIFEST_NAME, root / ASIDE_NAME)
            sync_folder(root)

    def _free(self, files: Iterable[str]) -> None:
        for file in files:
            if (self._checkpoint.root / file).exists():
                free_file(self._checkpoint.root / file)

    def _manifest_name(self) -> str:
        """What tells this checkpoint from others: the sha256 of its manifest's bytes."""
        root = self._checkpoint.root
        path = root / MANIFEST_NAME
        return sha256_hex((path if path.exists() else root / ASIDE_NAME).read_bytes())


def _pieces(checkpoint: Checkpoint, header: Header, writer: Writer | None) -> list[Piece | Given]:
    """All of a shard behind its header: tensors from wherever they lie now, and what is between them."""

    def target(begin: int) -> Target | None:
        return None if writer is None else Target(open=lambda: writer, offset=len(header.raw) + begin)

    pieces: list[tuple[int, Piece | Given]] = []
    for tensor in header.tensors:
        place = checkpoint.locate(tensor.name)
        assert place is not None
        path = checkpoint.path(place.file)
        file = LocalFile(path) if place.codec == "none" else PackedFile(path, place.unpacked_size)
        piece = Piece(file=file, offset=place.offset, size=place.size, target=target(tensor.begin))
        pieces.append((tensor.begin, piece))
    pieces += [(gap.begin, Given(content=gap.content, target=target(gap.begin))) for gap in header.gaps]
    # Stable: an empty tensor stays where the header has it.
    return [piece for _, piece in sorted(pieces, key=itemgetter(0))]


def _rebuild(
    shard: Shard, header: Header, pieces: list[Piece | Given], ring: Ring, progress: Progress, stop: StopFlag
) -> RestoredShard:
    """Stream one shard, its saved header first, and prove it."""
    hasher = hashlib.sha256(header.raw)
    pump(pieces, whole=hasher, digests=False, ring=ring, progress=progress, stop=stop)
    digest = hasher.hexdigest()
    if shard.sha256 is not None and digest != shard.sha256:
        raise IntegrityError(f"{shard.name}: its rebuilt bytes have sha256 {digest}, the source had {shard.sha256}")
    return RestoredShard(name=shard.name, size=header.file_bytes, sha256=digest)


@contextmanager
def _naming_damage(checkpoint: Checkpoint, paths: Collection[str]) -> Iterator[None]:
    """Say of a shard that is not what it was which of the files it was made from is damaged, and where.

    `reshard verify` cannot be sent for: it refuses a folder that is being taken apart.
    """
    try:
        yield
    except IntegrityError as error:
        files = tuple(file for file in checkpoint.manifest.files if file.path in paths)
        part = Checkpoint(checkpoint.folder, replace(checkpoint.manifest, files=files, documents=()))
        with Progress(0, label="", quiet=True) as unseen:
            damage = verify(part, jobs=1, progress=unseen)
        named = [f"{found.path}: bytes {found.begin}-{found.end} are damaged" for found in damage[:SHOWN_DAMAGE]]
        if named:
            named.append("put a good copy there and run again")
        else:
            named = ["every tensor's digest is right, so what the manifest records of the shard is not"]
        raise IntegrityError("; ".join([str(error), *named])) from error


def _kept_documents(checkpoint: Checkpoint) -> list[Document]:
    """Those that go back into the source as files."""
    return [
        document
        for document in checkpoint.manifest.documents
        if document.source_name is not None and document.role != "source_header"
    ]


def _restore_document(checkpoint: Checkpoint, document: Document, out: Path) -> None:
    assert document.source_name is not None
    target = out / document.source_name
    if document.codec != "none":
        write_file(target, read_document(checkpoint, document))
        return
    path = resolve_inside(checkpoint.root, document.path)
    size, sha256 = copy_file(path, target)
    if (size, sha256) != (document.size, document.sha256):
        target.unlink()
        raise IntegrityError(f"{path}: its bytes are not those in the manifest; it is damaged")


def _prove_document(checkpoint: Checkpoint, document: Document) -> None:
    if document.codec != "none":
        read_document(checkpoint, document)
        return
    path = resolve_inside(checkpoint.root, document.path)
    if path.stat().st_size != document.size or hash_file(path) != document.sha256:
        raise IntegrityError(f"{path}: its bytes are not those in the manifest; it is damaged")


def _files_of(checkpoint: Checkpoint) -> dict[str, str]:
    """The file that holds each tensor."""
    return {tensor.name: file.path for file in checkpoint.manifest.files for tensor in file.tensors}


def _remove_rest(checkpoint: Checkpoint) -> None:
    """Remove what is left of a checkpoint whose source is whole again; the manifest, which names it, last."""
    root = checkpoint.root
    for document in checkpoint.manifest.documents:
        (root / document.path).unlink(missing_ok=True)
    paths = [file.path for file in checkpoint.manifest.files]
    paths += [document.path for document in checkpoint.manifest.documents]
    folders = {
        folder for path in paths for folder in (root / path).parents if folder != root and folder.is_relative_to(root)
    }
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        # A folder that somebody put something into stays.
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    sync_folder(root)
    (root / ASIDE_NAME).unlink(missing_ok=True)
    sync_folder(root)


def _remove_empty(root: Path) -> None:
    try:
        root.rmdir()
    except OSError as error:
        if error.errno not in FOLDER_STAYS:
            raise ToolkitError(f"{root}: all is restored, but it cannot be removed: {error.strerror}") from error
    sync_folder(root.parent)
