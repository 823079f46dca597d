"""What the disk and the processor are said to give: by a clock of our own, and nothing is left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manifests.errors import ResourceError, ToolkitError
from reshard import disk
from reshard.blocks import BLOCK_BYTES
from reshard.disk import (
    measure_arrival_rate,
    measure_fsync_seconds,
    measure_hash_rate,
    measure_read_rate,
    measure_write_rate,
)
from reshard.openable import LocalFile

FailCall = Callable[..., list[int]]


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A clock that goes on by one second whenever somebody looks at it."""
    numbers = count()
    monkeypatch.setattr(disk, "time", SimpleNamespace(perf_counter=lambda: float(next(numbers))))
    for name in ("READ_SECONDS", "WRITE_SECONDS"):
        monkeypatch.setattr(disk, name, 1e6)
    return numbers


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Any]:
    real, seen = getattr(os, name), []

    def call(*arguments: Any) -> Any:
        seen.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(os, name, call)
    return seen


@pytest.mark.usefixtures("ticks")
def test_the_read_rate_is_bytes_over_the_time_of_reading(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(2 * BLOCK_BYTES + 4096))
    # Three reads of one second each.
    assert measure_read_rate(tmp_path / "file") == (2 * BLOCK_BYTES + 4096) / 3


@pytest.mark.usefixtures("ticks")
def test_no_more_is_read_than_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(os.urandom(4 * BLOCK_BYTES))
    reads = calls_of(monkeypatch, "preadv")
    assert measure_read_rate(tmp_path / "file", sample_bytes=BLOCK_BYTES + 1) == BLOCK_BYTES
    assert len(reads) == 2
    monkeypatch.setattr(disk, "READ_SECONDS", 2.5)
    assert measure_read_rate(tmp_path / "file") == BLOCK_BYTES
    assert len(reads) == 2 + 3


@pytest.mark.usefixtures("ticks")
def test_holes_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 4 * BLOCK_BYTES)
    assert measure_read_rate(path) is None  # nothing but holes
    with path.open("rb+") as file:
        file.seek(2 * BLOCK_BYTES)
        file.write(os.urandom(BLOCK_BYTES))
    assert measure_read_rate(path) == BLOCK_BYTES


@pytest.mark.usefixtures("ticks")
def test_the_rate_of_what_arrives_is_that_behind_the_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(4 * BLOCK_BYTES))
    file = LocalFile(tmp_path / "file")
    # A look at the clock behind the first block, before each other, and at the end.
    monkeypatch.setattr(disk, "ARRIVAL_SECONDS", 1e6)
    assert measure_arrival_rate(file, 0, 4 * BLOCK_BYTES) == 3 * BLOCK_BYTES / 4
    monkeypatch.setattr(disk, "ARRIVAL_SECONDS", 1.5)
    assert measure_arrival_rate(file, 0, 4 * BLOCK_BYTES) == BLOCK_BYTES / 3
    assert measure_arrival_rate(file, 100, 100 + BLOCK_BYTES) is None


def test_a_small_file_tells_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(BLOCK_BYTES - 1))
    assert measure_read_rate(tmp_path / "file") is None


def test_reading_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(os.urandom(BLOCK_BYTES))
    real = os.open

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", refuse)
    rate = measure_read_rate(tmp_path / "file")
    assert rate is not None
    assert rate > 0


def test_a_file_that_cannot_be_read(tmp_path: Path, fail_call: FailCall) -> None:
    (tmp_path / "file").write_bytes(os.urandom(BLOCK_BYTES))
    fail_call("preadv", 1)
    with pytest.raises(ToolkitError, match="cannot be read at byte 0"):
        measure_read_rate(tmp_path / "file")


@pytest.mark.usefixtures("ticks")
def test_the_write_rate_counts_what_is_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SYNC_BLOCKS", 2)
    writes, syncs = calls_of(monkeypatch, "pwrite"), calls_of(monkeypatch, "fsync")
    # The clock is read at the beginning, before each of the two steps, and at the end.
    assert measure_write_rate(tmp_path, most_bytes=5 * BLOCK_BYTES) == 4 * BLOCK_BYTES / 3
    assert (len(writes), len(syncs)) == (4, 2)
    assert all(len(set(view[:4096])) > 100 for _, view, _ in writes)  # nothing that a file system could leave out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ticks")
def test_the_write_test_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "SYNC_BLOCKS", 1)
    monkeypatch.setattr(disk, "WRITE_SECONDS", 1.5)
    writes = calls_of(monkeypatch, "pwrite")
    assert measure_write_rate(tmp_path) == BLOCK_BYTES / 3
    assert len(writes) == 1


def test_too_little_room_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = calls_of(monkeypatch, "pwrite")
    assert measure_write_rate(tmp_path, most_bytes=disk.SYNC_BLOCKS * BLOCK_BYTES - 1) is None
    assert writes == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("measure", [measure_write_rate, measure_fsync_seconds])
@pytest.mark.parametrize(
    ("call", "code", "kind"),
    [
        ("pwrite", errno.ENOSPC, ResourceError), ("pwrite", errno.EIO, ToolkitError),
        ("fsync", errno.EIO, ToolkitError), ("open", errno.EROFS, ToolkitError),
    ],
)  # fmt: skip
def test_a_disk_that_fails_keeps_nothing_of_it(
    tmp_path: Path, fail_call: FailCall, measure: Callable[[Path], object], call: str, code: int, kind: type[Exception]
) -> None:
    fail_call(call, 1, code)
    with pytest.raises(kind):
        measure(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fsync_takes_the_median(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nine of them: from an eighth of a second to five seconds.
    times = iter([0, 5, 10, 10.5, 20, 20.25, 30, 31, 40, 40.125, 50, 51, 60, 60.5, 70, 70.25, 80, 80.25])
    monkeypatch.setattr(disk, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    syncs = calls_of(monkeypatch, "fsync")
    assert measure_fsync_seconds(tmp_path) == 0.5
    assert len(syncs) == 9
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("ticks")
def test_the_hash_rate_is_that_of_one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "HASH_SECONDS", 4)
    assert measure_hash_rate() == 3 * (1 << 20) / 4
