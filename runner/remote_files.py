"""The files of a checkpoint on a server: what is missing of them here is fetched when it is needed, checked, and kept.

Missing pieces come over many connections at once. Each is compared with its sha256 before it counts; a wrong one is
fetched once more, then refused. No two threads or processes that share a cache fetch the same piece. This file knows
pieces and bytes; it must not know experts.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache

from manifests.errors import IntegrityError, ToolkitError
from manifests.http import RemoteFile, Stream
from manifests.schema import FileEntry
from runner import filesystem
from runner.background import Background
from runner.cache_folder import TENSORS
from runner.layout import Layout
from runner.mirror import Mirror, kept_bytes, own_bytes
from runner.pieces import Piece, cut, disk_bytes, requests, touched
from runner.reading import Opener, Part
from runner.remote_folder import CachedFolder

CONNECTIONS = 16
"""A server's, or the way's, bound on one connection is met by several; more gain nothing on fast ones."""

_READ_BYTES = 1 << 20
_KNOWN_FILES = 256
_PAUSE_S = 0.002
_ROUNDS = 16
"""Pieces that went while others came are fetched again; if that goes on, the bound is too low for all who use it."""


class RemoteFiles:
    """The files of a checkpoint on a server; see `runner.reading.Source`.

    Args:
        folder: Where they are, and where what was fetched is kept.
        files: What the manifest says of them.
    """

    loads_at_once = CONNECTIONS

    def __init__(self, folder: CachedFolder, files: Iterable[FileEntry]) -> None:
        self._folder = folder
        self._cache = folder.cache
        self._files: Mapping[str, FileEntry] = {file.path: file for file in files}
        self._pieces = lru_cache(_KNOWN_FILES)(lambda file: cut(self._files[file]))
        self._remote: dict[str, RemoteFile] = {}
        self._opened: set[str] = set()
        self._fitting: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        self._background = Background(CONNECTIONS)
        self._traffic = _Traffic()
        # Now, when it is known that the bound is not too low, and not before.
        self._cache.begin(folder.state.name)

    def where(self, file: str) -> str:
        """See `Source`."""
        return self._folder.where(file)

    @property
    def opened(self) -> int:
        """See `Source`."""
        return len(self._opened)

    @property
    def fetched_bytes(self) -> int:
        """See `Source`."""
        return self._traffic.bytes

    @property
    def fetching_s(self) -> float:
        """See `Source`."""
        return self._traffic.seconds

    def forget(self, layout: Layout) -> None:
        """Nothing: what was fetched is put out of the page cache when it was read."""

    @contextmanager
    def holding(self, parts: Iterable[Part]) -> Iterator[Opener]:
        """See `Source`.

        Raises:
            ResourceError: There is no room for them, within the bound or on the disk.
            IntegrityError: They are not what the manifest says, or the file changed on the server.
            SourceNotFoundError: The server has no such file.
            RemoteError: It cannot be reached, or does not do what is asked.
        """
        wanted: dict[str, set[int]] = {}
        for file, begin, end in parts:
            wanted.setdefault(file, set()).update(touched(self._pieces(file), begin, end))
        held: list[_Held] = []
        try:
            try:
                for file, numbers in wanted.items():
                    held.append(_Held(file=file, mirror=self._open(file), spans=_spans(sorted(numbers))))
                is_new = self._bring(held)
            except OSError as error:
                raise error if isinstance(error, ToolkitError) else self._cache.refusal(error) from error
            mirrors = {one.file: one.mirror for one in held}
            # What was just written is still in the page cache; who reads it there puts it out.
            yield lambda file, direct: mirrors[file].reader(direct=direct and not is_new)
        finally:
            for one in held:
                one.mirror.close()

    def _bring(self, held: Sequence[_Held]) -> bool:
        """Fetch what is missing; all is here and locked then. Whether something was missing."""
        is_new, fetched = False, 0
        while True:
            if fetched > 1:
                # Pieces that were here went for those that were not: that need not end.
                size = sum(map(self._kept_bytes, held))
                if fetched > _ROUNDS or not self._cache.has_room(size):
                    raise self._cache.too_small(size)
            missing = [(one, one.missing(wait=is_new)) for one in held]
            # Before they were locked, somebody who makes room may have found some empty.
            removed = [one for one in held if one.mirror.is_removed]
            if not removed and not any(numbers is None or numbers for _, numbers in missing):
                return is_new
            for one in removed:
                one.mirror.close()
                one.mirror = self._open(one.file)
            if not removed:
                is_new = True
                for one in held:
                    one.free()
                self._fetch([(one, numbers) for one, numbers in missing if numbers])
                fetched += 1

    def _kept_bytes(self, one: _Held) -> int:
        """What the pieces that a load needs of a file take, with the table of the file."""
        pieces = self._pieces(one.file)
        return own_bytes(len(pieces)) + sum(disk_bytes(pieces[number]) for span in one.spans for number in span)

    def _open(self, file: str) -> Mirror:
        """The mirror of a file, made when there is none of it."""
        path, pieces = self._folder.state / TENSORS / file, self._pieces(file)
        with self._lock:
            self._opened.add(file)
        while True:
            try:
                mirror = Mirror.open(path)
            except FileNotFoundError:
                size, is_new = own_bytes(len(pieces)), False
                self._cache.reserve(size)
                try:
                    is_new = Mirror.create(path, self._files[file].size, pieces)
                finally:
                    if not is_new:
                        self._cache.release(size)
                continue
            if mirror is not None:
                if self._fitting.get(file) == mirror.identity or mirror.fits(pieces):
                    self._fitting[file] = mirror.identity
                    return mirror
                mirror.close()
            path.unlink(missing_ok=True)

    def _fetch(self, missing: Sequence[tuple[_Held, Sequence[int]]]) -> None:
        """Bring pieces in that are missing; all of them, or those that nobody else does meanwhile."""
        size = sum(disk_bytes(self._pieces(one.file)[number]) for one, numbers in missing for number in numbers)
        self._cache.reserve(size)
        is_cancelled = threading.Event()
        jobs = [
            _Job(self, one, numbers, is_cancelled)
            for one, all_numbers in missing
            for numbers in requests(self._pieces(one.file), all_numbers)
        ]
        failure: BaseException | None = None
        try:
            for load in [self._background.submit(job.run) for job in jobs]:
                try:
                    load.wait()
                except BaseException as error:
                    failure = failure or error
                    is_cancelled.set()
        finally:
            self._cache.release(size - sum(job.taken_bytes for job in jobs))
        if failure is not None:
            raise failure

    def receive(self, held: _Held, numbers: range, is_cancelled: threading.Event) -> None:
        """Fetch neighbouring pieces that nobody else does, and write them; they are durable then.

        Raises:
            See `holding`.
        """
        file, pieces = held.file, self._pieces(held.file)[numbers.start : numbers.stop]
        remote, size = self._remote_file(file), self._files[file].size
        wrong = []
        with self._traffic.running():
            with closing(remote.stream(pieces[0].begin, pieces[-1].end)) as stream:
                stream.open()
                if remote.facts.size != size:
                    raise IntegrityError(f"{self.where(file)}: has {remote.facts.size} bytes there, expected {size}")
                wrong = [piece for piece in pieces if not self._receive(stream, piece, held.mirror, is_cancelled)]
            for piece in wrong:
                with closing(remote.stream(piece.begin, piece.end)) as stream:
                    if not self._receive(stream, piece, held.mirror, is_cancelled):
                        raise IntegrityError(
                            f"{self.where(file)}: bytes {piece.begin} to {piece.end}, of {piece.tensor}, were fetched "
                            "twice and have another sha256 than the manifest says; the file on the server is damaged"
                        )
        held.mirror.sync()

    def _receive(self, stream: Stream, piece: Piece, mirror: Mirror, is_cancelled: threading.Event) -> bool:
        """Write the next piece of a stream; whether it has the digest that it must have."""
        hasher, at, buffer = hashlib.sha256(), piece.begin, memoryview(bytearray(_READ_BYTES))
        while at < piece.end:
            if is_cancelled.is_set():
                raise _CancelledError
            count = stream.readinto(buffer[: piece.end - at])
            part = buffer[:count]
            hasher.update(part)
            mirror.write(part, at)
            at += count
            self._traffic.count(count)
        return piece.digest in (None, hasher.hexdigest())

    def _remote_file(self, file: str) -> RemoteFile:
        with self._lock:
            if file not in self._remote:
                self._remote[file] = self._folder.remote_file(file)
            return self._remote[file]


class _CancelledError(Exception):
    """Another part of the same load failed: nobody needs this one."""


@dataclass(slots=True, kw_only=True)
class _Held:
    """A mirror that is open for one load.

    Attributes:
        file: Its path in the checkpoint.
        mirror: As said.
        spans: The numbers of its pieces that the load needs.
    """

    file: str
    mirror: Mirror
    spans: Sequence[range]

    def missing(self, *, wait: bool) -> list[int] | None:
        """The pieces that are not here, where all others are locked now and count as used; None when not all are.

        Args:
            wait: For those that somebody else is fetching.
        """
        found, is_locked, now = [], True, int(time.time())
        for span in self.spans:
            if self.mirror.lock(span, filesystem.SHARED, wait=wait):
                self.mirror.mark(span, now, absent=False)
            else:
                is_locked = False
            found += [number for number, one in zip(span, self.mirror.entries(span), strict=True) if not one.used]
        return found if found or is_locked else None

    def free(self) -> None:
        """End all locks."""
        for span in self.spans:
            self.mirror.lock(span, filesystem.FREE)


@dataclass(slots=True)
class _Job:
    """Brings neighbouring pieces in, or waits for whoever does; they are locked then, unless their file went."""

    files: RemoteFiles
    held: _Held
    numbers: range
    is_cancelled: threading.Event
    taken_bytes: int = field(default=0)

    def run(self) -> None:
        """Do it."""
        mirror = self.held.mirror
        while not self.is_cancelled.is_set():
            # Who fetches a piece holds it alone. Nobody who waits holds one that is missing, so somebody goes on.
            mirror.lock(self.numbers, filesystem.SHARED)
            if mirror.is_removed:
                return
            absent = _first_absent(self.numbers, [entry.used for entry in mirror.entries(self.numbers)])
            if not absent:
                return
            if not mirror.lock(absent, filesystem.EXCLUSIVE, wait=False):
                mirror.lock(self.numbers, filesystem.FREE)
                time.sleep(random.uniform(_PAUSE_S / 2, _PAUSE_S))
                continue
            self._fetch(mirror, absent)

    def _fetch(self, mirror: Mirror, absent: range) -> None:
        try:
            self.files.receive(self.held, absent, self.is_cancelled)
            mirror.mark(absent, int(time.time()), absent=True)
        except BaseException:
            # What failed is said, and not that its file system frees no parts of files.
            with suppress(OSError):
                mirror.punch(absent)
            mirror.lock(self.numbers, filesystem.FREE)
            raise
        mirror.lock(absent, filesystem.SHARED)
        entries = mirror.entries(absent)
        self.taken_bytes += kept_bytes(entries)


class _Traffic:
    """How much came from the server, and for how long something was on its way."""

    def __init__(self) -> None:
        self.bytes = 0
        self._lock = threading.Lock()
        self._running = 0
        self._begin = 0.0
        self._seconds = 0.0

    def count(self, size: int) -> None:
        """So many bytes came."""
        with self._lock:
            self.bytes += size

    @property
    def seconds(self) -> float:
        """Seconds so far in which something was on its way."""
        with self._lock:
            return self._seconds + (time.perf_counter() - self._begin if self._running else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Something is on its way meanwhile."""
        with self._lock:
            self._running += 1
            if self._running == 1:
                self._begin = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if not self._running:
                    self._seconds += time.perf_counter() - self._begin


def _spans(numbers: Sequence[int]) -> list[range]:
    """Ascending numbers as ranges."""
    found: list[range] = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def _first_absent(numbers: range, used: Sequence[int]) -> range:
    """The first pieces, one behind the other, that are not here."""
    first = next((at for at, one in enumerate(used) if not one), len(used))
    last = next((at for at in range(first, len(used)) if used[at]), len(used))
    return range(numbers.start + first, numbers.start + last)
