"""Make a damaged checkpoint whole again: what `verify` finds is taken from the source or from another resharded copy.

No file is changed where it lies, and none is replaced by one that is not proven. So an interrupted repair leaves each
file damaged or repaired, and repeating it goes on with the rest.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from manifests import inventory
from manifests.checkpoint import Checkpoint
from manifests.errors import IntegrityError, ManifestError, ResourceError, SourceNotFoundError, ToolkitError
from manifests.folder import LocalFolder
from manifests.inventory import check_finished
from manifests.jsontext import parse_json
from manifests.paths import MANIFEST_NAME
from manifests.questions import Watch
from manifests.safety import require_folder
from manifests.schema import Document, FileEntry
from manifests.storage import MAX_MANIFEST_BYTES, load, save
from reshard.blocks import write_error
from reshard.destination import check_room, sync_folders
from reshard.lock import lock_folder
from reshard.progress import Progress
from reshard.rebuild import Rebuilder, Repaired
from reshard.saved import require_source
from reshard.verify import Damage, verify
from reshard.workers import StopFlag, run_all


class StartProgress(Protocol):
    """Begins to show a pass over so many bytes."""

    def __call__(self, total_bytes: int, *, label: str) -> Progress:
        """Return what counts them."""


class UnrepairedError(IntegrityError):
    """Some files are damaged still: the source's bytes are wrong too, or not there.

    Attributes:
        repaired: The files that are whole again all the same.
        failures: A sentence for each of the others.
    """

    def __init__(self, repaired: Sequence[Repaired], failures: Sequence[str]) -> None:
        more = f" (and {len(failures) - 1} more files are damaged still)" if len(failures) > 1 else ""
        super().__init__(f"{failures[0]}{more}")
        self.repaired = tuple(repaired)
        self.failures = tuple(failures)


def repair(
    folder: Path, source_path: Path | str, *, jobs: int, progress: StartProgress, watch: Watch | None = None
) -> list[Repaired]:
    """Verify a resharded checkpoint, and replace what is damaged.

    Args:
        folder: The checkpoint.
        source_path: Its source, one shard of that, or another resharded copy; or the address of one of these. A file
            of a split GGUF model stands for the set.
        jobs: Files at the same time.
        progress: Called for the verification, and once more for the repair if anything is damaged.
        watch: Is told how far the headers are that a server is asked for.

    Returns:
        What was repaired, in the order of the manifest, which comes first itself.

    Raises:
        UnrepairedError: Not all could be repaired.
        IncompleteError: The folder is not finished.
        LockedError: Another process writes it.
        ManifestError: The manifest is damaged, and the source has none that can replace it.
        ResourceError: The disk is full.
        SourceNotFoundError: One of the two is not there.
        RemoteError: The server of the source cannot be reached.
    """
    require_folder(folder, "give the resharded checkpoint that is damaged")
    source = inventory.open_set(source_path, watch)
    if isinstance(source.folder, LocalFolder) and os.path.samefile(source.root, folder):
        raise ToolkitError(f"{folder}: cannot be repaired from itself; give its source or another copy")

    def look(checkpoint: Checkpoint) -> list[Damage]:
        entries = _entries(checkpoint)
        with progress(sum(entry.size for entry in entries), label="verify") as shown:
            return verify(checkpoint, jobs=jobs, progress=shown)

    with lock_folder(folder):
        check_finished(folder)
        # What an interrupted repair renamed may be in memory only, and would be found right.
        sync_folders(folder)
        repaired = []
        try:
            checkpoint = Checkpoint(LocalFolder(folder), load(folder))
            require_source(checkpoint)
        except (ManifestError, SourceNotFoundError) as problem:
            checkpoint = Checkpoint(LocalFolder(folder), source.manifest)
            damage = _replace_manifest(checkpoint, source, problem, look)
            repaired.append(_repaired_manifest(folder))
        else:
            damage = look(checkpoint)
        return _replace_damaged(checkpoint, source, damage, repaired, jobs=jobs, progress=progress)


def _entries(checkpoint: Checkpoint) -> list[FileEntry | Document]:
    return [*checkpoint.manifest.files, *checkpoint.manifest.documents]


def _repaired_manifest(folder: Path) -> Repaired:
    return Repaired(path=MANIFEST_NAME, taken_bytes=(folder / MANIFEST_NAME).stat().st_size)


def _replace_manifest(
    checkpoint: Checkpoint,
    source: Checkpoint,
    problem: ManifestError | SourceNotFoundError,
    look: Callable[[Checkpoint], list[Damage]],
) -> list[Damage]:
    """Take the copy's manifest if it is the one that was here; return what is damaged by it.

    It is when its own digest stands in what is left of ours. Where even that is gone, every file must be as it says: a
    model that was trained on from this one has files of the same form, and many of the same bytes.
    """
    if source.manifest.layout != "resharded":
        raise type(problem)(f"{problem}; {source.folder} is not resharded, so it has none to replace it: give a copy")
    path = checkpoint.root / MANIFEST_NAME
    raw = source.folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES) or b""
    digest = parse_json(raw, what=str(source.folder))["manifest_sha256"]
    is_same = path.is_file() and path.stat().st_size <= MAX_MANIFEST_BYTES and digest.encode() in path.read_bytes()
    if not is_same and isinstance(problem, ManifestError) and any(found.loc == "version" for found in problem.problems):
        # Another program's, and for all that can be seen as it should be.
        raise problem
    damage = look(checkpoint)
    if damage and not is_same:
        paths = list(dict.fromkeys(found.path for found in damage))
        raise type(problem)(
            f"{problem}; the manifest of {source.folder} does not fit, for {len(paths)} files are not as it says, "
            f"first {paths[0]}: give a copy of this very checkpoint"
        )
    save(source.manifest, checkpoint.root)
    return damage


def _replace_damaged(
    checkpoint: Checkpoint,
    source: Checkpoint,
    damage: Sequence[Damage],
    repaired: list[Repaired],
    *,
    jobs: int,
    progress: StartProgress,
) -> list[Repaired]:
    """Replace every damaged file; what cannot be is told when all others are done."""
    found: dict[str, list[Damage]] = {}
    for one in damage:
        found.setdefault(one.path, []).append(one)
    entries = [entry for entry in _entries(checkpoint) if entry.path in found]
    if not entries:
        return repaired
    folder = checkpoint.root
    _check_room(folder, entries, jobs)
    rebuilder = Rebuilder(checkpoint, source)
    files: dict[str, FileEntry] = {}
    documents: dict[str, Document] = {}

    with progress(sum(entry.size for entry in entries), label="repair") as shown:

        def work(entry: FileEntry | Document, stop: StopFlag) -> Repaired | str:
            shown.at(entry.path)
            try:
                if isinstance(entry, Document):
                    done, documents[entry.path] = rebuilder.rebuild_document(entry, shown, stop)
                else:
                    done, files[entry.path] = rebuilder.rebuild_file(entry, found[entry.path], shown, stop)
            except (ToolkitError, OSError) as error:
                failure = error if isinstance(error, ToolkitError) else write_error(folder / entry.path, error)
                if isinstance(failure, ResourceError):
                    raise failure from error
                message = f"{folder / entry.path}: stays damaged: {failure}"
                shown.event("failed", path=entry.path, message=message)
                return message
            shown.event("repaired", **dataclasses.asdict(done))
            return done

        results = run_all(work, entries, workers=jobs)
    repaired += [result for result in results if isinstance(result, Repaired)]
    manifest = dataclasses.replace(
        checkpoint.manifest,
        files=tuple(files.get(file.path, file) for file in checkpoint.manifest.files),
        documents=tuple(documents.get(document.path, document) for document in checkpoint.manifest.documents),
    )
    if manifest != checkpoint.manifest:
        save(manifest, folder)
        repaired.append(_repaired_manifest(folder))
    failures = [result for result in results if isinstance(result, str)]
    if failures:
        raise UnrepairedError(repaired, failures)
    return repaired


def _check_room(folder: Path, entries: Sequence[FileEntry | Document], jobs: int) -> None:
    """Each missing file takes its size; of the others as many as are written at the same time."""
    missing = [entry.size for entry in entries if not (folder / entry.path).exists()]
    replaced = sorted((entry.size for entry in entries if (folder / entry.path).exists()), reverse=True)
    check_room(folder, sum(missing) + sum(replaced[:jobs]))
