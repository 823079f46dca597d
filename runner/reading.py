"""Brings the runs of a layout into memory, in one of two ways, and takes them out again.

`direct` reads past the page cache into memory of our own; `mapped` lets the page cache hold the bytes. Either way a
whole run is asked for at once, never one small page at a time, and a file that is not what it was is refused by name.
This file must not know experts.
"""

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from manifests.errors import IntegrityError, ToolkitError
from manifests.mapping import refusal
from runner.background import THREADS
from runner.layout import HUGE_PAGE_BYTES, PAGE_BYTES, Layout, Run
from runner.memory import Guard, Region

_READ_BYTES = 1 << 30
"""At most, by one call: systems give no more than 2 GiB."""

Part = tuple[str, int, int]
"""A file of a checkpoint, the first byte that is needed, and the byte behind the last."""

Opener = Callable[[str, bool], AbstractContextManager[tuple[int, bool]]]
"""Opens a file, past the page cache where that is asked for and possible: a descriptor, and whether it is so."""


class Source(Protocol):
    """The files of a checkpoint, here or on a server."""

    loads_at_once: int
    """How many layouts should be asked for at the same time."""

    @property
    def opened(self) -> int:
        """How many files were opened so far."""

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came from a server so far."""

    @property
    def fetching_s(self) -> float:
        """Seconds so far in which some were on their way."""

    def where(self, file: str) -> str:
        """A file's full name for messages."""

    def holding(self, parts: Iterable[Part]) -> AbstractContextManager[Opener]:
        """What opens the files of these parts; their bytes are there and stay there until this ends.

        Raises:
            See `Files.open`.
            RemoteError: The server that has them cannot be reached, or does not do what is asked.
        """

    def forget(self, layout: Layout) -> None:
        """Ask for the page cache to let the runs of a layout go; it keeps what is mapped."""


class Files:
    """The files of a checkpoint on this machine, each of which must stay what it is now.

    Args:
        root: The checkpoint's folder.
        sizes: Bytes that each file must have, by its path in the checkpoint.
        find: Gives the path of a file that is there; see `manifests.folder.LocalFolder.path`.
    """

    loads_at_once = THREADS
    fetched_bytes = 0
    fetching_s = 0.0

    def __init__(self, root: Path, sizes: Mapping[str, int], find: Callable[[str], Path]) -> None:
        self._root = root
        self._find = find
        self._sizes = sizes
        # Of all of them at once: experts that a text needs late must be of the same checkpoint as those it needs first.
        self._identities = {file: _identity_of(f"{root}/{file}") for file in sizes}
        self._opened: set[str] = set()

    def where(self, file: str) -> str:
        """A file's full name for messages."""
        return str(self._root / file)

    @property
    def opened(self) -> int:
        """How many files were opened so far."""
        return len(self._opened)

    @contextmanager
    def holding(self, parts: Iterable[Part]) -> Iterator[Opener]:
        """See `Source`; nothing needs to be done for it here."""
        yield self.open

    @contextmanager
    def open(self, file: str, direct: bool = False) -> Iterator[tuple[int, bool]]:
        """Open one file for reading, checked.

        Args:
            file: Its path in the checkpoint.
            direct: Past the page cache, where its file system can.

        Yields:
            A descriptor, and whether it is direct.

        Raises:
            SourceNotFoundError: There is no such file.
            IntegrityError: It has another size than the manifest says, or was replaced while the model ran.
            ResourceError: Too many files are open.
        """
        path = self._find(file)
        try:
            descriptor, is_direct = open_for_reading(path, direct=direct)
        except OSError as error:
            raise refusal(path, error.errno or 0) from error
        try:
            self._check(path, file, os.fstat(descriptor))
            yield descriptor, is_direct
        finally:
            os.close(descriptor)

    def check(self, run: Run) -> None:
        """Look whether a file that was opened is still the same.

        Raises:
            IntegrityError: It was cut, replaced or written to.
            SourceNotFoundError: It is gone.
        """
        path = self._find(run.file)
        try:
            self._check(path, run.file, os.stat(path))
        except OSError as error:
            raise refusal(path, error.errno or 0) from error

    def _check(self, path: Path, file: str, found: os.stat_result) -> None:
        if found.st_size != self._sizes[file]:
            raise IntegrityError(
                f"{path}: has {found.st_size} bytes, expected {self._sizes[file]}; `reshard verify` tells more"
            )
        if self._identities[file] != _identity(found):
            raise IntegrityError(f"{path}: was replaced or written to while in use; start again")
        self._opened.add(file)

    def forget(self, layout: Layout) -> None:
        """See `Source`."""
        if not hasattr(os, "posix_fadvise"):
            return
        for run in layout.runs:
            try:
                descriptor = os.open(self._find(run.file), os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                continue  # gone; so are its pages
            try:
                _drop(descriptor, run)
            finally:
                os.close(descriptor)


def _identity(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _identity_of(path: str) -> tuple[int, int, int] | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None  # nobody may ever need it


def _drop(descriptor: int, run: Run) -> None:
    # The cache lets go of its own pages only as wholes, and these may be huge.
    begin = run.begin // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    end = -(-run.end // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def open_for_reading(path: Path, *, direct: bool) -> tuple[int, bool]:
    """Open a file, past the page cache where that is asked for and its file system can; whether it is so."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    if direct and hasattr(os, "O_DIRECT"):
        try:
            return os.open(path, flags | os.O_DIRECT), True
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(path, flags), False


class Way(Protocol):
    """How layouts come into a region and leave it."""

    alignment: int
    """Of the layouts that it takes."""

    def where(self, run: Run) -> str:
        """The full name of a run's file for messages."""

    def guard(self, region: Region, part_bytes: int) -> Guard | None:
        """What tells that a part's file was cut while in use; None where that cannot be noticed, nor do harm."""

    def check(self, layout: Layout) -> None:
        """Look whether what was brought in is still what the files hold, as far as it depends on them.

        Raises:
            IntegrityError: A file was cut, replaced or written to since.
            SourceNotFoundError: It is gone.
        """

    def load(self, layout: Layout, region: Region, position: int) -> None:
        """Bring all runs in; they are in memory when it returns.

        Raises:
            SourceNotFoundError, IntegrityError, ResourceError, ToolkitError: See `Files.open`; or the disk failed.
        """

    def unload(self, layout: Layout, region: Region, position: int) -> None:
        """Take out what `load` brought in."""


class Direct:
    """Reads into anonymous memory past the page cache; where the file system cannot, through it and out of it."""

    alignment = PAGE_BYTES

    def __init__(self, files: Source) -> None:
        self._files = files

    def where(self, run: Run) -> str:
        """See `Way`."""
        return self._files.where(run.file)

    def guard(self, region: Region, part_bytes: int) -> None:
        """None: the bytes are copies."""

    def check(self, layout: Layout) -> None:
        """Nothing, for the same reason."""

    def load(self, layout: Layout, region: Region, position: int) -> None:
        """See `Way`."""
        with self._files.holding([(run.file, run.begin, run.end) for run in layout.runs]) as open_file:
            for run in layout.runs:
                with open_file(run.file, True) as (descriptor, is_direct):
                    self._read(run, descriptor, region, position + run.position, is_direct=is_direct)
                    if not is_direct and hasattr(os, "posix_fadvise"):
                        _drop(descriptor, run)

    def unload(self, layout: Layout, region: Region, position: int) -> None:
        """Nothing: the next expert is read over this one."""

    def _read(self, run: Run, descriptor: int, region: Region, position: int, *, is_direct: bool) -> None:
        # Whole pages of the file that hold the run: what direct reading takes, and no slower otherwise.
        at = run.begin // PAGE_BYTES * PAGE_BYTES
        while at < run.end:
            wanted = -(-(run.end - at) // PAGE_BYTES) * PAGE_BYTES
            view = region.bytes(position + at - run.offset, min(wanted, _READ_BYTES))
            try:
                count = os.preadv(descriptor, [view], at)
            except OSError as error:
                raise _read_error(self._files.where(run.file), run, at, error) from error
            if at + count < run.end and (count == 0 or (is_direct and count % PAGE_BYTES)):
                where = self._files.where(run.file)
                raise IntegrityError(f"{where}: ends at byte {at + count}, not {run.end}; it was cut while in use")
            at += count


class Mapped:
    """Maps the files, so that the page cache holds the bytes and other processes share them."""

    alignment = HUGE_PAGE_BYTES

    def __init__(self, files: Files) -> None:
        self._files = files

    def where(self, run: Run) -> str:
        """See `Way`."""
        return self._files.where(run.file)

    def guard(self, region: Region, part_bytes: int) -> Guard:
        """See `Way`."""
        return Guard(region, part_bytes)

    def check(self, layout: Layout) -> None:
        """A mapping shows what is written to its file, and zeros behind its end."""
        for run in layout.runs:
            self._files.check(run)

    def load(self, layout: Layout, region: Region, position: int) -> None:
        """See `Way`."""
        for run in layout.runs:
            # A file of its own for each mapping: reading ahead is remembered by open file.
            with self._files.open(run.file) as (descriptor, _):
                try:
                    region.map_file(position + run.position, run.end - run.offset, descriptor, run.offset)
                except OSError as error:
                    raise refusal(self._files.where(run.file), error.errno or 0) from error
                begin = run.begin - run.offset
                try:
                    if not region.populate(position + run.position + begin, run.end - run.begin):
                        _read_through(descriptor, run)
                except OSError as error:
                    raise _read_error(self._files.where(run.file), run, run.begin, error) from error

    def unload(self, layout: Layout, region: Region, position: int) -> None:
        """Unmap, and ask for the page cache to let go: no other memory is freed for the next expert otherwise."""
        region.clear(position, layout.size)
        self._files.forget(layout)


def _read_through(descriptor: int, run: Run) -> None:
    """Fill the page cache by reading: the way of systems that cannot populate a mapping."""
    at = run.begin
    while at < run.end:
        count = len(os.pread(descriptor, min(run.end - at, 1 << 22), at))
        if not count:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        at += count


def _read_error(where: str, run: Run, at: int, error: OSError) -> ToolkitError:
    # A populated page behind the end of its file is a bad address.
    if error.errno in (errno.EFAULT, errno.ENXIO):
        return IntegrityError(f"{where}: ends before byte {run.end}; it was cut while in use")
    return ToolkitError(f"{where}: cannot be read at byte {at}: {error.strerror}")
