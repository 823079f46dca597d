"""From a JSON document to a `Manifest`: every problem is found, with its place, kind and message.

`parse` is the only way to a `Manifest` from outside, so whoever holds one may rely on it: types and ranges are
right, paths are safe, ranges lie inside their files without overlap, names and paths are unique, digests agree
with the digests they are built from, references resolve. Whether the files on disk are so is not asked here.
"""

import re
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, TypeVar

from manifests.digest import CHUNK_BYTES, combine, file_digest
from manifests.dtypes import BITS
from manifests.errors import ManifestError, Problem
from manifests.header import LENGTH_BYTES, MAX_DIMENSIONS, MAX_FILE_BYTES, MAX_HEADER_BYTES, MAX_NAME_CHARS
from manifests.paths import ASIDE_NAME, JOURNAL_NAME, MANIFEST_NAME, TEMP_SUFFIX, Kind, Place, parse_path
from manifests.safety import relative_fault
from manifests.schema import (
    CODECS,
    FORMAT_NAME,
    FORMAT_VERSION,
    LAYOUTS,
    PLAIN,
    ROLES,
    SOURCE_KINDS,
    Document,
    FileEntry,
    Manifest,
    ModelFacts,
    Selection,
    Shard,
    Source,
    TensorEntry,
)
from manifests.shared import Shared

MAX_PROBLEMS = 1000
"""Enough to act on; a document of noise should not fill memory with complaints."""

T = TypeVar("T")
_SHA256 = re.compile("[0-9a-f]{64}")
_OWN_NAMES = (MANIFEST_NAME, ASIDE_NAME, JOURNAL_NAME)


def parse(document: Any, *, what: str = "manifest", keep: bool = True) -> Manifest:
    """Turn a document into a manifest.

    Args:
        document: Parsed JSON, with or without the ``manifest_sha256`` key (its value is checked by the reader
            of the bytes, `manifests.storage`).
        what: Name of the document for messages.
        keep: Whether the document is needed afterwards. Else it is emptied on the way: a large one and its manifest
            never are in memory together.

    Raises:
        ManifestError: With all problems.
    """
    manifest, problems = _Reader(keep=keep).read(document)
    if manifest is None or problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        where = f" at {first.loc}" if first.loc else ""
        raise ManifestError(f"{what}: {first.message}{where}{more}", problems)
    return manifest


def validate(document: Any) -> list[Problem]:
    """All problems of a document; empty when it is a manifest."""
    return _Reader().read(document)[1]


class _Keys:
    """The keys that an object must and may have, as sets: this is asked for each of a hundred thousand tensors."""

    __slots__ = ("all", "required")

    def __init__(self, required: Iterable[str], optional: Iterable[str] = ()) -> None:
        self.required = frozenset(required)
        self.all = self.required.union(optional)


_TOP_KEYS = _Keys(
    ("format", "version", "layout", "model", "selection", "files", "documents", "source"), ("manifest_sha256",)
)
_MODEL_KEYS = _Keys((), ("model_type", "num_hidden_layers", "n_routed_experts", "num_experts_per_tok"))
_SELECTION_KEYS = _Keys(("layers", "experts"))
_FILE_KEYS = _Keys(
    ("path", "kind", "size", "header_size", "tensors"),
    ("layer", "expert", "codec", "stored_sha256", "unpacked_size", "header_sha256", "digest"),
)
_STORED_FILE_KEYS = _Keys({*_FILE_KEYS.required, "header_sha256", "digest"}, _FILE_KEYS.all)
_TENSOR_KEYS = _Keys(
    ("name", "dtype", "shape", "offset", "size"), ("digest", "chunks", "encoding", "logical_shape", "source_name")
)
_STORED_TENSOR_KEYS = _Keys({*_TENSOR_KEYS.required, "digest"}, _TENSOR_KEYS.all)
_DOCUMENT_KEYS = _Keys(("path", "role", "size", "sha256"), ("codec", "content_size", "content_sha256", "source_name"))
_SOURCE_KEYS = _Keys(("kind", "shards"))
_SHARD_KEYS = _Keys(("name", "size", "sha256", "header"))


class _TooManyError(Exception):
    """Ends the search for problems; never leaves this file."""


class _Reader:
    """Reads one document. Bad parts yield a problem and None, so that the search goes on."""

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self.problems: list[Problem] = []
        self._shared = Shared()

    def read(self, document: Any) -> tuple[Manifest | None, list[Problem]]:
        try:
            return self._manifest(document), self.problems
        except _TooManyError:
            return None, self.problems

    # The small readers. Each takes the mapping, the key and the mapping's place in the document.

    def _problem(self, loc: str, kind: str, message: str) -> None:
        self.problems.append(Problem(loc=loc, kind=kind, message=message))
        if len(self.problems) >= MAX_PROBLEMS:
            raise _TooManyError

    def _mapping(self, value: Any, loc: str, keys: _Keys) -> dict[str, Any]:
        if not isinstance(value, dict):
            self._problem(loc, "invalid_type", "must be an object")
            return {}
        if keys.required <= value.keys() <= keys.all:
            return value
        for key in sorted(keys.required - value.keys()):
            self._problem(loc, "missing_key", f"{key!r} is missing")
        for key in sorted(value.keys() - keys.all):
            # A later version may mean something by it; ignoring it would be a guess.
            self._problem(loc, "unknown_key", f"{key!r:.100} is not known in version {FORMAT_VERSION}")
        return value

    def _text(self, mapping: dict[str, Any], key: str, loc: str, *, limit: int = 1024) -> str:
        value = mapping.get(key, "")
        if isinstance(value, str) and 0 < len(value) <= limit:
            return value
        if key in mapping:
            self._problem(_at(loc, key), "invalid_type", f"must be a text of 1 to {limit} characters")
        return ""

    def _choice(self, mapping: dict[str, Any], key: str, loc: str, choices: Iterable[str], default: str = "") -> str:
        value = mapping.get(key, default)
        if isinstance(value, str) and value in choices:
            return value
        if key in mapping:
            self._problem(_at(loc, key), "invalid_value", f"must be one of {', '.join(choices)}")
        return default

    def _count(self, mapping: dict[str, Any], key: str, loc: str, default: int = 0) -> int:
        value = mapping.get(key, default)
        # type() and not isinstance: True is an int in Python and not a size.
        if type(value) is int and 0 <= value <= MAX_FILE_BYTES:
            return value
        self._problem(_at(loc, key), "invalid_type", f"must be a whole number from 0 to {MAX_FILE_BYTES}")
        return default

    def _optional_count(self, mapping: dict[str, Any], key: str, loc: str) -> int | None:
        return self._count(mapping, key, loc) if key in mapping else None

    def _sha256(self, mapping: dict[str, Any], key: str, loc: str) -> str | None:
        value = mapping.get(key)
        # An absent one was reported where it must be there; null is not a way to leave one out.
        if key not in mapping or self._is_sha256(value):
            return value
        self._problem(_at(loc, key), "invalid_value", "must be 64 lower-case hexadecimal digits")
        return None

    @staticmethod
    def _is_sha256(value: Any) -> bool:
        return isinstance(value, str) and _SHA256.fullmatch(value) is not None

    def _counts(self, mapping: dict[str, Any], key: str, loc: str) -> tuple[int, ...]:
        value = mapping.get(key, [])
        if isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_FILE_BYTES for item in value):
            return tuple(value)
        self._problem(_at(loc, key), "invalid_type", "must be a list of whole numbers from 0")
        return ()

    def _shape(self, mapping: dict[str, Any], key: str, loc: str) -> tuple[int, ...]:
        shape = self._counts(mapping, key, loc)
        # The bounds of a header. Dimensions first: the product of a million numbers takes hours.
        if len(shape) > MAX_DIMENSIONS or prod(number for number in shape if number) > MAX_FILE_BYTES:
            self._problem(
                _at(loc, key),
                "invalid_value",
                f"has more than {MAX_DIMENSIONS} dimensions, or more elements than any file can hold",
            )
            return ()
        return shape

    def _list(self, mapping: dict[str, Any], key: str, loc: str, read: Callable[[Any, str], T | None]) -> tuple[T, ...]:
        value = mapping.get(key, [])
        if not isinstance(value, list):
            self._problem(f"{loc}{key}", "invalid_type", "must be a list")
            return ()
        found = []
        for number, item in enumerate(value):
            entry = read(item, f"{loc}{key}[{number}]")
            if entry is not None:
                found.append(entry)
            if not self._keep:
                value[number] = None
        return tuple(found)

    def _path(self, mapping: dict[str, Any], key: str, loc: str) -> str:
        path = self._text(mapping, key, loc)
        fault = relative_fault(path) if path else None
        if fault:
            self._problem(_at(loc, key), "invalid_value", f"path {path!r:.200} {fault}")
        return path

    # The parts of the document.

    def _manifest(self, document: Any) -> Manifest | None:
        if isinstance(document, dict):
            # Asked first: nothing else can be said of a document of another kind or version.
            if document.get("format") != FORMAT_NAME:
                self._problem("format", "invalid_value", f"not a manifest: format is not {FORMAT_NAME!r}")
                return None
            version = document.get("version")
            if type(version) is not int or version != FORMAT_VERSION:
                self._problem(
                    "version",
                    "invalid_value",
                    f"version {version!r:.40} is not {FORMAT_VERSION}, the only one this program knows; update it",
                )
                return None
        top = self._mapping(document, "", _TOP_KEYS)
        if not top:
            return None
        self._sha256(top, "manifest_sha256", "")
        layout = self._choice(top, "layout", "", LAYOUTS, "resharded")
        stored = layout == "resharded"
        manifest = Manifest(
            layout=layout,
            model=self._model(top.get("model", {})),
            selection=self._selection(top.get("selection", {})),
            files=self._list(top, "files", "", lambda item, loc: self._file(item, loc, stored)),
            documents=self._list(top, "documents", "", self._document),
            source=None if top.get("source") is None else self._source(top["source"]),
        )
        self._check_whole(manifest)
        return manifest

    def _model(self, value: Any) -> ModelFacts:
        facts = self._mapping(value, "model", _MODEL_KEYS)
        return ModelFacts(
            model_type=self._text(facts, "model_type", "model") or None,
            num_hidden_layers=self._optional_count(facts, "num_hidden_layers", "model"),
            n_routed_experts=self._optional_count(facts, "n_routed_experts", "model"),
            num_experts_per_tok=self._optional_count(facts, "num_experts_per_tok", "model"),
        )

    def _selection(self, value: Any) -> Selection:
        selection = self._mapping(value, "selection", _SELECTION_KEYS)
        numbers: dict[str, tuple[int, ...] | None] = {}
        for key in ("layers", "experts"):
            numbers[key] = None
            if selection.get(key) is not None:
                numbers[key] = chosen = self._counts(selection, key, "selection")
                if list(chosen) != sorted(set(chosen)):
                    self._problem(f"selection.{key}", "invalid_value", "must be sorted, without repeats")
        return Selection(layers=numbers["layers"], experts=numbers["experts"])

    def _file(self, value: Any, loc: str, stored: bool) -> FileEntry | None:
        file = self._mapping(value, loc, _STORED_FILE_KEYS if stored else _FILE_KEYS)
        if not file:
            return None
        size = self._count(file, "size", loc)
        codec = self._choice(file, "codec", loc, CODECS, "none")
        packed = codec != "none"
        entry = FileEntry(
            path=self._path(file, "path", loc),
            kind=Kind(self._choice(file, "kind", loc, list(Kind), Kind.SHARD)),
            layer=self._optional_count(file, "layer", loc),
            expert=self._optional_count(file, "expert", loc),
            size=size,
            codec=codec,
            stored_sha256=self._sha256(file, "stored_sha256", loc),
            unpacked_size=self._count(file, "unpacked_size", loc, size) if packed else size,
            header_size=self._count(file, "header_size", loc),
            header_sha256=self._sha256(file, "header_sha256", loc),
            digest=self._sha256(file, "digest", loc),
            tensors=self._list(file, "tensors", f"{loc}.", lambda item, place: self._tensor(item, place, stored)),
        )
        self._check_file(entry, file, loc, stored)
        return entry

    def _tensor(self, value: Any, loc: str, stored: bool) -> TensorEntry | None:
        tensor = self._mapping(value, loc, _STORED_TENSOR_KEYS if stored else _TENSOR_KEYS)
        if not tensor:
            return None
        name = self._text(tensor, "name", loc, limit=MAX_NAME_CHARS)
        shape = self._shared[self._shape(tensor, "shape", loc)]
        entry = TensorEntry(
            name=name,
            dtype=self._shared[self._choice(tensor, "dtype", loc, BITS, "U8")],
            shape=shape,
            offset=self._shared[self._count(tensor, "offset", loc)],
            size=self._shared[self._count(tensor, "size", loc)],
            digest=self._sha256(tensor, "digest", loc),
            chunks=tuple(tensor["chunks"]) if self._chunks_are_sound(tensor, loc) else (),
            encoding=self._text(tensor, "encoding", loc, limit=40) if "encoding" in tensor else PLAIN,
            logical_shape=self._shape(tensor, "logical_shape", loc) if "logical_shape" in tensor else shape,
            source_name=(self._text(tensor, "source_name", loc, limit=MAX_NAME_CHARS) or name)
            if "source_name" in tensor
            else name,
        )
        if entry.size * 8 != BITS[entry.dtype] * prod(shape):
            self._problem(loc, "inconsistent", f"{entry.dtype} {list(shape)} does not take {entry.size} bytes")
        if stored:
            self._check_chunks(entry, loc)
        return entry

    def _chunks_are_sound(self, tensor: dict[str, Any], loc: str) -> bool:
        if "chunks" not in tensor:
            return False
        chunks = tensor["chunks"]
        if isinstance(chunks, list) and chunks and all(map(self._is_sha256, chunks)):
            return True
        self._problem(f"{loc}.chunks", "invalid_value", "must be a list of sha256 digests")
        return False

    def _check_chunks(self, tensor: TensorEntry, loc: str) -> None:
        expected = -(-tensor.size // CHUNK_BYTES) if tensor.size > CHUNK_BYTES else 0
        if len(tensor.chunks) != expected:
            self._problem(f"{loc}.chunks", "inconsistent", f"{tensor.size} bytes need {expected} chunk digests")
        elif tensor.chunks and tensor.digest is not None and combine(tensor.chunks) != tensor.digest:
            self._problem(f"{loc}.digest", "inconsistent", "is not the digest of its chunks")

    def _check_file(self, file: FileEntry, document: dict[str, Any], loc: str, stored: bool) -> None:
        packing = {"stored_sha256", "unpacked_size"} & document.keys()
        if (file.codec != "none") != (len(packing) == 2) or (file.codec == "none") != (not packing):
            self._problem(loc, "inconsistent", "codec, stored_sha256 and unpacked_size belong together")
        if file.header_size > LENGTH_BYTES + MAX_HEADER_BYTES:
            self._problem(f"{loc}.header_size", "invalid_value", "is larger than any header can be")
        position = file.header_size
        for number, tensor in enumerate(file.tensors):
            if tensor.offset < position or (stored and tensor.offset != position):
                self._problem(
                    f"{loc}.tensors[{number}].offset", "inconsistent", f"is {tensor.offset}, expected {position}"
                )
            position = tensor.offset + tensor.size
        if position > file.unpacked_size or (stored and position != file.unpacked_size):
            self._problem(f"{loc}.size", "inconsistent", f"tensors end at {position}, file at {file.unpacked_size}")
        if not stored:
            return
        unpacked_path = file.path if file.codec == "none" else file.path.removesuffix(".zst")
        if file.codec != "none" and unpacked_path == file.path:
            self._problem(f"{loc}.path", "inconsistent", "must end in .zst, as the file is compressed")
        if parse_path(unpacked_path) != Place(file.layer, file.kind, file.expert):
            self._problem(f"{loc}.path", "inconsistent", "does not fit kind, layer and expert")
        digests = [tensor.digest for tensor in file.tensors if tensor.digest is not None]
        complete = file.header_sha256 is not None and len(digests) == len(file.tensors)
        if complete and file_digest(file.header_sha256 or "", digests) != file.digest:
            self._problem(f"{loc}.digest", "inconsistent", "is not the digest of its header and tensors")

    def _document(self, value: Any, loc: str) -> Document | None:
        document = self._mapping(value, loc, _DOCUMENT_KEYS)
        if not document:
            return None
        codec = self._choice(document, "codec", loc, CODECS, "none")
        size, sha256 = self._count(document, "size", loc), self._sha256(document, "sha256", loc) or ""
        if codec == "none":
            content_size, content_sha256 = size, sha256
        else:
            content_size = self._count(document, "content_size", loc)
            content_sha256 = self._sha256(document, "content_sha256", loc) or ""
        packing = {"content_size", "content_sha256"} & document.keys()
        if len(packing) != (0 if codec == "none" else 2):
            self._problem(loc, "inconsistent", "codec, content_size and content_sha256 belong together")
        return Document(
            path=self._path(document, "path", loc),
            role=self._choice(document, "role", loc, ROLES, "auxiliary"),
            size=size,
            sha256=sha256,
            codec=codec,
            content_size=content_size,
            content_sha256=content_sha256,
            source_name=self._path(document, "source_name", loc) if "source_name" in document else None,
        )

    def _source(self, value: Any) -> Source:
        source = self._mapping(value, "source", _SOURCE_KEYS)
        return Source(
            kind=self._choice(source, "kind", "source", SOURCE_KINDS, "safetensors"),
            shards=self._list(source, "shards", "source.", self._shard),
        )

    def _shard(self, value: Any, loc: str) -> Shard | None:
        shard = self._mapping(value, loc, _SHARD_KEYS)
        if not shard:
            return None
        return Shard(
            name=self._path(shard, "name", loc),
            size=self._count(shard, "size", loc),
            sha256=None if shard.get("sha256") is None else self._sha256(shard, "sha256", loc),
            header=self._path(shard, "header", loc),
        )

    def _check_whole(self, manifest: Manifest) -> None:
        paths = [file.path for file in manifest.files] + [document.path for document in manifest.documents]
        self._check_folder("files", "path", paths)
        self._check_unique("files", "tensor", (tensor.name for file in manifest.files for tensor in file.tensors))
        if (manifest.layout == "resharded") != (manifest.source is not None):
            self._problem("source", "inconsistent", "must be named by a resharded checkpoint, and by no other")
        if manifest.source is None:
            return
        # What restoring writes: two sources of one file would overwrite each other.
        restored = [shard.name for shard in manifest.source.shards]
        restored += [d.source_name for d in manifest.documents if d.source_name and d.role != "source_header"]
        self._check_folder("source", "name", restored)
        headers = {document.path for document in manifest.documents if document.role == "source_header"}
        for number, shard in enumerate(manifest.source.shards):
            if shard.header not in headers:
                self._problem(f"source.shards[{number}].header", "inconsistent", "names no saved source header")
            if shard.sha256 is None and manifest.selection.is_everything:
                self._problem(f"source.shards[{number}].sha256", "missing_key", "is null although nothing was left out")

    def _check_folder(self, loc: str, noun: str, paths: Iterable[str]) -> None:
        """Files that one folder is to hold: no two in one place, and none where the tools put what is theirs."""
        # Compared without case: some file systems would write both to one file.
        paths = list(paths)
        names = [path.casefold() for path in paths]
        self._check_unique(loc, noun, names)
        folders: set[str] = set()
        for name in names:
            above = name
            while (above := above.rpartition("/")[0]) and above not in folders:
                folders.add(above)
        for path, name in zip(paths, names, strict=True):
            if name in folders:
                self._problem(loc, "inconsistent", f"{noun} {path!r:.200} is a file and a folder")
            if name in _OWN_NAMES or path.endswith(TEMP_SUFFIX):
                self._problem(loc, "invalid_value", f"{noun} {path!r:.200} is one that the tools need themselves")

    def _check_unique(self, loc: str, noun: str, values: Iterable[str]) -> None:
        seen: set[str] = set()
        for value in values:
            if value in seen:
                self._problem(loc, "inconsistent", f"{noun} {value!r:.200} appears twice")
            seen.add(value)


def _at(loc: str, key: str) -> str:
    """The place of a key in an object; the document itself has no name."""
    return f"{loc}.{key}" if loc else key
