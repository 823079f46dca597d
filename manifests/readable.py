"""Bytes that can be read at any offset, of which nobody needs to know where they are; and those of a regular file.

Headers and small documents are parsed from these. This file knows no format.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import SourceNotFoundError, ToolkitError

NOT_FOUND = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""What the system says of a path that leads nowhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readable:
    """Some bytes.

    Attributes:
        what: Their name for messages.
        size: How many there are.
        read: Gives so many of them from an offset on, ``read(offset, count)``; fewer only where they end.
    """

    what: str
    size: int
    read: Callable[[int, int], bytes]


def in_memory(raw: bytes, *, size: int, what: str) -> Readable:
    """The first bytes of something that is known to have ``size`` of them."""
    return Readable(what=what, size=size, read=lambda offset, count: raw[offset : offset + count])


@contextmanager
def open_regular(path: Path) -> Iterator[Readable]:
    """Open a regular file for reading.

    Raises:
        SourceNotFoundError: There is nothing at path, or something else, such as a folder or a FIFO.
        ToolkitError: It cannot be read: it is another user's, or the disk fails. So does a later read.
    """
    # Asked before opening: opening a FIFO or a device could hang or do worse.
    require_regular(path)
    try:
        file = path.open("rb")
    except OSError as error:
        raise refusal(path, error) from error
    with file:

        def read(offset: int, count: int) -> bytes:
            try:
                file.seek(offset)
                return file.read(count)
            except OSError as error:
                raise refusal(path, error) from error

        yield Readable(what=str(path), size=os.fstat(file.fileno()).st_size, read=read)


def require_regular(path: Path) -> None:
    """Refuse what is no regular file, links followed.

    Raises:
        SourceNotFoundError, ToolkitError: See `open_regular`.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise refusal(path, error) from error
    if not stat.S_ISREG(mode):
        raise SourceNotFoundError(f"{path}: not a regular file")


def refusal(path: Path, error: OSError) -> ToolkitError:
    """What to raise when the system would not let a file be looked at, opened or read."""
    if error.errno in NOT_FOUND:
        return SourceNotFoundError(f"{path}: no such file")
    # A failing disk, for one, which says nothing of what is on it.
    return ToolkitError(f"{path}: cannot be read: {error.strerror}")
