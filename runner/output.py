"""Files that somebody named to write to: whole or not at all, and never in the place of what is no file.

A regular file is written beside its name and renamed when all of it is there; a link stays, and what it leads to is
replaced. A FIFO or a device is opened and written to, and so is stdout under any name. This file must not know what is
written.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from manifests.errors import ResourceError, SourceNotFoundError, ToolkitError


def check_output(path: Path) -> None:
    """Refuse what cannot be written, before the work whose result it is to hold.

    Raises:
        SourceNotFoundError: Its folder is not there.
        ToolkitError: It is a folder, or it or its folder may not be written to.
    """
    try:
        found = _status(path)
        if found is not None and stat.S_ISDIR(found.st_mode):
            raise ToolkitError(f"{path}: is a folder; give the name of a file")
        if found is not None and not os.access(path, os.W_OK):
            raise ToolkitError(f"{path}: may not be written to; choose another file, or change its permissions")
        if found is not None and _is_written_into(found):
            return
        folder = _real(path).parent
        if not folder.is_dir():
            raise SourceNotFoundError(f"{path}: no such folder {folder} to write it to; make it first")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ToolkitError(
                f"{path}: its folder {folder} may not be written to; choose another one, or change its permissions"
            )
    except ToolkitError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """A file to write to from its begin to its end. A regular one is there, whole, when this ends without an error.

    Raises:
        ResourceError: The disk is full.
        ToolkitError: It cannot be written for another reason.
    """
    try:
        found = _status(path)
        if found is not None and _is_written_into(found):
            with _opened(path, found) as file:
                yield file
            return
        real = _real(path)
        # A name of its own: with a suffix a long one could become longer than a file system takes.
        unfinished = real.with_name(f".runner-{os.getpid()}.tmp")
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, real)
        finally:
            with suppress(OSError):  # what led here is what must be told
                unfinished.unlink(missing_ok=True)
    except ToolkitError:
        raise
    except OSError as error:
        raise _refusal(path, error) from error


def _status(path: Path) -> os.stat_result | None:
    """What is there, behind all links; None for nothing."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return None


def _real(path: Path) -> Path:
    """The file that would be replaced or made."""
    return Path(os.path.realpath(path))


def _is_written_into(found: os.stat_result) -> bool:
    """Whether it stays what it is; a regular file does where it is our stdout, which nobody would find again."""
    return not stat.S_ISREG(found.st_mode) or _is_stdout(found)


def _is_stdout(found: os.stat_result) -> bool:
    try:
        return sys.stdout is not None and os.path.samestat(found, os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):  # it has no descriptor
        return False


def _opened(path: Path, found: os.stat_result) -> BinaryIO:
    if _is_stdout(found):
        sys.stdout.flush()
        # The same descriptor: what is printed later comes behind it.
        return open(os.dup(sys.stdout.fileno()), "wb")
    # Neither made nor cut: it is there, and no regular file.
    return open(os.open(path, os.O_WRONLY | os.O_CLOEXEC), "wb")


def _refusal(path: Path, error: OSError) -> ToolkitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"{path}: no space left to write it; free some and run again")
    return ToolkitError(f"{path}: cannot be written: {error.strerror}; choose another file")
