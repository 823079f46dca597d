"""GGUF files as a checkpoint in place: which files belong together, and every tensor where it lies.

A model is one file, or a split set ``NAME-00001-of-00003.gguf`` whose first file has the metadata. Stacked experts are
described one by one, under Hugging Face's names: each is a contiguous part of its stack. Quantised tensors are rows of
bytes (``U8``) with the block type as their encoding and the shape of the matrix as their logical shape.
This file knows headers; it reads no tensor.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.ggml import BlockType
from manifests.gguf import GgufHeader, GgufTensor, read_gguf
from manifests.gguf_config import ARCHITECTURE_KEY, hugging_face_config
from manifests.gguf_names import ARCHITECTURE, Stack, to_hugging_face
from manifests.gguf_tokenizer import NAMES as TOKENIZER_NAMES
from manifests.gguf_tokenizer import tokenizer_documents
from manifests.paths import Kind
from manifests.safety import resolve_inside
from manifests.schema import PLAIN, FileEntry, TensorEntry

SUFFIX = ".gguf"
MAX_EXPERTS = 10_000
"""Numbers in names have at most four digits; see `manifests.names`."""
MAX_ENTRIES = 500_000
"""Tensors with every expert counted. Kimi-K2 has 70,000."""

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What is known of a model without reading its tensors.

    Attributes:
        files: One entry a file, in the order of the set.
        architecture: What the metadata calls it; None where it does not, or for one file of a set.
        config: Gives its config.json, which may be refused; see `manifests.gguf_config`. Empty for one file of a set.
        auxiliary: Gives the files of its tokenizer by name, each of which may be refused or None; see
            `manifests.gguf_tokenizer`. None of them for one file of a set.
    """

    files: tuple[FileEntry, ...]
    architecture: str | None
    config: Callable[[], Mapping[str, Any]]
    auxiliary: Mapping[str, Callable[[], bytes | None]]


def find_gguf(folder: Path) -> list[str]:
    """Names of the GGUF files of a folder, sorted."""
    return sorted(entry.name for entry in folder.iterdir() if entry.suffix == SUFFIX and entry.is_file())


def read_file(path: Path) -> GgufModel:
    """One file: a whole model, or one of a split set, of which nobody can say what the model is.

    Raises:
        SourceNotFoundError: There is no regular file at path.
        ManifestError: It is not what the format allows.
    """
    header = read_gguf(path)
    count = header.metadata.get("split.count", 1)
    return _describe({path.name: header}, path.parent, what=str(path), is_whole=count in (0, 1))


def read_folder(folder: Path, names: Sequence[str]) -> GgufModel:
    """The model whose files these are: one file, or a whole split set.

    Args:
        folder: Where they are.
        names: What `find_gguf` found, one or more.

    Raises:
        SourceNotFoundError: Files of the set are missing, or these are files of several models.
        ManifestError: A file is not what the format allows, or the files are not of one set.
    """
    parts = _order_parts(folder, names)
    headers = {name: read_gguf(resolve_inside(folder, name)) for name in parts}
    tensors = sum(len(header.tensors) for header in headers.values())
    for number, (name, header) in enumerate(headers.items()):
        facts = {"split.no": number, "split.count": len(parts), "split.tensors.count": tensors}
        for key, expected in facts.items():
            # A file that never was split has none of them.
            found = header.metadata.get(key, expected if len(parts) == 1 else None)
            if type(found) is not int or found != expected:
                raise ManifestError(
                    f"{folder / name}: has {key} {found!r:.40}, which must be {expected} for these files; they are not "
                    "one split set, download them again"
                )
    return _describe(headers, folder, what=str(folder), is_whole=True)


def _order_parts(folder: Path, names: Sequence[str]) -> list[str]:
    """The names of one model's files, in their order."""
    matches = [_PART.fullmatch(name) for name in names]
    sets = {(match[1], int(match[3])) for match in matches if match is not None}
    if None not in matches and len(sets) == 1:
        prefix, count = sets.pop()
        expected = [f"{prefix}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]
        present = set(names)
        missing = [name for name in expected if name not in present]
        if missing:
            raise SourceNotFoundError(
                f"{folder}: {len(missing)} of {count} files of a split model are missing, first {missing[0]}; download "
                "them, or name one file"
            )
        if len(present) == count:
            return expected
    elif len(names) == 1:
        return list(names)
    raise SourceNotFoundError(
        f"{folder}: {len(names)} {SUFFIX} files that are not one model; name one file, or keep one model in a folder"
    )


def _describe(headers: Mapping[str, GgufHeader], folder: Path, *, what: str, is_whole: bool) -> GgufModel:
    first, header = next(iter(headers.items()))
    metadata = header.metadata
    architecture = metadata.get(ARCHITECTURE_KEY)
    translate = architecture == ARCHITECTURE
    files = tuple(_describe_file(name, header, what, translate=translate) for name, header in headers.items())
    _check_unique(what, files)
    if not is_whole:
        return GgufModel(files=files, architecture=None, config=dict, auxiliary={})
    names = {tensor.name for header in headers.values() for tensor in header.tensors}
    config = partial(
        hugging_face_config,
        # Not the vocabulary, which would stay in memory for as long as the checkpoint is open.
        {
            key: value
            for key, value in metadata.items()
            if not (isinstance(value, tuple) and key.startswith("tokenizer."))
        },
        has_router_bias=any(name.endswith(".exp_probs_b.bias") for name in names),
        has_head="output.weight" in names,
    )
    return GgufModel(
        files=files,
        architecture=architecture if isinstance(architecture, str) else None,
        config=config,
        auxiliary={name: partial(_read_tokenizer, folder, first, name) for name in TOKENIZER_NAMES},
    )


def _read_tokenizer(folder: Path, first: str, name: str) -> bytes | None:
    # The header is read again, so that the vocabulary is in memory only while it is asked for.
    return tokenizer_documents(read_gguf(resolve_inside(folder, first)).metadata).get(name)


def _describe_file(name: str, header: GgufHeader, what: str, *, translate: bool) -> FileEntry:
    entries = list(_limited(_describe_tensors(header.tensors, what, translate=translate), what))
    return FileEntry(
        path=name,
        kind=Kind.SHARD,
        size=header.file_bytes,
        unpacked_size=header.file_bytes,
        header_size=len(header.raw),
        header_sha256=None,
        digest=None,
        tensors=tuple(entries),
    )


def _limited(entries: Iterable[TensorEntry], what: str) -> Iterator[TensorEntry]:
    for number, entry in enumerate(entries):
        if number >= MAX_ENTRIES:
            raise ManifestError(f"{what}: has more than {MAX_ENTRIES} tensors with every expert counted; no model has")
        yield entry


def _describe_tensors(tensors: Iterable[GgufTensor], what: str, *, translate: bool) -> Iterator[TensorEntry]:
    for tensor in tensors:
        target = to_hugging_face(tensor.name) if translate else tensor.name
        if isinstance(target, Stack):
            yield from _describe_stack(target, tensor, what)
        else:
            yield _entry(target, tensor, tensor.shape, tensor.begin, tensor.end - tensor.begin)


def _describe_stack(stack: Stack, tensor: GgufTensor, what: str) -> Iterator[TensorEntry]:
    if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS or tensor.shape[1] % len(stack.parts):
        raise ManifestError(
            f"{what}: tensor {tensor.name!r:.200} has shape {list(tensor.shape)}; it must be [experts, "
            f"{'rows of gate and up' if len(stack.parts) > 1 else 'rows'}, columns] with at most {MAX_EXPERTS} experts"
        )
    experts, rows, columns = tensor.shape
    shape = rows // len(stack.parts), columns
    size = (tensor.end - tensor.begin) // experts // len(stack.parts)
    begin = tensor.begin
    for expert in range(experts):
        for name in stack.names(expert):
            yield _entry(name, tensor, shape, begin, size)
            begin += size


def _entry(name: str, tensor: GgufTensor, shape: tuple[int, ...], begin: int, size: int) -> TensorEntry:
    dtype, stored, encoding = _storage(tensor.type, shape)
    return TensorEntry(
        name=name,
        dtype=dtype,
        shape=stored,
        offset=begin,
        size=size,
        digest=None,
        encoding=encoding,
        logical_shape=shape,
        source_name=tensor.name,
    )


def _storage(block_type: BlockType, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], str]:
    """dtype, stored shape and encoding of a matrix of this type."""
    if block_type.dtype is not None:
        return block_type.dtype, shape, PLAIN
    return "U8", (*shape[:-1], shape[-1] // block_type.elements * block_type.size), block_type.name


def _check_unique(what: str, files: Collection[FileEntry]) -> None:
    seen: set[str] = set()
    for file in files:
        for tensor in file.tensors:
            if tensor.name in seen:
                raise ManifestError(
                    f"{what}: two tensors are {tensor.name!r:.200}, one of them as {tensor.source_name!r:.200} in "
                    f"{file.path}; a name must be there once"
                )
            seen.add(tensor.name)
