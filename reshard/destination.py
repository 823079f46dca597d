"""An output folder from empty to complete: refuse what must not be touched, write small files, undo a failure.

Knows folders and files; it must not know tensors, plans or manifests.
"""

import hashlib
import os
import shutil
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from manifests.errors import LockedError, ResourceError, ToolkitError
from manifests.paths import JOURNAL_NAME
from manifests.storage import sync_folder
from reshard.blocks import ALIGN_BYTES, BLOCK_BYTES, Writer, aligned_buffer, temporary_path, write_error
from reshard.filesystem import existing_folder, free_inodes
from reshard.lock import lock_folder
from reshard.openable import LocalFile, Openable, read_blocks


def check_apart(source: Path | None, destination: Path) -> None:
    """Refuse a destination that is a file or overlaps the source, which may not be on this machine.

    Raises:
        ToolkitError: It does.
    """
    if source is not None:
        real_source, real_destination = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
        if real_destination == real_source:
            raise ToolkitError(f"{destination}: is the source itself; choose a folder beside it")
        if real_destination.is_relative_to(real_source) or real_source.is_relative_to(real_destination):
            raise ToolkitError(f"{destination}: lies inside {source} or around it; choose a folder beside it")
    if destination.exists() and not destination.is_dir():
        raise ToolkitError(f"{destination}: is a file; choose a new or empty folder")


def check_writable(destination: Path) -> None:
    """Refuse a folder in which nothing can be made: itself, or the one in which it would be made.

    Raises:
        ToolkitError: The system would not let this process.
    """
    folder = existing_folder(destination)
    if not folder.is_dir():
        raise ToolkitError(f"{destination}: {folder} is a file; choose another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ToolkitError(f"{destination}: {folder} may not be written to; choose another folder")


def check_empty(destination: Path) -> None:
    """Refuse a folder that holds anything, but for a journal that was never finished.

    Raises:
        ToolkitError: It does.
    """
    if any(entry.name != temporary_path(Path(JOURNAL_NAME)).name for entry in destination.iterdir()):
        raise ToolkitError(
            f"{destination}: is not empty, and what is there is neither a resharded checkpoint nor a run to continue; "
            "choose a new or empty folder"
        )


def check_room(destination: Path, needed: int) -> None:
    """Refuse a disk with too little room, before anything is written.

    Raises:
        ResourceError: Fewer bytes are free.
    """
    free = free_bytes(destination)
    if free < needed:
        raise ResourceError(f"{destination}: needs {needed:,} bytes, the disk has {free:,} free; nothing was written")


def free_bytes(path: Path) -> int:
    """Free space on the disk of a path, which need not exist yet."""
    return shutil.disk_usage(existing_folder(path)).free


def check_inodes(destination: Path, needed: int) -> None:
    """Refuse a disk on which so many files cannot be made.

    Raises:
        ResourceError: It has fewer inodes left.
    """
    free = free_inodes(destination)
    if free is not None and free < needed:
        raise ResourceError(
            f"{destination}: needs {needed:,} files and folders, the file system can hold {free:,} more; "
            "nothing was written"
        )


def used_bytes(folder: Path, paths: Iterable[str]) -> int:
    """Bytes that these files of a folder take, finished or not; holes do not count, nor what is not there."""
    used = 0
    for path in paths:
        for candidate in (folder / path, temporary_path(folder / path)):
            with suppress(OSError):
                status = os.lstat(candidate)
                used += min(status.st_size, status.st_blocks * 512) if stat.S_ISREG(status.st_mode) else 0
    return used


class Hold:
    """A folder that this process has locked for writing, and what happens to it after a failure."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._is_ours = False

    def own(self) -> None:
        """Say that the folder was empty: after a failure, all that is in it is removed."""
        self._is_ours = True

    def keep(self) -> None:
        """Say that something in it is worth keeping: after a failure it stays, and a later run goes on from it."""
        self._is_ours = False

    def clear(self) -> None:
        """Remove what is ours, as far as the disk lets us: the failure that led here is what must be told."""
        if self._is_ours:
            empty_folder(self.folder)


@contextmanager
def hold_folder(destination: Path) -> Iterator[Hold]:
    """Make the folder and hold its lock; a failure leaves it as it was found, or as far as it is worth keeping.

    Raises:
        LockedError: Another process is writing there.
        ToolkitError: It cannot be made, or the disk reports an error.
        ResourceError: The disk is full.
    """
    made = [folder for folder in (destination, *destination.parents) if not folder.exists()]
    with _one_interrupt() as ignore_interrupts:
        try:
            destination.mkdir(parents=True, exist_ok=True)
            _sync_way(destination)
            with lock_folder(destination):
                hold = Hold(destination)
                try:
                    yield hold
                except BaseException:
                    ignore_interrupts()
                    hold.clear()
                    raise
        except LockedError:
            raise
        except BaseException as failure:
            ignore_interrupts()
            _remove_folders(made)
            if isinstance(failure, OSError) and not isinstance(failure, ToolkitError):
                raise write_error(destination, failure) from failure
            raise


def _sync_way(folder: Path) -> None:
    """Make the way to a folder durable, before anything is freed for what will be in it.

    Also where it was there: a run that was killed may have made it just before, and synced nothing.
    """
    device = folder.stat().st_dev
    for parent in folder.parents:
        if parent.stat().st_dev != device:
            return
        try:
            sync_folder(parent)
        except PermissionError:
            return  # another user's; what is ours lies below


def empty_folder(folder: Path) -> None:
    """Remove all that is in a folder, as far as the disk lets us."""
    with suppress(OSError):
        others = [entry for entry in folder.iterdir() if entry.name != JOURNAL_NAME]
        for entry in others:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        # The journal last, and only when all else is gone: without it nobody could go on from what stays.
        if not any(entry.name != JOURNAL_NAME for entry in folder.iterdir()):
            (folder / JOURNAL_NAME).unlink(missing_ok=True)


def _remove_folders(folders: Iterable[Path]) -> None:
    """Remove empty folders, the innermost first; one that is not there or was filled by someone else stays."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextmanager
def _one_interrupt() -> Iterator[Callable[[], None]]:
    """Let one request to stop through and ignore the next ones: who is impatient would leave half of the cleaning up.

    Yields:
        What ignores even the first one from now on.
    """
    # Only a signal that is handled at all: a process in the background is often told to ignore Ctrl-C.
    before = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(handler := signal.getsignal(number))
    }
    if threading.current_thread() is not threading.main_thread():
        before = {}

    def ignore() -> None:
        for number in before:
            signal.signal(number, signal.SIG_IGN)

    def stop(number: int, frame: FrameType | None) -> None:
        ignore()
        raise KeyboardInterrupt

    try:
        for number in before:
            signal.signal(number, stop)
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def copy_file(source: Path, destination: Path) -> tuple[int, str]:
    """Copy one small file durably; return its size and sha256. A finished copy that is there already is kept."""
    size = source.stat().st_size
    return size, copy_readable(LocalFile(source), size, destination)


def copy_readable(source: Openable, size: int, destination: Path) -> str:
    """Copy one small file from wherever it is, as `copy_file` does; return its sha256."""
    hasher = hashlib.sha256()
    with closing(source.open()) as reader:
        if destination.exists():
            if destination.stat().st_size == size and (known := hash_file(destination)) == hash_readable(source, size):
                return known
            os.unlink(destination)
        writer = _fresh_writer(destination)
        try:
            offset = 0
            for block in read_blocks(reader, block_for(size), 0, size):
                hasher.update(block)
                writer.write(block, offset)
                offset += len(block)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    return hasher.hexdigest()


def hash_file(path: Path) -> str:
    """The sha256 of a whole file."""
    return hash_readable(LocalFile(path), path.stat().st_size)


def hash_readable(file: Openable, size: int) -> str:
    """The sha256 of a whole file of so many bytes, wherever it is."""
    hasher = hashlib.sha256()
    with closing(file.open()) as reader:
        for block in read_blocks(reader, block_for(size), 0, size):
            hasher.update(block)
    return hasher.hexdigest()


def block_for(size: int) -> memoryview:
    """Memory to read so many bytes: most small files are smaller than a block, and touching one takes as long."""
    return aligned_buffer(min(size + 2 * ALIGN_BYTES, BLOCK_BYTES))


def write_file(path: Path, data: bytes) -> None:
    """Write one small file durably; what an interrupted run left of it is replaced."""
    writer = _fresh_writer(path)
    try:
        writer.write(data, 0)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def _fresh_writer(path: Path) -> Writer:
    temporary_path(path).unlink(missing_ok=True)
    return Writer(path)


def sync_folders(destination: Path) -> None:
    """Make every rename durable before the manifest says that the files are there."""
    for folder, _, _ in os.walk(destination, onerror=_fail):
        sync_folder(Path(folder))


def _fail(error: OSError) -> NoReturn:
    raise error
