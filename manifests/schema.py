"""The manifest as frozen dataclasses, its conversion to a JSON document, and its version.

FORMAT.md describes each field; `manifests.validate` is the way back from a document. One type serves a
resharded checkpoint (`layout` ``resharded``: written to disk, every digest present) and original files
described where they lie (`layout` ``in_place``: made from headers, digests unknown).
This file knows the shape of the data; it does no I/O.
"""

from dataclasses import dataclass, field
from typing import Any

from manifests.paths import Kind

FORMAT_NAME = "expert-reshard-manifest"
FORMAT_VERSION = 1

LAYOUTS = ("resharded", "in_place")
ROLES = ("auxiliary", "generated", "index", "source_header", "source_index")
CODECS = ("none", "zstd")
SOURCE_KINDS = ("safetensors", "gguf")
PLAIN = "plain"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor inside a file.

    Attributes:
        name: Name in Hugging Face's grammar.
        dtype: safetensors tag of the stored elements.
        shape: Stored shape.
        offset: First byte, counted from the start of the file.
        size: Bytes.
        digest: See `manifests.digest`; None in place.
        chunks: Digests of 16 MiB chunks for tensors that have more than one.
        encoding: ``plain``, or the quantised block type whose bytes the elements are.
        logical_shape: Shape of the matrix that the bytes encode; the stored shape when plain.
        source_name: Name in the source; differs from name only where the source has another grammar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    size: int
    digest: str | None
    chunks: tuple[str, ...] = ()
    encoding: str = PLAIN
    logical_shape: tuple[int, ...]
    source_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file that holds tensors.

    Attributes:
        path: Relative path.
        kind, layer, expert: What it holds; see `manifests.paths.Place`.
        size: Bytes of the file as stored.
        codec: ``none``, or how the whole file is compressed; offsets then count in the unpacked file.
        stored_sha256: Digest of the compressed bytes; None when the codec is ``none``.
        unpacked_size: Bytes of the file when unpacked; equal to size when the codec is ``none``.
        header_size: Bytes up to the payload.
        header_sha256: Digest of those bytes; None in place.
        digest: See `manifests.digest`; None in place.
        tensors: In the order of their offsets.
    """

    path: str
    kind: Kind
    layer: int | None = None
    expert: int | None = None
    size: int
    codec: str = "none"
    stored_sha256: str | None = None
    unpacked_size: int
    header_size: int
    header_sha256: str | None
    digest: str | None
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A file without tensors: auxiliary files, our index, and what `source/` keeps.

    `sha256` and `size` are of the file as stored, `content_*` of what it unpacks to.
    `source_name` is the relative path it had in the source, None for what we made ourselves.
    """

    path: str
    role: str
    size: int
    sha256: str
    codec: str = "none"
    content_size: int
    content_sha256: str
    source_name: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One source shard: its name, size, whole-file sha256 (None after a partial reshard), saved header's path."""

    name: str
    size: int
    sha256: str | None
    header: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the bytes came from: the kind of container, and the shards in source order."""

    kind: str
    shards: tuple[Shard, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What a partial reshard took: layer and expert numbers, sorted; None means all.

    The model's own files (embedding, head) are always taken.
    """

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None

    @property
    def is_everything(self) -> bool:
        """Whether nothing was left out."""
        return self.layers is None and self.experts is None

    def includes(self, layer: int | None, expert: int | None) -> bool:
        """Whether a file with these numbers is taken."""
        layer_taken = layer is None or self.layers is None or layer in self.layers
        return layer_taken and (expert is None or self.experts is None or expert in self.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The few config values that counting needs, under their config.json names; None when absent there."""

    model_type: str | None = None
    num_hidden_layers: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that is known of one checkpoint's files."""

    layout: str
    model: ModelFacts = field(default_factory=ModelFacts)
    selection: Selection = field(default_factory=Selection)
    files: tuple[FileEntry, ...]
    documents: tuple[Document, ...] = ()
    source: Source | None = None


def to_document(manifest: Manifest) -> dict[str, Any]:
    """The manifest as a JSON document without its own digest. Values that equal their default are left out."""
    return {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "layout": manifest.layout,
        "model": _present(
            model_type=manifest.model.model_type,
            num_hidden_layers=manifest.model.num_hidden_layers,
            n_routed_experts=manifest.model.n_routed_experts,
            num_experts_per_tok=manifest.model.num_experts_per_tok,
        ),
        "selection": {
            "layers": _list_or_none(manifest.selection.layers),
            "experts": _list_or_none(manifest.selection.experts),
        },
        "files": [file_document(file) for file in manifest.files],
        "documents": [_document_document(document) for document in manifest.documents],
        "source": None if manifest.source is None else _source_document(manifest.source),
    }


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _list_or_none(numbers: tuple[int, ...] | None) -> list[int] | None:
    return None if numbers is None else list(numbers)


def _tensor_document(tensor: TensorEntry) -> dict[str, Any]:
    document: dict[str, Any] = {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "offset": tensor.offset,
        "size": tensor.size,
    }
    if tensor.digest is not None:
        document["digest"] = tensor.digest
    if tensor.chunks:
        document["chunks"] = list(tensor.chunks)
    if tensor.encoding != PLAIN:
        document["encoding"] = tensor.encoding
    if tensor.logical_shape != tensor.shape:
        document["logical_shape"] = list(tensor.logical_shape)
    if tensor.source_name != tensor.name:
        document["source_name"] = tensor.source_name
    return document


def file_document(file: FileEntry) -> dict[str, Any]:
    """One entry of the document's ``files``."""
    document = _present(
        path=file.path,
        kind=str(file.kind),
        layer=file.layer,
        expert=file.expert,
        size=file.size,
        header_size=file.header_size,
        header_sha256=file.header_sha256,
        digest=file.digest,
        tensors=[_tensor_document(tensor) for tensor in file.tensors],
    )
    if file.codec != "none":
        document |= {"codec": file.codec, "stored_sha256": file.stored_sha256, "unpacked_size": file.unpacked_size}
    return document


def _document_document(entry: Document) -> dict[str, Any]:
    document = _present(
        path=entry.path, role=entry.role, size=entry.size, sha256=entry.sha256, source_name=entry.source_name
    )
    if entry.codec != "none":
        document |= {
            "codec": entry.codec,
            "content_size": entry.content_size,
            "content_sha256": entry.content_sha256,
        }
    return document


def _source_document(source: Source) -> dict[str, Any]:
    return {
        "kind": source.kind,
        "shards": [
            {"name": shard.name, "size": shard.size, "sha256": shard.sha256, "header": shard.header}
            for shard in source.shards
        ],
    }
