"""Map a whole file read-only, without keeping it open.

Python's own mmap holds a descriptor for each mapping, and a token of DeepSeek-V3 needs 464 expert files where many
systems allow 1,024 open ones. The system call itself needs none once the mapping stands.
"""

import ctypes
import errno
import mmap
import os
import weakref
from pathlib import Path

from manifests.errors import IntegrityError, ResourceError, SourceNotFoundError, ToolkitError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)

_FAILED = ctypes.c_void_p(-1).value
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


def map_file(path: Path, size: int) -> memoryview:
    """Map a file of a known size; nothing is read until a page is touched.

    The mapping ends when the view and everything cut from it are gone.

    Args:
        path: The file.
        size: Bytes that it must have, more than 0. Asked before mapping: touching a page behind the end of a file
            kills the process.

    Returns:
        Its bytes, read-only.

    Raises:
        SourceNotFoundError: There is no such file.
        IntegrityError: It has another size.
        ResourceError: The system has no room for another mapping or open file.
        ToolkitError: It cannot be opened for another reason.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise refusal(path, error.errno or 0) from error
    try:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise IntegrityError(f"{path}: has {found} bytes, expected {size}; `reshard verify` tells more")
        address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == _FAILED:
            raise refusal(path, ctypes.get_errno())
    finally:
        os.close(descriptor)
    array = (ctypes.c_ubyte * size).from_address(address)
    # Not at the end of the process, when threads may still read: the kernel unmaps then.
    weakref.finalize(array, _libc.munmap, address, size).atexit = False
    return memoryview(array).cast("B").toreadonly()


def refusal(path: Path | str, number: int) -> ToolkitError:
    """What to raise when a file could not be opened or mapped, by the system's error number."""
    if number in (errno.ENOENT, errno.ENOTDIR):
        return SourceNotFoundError(f"{path}: no such file; `reshard verify` tells more")
    reason = os.strerror(number)
    if number in _SCARCE:
        return ResourceError(f"{path}: cannot be mapped ({reason}); allow more open files or mappings (ulimit -n, -v)")
    return ToolkitError(f"{path}: cannot be mapped: {reason}")
