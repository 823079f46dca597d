"""What is durable, written down as it becomes so: an append-only file in the folder that is being written.

One JSON document a line: ``{"check": ..., "record": ...}``. The check is the sha256 of the line before it and of the
record, so a line cannot be changed, lost or repeated unnoticed. Each line is fsynced before anything relies on it. A
crash can tear the last line only: it is dropped, and what it said is done again. The file gets its name with its first
line in it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manifests.digest import sha256_hex
from manifests.errors import IntegrityError, ManifestError
from manifests.jsontext import parse_json
from manifests.paths import ASIDE_NAME, JOURNAL_NAME, MANIFEST_NAME
from manifests.storage import sync_folder, write_atomic
from reshard.blocks import write_error

JOURNAL_VERSION = 1
MAX_JOURNAL_BYTES = 256_000_000
"""Ten times DeepSeek-V3's."""

CONSUMES = {"consume": True}
"""The record of a command that goes on with --consume what was begun without."""

_DIGEST = re.compile("[0-9a-f]{64}")


class Journal:
    """An open journal to append to."""

    def __init__(self, folder: Path, *, last_check: str, size: int) -> None:
        """Go on with a journal; what lies behind `size` is cut off. See `create` and `read`."""
        self.path = folder / JOURNAL_NAME
        self._last_check = last_check
        self._size = size
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            os.ftruncate(self._descriptor, size)
        except OSError as error:
            self.close()
            raise write_error(self.path, error) from error

    @classmethod
    def create(cls, folder: Path, begin: Mapping[str, Any]) -> "Journal":
        """Begin a journal with its first record.

        Raises:
            ResourceError, ToolkitError: It cannot be written.
        """
        record = {"version": JOURNAL_VERSION, **begin}
        check = _check("", record)
        line = _canonical({"check": check, "record": record}) + b"\n"
        _replace(folder / JOURNAL_NAME, line)
        return cls(folder, last_check=check, size=len(line))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record durably.

        Raises:
            ResourceError, ToolkitError: It cannot be written; then it does not count, and the file must be closed.
        """
        check = _check(self._last_check, record)
        line = memoryview(_canonical({"check": check, "record": record}) + b"\n")
        offset = self._size
        try:
            while line:
                count = os.pwrite(self._descriptor, line, offset)
                line, offset = line[count:], offset + count
            os.fsync(self._descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._last_check, self._size = check, offset

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def remove(self) -> None:
        """Close and remove the file durably: the work is done."""
        self.close()
        os.unlink(self.path)
        sync_folder(self.path.parent)


class JournalContents:
    """What a journal says: its first record, the others, and where the next one goes."""

    def __init__(self, folder: Path, records: list[dict[str, Any]], *, last_check: str, size: int) -> None:
        self._folder = folder
        self.begin = records[0]
        self.records = records[1:]
        self._last_check = last_check
        self._size = size

    def reopen(self) -> Journal:
        """The journal, to append to; a torn last line is cut off.

        It is written anew, because what was read may be in memory only: a record that a crash would take back must not
        be relied on.
        """
        path = self._folder / JOURNAL_NAME
        _replace(path, path.read_bytes()[: self._size])
        return Journal(self._folder, last_check=self._last_check, size=self._size)


def read_journal(folder: Path) -> JournalContents | None:
    """Read the journal of a folder.

    Returns:
        None when there is none.

    Raises:
        IntegrityError: A line that is not the last is damaged, or the first.
        ManifestError: It is of an unknown version.
    """
    path = folder / JOURNAL_NAME
    if not path.exists():
        return None
    if path.stat().st_size > MAX_JOURNAL_BYTES:
        raise IntegrityError(f"{path}: larger than {MAX_JOURNAL_BYTES} bytes; not a journal of ours")
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    last_check, size = "", 0
    for number, line in enumerate(lines[:-1], start=1):
        parsed = _parse(line, last_check)
        if parsed is None:
            # A torn line is part of one record. Two in one line are a border that was damaged.
            is_torn = line.count(b'"check":') < 2 and not any(_is_whole(later) for later in lines[number:])
            if records and not is_torn:
                raise IntegrityError(
                    f"{path}: line {number} is damaged; what it vouched for cannot be trusted, restore the journal "
                    "from a copy, or start again with --discard if the source is still whole"
                )
            break
        last_check, record = parsed
        records.append(record)
        size += len(line) + 1
    if not records:
        raise _first_line_damaged(folder)
    if records[0].get("version") != JOURNAL_VERSION:
        raise ManifestError(f"{path}: journal of version {records[0].get('version')!r:.50}, this program writes 1")
    return JournalContents(folder, records, last_check=last_check, size=size)


def read_begin(folder: Path) -> dict[str, Any]:
    """The first record alone, also of a journal that is damaged further on.

    Raises:
        IntegrityError: It is damaged.
    """
    with (folder / JOURNAL_NAME).open("rb") as file:
        line = file.readline(MAX_JOURNAL_BYTES)
    parsed = _parse(line[:-1], "") if line.endswith(b"\n") else None
    if parsed is None:
        raise _first_line_damaged(folder)
    return parsed[1]


def is_consuming(contents: JournalContents) -> bool:
    """Whether what the journal's command reads from may have been freed in part."""
    return bool(contents.begin.get("consume")) or CONSUMES in contents.records


def is_digest(value: object) -> bool:
    """Whether a value has the form of a sha256: a journal's check proves that it is whole, not who wrote it."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def end_journal(folder: Path) -> None:
    """Behind a new manifest, which must be durable: the one that it replaced goes, and then the journal.

    In this order, each step durable: without a journal nobody would look for what stepped aside.
    """
    for name in (ASIDE_NAME, JOURNAL_NAME):
        (folder / name).unlink(missing_ok=True)
        sync_folder(folder)


def _first_line_damaged(folder: Path) -> IntegrityError:
    """It was whole when the file got its name, so it is no torn end."""
    rest = "this file: the manifest beside it is whole" if (folder / MANIFEST_NAME).exists() else "this folder"
    return IntegrityError(
        f"{folder / JOURNAL_NAME}: its first line is damaged, so nobody can say whether the source is still whole; "
        f"look there, and if it is, delete {rest}"
    )


def _replace(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        raise write_error(path, error) from error


def _parse(line: bytes, last_check: str) -> tuple[str, dict[str, Any]] | None:
    """A line's check and record, or None when it is not what was once written behind the line before."""
    try:
        document = parse_json(line, what="journal")
    except ManifestError:
        return None
    if not isinstance(document, dict) or document.keys() != {"check", "record"}:
        return None
    record = document["record"]
    if not isinstance(record, dict) or document["check"] != _check(last_check, record):
        return None
    return document["check"], record


def _is_whole(line: bytes) -> bool:
    """Whether a line is a record, of whatever chain: then the one before it is not the torn end."""
    try:
        return line.startswith(b"{") and isinstance(parse_json(line, what="journal"), dict)
    except ManifestError:
        return False


def _check(last_check: str, record: Mapping[str, Any]) -> str:
    return sha256_hex(last_check.encode("ascii") + _canonical(record))


def _canonical(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode(
        "ascii"
    )
