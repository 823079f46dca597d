"""A manifest on disk: canonical bytes, its digest of itself, atomic and durable writing, strict reading.

Canonical means: the same manifest gives the same bytes. Keys are sorted, no blanks, ASCII only, one final newline.
``manifest_sha256`` is the sha256 of these bytes with its own 64 digits replaced by zeros, so it can be checked on
the raw bytes, before anything in them is believed.

Bytes are made and written file by file: all of DeepSeek-V3's manifest at once, as objects and as text, would take a
hundred megabytes.
"""

import dataclasses
import gc
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.jsontext import parse_json
from manifests.paths import MANIFEST_NAME, TEMP_SUFFIX
from manifests.schema import FileEntry, Manifest, file_document, to_document
from manifests.validate import parse

MAX_MANIFEST_BYTES = 256_000_000
"""Eight times DeepSeek-V3's; a bound, so that a crafted file cannot take all memory."""

WRITE_BYTES = 1 << 20
"""Collected before it is written: a file of the manifest is one or two kilobytes."""

_ZEROS = b"0" * 64
# Inside a JSON string a quote is escaped, so these bytes can only be a key and its value.
_DIGEST_FIELD = re.compile(rb'"manifest_sha256":"([0-9a-f]{64})"')
_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes, with the digest of themselves."""
    raw = bytearray()
    for offset, block in _blocks(manifest, manifest.files):
        raw[offset : offset + len(block)] = block
    return bytes(raw)


def _blocks(manifest: Manifest, files: Iterable[FileEntry]) -> Iterator[tuple[int, bytes]]:
    """The canonical bytes in blocks with their offsets; the last block is the digest, over the zeros that stood there.

    Args:
        manifest: All but its files.
        files: Its files.
    """
    hasher = hashlib.sha256()
    block = bytearray()
    offset = digest_offset = 0
    for part in _parts(manifest, files):
        if part is _ZEROS:
            digest_offset = offset + len(block)
        block += part
        if len(block) >= WRITE_BYTES:
            hasher.update(block)
            yield offset, bytes(block)
            offset += len(block)
            block.clear()
    hasher.update(block)
    yield offset, bytes(block)
    yield digest_offset, hasher.hexdigest().encode("ascii")


def _parts(manifest: Manifest, files: Iterable[FileEntry]) -> Iterator[bytes]:
    """The canonical bytes in order, zeros in place of the digest: `_ZEROS` itself, and by itself."""
    document = to_document(dataclasses.replace(manifest, files=()))
    for number, key in enumerate(sorted([*document, "manifest_sha256"])):
        yield f'{"," if number else "{"}"{key}":'.encode("ascii")
        if key == "manifest_sha256":
            yield b'"'
            yield _ZEROS
            yield b'"'
        elif key == "files":
            before = b"["
            for file in files:
                yield before + _ENCODER.encode(file_document(file)).encode("ascii")
                before = b","
            yield b"]" if before == b"," else b"[]"
        else:
            yield _ENCODER.encode(document[key]).encode("ascii")
    yield b"}\n"


def decode(raw: bytes, *, what: str) -> Manifest:
    """Read canonical bytes back.

    Raises:
        ManifestError: Not strict JSON, not this version, any other problem, or the digest does not fit.
    """
    with _collector_paused():
        manifest = parse(parse_json(raw, what=what), what=what, keep=False)
    found = list(_DIGEST_FIELD.finditer(raw))
    if len(found) != 1 or _digest(raw, found[0].start(1)) != found[0][1]:
        raise ManifestError(
            f"{what}: its bytes do not match its own manifest_sha256; it was damaged or edited, restore it from a copy"
        )
    return manifest


def _digest(raw: bytes, offset: int) -> bytes:
    """The digest of canonical bytes, which stands in them at this offset."""
    hasher = hashlib.sha256(memoryview(raw)[:offset])
    hasher.update(_ZEROS)
    hasher.update(memoryview(raw)[offset + len(_ZEROS) :])
    return hasher.hexdigest().encode("ascii")


@contextmanager
def _collector_paused() -> Iterator[None]:
    """No garbage collection meanwhile: it would walk the growing tree of a large manifest again and again.

    A quarter of the time of reading DeepSeek-V3's. Nothing made here is cyclic.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def load(folder: Path) -> Manifest:
    """Read and check the manifest of a resharded checkpoint.

    Raises:
        SourceNotFoundError: The folder has none.
        ManifestError: See `decode`.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise SourceNotFoundError(f"{folder}: has no {MANIFEST_NAME}; is it a resharded checkpoint?")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest of ours")
    return decode(path.read_bytes(), what=str(path))


def save(manifest: Manifest, folder: Path, *, files: Iterable[FileEntry] | None = None) -> None:
    """Write the manifest into folder, atomically and durably.

    Args:
        manifest: What to write.
        folder: Where to.
        files: Taken one by one, sorted by path, in place of the manifest's own, which then may be empty: so that
            nobody needs to hold all of them.
    """
    with _replacing(folder / MANIFEST_NAME) as descriptor:
        for offset, block in _blocks(manifest, manifest.files if files is None else files):
            _write(descriptor, block, offset)


def write_atomic(path: Path, data: bytes) -> None:
    """Put data at path: temporary name, fsync, rename, fsync of the folder. Readers see all of it or none."""
    with _replacing(path) as descriptor:
        _write(descriptor, data, 0)


@contextmanager
def _replacing(path: Path) -> Iterator[int]:
    """A descriptor whose file takes the place of path when it is whole and durable; a failure leaves no trace of it."""
    temporary = path.with_name(path.name + TEMP_SUFFIX)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):  # what led here is what must be told
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of data; the system may take less at a time."""
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def sync_folder(folder: Path) -> None:
    """Make renames inside folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
