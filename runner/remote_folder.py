"""The folder of a checkpoint on a server, with the cache before it: small files, and the way to the large ones.

Small files of a resharded checkpoint are compared with the manifest's digests. Those beside original shards have none:
the server is asked each time whether they are still the same. This file knows names; it must not know tensors.
"""

import hashlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from manifests import urls
from manifests.digest import sha256_hex
from manifests.errors import IntegrityError, ManifestError, RemoteError
from manifests.folder import Cut
from manifests.http import Document, Facts, RemoteFile
from manifests.readable import Readable, in_memory
from manifests.remote import REQUESTS_AT_ONCE, RemoteFolder
from manifests.safety import check_relative
from manifests.schema import Manifest
from manifests.storage import MAX_MANIFEST_BYTES
from runner import notes
from runner.cache_folder import HEADERS, SMALL, CacheFolder

_ASKED = "asked"
_DIGEST_BYTES = 32
"""In front of a kept header: nothing else would tell that it is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What the server said of a small file when it was asked last: its sha256, None without one, and its ETag."""

    sha256: str | None
    etag: str | None


class CachedFolder:
    """A folder on a server, in one state.

    Args:
        cache: Where what was fetched is kept.
        key: Of the state.
        manifest: What the state holds.
        name: What it is called in messages.
        origin: The folder itself; None when the server must not, or cannot, be asked.
        offline: Why the server did not say which state it has; None when it did.
        facts: What original shards were when their headers were read, by name.

    Attributes:
        cache: As given.
        state: The folder of the state.
        offline: As given.
    """

    at_once = REQUESTS_AT_ONCE

    def __init__(
        self,
        cache: CacheFolder,
        key: str,
        manifest: Manifest,
        *,
        name: str,
        origin: RemoteFolder | None,
        offline: str | None,
        facts: Mapping[str, Facts],
    ) -> None:
        self.cache = cache
        self.state = cache.state(key)
        self._name = name
        self._origin = origin
        self.offline = offline
        self._facts = facts
        self._documents = {document.path: document for document in manifest.documents}
        self._is_in_place = manifest.layout != "resharded"
        self._asked: set[str] = set()

    def __str__(self) -> str:
        return self._name

    def where(self, name: str) -> str:
        """See `manifests.folder.Folder`."""
        return f"{self._name.rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """See `manifests.folder.Folder`."""
        if not self._is_in_place:
            document = self._documents.get(name)
            return None if document is None else document.size
        # Who asks for its size reads it soon, and then it is here.
        found = self.read(name, max_bytes=MAX_MANIFEST_BYTES)
        return None if found is None else len(found)

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """See `manifests.folder.Folder`.

        Raises:
            IntegrityError: It is not what the manifest says.
            RemoteError: It is not in the cache, and the server cannot be asked.
            ResourceError: The cache has no room for it.
        """
        check_relative(name, what=str(self))
        found = self._read_in_place(name, max_bytes) if self._is_in_place else self._read_document(name, max_bytes)
        if found is not None and len(found) > max_bytes:
            raise ManifestError(f"{self.where(name)}: larger than {max_bytes} bytes, which no such file needs")
        return found

    def open(self, name: str, *, first: int) -> AbstractContextManager[Readable]:
        """See `manifests.folder.Folder`; asked of the server, but for a header that is kept here."""
        facts = self._facts.get(name)
        header = None if facts is None else _read_header(self.state / HEADERS / name)
        if header is not None and facts is not None:
            return nullcontext(in_memory(header, size=facts.size, what=self.where(name)))
        return self._reach(name).open(name, first=first)

    def require(self, name: str) -> None:
        """See `manifests.folder.Folder`; nothing is asked, the file's own bytes will tell."""
        check_relative(name, what=str(self))

    def view(self, name: str, size: int) -> Cut:
        """See `manifests.folder.Folder`; each range is fetched when it is asked for, and not kept."""
        return self._reach(name).view(name, size)

    def remote_file(self, name: str) -> RemoteFile:
        """One of its files on the server, which must be what it was when its header was read.

        Raises:
            RemoteError: The server must not, or cannot, be asked.
        """
        check_relative(name, what=str(self))
        origin = self._reach(name)
        return RemoteFile(origin.web, urls.join(origin.url, name), self._facts.get(name))

    def _reach(self, name: str) -> RemoteFolder:
        if self._origin is None:
            raise RemoteError(
                f"{self.where(name)}: is needed and not in the cache, and the server cannot be asked; run again with it"
            )
        return self._origin

    def _read_document(self, name: str, max_bytes: int) -> bytes | None:
        document = self._documents.get(name)
        if document is None:
            return None
        path = self.state / SMALL / name
        if (kept := _kept(path)) is not None and sha256_hex(kept) == document.sha256:
            return kept
        for _ in range(2):
            found = self._ask(name, max_bytes, None)
            if found is None:
                raise IntegrityError(f"{self.where(name)}: is in the manifest, but not there")
            if sha256_hex(found.content) == document.sha256:
                self.cache.put(path, found.content)
                return found.content
        raise IntegrityError(f"{self.where(name)}: was fetched twice and has another sha256 than the manifest says")

    def _read_in_place(self, name: str, max_bytes: int) -> bytes | None:
        path, note = self.state / SMALL / name, self.state / _ASKED / f"{name}.json"
        asked, kept = _read_note(note), _kept(path)
        if asked is not None and (kept is None or sha256_hex(kept) != asked.sha256):
            kept = None
            # What was noted of a file that is lost or damaged here helps nobody.
            asked = asked if asked.sha256 is None else None
        # What belongs to a commit stays what it is; anything else is asked for once in a run.
        is_settled = self._origin is None or self._origin.files is not None or name in self._asked
        if asked is not None and (self.offline is not None or is_settled):
            return kept
        etag = None if asked is None or asked.sha256 is None else asked.etag
        found = self._ask(name, max_bytes, etag)
        self._asked.add(name)
        if found is None and etag is not None:
            return kept
        answer = _Asked(sha256=None, etag=None)
        if found is not None:
            answer = _Asked(sha256=sha256_hex(found.content), etag=found.etag)
            self.cache.put(path, found.content)
        if asked != answer:
            self.cache.put(note, notes.encode({"sha256": answer.sha256, "etag": answer.etag}))
        return None if found is None else found.content

    def _ask(self, name: str, max_bytes: int, etag: str | None) -> Document | None:
        return self._reach(name).document(name, max_bytes=max_bytes, etag=etag)


def keep_header(cache: CacheFolder, key: str, name: str, header: bytes) -> None:
    """Keep the header of a file of a state: it is read at every start and has what would be in small files.

    Raises:
        ResourceError: The cache has no room for it.
    """
    path = cache.state(key) / HEADERS / name
    if _read_header(path) != header:
        cache.put(path, hashlib.sha256(header).digest() + header)


def _read_header(path: Path) -> bytes | None:
    found = _kept(path)
    if found is None or found[:_DIGEST_BYTES] != hashlib.sha256(found[_DIGEST_BYTES:]).digest():
        return None
    return found[_DIGEST_BYTES:]


def _kept(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _read_note(path: Path) -> _Asked | None:
    found = notes.read(path)
    return _Asked(sha256=found["sha256"], etag=found["etag"]) if found.keys() == {"sha256", "etag"} else None
