"""An output folder from empty to complete: refuse what must not be touched, write small files, undo a failure.

Knows folders and files; it must not know tensors, plans or manifests.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.errors import ResourceError, ToolkitError
from manifests.storage import sync_folder
from reshard.blocks import Reader, Writer, write_error
from reshard.lock import lock_folder


def check_destination(source: Path, destination: Path, needed: int) -> None:
    """Refuse a destination that holds anything, overlaps the source, or has too little room.

    Raises:
        LockedError: Another process is writing there.
        ToolkitError: Not empty, not a folder, or overlapping.
        ResourceError: Too little free space.
    """
    real_source, real_destination = Path(os.path.realpath(source)), Path(os.path.realpath(destination))
    if real_destination.is_relative_to(real_source) or real_source.is_relative_to(real_destination):
        raise ToolkitError(f"{destination}: lies inside {source} or around it; choose a folder beside it")
    if destination.exists():
        if not destination.is_dir():
            raise ToolkitError(f"{destination}: is a file; choose a new or empty folder")
        # Under the lock, so that a folder that is being written is called so, and not merely full.
        with lock_folder(destination):
            _check_empty(destination)
    existing = real_destination
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(f"{destination}: needs {needed:,} bytes, the disk has {free:,} free; nothing was written")


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
        ToolkitError: It is not empty, or cannot be made.
    """
    made = not destination.exists()
    try:
        destination.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(destination, error) from error
    with lock_folder(destination):
        # Asked again under the lock: what is found from here on is ours, and so ours to remove.
        _check_empty(destination)
        try:
            yield
        except BaseException:
            for entry in destination.iterdir():
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
            if made:
                destination.rmdir()
            raise


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
