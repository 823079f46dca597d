"""A file in its two forms, plain and packed: where each stands, what is in it, how one is made of the other.

Whatever is made is read back from the disk and proven by the digests in the manifest, which are those of the plain
form: so what it was made of was right as well, and may go. Knows single files; it must not know what becomes of a
folder.
"""

import dataclasses
import hashlib
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import IntegrityError, ToolkitError
from manifests.safety import resolve_inside
from manifests.schema import FileEntry
from reshard.archive import unpack_blocks, write_packed
from reshard.blocks import PageWriter, Reader, Writer
from reshard.progress import Progress
from reshard.verify import checks_of
from reshard.workers import StopFlag

if TYPE_CHECKING:
    from hashlib import _Hash

SUFFIX = ".zst"


def other_path(file: FileEntry) -> str:
    """The relative path of a file's other form."""
    return file.path + SUFFIX if file.codec == "none" else file.path.removesuffix(SUFFIX)


def other_entry(file: FileEntry, *, size: int, stored_sha256: str | None) -> FileEntry:
    """The entry of a file's other form: where its bytes lie changes, what they are does not.

    Args:
        file: As it is.
        size: Of the other form, in bytes as stored.
        stored_sha256: Of the other form; None for a plain one.
    """
    codec = "zstd" if file.codec == "none" else "none"
    return dataclasses.replace(file, path=other_path(file), size=size, codec=codec, stored_sha256=stored_sha256)


def make_other(root: Path, file: FileEntry, *, progress: Progress, stop: StopFlag) -> FileEntry:
    """Write the other form of a file and prove it. Its bytes are durable then; its name is when its folder is synced.

    Args:
        root: The checkpoint.
        file: What to make it of; it stays.
        progress: Counts bytes of the plain form.
        stop: Asked before each block.

    Returns:
        The entry of what was made.

    Raises:
        IntegrityError: What was made is not right; nothing is left of it.
        ResourceError, ToolkitError: The disk is full, or reports another error.
    """

    def counted(blocks: Iterable[memoryview]) -> Generator[memoryview, None, None]:
        for block in blocks:
            stop.check()
            yield block
            progress.advance(len(block))

    target = root / other_path(file)
    with closing(_read(root, file)) as blocks:
        writer = Writer(target)
        try:
            if file.codec == "none":
                write_packed(counted(blocks), writer, size=file.size)
            else:
                _write_plain(counted(blocks), writer)
            writer.finish()
        except BaseException:
            writer.abandon()
            raise
    try:
        return prove_other(root, file)
    except ToolkitError as error:
        target.unlink()
        raise type(error)(f"{error}; it was written just now, and must be read back right") from error


def prove_other(root: Path, file: FileEntry) -> FileEntry:
    """Read the other form of a file, all of it, and check it against the manifest; return its entry.

    Raises:
        IntegrityError: It is not right in every byte.
        SourceNotFoundError, ToolkitError: It is not there, or cannot be read.
    """
    if file.codec != "none":
        entry = other_entry(file, size=file.unpacked_size, stored_sha256=None)
        _require_right(root, entry)
        return entry
    stored = hashlib.sha256()
    size = resolve_inside(root, other_path(file)).stat().st_size
    entry = other_entry(file, size=size, stored_sha256=None)
    _require_right(root, entry, stored)
    return dataclasses.replace(entry, stored_sha256=stored.hexdigest())


def find_fault(root: Path, file: FileEntry) -> ToolkitError | None:
    """What is wrong with a file; None when its content is right in every byte."""
    try:
        _require_right(root, file)
    except ToolkitError as error:
        return error
    return None


def _read(root: Path, file: FileEntry, stored: "_Hash | None" = None) -> Generator[memoryview, None, None]:
    """A file's content, unpacked if it is packed; `stored` then takes the bytes as they lie."""
    path = resolve_inside(root, file.path)
    found = path.stat().st_size
    if found != file.size:
        raise IntegrityError(f"{path}: has {found} bytes, the manifest says {file.size}")
    if file.codec != "none":
        yield from unpack_blocks(path, size=file.unpacked_size, stored=stored)
    else:
        with closing(Reader(path)) as reader:
            yield from reader.blocks(0, file.size)


def _require_right(root: Path, file: FileEntry, stored: "_Hash | None" = None) -> None:
    """Hash a file's content, part by part as the manifest has it."""
    with closing(_read(root, file, stored)) as blocks:
        rest = memoryview(b"")
        for check in checks_of(dataclasses.replace(file, codec="none", size=file.unpacked_size)):
            hasher = hashlib.sha256()
            left = check.end - check.begin
            while left:
                rest = rest or next(blocks)
                hasher.update(rest[:left])
                left, rest = max(0, left - len(rest)), rest[left:]
            if hasher.hexdigest() != check.sha256:
                what = "its header" if check.tensor is None else f"tensor {check.tensor.name!r}"
                raise IntegrityError(f"{root / file.path}: {what} is damaged")
        # Behind the last byte a packed file has its checksum.
        next(blocks, None)


def _write_plain(blocks: Iterable[memoryview], writer: Writer) -> None:
    pages = PageWriter()
    offset = 0
    for block in blocks:
        pages.put(writer, block, offset)
        offset += len(block)
    pages.flush()
