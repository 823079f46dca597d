"""Cold storage: the experts of a checkpoint packed where they lie, one by one, and unpacked again.

In between the folder is not complete, so its manifest steps aside before the first file and a new one is written behind
the last. Each file is made beside the other, durable and proven, then recorded in the journal; only then the other is
removed. So what is interrupted anywhere is continued by the same command, and the disk needs room for one expert of
each job. A damaged expert stays as it is, and so stands in the new manifest: it can be repaired, and holds up no other.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from manifests.digest import sha256_hex
from manifests.errors import IntegrityError, ManifestError, SourceNotFoundError, ToolkitError
from manifests.inventory import check_finished
from manifests.paths import ASIDE_NAME, INDEX_NAME, JOURNAL_NAME, MANIFEST_NAME, Kind
from manifests.safety import require_folder, resolve_inside
from manifests.schema import FileEntry, Manifest
from manifests.storage import decode, load, save, sync_folder
from reshard.blocks import temporary_path
from reshard.destination import check_room, hold_folder, sync_folders
from reshard.documents import write_index
from reshard.forms import find_fault, make_other, other_entry, other_path, prove_other
from reshard.journal import Journal, JournalContents, end_journal, read_begin, read_journal
from reshard.progress import Progress
from reshard.workers import PoisonLock, StopFlag, run_all

Task = Literal["pack", "unpack"]


def pack(folder: Path, *, jobs: int, progress: Progress) -> Manifest:
    """Compress every expert of a resharded checkpoint, or go on with that. Its dense files stay as they are.

    Args:
        folder: The checkpoint.
        jobs: Files at the same time.
        progress: Counts bytes of unpacked experts; `expert_bytes` is all of them.

    Returns:
        The new manifest, or the one that is there when there is nothing to do.

    Raises:
        IntegrityError: Experts are damaged or missing; all others are packed.
        SourceNotFoundError: There is no resharded checkpoint.
        ManifestError: Another command was interrupted here.
        ToolkitError: An expert is a link, something is in the way, or the disk reports an error.
        LockedError, ResourceError: See `reshard.destination`.
    """
    return _run(folder, "pack", jobs, progress)


def unpack(folder: Path, *, jobs: int, progress: Progress) -> Manifest:
    """Undo `pack`, byte for byte. See there."""
    return _run(folder, "unpack", jobs, progress)


def interrupted_task(folder: Path) -> Task | None:
    """Which of the two was interrupted in a folder, and is to be finished before anything else is done there.

    Raises:
        IntegrityError: See `reshard.journal.read_begin`.
    """
    return _task_of(read_begin(folder)) if (folder / JOURNAL_NAME).exists() else None


def expert_bytes(folder: Path) -> int:
    """Bytes of all experts of a checkpoint when unpacked, also of one in which `pack` or `unpack` was interrupted.

    Raises:
        ToolkitError: See `pack`.
    """
    is_aside = not (folder / MANIFEST_NAME).exists() and interrupted_task(folder) is not None
    return _expert_bytes(_load_aside(folder) if is_aside else _load(folder))


def _run(folder: Path, task: Task, jobs: int, progress: Progress) -> Manifest:
    require_folder(folder, "give a resharded checkpoint")
    with hold_folder(folder):
        contents = _read_own_journal(folder)
        if contents is not None and _task_of(contents.begin) != task:
            # What the other task did is brought to an end, and then undone like that of any complete checkpoint.
            _resume(folder, contents, jobs, progress).settle()
            contents = None
        if contents is not None:
            return _resume(folder, contents, jobs, progress).execute()
        manifest = _load(folder)
        files = _files_of(manifest, task)
        if not files:
            progress.skip(_expert_bytes(manifest))
            return manifest
        _check_files(folder, files)
        _check_room(folder, files, jobs)
        return _Conversion(folder, manifest, task, _begin(folder, task), {}, jobs, progress).execute()


def _begin(folder: Path, task: Task) -> Journal:
    """From here on the folder is not complete."""
    journal = Journal.create(folder, {"task": task, "manifest": sha256_hex((folder / MANIFEST_NAME).read_bytes())})
    os.rename(folder / MANIFEST_NAME, folder / ASIDE_NAME)
    sync_folder(folder)
    return journal


def _resume(folder: Path, contents: JournalContents, jobs: int, progress: Progress) -> "_Conversion":
    """Go on from a journal."""
    task, manifest = _task_of(contents.begin), _load_aside(folder)
    assert task is not None
    if contents.begin.get("manifest") != sha256_hex((folder / ASIDE_NAME).read_bytes()):
        raise ManifestError(f"{folder / ASIDE_NAME}: is not the manifest that was set aside; put back a copy of it")
    recorded = _read_records(folder, contents, {file.path: file for file in _files_of(manifest, task)})
    return _Conversion(folder, manifest, task, contents.reopen(), recorded, jobs, progress)


def _read_records(folder: Path, contents: JournalContents, files: Mapping[str, FileEntry]) -> dict[str, FileEntry]:
    """What the journal says was made, by the path of what it was made of."""
    entries = {}
    for record in contents.records:
        match record:
            case {"file": str(path), "size": int(size), "stored_sha256": str() | None as sha256} if path in files:
                entries[path] = other_entry(files[path], size=size, stored_sha256=sha256)
            case _:
                raise ManifestError(
                    f"{folder / JOURNAL_NAME}: a record has not the form of a {contents.begin.get('task')}'s; it was "
                    "not written by this program"
                )
    return entries


class _Conversion:
    """One `pack` or `unpack` of a folder that is held and whose manifest stands aside."""

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        task: Task,
        journal: Journal,
        recorded: Mapping[str, FileEntry],
        jobs: int,
        progress: Progress,
    ) -> None:
        self._folder = folder
        self._manifest = manifest
        self._task = task
        self._journal = journal
        self._recorded = recorded
        self._jobs = jobs
        self._progress = progress
        self._files = _files_of(manifest, task)
        self._faults: list[ToolkitError] = []
        self._lock = PoisonLock()

    def execute(self) -> Manifest:
        """Convert what is not yet converted, and complete the folder."""
        left = [file for file in self._files if not self._is_done(file)]
        self._progress.skip(_expert_bytes(self._manifest) - sum(file.unpacked_size for file in left))
        manifest = self._complete(left, makes=True)
        if self._faults:
            # Wrong or missing bytes, or a disk that does not give them.
            kinds = (IntegrityError, SourceNotFoundError)
            kind = IntegrityError if any(isinstance(fault, kinds) for fault in self._faults) else ToolkitError
            more = f" (and {len(self._faults) - 1} more)" if len(self._faults) > 1 else ""
            raise kind(
                f"{self._faults[0]}{more}; it stays as it is, all else is {self._task}ed: mend it with "
                f"`reshard repair` and {self._task} again"
            )
        return manifest

    def settle(self) -> None:
        """Complete the folder with what is converted by now; every other file stays as it was."""
        self._complete([file for file in self._files if not self._is_done(file)], makes=False)

    def _complete(self, left: list[FileEntry], *, makes: bool) -> Manifest:
        def convert(file: FileEntry, stop: StopFlag) -> tuple[str, FileEntry]:
            return file.path, self._convert(file, stop, makes=makes)

        try:
            entries = {**self._recorded, **dict(run_all(convert, left, workers=self._jobs))}
        finally:
            self._journal.close()
        # All names are durable before the manifest vouches for them.
        sync_folders(self._folder)
        files = [entries.get(file.path, file) for file in self._manifest.files]
        index = write_index(
            (
                (file.path, ((tensor.name, tensor.size) for tensor in file.tensors))
                for file in files
                if file.codec == "none"
            ),
            self._folder,
        )
        sync_folder(self._folder)
        documents = [document for document in self._manifest.documents if document.path != INDEX_NAME]
        manifest = dataclasses.replace(
            self._manifest,
            files=tuple(files),
            documents=tuple(sorted([*documents, index], key=lambda document: document.path)),
        )
        save(manifest, self._folder)
        end_journal(self._folder)
        return manifest

    def _convert(self, file: FileEntry, stop: StopFlag, *, makes: bool) -> FileEntry:
        """The entry of a file in the new manifest: of what was made of it, or as it was."""
        self._progress.at(file.path)
        temporary_path(self._folder / other_path(file)).unlink(missing_ok=True)
        entry = self._adopt(file)
        if entry is not None:
            self._progress.advance(file.unpacked_size if makes else 0)
        elif not makes:
            return file
        else:
            try:
                entry = make_other(self._folder, file, progress=self._progress, stop=stop)
            except ToolkitError:
                fault = find_fault(self._folder, file)
                if fault is None:
                    raise
                with self._lock:
                    self._faults.append(fault)
                return file
        with self._lock:
            sync_folder((self._folder / entry.path).parent)
            if self._recorded.get(file.path) != entry:
                self._journal.append({"file": file.path, "size": entry.size, "stored_sha256": entry.stored_sha256})
        # A removal that is lost in a crash is found, and done again.
        (self._folder / file.path).unlink(missing_ok=True)
        return entry

    def _is_done(self, file: FileEntry) -> bool:
        """Whether a file's other form is recorded, and there with its size, and the file itself gone."""
        entry = self._recorded.get(file.path)
        if entry is None or os.path.lexists(self._folder / file.path):
            return False
        try:
            return resolve_inside(self._folder, entry.path).stat().st_size == entry.size
        except ToolkitError:
            return False

    def _adopt(self, file: FileEntry) -> FileEntry | None:
        """What an interrupted run made of a file, if it is right. If not, it is removed, but not as the only one."""
        target = self._folder / other_path(file)
        if not os.path.lexists(target):
            return None
        try:
            entry = prove_other(self._folder, file)
        except ToolkitError:
            if os.path.lexists(self._folder / file.path):
                target.unlink()
            return None
        # Who wrote it may have been killed before it was durable.
        _sync_file(target)
        return entry


def _task_of(begin: Mapping[str, Any]) -> Task | None:
    match begin.get("task"):
        case "pack":
            return "pack"
        case "unpack":
            return "unpack"
    return None


def _files_of(manifest: Manifest, task: Task) -> list[FileEntry]:
    """The files that a task converts."""
    return [file for file in manifest.files if file.kind is Kind.EXPERT and (file.codec == "none") == (task == "pack")]


def _expert_bytes(manifest: Manifest) -> int:
    return sum(file.unpacked_size for file in manifest.files if file.kind is Kind.EXPERT)


def _read_own_journal(folder: Path) -> JournalContents | None:
    """The journal of an interrupted `pack` or `unpack`; None when there is none, or all is done but its removal."""
    contents = read_journal(folder)
    # What a killed one renamed or removed last may be in memory only.
    sync_folder(folder)
    if contents is None:
        # Left when one was stopped as it began its journal.
        temporary_path(folder / JOURNAL_NAME).unlink(missing_ok=True)
        return None
    if _task_of(contents.begin) is None:
        raise ManifestError(f"{folder}: `reshard {contents.begin.get('task')}` was interrupted here; finish that first")
    if (folder / MANIFEST_NAME).exists():
        # It was stopped before it touched a file, or behind the last step.
        end_journal(folder)
        return None
    return contents


def _load(folder: Path) -> Manifest:
    if not (folder / MANIFEST_NAME).exists():
        check_finished(folder)
    return load(folder)


def _load_aside(folder: Path) -> Manifest:
    path = folder / ASIDE_NAME
    if not path.is_file():
        raise IntegrityError(f"{folder}: has neither {MANIFEST_NAME} nor {ASIDE_NAME}; put back a copy of one")
    return decode(path.read_bytes(), what=str(path))


def _check_files(folder: Path, files: list[FileEntry]) -> None:
    """Refuse files that do not lie here themselves, and to overwrite what we did not make."""
    root = Path(os.path.realpath(folder))
    for file in files:
        for path in (file.path, other_path(file)):
            if Path(os.path.realpath(folder / path)) != root / path:
                raise ToolkitError(
                    f"{folder / path}: is a link; only files that lie in the folder itself are packed and unpacked"
                )
        target = folder / other_path(file)
        if not os.path.lexists(target):
            continue
        try:
            prove_other(folder, file)
        except ToolkitError as error:
            raise ToolkitError(f"{target}: is in the way, and not what would be written there; move it away") from error


def _check_room(folder: Path, files: list[FileEntry], jobs: int) -> None:
    """Refuse a disk that would be full before the end."""
    # zstd makes nothing larger by more than a 256th, and some bytes for the frame.
    made = [file.size + file.size // 256 + 4096 if file.codec == "none" else file.unpacked_size for file in files]
    growth = sum(file.unpacked_size - file.size for file in files if file.codec != "none")
    manifest = (folder / MANIFEST_NAME).stat().st_size
    index = (folder / INDEX_NAME).stat().st_size if (folder / INDEX_NAME).exists() else 0
    check_room(folder, max(0, growth) + sum(sorted(made)[-jobs:]) + 2 * (manifest + index))


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
