"""A checkpoint on a web server: what it holds, from its manifest or from the headers of its shards alone.

Nothing is stored here. Small files are read whole, headers by range and many at once, tensors when somebody asks for
their bytes.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

from manifests import hub, urls
from manifests.answers import WEB_PAGE
from manifests.checkpoint import Checkpoint
from manifests.config import model_facts, read_config
from manifests.errors import ForbiddenError, RemoteError, SourceNotFoundError
from manifests.folder import Cut
from manifests.header import LENGTH_BYTES, Header, header_bytes, parse_header
from manifests.http import Document, RemoteFile, Web
from manifests.in_place import describe_in_place
from manifests.paths import INDEX_NAME, MANIFEST_NAME
from manifests.questions import each
from manifests.safety import check_relative
from manifests.schema import ModelFacts
from manifests.shards import MAX_INDEX_BYTES, SUFFIX, check_index, parse_weight_map, source_order
from manifests.storage import MAX_MANIFEST_BYTES, decode

FIRST_BYTES = 96 << 10
"""Asked for at first: DeepSeek-V3's headers, of about 600 tensors each, are shorter, so one request is all."""

REQUESTS_AT_ONCE = 16
SINGLE_NAME = f"model{SUFFIX}"
"""The file of a checkpoint without an index, as its writers call it."""

Watch = Callable[[int, int], None]
"""Is told how many of how many headers were read."""


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
        not have. Whoever finds nothing else either says both; see `forbidden`.
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
            raise RemoteError(f"{self.where(name)}: {WEB_PAGE}")
        return found

    def begin(self, name: str, size: int) -> tuple[bytes, int]:
        """See `manifests.folder.Folder`."""
        file = self.file(name)
        return file.begin(size), file.facts.size

    def require(self, name: str) -> None:
        """See `manifests.folder.Folder`; nothing is asked, the file's own bytes will tell."""
        check_relative(name, what=str(self))

    def view(self, name: str, size: int) -> Cut:
        """See `manifests.folder.Folder`; each range is fetched when it is asked for, and not kept."""
        file = self.file(name)
        return lambda begin, end: memoryview(file.read(begin, end)).toreadonly()


def open_remote(text: str, watch: Watch | None = None) -> Checkpoint:
    """Open a checkpoint on a web server or on the Hugging Face Hub.

    Args:
        text: The address of a folder with a manifest or with shards, or of one ``.safetensors`` file.
        watch: Is told how far the headers are.

    Raises:
        SourceNotFoundError: Nothing of the kind is there.
        ManifestError: The manifest, the index or a header is invalid, or they contradict each other.
        IntegrityError: A file changed while it was read.
        RemoteError: The server cannot be reached, or does not do what is asked.
    """
    folder = find_folder(text)
    name = urls.last_part(folder.url)
    if name.endswith(SUFFIX):
        folder = RemoteFolder(folder.web, urls.parent(folder.url))
        return Checkpoint(folder, describe_in_place(read_headers(folder, [name], watch), ModelFacts()))
    raw = folder.read(MANIFEST_NAME, max_bytes=MAX_MANIFEST_BYTES)
    if raw is not None:
        return Checkpoint(folder, decode(raw, what=folder.where(MANIFEST_NAME)))
    return Checkpoint(folder, describe_in_place(read_shards(folder, watch), model_facts(read_config(folder))))


def find_folder(text: str) -> RemoteFolder:
    """The folder that an address names; nothing of it is read but what the Hub says of a repository.

    Raises:
        SourceNotFoundError: It is no address that can be read, or the Hub has no such repository.
        RemoteError: The Hub cannot be reached.
        ToolkitError: A package is not installed that this needs.
    """
    if urls.is_hub(text):
        found = hub.resolve(text)
        web = Web({urls.origin(found.url): found.authorization} if found.authorization else None)
        return RemoteFolder(web, found.url, name=found.name, files=found.files)
    address = urls.parse(text)
    web = Web({urls.origin(address.url): address.authorization} if address.authorization else None)
    return RemoteFolder(web, address.url)


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
            if folder.forbidden is None:
                raise SourceNotFoundError(where) from error
            raise ForbiddenError(f"{where}, or you must not see them: {folder.forbidden}") from error
    weight_map = parse_weight_map(raw, what=folder.where(INDEX_NAME))
    shards = read_headers(folder, source_order(weight_map.values()), watch)
    check_index(str(folder), weight_map, shards)
    return shards


def read_headers(folder: RemoteFolder, names: Sequence[str], watch: Watch | None = None) -> dict[str, Header]:
    """The headers of these files, many at once, in the order of the names.

    Raises:
        See `open_remote`.
    """
    found: dict[str, Header] = {}
    with closing(each(lambda name: read_header(folder.file(name)), names, at_once=REQUESTS_AT_ONCE)) as headers:
        for name, header in zip(names, headers, strict=True):
            found[name] = header
            if watch is not None:
                watch(len(found), len(names))
    return found


def read_header(file: RemoteFile) -> Header:
    """The header of one safetensors file, of which no more than that is read.

    Raises:
        See `open_remote`.
    """
    raw = file.begin(FIRST_BYTES)
    size = file.facts.size
    wanted = header_bytes(raw[:LENGTH_BYTES], file_bytes=size, what=file.where)
    if wanted > len(raw):
        raw += file.read(len(raw), wanted)
    return parse_header(raw, file_bytes=size, what=file.where)
