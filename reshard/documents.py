"""The files of a destination that hold no tensors: copies of the source's small files, its saved headers, our index.

What is there already with the right bytes is kept, so that a continued run repeats nothing.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from manifests.digest import sha256_hex
from manifests.paths import INDEX_NAME, SOURCE_FOLDER
from manifests.schema import Document
from reshard.archive import pack
from reshard.destination import copy_readable, write_file
from reshard.openable import Openable
from reshard.source import SourceCheckpoint

INDEX_PATH = f"{SOURCE_FOLDER}/index.json.zst"


def header_paths(shards: Iterable[str]) -> dict[str, str]:
    """Where each shard's header is kept, by the shard's number in source order."""
    names = list(shards)
    width = len(str(len(names)))
    return {name: f"{SOURCE_FOLDER}/headers/{number:0{width}d}.zst" for number, name in enumerate(names, start=1)}


def write_kept(source: SourceCheckpoint, destination: Path, earlier: Iterable[Document] = ()) -> list[Document]:
    """Write all that is kept of a source beside its payload: small files, headers, its index.

    Args:
        source: The source.
        destination: Folder.
        earlier: What the manifest has that is about to be replaced. Small files stay: this time the source may have
            been named so that they are not seen, such as by one GGUF file.
    """
    documents = [
        _copy_auxiliary(destination, source.place.file(file.path), source.place.size(file.path), file.path)
        for file in source.auxiliary
    ]
    copied = {document.path for document in documents}
    documents += [document for document in earlier if document.role == "auxiliary" and document.path not in copied]
    copied = {document.path for document in documents}
    documents += [
        _write_own(destination, path, "generated", content)
        for path, content in source.generated.items()
        if path not in copied
    ]
    for shard, path in header_paths(source.shards).items():
        documents.append(_write_packed(destination, path, "source_header", shard, source.shards[shard].rest))
    if source.index is not None:
        documents.append(_write_packed(destination, INDEX_PATH, "source_index", INDEX_NAME, source.index))
    return documents


def write_index(files: Iterable[tuple[str, Iterable[tuple[str, int]]]], destination: Path) -> Document:
    """Write the standard index over our files, so that other tools can open the result.

    Args:
        files: Relative path of each file, and names and sizes in bytes of its tensors.
        destination: Folder.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for path, tensors in files:
        for name, size in tensors:
            weight_map[name] = path
            total += size
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    data = json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8") + b"\n"
    return _write_own(destination, INDEX_NAME, "index", data)


def _write_own(destination: Path, path: str, role: str, content: bytes) -> Document:
    """What the source has in no file."""
    _write(destination / path, content)
    sha256 = sha256_hex(content)
    return Document(
        path=path,
        role=role,
        size=len(content),
        sha256=sha256,
        content_size=len(content),
        content_sha256=sha256,
        source_name=None,
    )


def _copy_auxiliary(destination: Path, source: Openable, size: int, path: str) -> Document:
    sha256 = copy_readable(source, size, destination / path)
    return Document(
        path=path,
        role="auxiliary",
        size=size,
        sha256=sha256,
        content_size=size,
        content_sha256=sha256,
        source_name=path,
    )


def _write_packed(destination: Path, path: str, role: str, source_name: str, content: bytes) -> Document:
    packed = pack(content)
    _write(destination / path, packed)
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


def _write(path: Path, data: bytes) -> None:
    if not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data):
        write_file(path, data)
