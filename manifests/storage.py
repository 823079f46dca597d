"""A manifest on disk: canonical bytes, its digest of itself, atomic and durable writing, strict reading.

Canonical means: the same manifest gives the same bytes. Keys are sorted, no blanks, ASCII only, one final newline.
``manifest_sha256`` is the sha256 of these bytes with its own 64 digits replaced by zeros, so it can be checked on
the raw bytes, before anything in them is believed.
"""

import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manifests.digest import sha256_hex
from manifests.errors import ManifestError, SourceNotFoundError
from manifests.jsontext import parse_json
from manifests.paths import MANIFEST_NAME
from manifests.schema import Manifest, to_document
from manifests.validate import parse

MAX_MANIFEST_BYTES = 256_000_000
"""Eight times DeepSeek-V3's; a bound, so that a crafted file cannot take all memory."""

TEMP_SUFFIX = ".partial"

_ZEROS = "0" * 64
# Inside a JSON string a quote is escaped, so these bytes can only be a key and its value.
_DIGEST_FIELD = re.compile(rb'"manifest_sha256":"([0-9a-f]{64})"')


def encode(manifest: Manifest) -> bytes:
    """The canonical bytes, with the digest of themselves."""
    document = to_document(manifest) | {"manifest_sha256": _ZEROS}
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    raw = text.encode("ascii") + b"\n"
    return _DIGEST_FIELD.sub(f'"manifest_sha256":"{sha256_hex(raw)}"'.encode("ascii"), raw)


def decode(raw: bytes, *, what: str) -> Manifest:
    """Read canonical bytes back.

    Raises:
        ManifestError: Not strict JSON, not this version, any other problem, or the digest does not fit.
    """
    with _collector_paused():
        manifest = parse(parse_json(raw, what=what), what=what)
    found = _DIGEST_FIELD.findall(raw)
    zeroed = _DIGEST_FIELD.sub(b'"manifest_sha256":"' + _ZEROS.encode("ascii") + b'"', raw)
    if len(found) != 1 or sha256_hex(zeroed) != found[0].decode("ascii"):
        raise ManifestError(
            f"{what}: its bytes do not match its own manifest_sha256; it was damaged or edited, restore it from a copy"
        )
    return manifest


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


def save(manifest: Manifest, folder: Path) -> None:
    """Write the manifest into folder, atomically and durably."""
    write_atomic(folder / MANIFEST_NAME, encode(manifest))


def write_atomic(path: Path, data: bytes) -> None:
    """Put data at path: temporary name, fsync, rename, fsync of the folder. Readers see all of it or none."""
    temporary = path.with_name(path.name + TEMP_SUFFIX)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames inside folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
