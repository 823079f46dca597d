"""One writer for a folder: a lock that the kernel gives back when its holder ends, however it ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.errors import LockedError


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold a folder for writing.

    The lock is on the folder itself, so nothing is left behind. File systems that cannot lock a folder (NFS) are
    written without one.

    Raises:
        LockedError: Another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno == errno.EWOULDBLOCK:
                raise LockedError(f"{folder}: another process is writing it; wait until it has ended") from error
            if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(descriptor)
