"""GGUF files as a checkpoint in place: which files belong together, and every tensor where it lies.

A model is one file, or a split set ``NAME-00001-of-00003.gguf`` whose first file has the metadata. Stacked experts are
described one by one, under Hugging Face's names: each is a contiguous part of its stack. Quantised tensors are rows of
bytes (``U8``) with the block type as their encoding and the shape of the matrix as their logical shape.
This file knows headers; it reads no tensor.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from manifests.errors import ManifestError, SourceNotFoundError, UnsupportedModelError
from manifests.ggml import BlockType
from manifests.gguf import GgufHeader, GgufTensor, parse_gguf, read_gguf
from manifests.gguf_config import ARCHITECTURE_KEY, hugging_face_config
from manifests.gguf_names import ARCHITECTURE, Stack, to_hugging_face
from manifests.gguf_tokenizer import NAMES as TOKENIZER_NAMES
from manifests.gguf_tokenizer import tokenizer_documents
from manifests.header import Gap, Header, HeaderTensor
from manifests.readable import open_regular
from manifests.safety import resolve_inside
from manifests.schema import PLAIN

SUFFIX = ".gguf"
MAX_EXPERTS = 10_000
"""Numbers in names have at most four digits; see `manifests.names`."""
MAX_ENTRIES = 500_000
"""Tensors with every expert counted. Kimi-K2 has 70,000."""

_MERGED = 0
"""What llama.cpp writes for the count of files into the one that it makes of a set."""

_PART = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What is known of a model without reading its tensors.

    Attributes:
        shards: Each file as a header under Hugging Face's names, in the order of the set; its gaps were not read.
        architecture: What the metadata calls it; None where it does not, or for one file of a set.
        config: Gives its config.json, which may be refused; see `manifests.gguf_config`. Empty for one file of a set.
        auxiliary: Gives the files of its tokenizer by name, each of which may be refused or None; see
            `manifests.gguf_tokenizer`. None of them for one file of a set.
    """

    shards: Mapping[str, Header]
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
    return _describe({path.name: header}, path.parent, what=str(path), is_whole=count in (_MERGED, 1))


def set_names(name: str) -> list[str]:
    """Names of all files of the model that has one of this name, in order: itself, or those of its split set."""
    match = _PART.fullmatch(name)
    if match is None or not int(match[3]):
        return [name]
    return [f"{match[1]}-{number:05d}-of-{match[3]}{SUFFIX}" for number in range(1, int(match[3]) + 1)]


def read_set(path: Path) -> GgufModel:
    """The model that one file belongs to: itself, or its whole split set, which lies beside it.

    Raises:
        SourceNotFoundError: There is no regular file at path, or others of the set are missing.
        ManifestError: See `read_folder`; or it is of a set, and has not the name of such a file.
    """
    model = read_file(path)
    if model.auxiliary:  # which one file of a set has not
        return model
    names = set_names(path.name)
    if names == [path.name]:
        raise ManifestError(
            f"{path}: is one file of a split model, and its name does not say which the others are; give all of them "
            "their own names again, such as NAME-00001-of-00003.gguf"
        )
    return read_folder(path.parent, [name for name in names if (path.parent / name).is_file()])


def read_folder(folder: Path, names: Sequence[str], absent: Mapping[str, Header] | None = None) -> GgufModel:
    """The model whose files these are: one file, or a whole split set.

    Args:
        folder: Where they are.
        names: What `find_gguf` found, one or more.
        absent: Headers of files that need not be there any more.

    Raises:
        SourceNotFoundError: Files of the set are missing, or these are files of several models.
        ManifestError: A file is not what the format allows, or the files are not of one set.
    """
    absent = absent or {}
    parts = _order_parts(folder, sorted({*names, *absent}))

    def read(name: str) -> GgufHeader:
        if (known := absent.get(name)) is not None:
            return parse_gguf(known.raw, file_bytes=known.file_bytes, what=f"saved header of {name}")
        return read_gguf(resolve_inside(folder, name))

    headers = {name: read(name) for name in parts}
    tensors = sum(len(header.tensors) for header in headers.values())
    for number, (name, header) in enumerate(headers.items()):
        if len(parts) == 1:
            _require_whole(folder / name, header)
        facts = {"split.no": number, "split.count": len(parts), "split.tensors.count": tensors}
        for key, expected in facts.items():
            # A file that never was split has none of them.
            found = header.metadata.get(key, expected if len(parts) == 1 else None)
            if key == "split.count" and len(parts) == 1 and found == _MERGED:
                continue
            if type(found) is not int or found != expected:
                raise ManifestError(
                    f"{folder / name}: has {key} {found!r:.40}, which must be {expected} for these files; they are not "
                    "one split set, download them again"
                )
    return _describe(headers, folder, what=str(folder), is_whole=True)


def _require_whole(path: Path, header: GgufHeader) -> None:
    """Refuse a file of a set by another name, of which nobody can tell where the others are."""
    number, count = header.metadata.get("split.no", 0), header.metadata.get("split.count", 1)
    if type(number) is type(count) is int and number < count > 1:
        raise ManifestError(
            f"{path}: is file {number + 1} of {count} of a split model; give all of them the names that they had, "
            f"such as NAME-{number + 1:05d}-of-{count:05d}{SUFFIX}"
        )


def _order_parts(folder: Path, names: Sequence[str]) -> list[str]:
    """The names of one model's files, in their order."""
    matches = [_PART.fullmatch(name) for name in names]
    sets = {(match[1], int(match[3])) for match in matches if match is not None}
    if None not in matches and len(sets) == 1:
        _, count = sets.pop()
        expected = set_names(names[0])
        present = set(names)
        missing = [name for name in expected if name not in present]
        if missing:
            raise SourceNotFoundError(
                f"{folder}: {len(missing)} of {count} files of a split model are missing, first {missing[0]}; download "
                "them, or give them back their names"
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
    shards = _translated(headers, what)
    if not is_whole:
        return GgufModel(shards=shards, architecture=None, config=dict, auxiliary={})
    names = {tensor.name for header in headers.values() for tensor in header.tensors}
    config = partial(
        _read_config,
        folder / first,
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
        shards=shards,
        architecture=architecture if isinstance(architecture, str) else None,
        config=config,
        auxiliary={name: partial(_read_tokenizer, folder, first, name) for name in TOKENIZER_NAMES},
    )


def _read_config(path: Path, metadata: Mapping[str, Any], **tensors: bool) -> Mapping[str, Any]:
    with _named(path):
        return hugging_face_config(metadata, **tensors)


def _read_tokenizer(folder: Path, first: str, name: str) -> bytes | None:
    # The header is read again, so that the vocabulary is in memory only while it is asked for.
    metadata = read_gguf(resolve_inside(folder, first)).metadata
    with _named(folder / first):
        return tokenizer_documents(metadata).get(name)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say of what is refused which file has it."""
    try:
        yield
    except (ManifestError, UnsupportedModelError) as error:
        raise type(error)(f"{path}: {error}") from error


def _translated(headers: Mapping[str, GgufHeader], what: str) -> dict[str, Header]:
    """The files of one model under Hugging Face's names; the first says what the model is."""
    translate = next(iter(headers.values())).metadata.get(ARCHITECTURE_KEY) == ARCHITECTURE
    shards = {name: _describe_file(header, what, translate=translate) for name, header in headers.items()}
    _check_unique(what, shards)
    return shards


def _describe_file(header: GgufHeader, what: str, *, translate: bool) -> Header:
    start = len(header.raw)
    entries = _limited(_describe_tensors(header.tensors, start, what, translate=translate), what)
    return Header(raw=header.raw, tensors=tuple(entries), metadata={}, file_bytes=header.file_bytes)


def _limited(entries: Iterable[HeaderTensor], what: str) -> Iterator[HeaderTensor]:
    for number, entry in enumerate(entries):
        if number >= MAX_ENTRIES:
            raise ManifestError(f"{what}: has more than {MAX_ENTRIES} tensors with every expert counted; no model has")
        yield entry


def _describe_tensors(
    tensors: Iterable[GgufTensor], start: int, what: str, *, translate: bool
) -> Iterator[HeaderTensor]:
    for tensor in tensors:
        target = to_hugging_face(tensor.name) if translate else tensor.name
        if isinstance(target, Stack):
            yield from _describe_stack(target, tensor, start, what)
        else:
            yield _entry(target, tensor, tensor.shape, tensor.begin - start, tensor.end - tensor.begin)


def _describe_stack(stack: Stack, tensor: GgufTensor, start: int, what: str) -> Iterator[HeaderTensor]:
    if len(tensor.shape) != 3 or tensor.shape[0] > MAX_EXPERTS or tensor.shape[1] % len(stack.parts):
        raise ManifestError(
            f"{what}: tensor {tensor.name!r:.200} has shape {list(tensor.shape)}; it must be [experts, "
            f"{'rows of gate and up' if len(stack.parts) > 1 else 'rows'}, columns] with at most {MAX_EXPERTS} experts"
        )
    experts, rows, columns = tensor.shape
    shape = rows // len(stack.parts), columns
    size = (tensor.end - tensor.begin) // experts // len(stack.parts)
    begin = tensor.begin - start
    for expert in range(experts):
        for name in stack.names(expert):
            yield _entry(name, tensor, shape, begin, size)
            begin += size


def _entry(name: str, tensor: GgufTensor, shape: tuple[int, ...], begin: int, size: int) -> HeaderTensor:
    dtype, stored, encoding = _storage(tensor.type, shape)
    return HeaderTensor(
        name=name,
        dtype=dtype,
        shape=stored,
        begin=begin,
        end=begin + size,
        encoding=encoding,
        logical_shape=shape,
        source_name=tensor.name,
    )


def _storage(block_type: BlockType, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], str]:
    """dtype, stored shape and encoding of a matrix of this type."""
    if block_type.dtype is not None:
        return block_type.dtype, shape, PLAIN
    return "U8", (*shape[:-1], shape[-1] // block_type.elements * block_type.size), block_type.name


def _check_unique(what: str, shards: Mapping[str, Header]) -> None:
    seen: set[str] = set()
    for path, header in shards.items():
        for tensor in header.tensors:
            if tensor.name in seen:
                raise ManifestError(
                    f"{what}: two tensors are {tensor.name!r:.200}, one of them as {tensor.source_name!r:.200} in "
                    f"{path}; a name must be there once"
                )
            seen.add(tensor.name)


def tokenizer_of(first: Header) -> dict[str, bytes]:
    """The files of a model's tokenizer by name, out of its first file; see `manifests.gguf_tokenizer`."""
    found = parse_gguf(first.raw, file_bytes=first.file_bytes, what="the saved header")
    return tokenizer_documents(found.metadata)


def with_gaps(path: Path, header: Header) -> Header:
    """The same header with the bytes between its tensors, which are read for it.

    Raises:
        SourceNotFoundError, ToolkitError: See `open_regular`.
        ManifestError: The file became shorter.
    """
    with open_regular(path) as file:

        def read(begin: int, size: int) -> bytes:
            content = file.read(len(header.raw) + begin, size)
            if len(content) < size:
                raise ManifestError(f"{path}: became shorter while it was read; download it again")
            return content

        return replace(header, gaps=tuple(Gap(begin=begin, content=read(begin, size)) for begin, size in _gaps(header)))


def parse_saved(saved: Mapping[str, tuple[bytes, int]]) -> dict[str, Header]:
    """The files of one model again, of `Header.rest` and the size of each, by name in the order of the set.

    Raises:
        ManifestError: It is not what a file's rest can be.
    """
    parsed = {}
    for name, (rest, file_bytes) in saved.items():
        parsed[name] = parse_gguf(rest, file_bytes=file_bytes, what=f"saved header of {name}")
    shards = _translated(parsed, "the saved headers")
    return {name: _with_rest(name, header, saved[name][0]) for name, header in shards.items()}


def _with_rest(name: str, header: Header, rest: bytes) -> Header:
    gaps, position = [], len(header.raw)
    for begin, size in _gaps(header):
        gaps.append(Gap(begin=begin, content=rest[position : position + size]))
        position += size
    if position != len(rest):
        raise ManifestError(f"saved header of {name}: has {len(rest)} bytes, its file has {position} beside tensors")
    return replace(header, gaps=tuple(gaps))


def _gaps(header: Header) -> Iterator[tuple[int, int]]:
    """Begin and size of what is no tensor behind the header."""
    position = 0
    for tensor in header.tensors:
        if tensor.begin > position:
            yield position, tensor.begin - position
        position = tensor.end
    if (end := header.file_bytes - len(header.raw)) > position:
        yield position, end - position
