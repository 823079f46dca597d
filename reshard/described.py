"""What the manifest says of a file that a plan foresaw, once its digests are known."""

from collections.abc import Callable

from manifests.digest import file_digest, sha256_hex, tensor_digest
from manifests.schema import FileEntry, TensorEntry
from reshard.plan import PlannedFile, PlannedTensor


def file_entry(file: PlannedFile, chunks_of: Callable[[PlannedTensor], tuple[str, ...]]) -> FileEntry:
    """A finished file as the manifest describes it.

    Args:
        file: As planned.
        chunks_of: The sha256 of each chunk of one of its tensors.
    """
    header_sha256 = sha256_hex(file.header)
    tensors = []
    for tensor in file.tensors:
        chunks = chunks_of(tensor)
        tensors.append(
            TensorEntry(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                offset=tensor.output_offset,
                size=tensor.size,
                digest=tensor_digest(chunks),
                chunks=chunks if len(chunks) > 1 else (),
                encoding=tensor.encoding,
                logical_shape=tensor.logical_shape,
                source_name=tensor.source_name,
            )
        )
    return FileEntry(
        path=file.path,
        kind=file.place.kind,
        layer=file.place.layer,
        expert=file.place.expert,
        size=file.size,
        unpacked_size=file.size,
        header_size=len(file.header),
        header_sha256=header_sha256,
        digest=file_digest(header_sha256, (tensor.digest for tensor in tensors if tensor.digest)),
        tensors=tuple(tensors),
    )
