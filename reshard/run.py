"""A whole reshard in order: check the destination, move the bytes, write the documents, the manifest last.

A folder with a manifest is complete; whatever fails before that leaves the destination as it was found.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from manifests.digest import sha256_hex
from manifests.inventory import model_facts
from manifests.paths import INDEX_NAME, SOURCE_FOLDER
from manifests.safety import resolve_inside
from manifests.schema import Document, FileEntry, Manifest, Shard, Source
from manifests.storage import save, sync_folder
from reshard.archive import pack
from reshard.destination import all_or_nothing, check_destination, check_room, copy_file, sync_folders, write_file
from reshard.plan import Plan
from reshard.progress import Progress
from reshard.source import AuxiliaryFile, SourceCheckpoint
from reshard.transfer import transfer

MANIFEST_BYTES_PER_TENSOR = 400
"""An upper estimate, for the check of free space: DeepSeek-V3's manifest takes about 270."""


def needed_bytes(source: SourceCheckpoint, plan: Plan) -> int:
    """Bytes that the destination will take, a little over-estimated."""
    tensors = sum(len(file.tensors) for file in plan.files)
    headers = sum(len(header.raw) for header in source.shards.values()) + len(source.index or b"")
    auxiliary = sum(file.size for file in source.auxiliary)
    # Our index and the manifest; the saved headers are smaller than the originals.
    return plan.output_bytes + auxiliary + headers + len(source.index or b"") + tensors * MANIFEST_BYTES_PER_TENSOR


def reshard_checkpoint(
    source: SourceCheckpoint, plan: Plan, destination: Path, *, jobs: int, progress: Progress
) -> Manifest:
    """Write a resharded checkpoint into an empty or new folder.

    Returns:
        The manifest that was written.

    Raises:
        ToolkitError: The destination is not empty, or overlaps the source, or a disk error.
        ResourceError: Too little free space, found before anything is written where possible.
        ManifestError, IntegrityError: The source changed or is damaged.
    """
    check_destination(source.root, destination)
    check_room(destination, needed_bytes(source, plan))
    with all_or_nothing(destination):
        moved = transfer(source.root, source.shards, plan, destination, jobs=jobs, progress=progress)
        headers = {
            shard: f"{SOURCE_FOLDER}/headers/{number:0{len(str(len(source.shards)))}d}.zst"
            for number, shard in enumerate(source.shards, start=1)
        }
        documents = [
            *(_copy_auxiliary(source.root, file, destination) for file in source.auxiliary),
            *(
                _write_packed(destination, path, "source_header", shard, source.shards[shard].raw)
                for shard, path in headers.items()
            ),
            _write_document(destination, INDEX_NAME, "index", _encode_index(moved.files)),
        ]
        if source.index is not None:
            path = f"{SOURCE_FOLDER}/index.json.zst"
            documents.append(_write_packed(destination, path, "source_index", INDEX_NAME, source.index))
        manifest = Manifest(
            layout="resharded",
            model=model_facts(source.config),
            selection=plan.selection,
            files=moved.files,
            documents=tuple(sorted(documents, key=lambda document: document.path)),
            source=Source(
                kind="safetensors",
                shards=tuple(
                    Shard(
                        name=shard,
                        size=header.file_bytes,
                        sha256=moved.shard_sha256.get(shard),
                        header=headers[shard],
                    )
                    for shard, header in source.shards.items()
                ),
            ),
        )
        sync_folders(destination)
        save(manifest, destination)
    sync_folder(destination.parent)
    return manifest


def _copy_auxiliary(root: Path, file: AuxiliaryFile, destination: Path) -> Document:
    size, sha256 = copy_file(resolve_inside(root, file.path), destination / file.path)
    return Document(
        path=file.path,
        role="auxiliary",
        size=size,
        sha256=sha256,
        content_size=size,
        content_sha256=sha256,
        source_name=file.path,
    )


def _write_document(destination: Path, path: str, role: str, data: bytes) -> Document:
    write_file(destination / path, data)
    sha256 = sha256_hex(data)
    return Document(
        path=path,
        role=role,
        size=len(data),
        sha256=sha256,
        content_size=len(data),
        content_sha256=sha256,
        source_name=None,
    )


def _write_packed(destination: Path, path: str, role: str, source_name: str, content: bytes) -> Document:
    packed = pack(content)
    write_file(destination / path, packed)
    return Document(
        path=path,
        role=role,
        size=len(packed),
        sha256=sha256_hex(packed),
        codec="zstd",
        content_size=len(content),
        content_sha256=sha256_hex(content),
        source_name=source_name,
    )


def _encode_index(files: Iterable[FileEntry]) -> bytes:
    """The standard index over our files, so that other tools can open the result."""
    weight_map = {tensor.name: file.path for file in files for tensor in file.tensors}
    total = sum(tensor.size for file in files for tensor in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"
