"""What the cache asks of Linux beyond Python's own calls: locks that threads have too, and holes in files.

A lock belongs to an open file, so two threads that opened one file exclude each other as two processes do; it ends with
the descriptor, whatever happens to its process.
"""

import ctypes
import errno
import fcntl
import os
import struct

from manifests.errors import ToolkitError

_libc = ctypes.CDLL(None, use_errno=True)
_PUNCH_HOLE = 0x02 | 0x01  # and keep the size
_FLOCK = struct.Struct("hhqqi4x")

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says when a disk has no room."""

SHARED, EXCLUSIVE, FREE = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK


def lock(descriptor: int, kind: int, begin: int, size: int, *, wait: bool = True) -> bool:
    """Lock bytes of an open file, or change or end its lock of them; they need not be there.

    Args:
        descriptor: Of the file; open for writing where the lock is exclusive.
        kind: SHARED, EXCLUSIVE or FREE.
        begin: First byte.
        size: How many.
        wait: Until it can be had.

    Returns:
        Whether it was had; a lock that the file had before stays when not.
    """
    if not hasattr(fcntl, "F_OFD_SETLKW"):
        raise ToolkitError("checkpoints on web servers are run on Linux only: this system has no locks for the cache")
    command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
    try:
        fcntl.fcntl(descriptor, command, _FLOCK.pack(kind, os.SEEK_SET, begin, size, 0))
    except OSError as error:
        if wait or error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    return True


def punch(descriptor: int, begin: int, size: int) -> None:
    """Free the whole pages of a range, which reads as zeros then.

    Raises:
        OSError: The file system cannot.
    """
    if not hasattr(_libc, "fallocate64"):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
    if _libc.fallocate64(descriptor, _PUNCH_HOLE, ctypes.c_int64(begin), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
