"""A folder for a benchmark's large files: room asked for first, everything removed at the end, however it ends.

It also brings the disk into the same state before each measurement: no page of a source in memory, and no removed
file still being given back to the device.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SETTLE_SECONDS_PER_GB = 0.7
"""Freed blocks are discarded when the journal is committed; the device is slower until it has done so."""


@contextmanager
def workspace(parent: Path, needed: int) -> Iterator[Path]:
    """Make a folder and remove it with all that is in it, after Ctrl-C and SIGTERM too.

    Raises:
        SystemExit: The disk has too little room.
    """
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed:
        sys.exit(f"{parent}: this benchmark needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")

    def stop(number: int, frame: FrameType | None) -> None:
        # A second one would leave half of the cleaning up.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    folder = Path(tempfile.mkdtemp(prefix="reshard-benchmark-", dir=parent.resolve()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        for number, handler in before.items():
            signal.signal(number, handler)


def evict(folder: Path) -> None:
    """Bring all files below a folder to the disk and out of the page cache."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def remove(folder: Path) -> None:
    """Remove a folder if it is there, and wait until the device has got its blocks back."""
    if not folder.exists():
        return
    size = sum(os.lstat(os.path.join(parent, name)).st_size for parent, _, names in os.walk(folder) for name in names)
    shutil.rmtree(folder)
    os.sync()
    time.sleep(SETTLE_SECONDS_PER_GB * size / 1e9)
