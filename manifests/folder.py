"""Where the files of a checkpoint lie, and how a small one is read: a folder of this machine, or one like it.

A folder on a server answers the same questions (`manifests.remote`). Knows names and bytes, not what they mean.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from manifests.errors import ManifestError
from manifests.mapping import map_file
from manifests.readable import Readable, open_regular
from manifests.safety import resolve_inside

Cut = Callable[[int, int], memoryview]
"""Gives the bytes of a file from one offset to another, read-only."""


class Folder(Protocol):
    """A folder with the files of a checkpoint; as text it is its own name for messages.

    Attributes:
        at_once: Questions that are best asked at the same time.
    """

    at_once: int

    def where(self, name: str) -> str:
        """A file's full name for messages."""

    def size(self, name: str) -> int | None:
        """Bytes of a file; None when there is none."""

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """All bytes of a small file; None when there is none.

        Raises:
            ManifestError: It is larger than max_bytes, or its name leaves the folder.
        """

    def open(self, name: str, *, first: int) -> AbstractContextManager[Readable]:
        """A file, to be read here and there.

        Args:
            name: Its name.
            first: How many bytes from its start on will be wanted at once; a server is asked for them by one request.

        Raises:
            ManifestError: Its name leaves the folder.
            SourceNotFoundError: There is none.
        """

    def require(self, name: str) -> None:
        """Refuse a file that is known to be gone.

        Raises:
            ManifestError: Its name leaves the folder.
            SourceNotFoundError: It is gone.
        """

    def view(self, name: str, size: int) -> Cut:
        """What gives the bytes of a file of this size; it is opened when the first are asked for."""


class LocalFolder:
    """A folder of this machine.

    Attributes:
        root: Its path.
    """

    at_once = 1

    def __init__(self, root: Path) -> None:
        self.root = root
        self._paths: dict[str, Path] = {}

    def __str__(self) -> str:
        return str(self.root)

    def where(self, name: str) -> str:
        """See `Folder`."""
        return str(self.root / name)

    def size(self, name: str) -> int | None:
        """See `Folder`."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """See `Folder`."""
        if not (self.root / name).exists():
            return None
        path = resolve_inside(self.root, name)
        with open_regular(path) as file:
            raw = file.read(0, max_bytes + 1)
        if len(raw) > max_bytes:
            raise ManifestError(f"{path}: larger than {max_bytes} bytes, which no such file needs")
        return raw

    def open(self, name: str, *, first: int) -> AbstractContextManager[Readable]:
        """See `Folder`."""
        return open_regular(self.path(name))

    def path(self, name: str) -> Path:
        """The path of a file that is there.

        Raises:
            ManifestError, SourceNotFoundError: See `manifests.safety.resolve_inside`.
        """
        path = self._paths.get(name)
        if path is None:
            # Links are followed once for each file, not for each of its tensors.
            path = self._paths[name] = resolve_inside(self.root, name)
        return path

    def require(self, name: str) -> None:
        """See `Folder`."""
        self.path(name)

    def view(self, name: str, size: int) -> Cut:
        """See `Folder`; the file is mapped, and its bytes are read page by page as they are touched."""
        # One mapping for all that is cut from it.
        whole = cache(partial(map_file, self.path(name), size))
        return lambda begin, end: whole()[begin:end]
