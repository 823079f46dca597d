"""What the tests' web server has to serve: files in memory, and those of a folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from email.utils import formatdate
from pathlib import Path
from typing import NamedTuple


class File(NamedTuple):
    """A file as it is now: its bytes, and the names of this state."""

    size: int
    read: Callable[[int, int], bytes]
    etag: str
    modified: str | None


def find(path: str, files: Mapping[str, bytes], root: Path | None) -> File | None:
    """The file at a path, which has its slash in front; None where there is none.

    Args:
        path: As said.
        files: Contents by path.
        root: A folder that has others; None for none.
    """
    content = files.get(path)
    if content is not None:
        return File(len(content), lambda begin, end: content[begin:end], f'"{len(content)}-{hash(content)}"', None)
    file = None if root is None else root / path.lstrip("/")
    if file is None or not file.is_file():
        return None

    def read(begin: int, end: int) -> bytes:
        with file.open("rb") as opened:
            opened.seek(begin)
            return opened.read(end - begin)

    now = file.stat()
    etag = f'"{now.st_mtime_ns:x}-{now.st_size:x}"'
    return File(now.st_size, read, etag, formatdate(now.st_mtime, usegmt=True))
