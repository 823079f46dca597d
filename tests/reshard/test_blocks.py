"""Where bytes meet the disk: short reads and writes, failures, names given only to what is durable."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import IntegrityError, ResourceError, ToolkitError
from reshard import blocks
from reshard.blocks import Reader, Writer, write_error


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 7)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(50)))
    return path


@pytest.mark.parametrize(("begin", "size"), [(0, 50), (0, 0), (50, 0), (3, 7), (3, 8), (49, 1), (10, 35)])
def test_ranges_are_read_as_they_are(file: Path, begin: int, size: int) -> None:
    reader = Reader(file)
    found = [bytes(block) for block in reader.blocks(begin, size)]
    assert b"".join(found) == bytes(range(50))[begin : begin + size]
    assert all(len(block) <= 7 for block in found)
    reader.close()


def test_short_reads_go_on(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:2]], at))
    reader = Reader(file)
    assert b"".join(bytes(block) for block in reader.blocks(1, 20)) == bytes(range(1, 21))
    reader.close()


def test_a_file_that_ends_early(file: Path) -> None:
    reader = Reader(file)
    with pytest.raises(IntegrityError, match="ends at byte 50, expected 51"):
        list(reader.blocks(45, 6))
    os.truncate(file, 10)
    with pytest.raises(IntegrityError, match="ends at byte 10, expected 20"):
        list(reader.blocks(0, 20))
    reader.close()


def test_a_failing_disk_is_named_with_the_place(file: Path, fail_call: Callable[..., Any]) -> None:
    reader = Reader(file)
    fail_call("preadv", 2)
    with pytest.raises(ToolkitError, match="file: cannot be read at byte 7: Input/output error"):
        list(reader.blocks(0, 50))
    reader.close()
    with pytest.raises(ToolkitError, match="absent: cannot be opened: No such file"):
        Reader(file.parent / "absent")
    fail_call("open", 1, errno.ENOSPC)
    with pytest.raises(ResourceError, match="file: cannot be opened: No space left"):
        Reader(file)


def test_a_name_is_given_last(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "a" / "b" / "file")
    writer.write(b"world", 5)
    writer.write(memoryview(b"hello"), 0)
    assert os.listdir(tmp_path / "a" / "b") == ["file.partial"]
    writer.finish()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"helloworld"
    writer.abandon()  # harmless behind finish: the file stays
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"helloworld"


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:3], at))
    writer = Writer(tmp_path / "file")
    writer.write(bytes(range(20)), 0)
    writer.finish()
    assert (tmp_path / "file").read_bytes() == bytes(range(20))


def test_bytes_are_durable_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: done.append(f"fsync {os.fstat(fd).st_size}") or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda a, b: done.append("rename") or rename(a, b))
    writer = Writer(tmp_path / "file")
    writer.write(b"12345", 0)
    writer.finish()
    assert done == ["fsync 5", "rename"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_at_the_end_gives_no_name(tmp_path: Path, call: str, fail_call: Callable[..., Any]) -> None:
    writer = Writer(tmp_path / "file")
    writer.write(b"x", 0)
    fail_call(call, 1)
    with pytest.raises(ToolkitError, match="cannot be written: Input/output error"):
        writer.finish()
    assert os.listdir(tmp_path) == ["file.partial"]
    writer.abandon()
    assert os.listdir(tmp_path) == []
    writer.abandon()


def test_an_abandoned_descriptor_is_closed_once(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "file")
    writer.abandon()
    other = os.open(tmp_path, os.O_RDONLY)  # gets the same number
    writer.abandon()
    os.close(other)  # raises if the second abandon closed it


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file.partial").write_bytes(b"someone else's")
    with pytest.raises(ToolkitError, match="File exists"):
        Writer(tmp_path / "file")
    assert (tmp_path / "file.partial").read_bytes() == b"someone else's"
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(ToolkitError, match="cannot be written"):
        Writer(tmp_path / "folder" / "file")


@pytest.mark.parametrize(
    ("code", "cls", "says"),
    [
        (errno.ENOSPC, ResourceError, "no space left"), (errno.EDQUOT, ResourceError, "no space left"),
        (errno.EFBIG, ResourceError, "no space left"), (errno.EMFILE, ResourceError, "too many files are open"),
        (errno.EIO, ToolkitError, "cannot be written"), (errno.EROFS, ToolkitError, "Read-only file system"),
    ],
)  # fmt: skip
def test_sentences(code: int, cls: type[ToolkitError], says: str) -> None:
    error = write_error(Path("x"), OSError(code, os.strerror(code)))
    assert type(error) is cls
    assert says in str(error)


def test_a_new_file_has_its_size_from_the_beginning(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "file", 1 << 20)
    assert writer.keeps_holes
    assert (tmp_path / "file.partial").stat().st_size == 1 << 20
    writer.close()
    adopted = Writer(tmp_path / "file", 1 << 20, adopt=True)
    assert not adopted.keeps_holes
    adopted.write(b"x", 5)
    adopted.finish()
    assert (tmp_path / "file").stat().st_size == 1 << 20
    assert not Writer(tmp_path / "other").keeps_holes


def test_only_what_is_there_is_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(ToolkitError, match="No such file"):
        Writer(tmp_path / "file", 10, adopt=True)
    assert os.listdir(tmp_path) == []


def test_a_failed_fsync_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says it once, and has forgotten the bytes."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = Writer(tmp_path / "file")
    writer.write(b"x", 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ToolkitError, match="Input/output error"):
            writer.sync()
    for again in (writer.sync, writer.finish):
        with pytest.raises(ToolkitError, match="Input/output error"):
            again()
    assert os.listdir(tmp_path) == ["file.partial"]
    writer.abandon()


def test_a_file_that_cannot_get_its_size_is_not_left(tmp_path: Path, fail_call: Callable[..., Any]) -> None:
    fail_call("ftruncate", 1, errno.EFBIG)
    with pytest.raises(ResourceError):
        Writer(tmp_path / "file", 10)
    assert os.listdir(tmp_path) == []
