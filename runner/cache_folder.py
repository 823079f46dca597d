"""The folder that keeps what was fetched from web servers, for all runs and processes, within a bound.

    states/KEY/manifest.json     what one state of one checkpoint holds; KEY is its digest
    states/KEY/small/...         its small files
    states/KEY/headers/...       headers of its GGUF files, which say what else would be in small files
    states/KEY/tensors/...       its other files, as far as they were needed; see `runner.mirror`
    places/HASH.json             which state an address had when it was last asked
    ledger                       how much all of it takes; see `runner.ledger`

When the bound is reached, what was unused for longest goes: experts first, and the dense part of a checkpoint counts as
used whenever anything of it is. This file knows folders and sizes; it must not know servers or tensors.
"""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from manifests.console import format_bytes
from manifests.errors import ResourceError, ToolkitError
from runner import filesystem
from runner.layout import PAGE_BYTES
from runner.ledger import Ledger
from runner.mirror import TEMP_SUFFIX, Entry, Mirror, kept_bytes, own_bytes, temporary_name

ENVIRONMENT = "EXPERT_RESHARD_CACHE"
NAME = "expert-reshard"

TENSORS, SMALL, HEADERS = "tensors", "small", "headers"

_VICTIM_BYTES = 64 << 20
"""Pieces that were used together go together, up to this: an expert of DeepSeek-V3 as a whole."""

_PAUSE_S = 0.02
_RECOUNT_S = 5.0
"""Behind so long without room somebody may have been killed who had written some down."""

_LONGEST_S = 600.0


class _Victim(NamedTuple):
    """Pieces of one file that may go: when they were used, as far as it counts; whether every token needs them."""

    counted: int
    is_dense: bool
    used: int
    path: Path
    numbers: range


def find_root() -> Path:
    """Where the cache is: what the environment names, or the user's own folder for such things."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / NAME
    except RuntimeError as error:
        raise ToolkitError(f"there is no home folder to keep a cache in; name one in {ENVIRONMENT}") from error


class CacheFolder:
    """The cache.

    Args:
        root: Its folder; made when there is none.
        bound: Bytes of the disk that it may take; any number when None.

    Attributes:
        root: As given.
        bound: As given.

    Raises:
        ToolkitError: The folder cannot be made or written to.
    """

    def __init__(self, root: Path, bound: int | None = None) -> None:
        self.root = root
        self.bound = bound
        try:
            for name in ("states", "places"):
                (root / name).mkdir(parents=True, exist_ok=True)
            self._ledger = Ledger(root / "ledger", lambda: self._count(keep=None))
        except OSError as error:
            raise ToolkitError(
                f"{root}: cannot keep a cache there: {error.strerror}; name another folder in {ENVIRONMENT}"
            ) from error
        self._victims: list[_Victim] = []
        self._is_begun = False

    def state(self, key: str) -> Path:
        """The folder of one state of a checkpoint; it need not be there."""
        return self.root / "states" / key

    def place(self, name: str) -> Path:
        """The file that says which state an address had last; it need not be there."""
        return self.root / "places" / f"{name}.json"

    @property
    def small_bytes(self) -> int:
        """What all files take that are not evicted piece by piece."""
        return sum(_small_files(folder) for folder in (self.root / "places", *(self.root / "states").iterdir()))

    def put(self, path: Path, raw: bytes) -> None:
        """Write a small file: all of it or nothing, also when the power fails.

        Raises:
            ResourceError: The disk is full.
            ToolkitError: The cache cannot be written to.
        """
        temporary, taken = path.with_name(temporary_name()), 0
        with self._refusing():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("wb") as file:
                    file.write(raw)
                    file.flush()
                    os.fsync(file.fileno())
                before = _small_bytes(path.stat().st_size) if path.exists() else 0
                self._ledger.take(taken := _small_bytes(len(raw)), None)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                    self._ledger.give(taken)
                raise
            self._ledger.give(before)

    def refusal(self, error: OSError) -> ToolkitError:
        """What a failed write to the cache is."""
        if error.errno == errno.EOPNOTSUPP:
            return ToolkitError(
                f"{self.root}: its file system frees no parts of files, so no --cache-size can be kept; leave it out, "
                f"or name another folder in {ENVIRONMENT}"
            )
        reason = f"{self.root}: cannot be written to: {error.strerror}"
        if error.errno in filesystem.FULL:
            return ResourceError(
                f"{reason}; what was fetched is kept: give a --cache-size that fits, free some room, or name another "
                f"folder in {ENVIRONMENT}"
            )
        return ToolkitError(f"{reason}; name another folder in {ENVIRONMENT}")

    def begin(self, key: str) -> None:
        """Tidy up when nobody else is here: free what a killed process left, and go down to the bound.

        Args:
            key: The state that is used from now on.
        """
        if self.bound is None or self._is_begun:
            return  # or this very process may be writing what nothing speaks of yet
        self._is_begun = True
        with self._refusing():
            with self._ledger.alone() as is_alone:
                if is_alone:
                    self._ledger.set(self._count(keep=key))
            if (over := self._ledger.bytes - self.bound) > 0:
                with self._ledger.evicting():
                    self._evict(over)

    def reserve(self, size: int) -> None:
        """Make room for so many bytes; `release` what was not taken.

        Raises:
            ResourceError: The bound is less, or all that is there is in use for minutes.
            ToolkitError: The cache cannot be written to.
        """
        with self._refusing():
            self._reserve(size)

    def _reserve(self, size: int) -> None:
        begin, before = time.monotonic(), -1
        is_recounted = False
        while not self._ledger.take(size, self.bound):
            assert self.bound is not None
            if (total := self._ledger.bytes) != before:
                begin, before = time.monotonic(), total  # somebody goes on: a slow way may take long
            waited = time.monotonic() - begin
            # Nothing is freed for what has no room in any case.
            if size > self.bound or waited > _LONGEST_S:
                raise self.too_small(size)
            with self._ledger.evicting():
                if self._ledger.take(size, self.bound):
                    return
                # A little more than is needed: looking through all files takes a while.
                freed = self._evict(max(self._ledger.bytes + size - self.bound, self.bound // 64))
            if not freed:
                if not self.has_room(size):
                    raise self.too_small(size)  # whatever others free
                if waited > _RECOUNT_S and not is_recounted:
                    is_recounted = True
                    self._ledger.set(self._count(keep=None))
                time.sleep(_PAUSE_S)

    def has_room(self, size: int) -> bool:
        """Whether so many bytes, with the tables of their files, can be here at the same time."""
        return self.bound is None or size + self.small_bytes <= self.bound

    def too_small(self, size: int) -> ResourceError:
        """What to raise where so many bytes have no room."""
        return ResourceError(
            f"{self.root}: no room for {format_bytes(size)} beside what is in use; give more --cache-size"
        )

    def release(self, size: int) -> None:
        """Give back what was reserved and not taken.

        Raises:
            ToolkitError: The cache cannot be written to.
        """
        with self._refusing():
            self._ledger.give(size)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise error if isinstance(error, ToolkitError) else self.refusal(error) from error

    def _evict(self, wanted: int) -> int:
        """Free about so many bytes of what was unused for longest; how many were."""
        freed, is_listed = 0, False
        while freed < wanted:
            # Of a list that was made before, dense weights do not go: there may be experts since.
            if not self._victims or (self._victims[-1].is_dense and not is_listed):
                if is_listed:
                    break
                self._victims, is_listed = self._list_victims(), True
                continue
            got = _free(self._victims.pop())
            self._ledger.give(got)
            freed += got
        return freed

    def _list_victims(self) -> list[_Victim]:
        """All that is here, what should go first at the end."""
        found = []
        for state in (self.root / "states").iterdir():
            victims = [victim for path in _files(state / TENSORS) for victim in _victims_of(path)]
            newest = max((victim.used for victim in victims), default=0)
            found += [victim._replace(counted=newest) if victim.is_dense else victim for victim in victims]
        return sorted(found, key=lambda victim: (victim.counted, victim.is_dense), reverse=True)

    def _count(self, *, keep: str | None) -> int:
        """What the cache takes, once what nobody will use is gone.

        Args:
            keep: A state that stays although nothing of its tensors is here; others of that kind are removed. None
                while others may be here, who use what looks unused.
        """
        total = _small_files(self.root / "places")
        for state in (self.root / "states").iterdir():
            kept = 0
            for path in _files(state / TENSORS, with_temporary=keep is not None):
                kept += _count_mirror(path, repair=keep is not None)
            if kept == 0 and keep not in (None, state.name):
                shutil.rmtree(state, ignore_errors=True)
                continue
            total += kept + _small_files(state)
        return total


def _files(folder: Path, *, with_temporary: bool = False) -> Iterator[Path]:
    """The mirrors below a folder; files that were not finished are removed where that is asked for."""
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if not name.endswith(TEMP_SUFFIX):
                yield path
            elif with_temporary:
                path.unlink(missing_ok=True)


def _open(path: Path) -> Mirror | None:
    """A mirror, unless it went meanwhile or is none."""
    with suppress(FileNotFoundError):
        mirror = Mirror.open(path)
        if mirror is None or mirror.is_in_order:
            return mirror
        mirror.close()
    return None


def _victims_of(path: Path) -> Iterator[_Victim]:
    mirror = _open(path)
    if mirror is None:
        return
    with closing(mirror):
        entries = mirror.entries()
    first = 0
    for number, entry in enumerate(entries):
        if number + 1 < len(entries) and _goes_with(entries[first], entry, entries[number + 1]):
            continue
        if entry.used:
            yield _Victim(entry.used, entry.is_dense, entry.used, path, range(first, number + 1))
        first = number + 1


def _goes_with(first: Entry, last: Entry, new: Entry) -> bool:
    is_together = (last.used, last.is_dense, last.end) == (new.used, new.is_dense, new.begin)
    return is_together and new.end - first.begin <= _VICTIM_BYTES


def _free(victim: _Victim) -> int:
    """Free these pieces, unless somebody uses them or used them since; how many bytes that gave."""
    mirror = _open(victim.path)
    if mirror is None:
        return 0
    with closing(mirror):
        if not mirror.lock(victim.numbers, filesystem.EXCLUSIVE, wait=False):
            return 0
        # Used since, or freed by somebody else, who counted it.
        if any(entry.used != victim.used for entry in mirror.entries(victim.numbers)):
            return 0
        return mirror.clear(victim.numbers) + mirror.remove()


def _count_mirror(path: Path, *, repair: bool) -> int:
    """What one mirror takes; 0 when none of its pieces is here."""
    mirror = _open(path)
    if mirror is None:
        if repair:
            path.unlink(missing_ok=True)
        return 0
    with closing(mirror):
        entries = mirror.entries()
        kept = kept_bytes(entries)
        if repair and not kept:
            path.unlink(missing_ok=True)
            return 0
        total = kept + own_bytes(len(entries))
        if repair and mirror.allocated_bytes() > total:
            first = 0
            for number in range(len(entries) + 1):
                if number == len(entries) or entries[number].used:
                    if number > first:
                        mirror.punch(range(first, number))
                    first = number + 1
    return total


def _small_files(state: Path) -> int:
    """What the small files of a state take."""
    # As they are: a link that somebody put there may lead nowhere.
    return sum(_small_bytes(path.lstat().st_size) for path in _files(state) if state / TENSORS not in path.parents)


def _small_bytes(size: int) -> int:
    return (-(-size // PAGE_BYTES) + 1) * PAGE_BYTES
