"""Original files as a manifest: described as a resharded checkpoint is, out of their headers, without digests."""

from collections.abc import Mapping

from manifests.header import Header
from manifests.paths import Kind
from manifests.schema import FileEntry, Manifest, ModelFacts, TensorEntry


def describe_in_place(shards: Mapping[str, Header], facts: ModelFacts) -> Manifest:
    """A manifest of the original files.

    Args:
        shards: Their headers, by relative path in source order.
        facts: What is known of the model.
    """
    return Manifest(
        layout="in_place",
        model=facts,
        files=tuple(_describe_shard(name, header) for name, header in shards.items()),
    )


def _describe_shard(name: str, header: Header) -> FileEntry:
    start = len(header.raw)
    return FileEntry(
        path=name,
        kind=Kind.SHARD,
        size=header.file_bytes,
        unpacked_size=header.file_bytes,
        header_size=start,
        header_sha256=None,
        digest=None,
        tensors=tuple(
            TensorEntry(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=start + tensor.begin,
                size=tensor.end - tensor.begin,
                digest=None,
                encoding=tensor.encoding,
                logical_shape=tensor.logical_shape or tensor.shape,
                source_name=tensor.source_name or tensor.name,
            )
            for tensor in header.tensors
        ),
    )
