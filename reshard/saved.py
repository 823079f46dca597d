"""What a resharded checkpoint keeps of its source beyond payload: headers and index, unpacked and proven."""

from collections.abc import Mapping
from contextlib import suppress

from manifests.checkpoint import Checkpoint
from manifests.digest import sha256_hex
from manifests.errors import IncompleteError, IntegrityError, ManifestError, ToolkitError
from manifests.gguf import MAGIC
from manifests.gguf_headers import parse_saved as parse_saved_gguf
from manifests.header import Header, parse_header
from manifests.schema import Document, Source
from reshard.archive import unpack


def require_source(checkpoint: Checkpoint) -> Source:
    """The manifest's source.

    Raises:
        ManifestError: These are original files, which nothing was made from.
    """
    if checkpoint.manifest.source is None:
        raise ManifestError(f"{checkpoint.root}: is not a resharded checkpoint")
    return checkpoint.manifest.source


def read_document(checkpoint: Checkpoint, document: Document) -> bytes:
    """A document's content, unpacked and checked by sha256.

    Raises:
        IntegrityError: Its bytes are not those that the manifest describes.
    """
    folder = checkpoint.folder
    path = folder.where(document.path)
    folder.require(document.path)
    if (size := folder.size(document.path)) != document.size:
        raise IntegrityError(f"{path}: has {size} bytes, the manifest says {document.size}")
    stored = folder.read(document.path, max_bytes=document.size) or b""
    if sha256_hex(stored) != document.sha256:
        raise IntegrityError(f"{path}: its sha256 is not the one in the manifest; it is damaged")
    if document.codec == "none":
        return stored
    content = unpack(stored, size=document.content_size, what=path)
    if sha256_hex(content) != document.content_sha256:
        raise IntegrityError(f"{path}: its content's sha256 is not the one in the manifest")
    return content


def read_saved_headers(checkpoint: Checkpoint) -> Mapping[str, Header]:
    """The original headers by shard name, in source order.

    Raises:
        IncompleteError: A tensor of a header is not here, because only a part was resharded.
        IntegrityError: A saved header is damaged.
        ManifestError: A saved header is no header, or disagrees with the manifest.
    """
    source = require_source(checkpoint)
    documents = {document.path: document for document in checkpoint.manifest.documents}
    headers = parse_saved(
        {shard.name: (read_document(checkpoint, documents[shard.header]), shard.size) for shard in source.shards}
    )
    entries = {tensor.name: tensor for file in checkpoint.manifest.files for tensor in file.tensors}
    absent = []
    for shard_name, header in headers.items():
        for tensor in header.tensors:
            entry = entries.get(tensor.name)
            if entry is None:
                absent.append(tensor.name)
            elif entry.size != tensor.end - tensor.begin:
                raise ManifestError(f"{shard_name}: tensor {tensor.name!r} has another size than in the manifest")
    if absent and checkpoint.manifest.selection.is_everything:
        raise ManifestError(
            f"{checkpoint.root}: the saved headers name {len(absent)} tensors that the manifest does not (first "
            f"{absent[0]!r}); they are not of one checkpoint"
        )
    if absent:
        raise IncompleteError(
            f"{checkpoint.root}: {len(absent)} tensors of the source are not here (first {absent[0]!r}): "
            "only a part was resharded; reshard the rest from the source to restore it"
        )
    return headers


def find_origins(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The shard that each tensor of the source was in, as far as the saved headers are undamaged."""
    saved = {}
    documents = {document.path: document for document in checkpoint.manifest.documents}
    for shard in require_source(checkpoint).shards:
        with suppress(ToolkitError):
            saved[shard.name] = read_document(checkpoint, documents[shard.header]), shard.size
    origins = {}
    with suppress(ToolkitError):
        for name, header in parse_saved(saved).items():
            origins.update({tensor.name: name for tensor in header.tensors})
    return origins


def parse_saved(saved: Mapping[str, tuple[bytes, int]]) -> dict[str, Header]:
    """Headers again, of what was kept of each shard beside its tensors, and its size, by name in source order.

    Raises:
        ManifestError: It is not what can be kept of a shard.
    """
    if any(rest.startswith(MAGIC) for rest, _ in saved.values()):
        return parse_saved_gguf(saved)
    return {
        name: parse_header(rest, file_bytes=size, what=f"saved header of {name}")
        for name, (rest, size) in saved.items()
    }
