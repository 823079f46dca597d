"""The journal: what was said durably is read back, a torn end is dropped, and nothing else goes unnoticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import IntegrityError, ManifestError, ResourceError, ToolkitError
from reshard import journal as journal_module
from reshard.journal import CONSUMES, Journal, is_consuming, is_digest, read_begin, read_journal

NAME = "reshard-journal.jsonl"
BEGIN = {"task": "run", "consume": False, "shards": [{"name": "a", "size": 3}]}
RECORDS: list[dict[str, Any]] = [
    {"shard": "a", "sha256": "00", "tensors": {'t\u2581"\n': ["11", "22"]}},
    {"shard": "b", "sha256": None, "tensors": {}},
    CONSUMES,
    {"shard": "c", "sha256": "ff", "tensors": {"u": ["33"]}},
]


def write(folder: Path, records: list[dict[str, Any]] = RECORDS) -> bytes:
    journal = Journal.create(folder, BEGIN)
    for record in records:
        journal.append(record)
    journal.close()
    return (folder / NAME).read_bytes()


def records_of(folder: Path) -> list[dict[str, Any]]:
    contents = read_journal(folder)
    assert contents is not None
    assert contents.begin == {"version": 1, **BEGIN}
    return contents.records


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert read_journal(tmp_path) is None
    raw = write(tmp_path)
    assert records_of(tmp_path) == RECORDS
    assert read_begin(tmp_path) == {"version": 1, **BEGIN}
    assert raw.isascii()
    assert raw.count(b"\n") == 1 + len(RECORDS)
    assert os.listdir(tmp_path) == [NAME]


def test_the_chain_as_format_says(tmp_path: Path) -> None:
    """Recomputed with nothing but the standard library."""
    check = ""
    for line in write(tmp_path).splitlines():
        document = json.loads(line)
        record = json.dumps(document["record"], sort_keys=True, separators=(",", ":"))
        check = hashlib.sha256((check + record).encode()).hexdigest()
        assert document["check"] == check


def test_each_record_is_durable_when_it_is_said_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    pwrite, fsync, rename = os.pwrite, os.fsync, os.rename
    monkeypatch.setattr(os, "pwrite", lambda *arguments: done.append("write") or pwrite(*arguments))
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("sync") or fsync(fd))
    monkeypatch.setattr(os, "rename", lambda *names: done.append("rename") or rename(*names))
    journal = Journal.create(tmp_path, BEGIN)
    # The first record before the name, the name before anything else.
    assert done == ["write", "sync", "rename", "sync"]
    done.clear()
    journal.append(RECORDS[0])
    assert done == ["write", "sync"]
    journal.remove()
    assert done == ["write", "sync", "sync"]
    assert os.listdir(tmp_path) == []


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data[:5]), at))
    write(tmp_path)
    assert records_of(tmp_path) == RECORDS


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, ResourceError), (errno.EIO, ToolkitError)])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "open", "ftruncate"])
def test_a_failing_disk(
    tmp_path: Path, call: str, code: int, error: type[ToolkitError], fail_call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    files = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context():
        fail_call(call, 1, code)
        with pytest.raises(error, match=f"{tmp_path}/{NAME}"):
            Journal.create(tmp_path, BEGIN)
    monkeypatch.undo()
    assert len(os.listdir("/proc/self/fd")) == files
    # Nothing had begun: it is there with its first record, or not at all.
    assert call == "ftruncate" or os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_record_that_could_not_be_written_does_not_count(
    tmp_path: Path, call: str, fail_call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = Journal.create(tmp_path, BEGIN)
    journal.append(RECORDS[0])
    fail_call(call, 1, errno.ENOSPC)
    with pytest.raises(ResourceError):
        journal.append(RECORDS[1])
    journal.close()
    monkeypatch.undo()
    # It may have reached the disk all the same: then what it says is true, because it is said last.
    assert records_of(tmp_path) in (RECORDS[:1], RECORDS[:2])


def test_a_torn_end_at_every_byte(tmp_path: Path) -> None:
    """All cuts: the records before it are kept, and the next one is put in its place."""
    raw = write(tmp_path)
    first = raw.index(b"\n") + 1
    whole = [position + 1 for position, byte in enumerate(raw) if byte == 10]
    for cut in range(first, len(raw)):
        (tmp_path / NAME).write_bytes(raw[:cut])
        complete = [end for end in whole if end <= cut]
        assert records_of(tmp_path) == RECORDS[: len(complete) - 1]
        if cut % 29 == 0 or cut + 1 in whole:
            contents = read_journal(tmp_path)
            assert contents is not None
            journal = contents.reopen()
            assert (tmp_path / NAME).read_bytes() == raw[: complete[-1]]
            for record in RECORDS[len(complete) - 1 :]:
                journal.append(record)
            journal.close()
            assert (tmp_path / NAME).read_bytes() == raw


@pytest.mark.parametrize(
    "garbage", [b"\0" * 600, b"\0" * 511 + b"\n", b"{}", b'{"check":"', b"\n", b"\n\n\0\n", b"\xff"]
)
def test_garbage_at_the_end_is_torn_too(tmp_path: Path, garbage: bytes) -> None:
    """What a file system may show of a block that never reached the disk."""
    raw = write(tmp_path)
    (tmp_path / NAME).write_bytes(raw + garbage)
    assert records_of(tmp_path) == RECORDS
    contents = read_journal(tmp_path)
    assert contents is not None
    contents.reopen().close()
    assert (tmp_path / NAME).read_bytes() == raw


def test_every_flipped_bit(tmp_path: Path) -> None:
    """It is found out, or it is in the last line, which is dropped; never is something else believed."""
    raw = bytearray(write(tmp_path))
    last = raw.rindex(b"\n", 0, -1) + 1
    first = raw.index(b"\n") + 1
    refused: list[bool] = []
    dropped = 0
    for position in range(len(raw)):
        for bit in range(8) if raw[position] == 10 else (position % 8,):
            raw[position] ^= 1 << bit
            (tmp_path / NAME).write_bytes(raw)
            try:
                found = records_of(tmp_path)
            except IntegrityError as error:
                refused.append((position < first) is ("its first line is damaged" in str(error)))
            else:
                assert found == RECORDS[:-1]
                assert position >= last
                dropped += 1
            raw[position] ^= 1 << bit
    assert all(refused)
    assert len(refused) >= last - 1
    assert dropped > 0


def lines_of(folder: Path) -> list[bytes]:
    return write(folder).splitlines(keepends=True)


@pytest.mark.parametrize("number", range(1, len(RECORDS)))
def test_a_missing_line(tmp_path: Path, number: int) -> None:
    lines = lines_of(tmp_path)
    del lines[number]
    (tmp_path / NAME).write_bytes(b"".join(lines))
    if number == len(lines) - 1:
        # What came last is not of the chain, and so taken for torn: what both said is done again.
        assert records_of(tmp_path) == RECORDS[: number - 1]
        return
    with pytest.raises(IntegrityError, match=f"line {number + 1} is damaged"):
        read_journal(tmp_path)


@pytest.mark.parametrize("number", range(len(RECORDS)))
def test_a_repeated_line_and_swapped_ones(tmp_path: Path, number: int) -> None:
    lines = lines_of(tmp_path)
    for changed in ([*lines[: number + 1], *lines[number:]], swapped(lines, number)):
        (tmp_path / NAME).write_bytes(b"".join(changed))
        try:
            assert records_of(tmp_path) == RECORDS[:-2]
            assert number == len(RECORDS) - 1  # the last two
        except IntegrityError:
            pass


def swapped(lines: list[bytes], number: int) -> list[bytes]:
    return [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]


def test_lines_of_another_journal(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    lines = lines_of(tmp_path / "a")
    other = write(tmp_path / "b", [RECORDS[1], *RECORDS[1:]]).splitlines(keepends=True)
    (tmp_path / "a" / NAME).write_bytes(b"".join([*lines[:3], *other[3:]]))
    with pytest.raises(IntegrityError, match="line 4 is damaged"):
        read_journal(tmp_path / "a")


def forge(folder: Path, *records: object) -> None:
    """Records with right checks, whatever they say."""
    check, raw = "", b""
    for record in records:
        text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        check = hashlib.sha256(check.encode() + text).hexdigest()
        raw += b'{"check":"%s","record":%s}\n' % (check.encode(), text)
    (folder / NAME).write_bytes(raw)


@pytest.mark.parametrize("version", [2, 0, "1", None, [], {"x": 1}, 10**30])
def test_another_version(tmp_path: Path, version: object) -> None:
    forge(tmp_path, {"version": version, "task": "run"})
    with pytest.raises(ManifestError, match="journal of version") as caught:
        read_journal(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


HOSTILE: list[bytes] = [
    b"", b"\n", b"\0" * 100, b"[]\n", b"null\n", b"{}\n", b'{"check":1,"record":{}}\n', b'{"check":"","record":[]}\n',
    b'{"check":"%s","record":{}}\n' % (b"0" * 64), b"[" * 100_000 + b"\n", b'{"check":"a","check":"a"}\n',
    b'{"check":"\\ud800","record":{}}\n', b"\xff\xfe\n", b'{"record":{"version":1}}\n', b"\n" * 1000,
]  # fmt: skip


@pytest.mark.parametrize("raw", HOSTILE, ids=range(len(HOSTILE)))
def test_a_first_line_that_is_none(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / NAME).write_bytes(raw)
    for read in (read_journal, read_begin):
        with pytest.raises(IntegrityError, match=r"its first line is damaged.*delete this folder$"):
            read(tmp_path)
    (tmp_path / "manifest.json").touch()
    with pytest.raises(IntegrityError, match=r"delete this file: the manifest beside it is whole$"):
        read_journal(tmp_path)


def test_a_journal_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write(tmp_path)
    monkeypatch.setattr(journal_module, "MAX_JOURNAL_BYTES", len(raw))
    assert records_of(tmp_path) == RECORDS
    (tmp_path / NAME).write_bytes(raw + b"\n")
    with pytest.raises(IntegrityError, match="larger than"):
        read_journal(tmp_path)


def test_a_damaged_journal_still_has_a_beginning(tmp_path: Path) -> None:
    lines = lines_of(tmp_path)
    (tmp_path / NAME).write_bytes(lines[0] + b"damaged\n" + lines[2])
    assert read_begin(tmp_path) == {"version": 1, **BEGIN}
    with pytest.raises(IntegrityError, match="line 2 is damaged"):
        read_journal(tmp_path)


def test_whether_a_source_may_be_freed(tmp_path: Path) -> None:
    for begin, records, may in (
        ({"consume": True}, [], True), ({"consume": False}, [], False), ({}, [], False),
        ({"consume": False}, [CONSUMES], True), ({}, [{"consume": False}], False),
    ):  # fmt: skip
        forge(tmp_path, {"version": 1, **begin}, *records)
        contents = read_journal(tmp_path)
        assert contents is not None
        assert is_consuming(contents) is may


def test_what_has_the_form_of_a_digest() -> None:
    assert is_digest(hashlib.sha256().hexdigest())
    for other in ("", "0" * 63, "0" * 65, "g" * 64, "A" * 64, None, 5, ["0" * 64], "0" * 64 + "\n"):
        assert not is_digest(other)
