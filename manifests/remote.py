"""A checkpoint on a web server: what it holds, from its manifest or from the headers of its shards alone.

Nothing is stored here. Small files are read whole, headers by range and many at once, tensors when somebody asks for
their bytes.
"""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

from manifests import gguf_files, hub, urls
from manifests.answers import WEB_PAGE
from manifests.checkpoint import Checkpoint
from manifests.config import CONFIG_NAME, model_facts, read_config
from manifests.errors import ForbiddenError, RemoteError, SourceNotFoundError
from manifests.folder import Cut
from manifests.header import Header
from manifests.http import Document, RemoteFile, Web
from manifests.in_place import describe_in_place
from manifests.paths import INDEX_NAME, MANIFEST_NAME
from manifests.questions import Watch
from manifests.readable import Readable
from manifests.safety import check_relative
from manifests.shards import MAX_INDEX_BYTES, SUFFIX, check_index, parse_weight_map, read_headers, source_order
from manifests.storage import MAX_MANIFEST_BYTES, decode

REQUESTS_AT_ONCE = 16
SINGLE_NAME = f"model{SUFFIX}"
"""The file of a checkpoint without an index, as its writers call it."""


class RemoteFolder:
    """A folder on a web server.

    Args:
        web: Who asks.
        url: Its address.
        name: What it is called in messages; its address when not given.
        files: What it holds, where the server says so.

    Attributes:
        web: As given.
        url: As given.
        files: As given; None where nobody knows.
        forbidden: Why the server did not let some file be read that need not be there.
    """

    at_once = REQUESTS_AT_ONCE

    def __init__(
        self, web: Web, url: str, *, name: str | None = None, files: Mapping[str, hub.Listed] | None = None
    ) -> None:
        self.web = web
        self.url = url
        self.files = files
        self.forbidden: ForbiddenError | None = None
        self._name = name or urls.shown(url)
        self._files: dict[str, RemoteFile] = {}
        self._lock = threading.Lock()

    def __str__(self) -> str:
        return self._name

    def where(self, name: str) -> str:
        """See `manifests.folder.Folder`."""
        return f"{self._name.rstrip('/')}/{name}"

    def file(self, name: str) -> RemoteFile:
        """One of its files, which must stay what it is from the first look at it on.

        Raises:
            ManifestError: The name leaves the folder.
        """
        with self._lock:
            if name not in self._files:
                check_relative(name, what=str(self))
                self._files[name] = self.web.file(urls.join(self.url, name))
            return self._files[name]

    def size(self, name: str) -> int | None:
        """See `manifests.folder.Folder`."""
        if self.files is not None:
            listed = self.files.get(name)
            return None if listed is None else listed.size
        try:
            return self.file(name).facts.size
        except ForbiddenError as error:
            self.forbidden = error
            return None
        except SourceNotFoundError:
            return None

    def read(self, name: str, *, max_bytes: int) -> bytes | None:
        """See `manifests.folder.Folder`."""
        found = self.document(name, max_bytes=max_bytes)
        return None if found is None else found.content

    def document(
        self, name: str, *, max_bytes: int, etag: str | None = None, tries: int | None = None
    ) -> Document | None:
        """A small file that need not be there, with the name of its state; see `manifests.http.Web.read`.

        One that must not be seen counts as absent: stores that do not let their lists be read say so of what they do
        not have. Whoever finds nothing else either says both; see `forbidden`. So does a web page in the place of JSON,
        which some servers have for whatever they do not have.
        """
        if self.files is not None and name not in self.files:
            return None
        check_relative(name, what=str(self))
        try:
            found = self.web.read(urls.join(self.url, name), max_bytes=max_bytes, etag=etag, tries=tries)
        except ForbiddenError as error:
            if self.files is not None or etag is not None:
                raise
            self.forbidden = error
            return None
        if found is not None and name.endswith(".json") and found.content.lstrip()[:1] == b"<":
            page = f"{self.where(name)}: {WEB_PAGE}"
            if etag is not None:
                raise RemoteError(page)  # None would say that it is what it was
            self.forbidden = ForbiddenError(page)
            return None
        return found

    def open(self, name: str, *, first: int) -> AbstractContextManager[Readable]:
        """See `manifests.folder.Folder`."""
        return nullcontext(_begun(self.file(name), first))

    def require(self, name: str) -> None:
        """See `manifests.folder.Folder`; nothing is asked, the file's own bytes will tell."""
        check_relative(name, what=str(self))

    def view(self, name: str, size: int) -> Cut:
        """See `manifests.folder.Folder`; each range is fetched when it is asked for, and not kept."""
        file = self.file(name)
        return lambda begin, end: memoryview(file.read(begin, end)).toreadonly()


def open_remote(folder: RemoteFolder, watch: Watch | None = None) -> Checkpoint:
    """Open the checkpoint of a folder on a web server or on the Hugging Face Hub.

    Args:
        folder: The folder.
        watch: Is told how far the headers are.

    Raises:
        SourceNotFoundError: Nothing of the kind is there.
        ManifestError: The manifest, the index or a header is invalid, or they contradict each other.
        IntegrityError: A file changed while it was read.
        RemoteError: The server cannot be reached, or does not do what is asked.
    """
    raw = folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    if raw is not None:
        return Checkpoint(folder, decode(raw, what=folder.where(MANIFEST_NAME)))
    if names := find_gguf(folder):
        return gguf_files.open_gguf(folder, gguf_files.read_folder(folder, names, watch=watch))
    return Checkpoint(folder, describe_in_place(read_shards(folder, watch), model_facts(read_config(folder))))


def find(text: str) -> tuple[RemoteFolder, str | None]:
    """The folder that an address names, and the file in it where it names one.

    Nothing is read but what the Hub says of a repository. Other servers do not say what is a file, and its name must.

    Raises:
        SourceNotFoundError: It is no address that can be read, or that of a document of a checkpoint, or the Hub has
            nothing of the name.
        RemoteError: The Hub cannot be reached.
        ToolkitError: A package is not installed that this needs.
    """
    if urls.is_hub(text):
        found = hub.resolve(text)
        web = Web({urls.origin(found.url): found.authorization} if found.authorization else None)
        return RemoteFolder(web, found.url, name=found.name, files=found.files), found.file
    address = urls.parse(text)
    web = Web({urls.origin(address.url): address.authorization} if address.authorization else None)
    name = urls.last_part(address.url)
    folder = RemoteFolder(web, urls.parent(address.url))
    if name in (MANIFEST_NAME, INDEX_NAME, CONFIG_NAME):
        raise SourceNotFoundError(f"{folder.where(name)}: is one file of a checkpoint; give its folder, {folder}")
    if name.endswith((SUFFIX, gguf_files.SUFFIX)):
        return folder, name
    return RemoteFolder(web, address.url), None


def is_resharded(folder: RemoteFolder) -> bool:
    """Whether there is a manifest.

    Raises:
        RemoteError: The server cannot be reached, or does not do what is asked.
    """
    return folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES) is not None


def find_gguf(folder: RemoteFolder) -> list[str]:
    """Names of the GGUF files of a folder, sorted; none where it has safetensors, or where nobody lists its files."""
    names = [name for name in folder.files or () if "/" not in name]
    if any(name.endswith(SUFFIX) or name == INDEX_NAME for name in names):
        return []
    return sorted(name for name in names if name.endswith(gguf_files.SUFFIX))


def read_shards(folder: RemoteFolder, watch: Watch | None = None) -> dict[str, Header]:
    """The headers of a plain checkpoint's shards in source order, checked against its index.

    Raises:
        See `open_remote`.
    """
    return read_indexed(folder, read_index(folder), watch)


def read_index(folder: RemoteFolder) -> bytes | None:
    """The bytes of a plain checkpoint's index; None when it has none.

    Raises:
        See `open_remote`.
    """
    return folder.read(INDEX_NAME, max_bytes=MAX_INDEX_BYTES)


def read_indexed(folder: RemoteFolder, raw: bytes | None, watch: Watch | None = None) -> dict[str, Header]:
    """As `read_shards`, with the bytes of the index, which were read before.

    Raises:
        See `open_remote`.
    """
    if raw is None:
        try:
            return read_headers(folder, [SINGLE_NAME], watch)
        except SourceNotFoundError as error:
            where = f"{folder}: no {MANIFEST_NAME}, no {INDEX_NAME} and no {SINGLE_NAME} there"
            if folder.forbidden is not None:
                raise ForbiddenError(f"{where}, or you must not see them: {folder.forbidden}") from error
            raise SourceNotFoundError(f"{where}; of a GGUF model give the address of the file") from error
    weight_map = parse_weight_map(raw, what=folder.where(INDEX_NAME))
    shards = read_headers(folder, source_order(weight_map.values()), watch)
    check_index(str(folder), weight_map, shards)
    return shards


def _begun(file: RemoteFile, first: int) -> Readable:
    """A file, of which the first bytes are asked for now: most who read it need no others."""
    raw = file.begin(first)
    size = file.facts.size

    def read(offset: int, count: int) -> bytes:
        end = min(offset + count, size)
        rest = file.read(max(offset, len(raw)), end) if end > max(offset, len(raw)) else b""
        return raw[offset:end] + rest

    return Readable(what=file.where, size=size, read=read)
