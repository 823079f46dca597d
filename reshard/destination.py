"""An output folder from empty to complete: refuse what must not be touched, write small files, undo a failure.

Knows folders and files; it must not know tensors, plans or manifests.
"""

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from manifests.errors import LockedError, ResourceError, ToolkitError
from manifests.storage import sync_folder
from reshard.blocks import Reader, Writer, write_error
from reshard.lock import lock_folder


def check_destination(source: Path, destination: Path) -> None:
    """Refuse a destination that holds anything or overlaps the source.

    Raises:
        LockedError: Another process is writing there.
        ToolkitError: Not empty, not a folder, or overlapping.
    """
    real_source, real_destination = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if real_destination == real_source:
        raise ToolkitError(f"{destination}: is the source itself; choose a folder beside it")
    if real_destination.is_relative_to(real_source) or real_source.is_relative_to(real_destination):
        raise ToolkitError(f"{destination}: lies inside {source} or around it; choose a folder beside it")
    if destination.exists():
        if not destination.is_dir():
            raise ToolkitError(f"{destination}: is a file; choose a new or empty folder")
        # Under the lock, so that a folder that is being written is called so, and not merely full.
        with lock_folder(destination):
            _check_empty(destination)


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
    existing = Path(os.path.realpath(path))
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _check_empty(destination: Path) -> None:
    if any(destination.iterdir()):
        raise ToolkitError(
            f"{destination}: is not empty; choose a new or empty folder, or delete what an interrupted run left"
        )


@contextmanager
def all_or_nothing(destination: Path) -> Iterator[None]:
    """Make the folder and hold its lock; after any failure remove everything that was put there.

    Raises:
        LockedError: Another process is writing there.
        ToolkitError: It is not empty, or cannot be made, or the disk reports an error.
        ResourceError: The disk is full.
    """
    made = [folder for folder in (destination, *destination.parents) if not folder.exists()]
    with _one_interrupt() as ignore_interrupts:
        try:
            destination.mkdir(parents=True, exist_ok=True)
            with lock_folder(destination):
                # Asked again under the lock: what is found from here on is ours, and so ours to remove.
                _check_empty(destination)
                try:
                    yield
                except BaseException:
                    ignore_interrupts()
                    _empty(destination)
                    raise
        except LockedError:
            raise
        except BaseException as failure:
            ignore_interrupts()
            _remove_folders(made)
            if isinstance(failure, OSError) and not isinstance(failure, ToolkitError):
                raise write_error(destination, failure) from failure
            raise


def _empty(folder: Path) -> None:
    """Remove all that is in a folder, as far as the disk lets us: the failure that led here is what must be told."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()


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
    """Copy one small file durably; return its size and sha256."""
    size = source.stat().st_size
    hasher = hashlib.sha256()
    reader, writer = Reader(source), Writer(destination)
    try:
        offset = 0
        for block in reader.blocks(0, size):
            hasher.update(block)
            writer.write(block, offset)
            offset += len(block)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    finally:
        reader.close()
    return size, hasher.hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Write one small file durably."""
    writer = Writer(path)
    try:
        writer.write(data, 0)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


def sync_folders(destination: Path) -> None:
    """Make every rename durable before the manifest says that the files are there."""
    for folder, _, _ in os.walk(destination):
        sync_folder(Path(folder))
