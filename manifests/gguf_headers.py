"""GGUF files under Hugging Face's names: every tensor of a header, stacked experts one by one, and what is no tensor.

A stack of experts is described as its experts: each is a contiguous part of it. Quantised tensors are rows of bytes
(``U8``) with the block type as their encoding and the shape of the matrix as their logical shape.
This file knows headers; it must not know where the files lie or which belong together.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from manifests.errors import ManifestError
from manifests.ggml import BlockType
from manifests.gguf import GgufHeader, GgufTensor, parse_gguf
from manifests.gguf_config import ARCHITECTURE_KEY
from manifests.gguf_names import ARCHITECTURE, Stack, to_hugging_face
from manifests.gguf_tokenizer import tokenizer_documents
from manifests.header import Gap, Header, HeaderTensor
from manifests.schema import PLAIN

MAX_EXPERTS = 10_000
"""Numbers in names have at most four digits; see `manifests.names`."""
MAX_ENTRIES = 500_000
"""Tensors with every expert counted. Kimi-K2 has 70,000."""


def translated(headers: Mapping[str, GgufHeader], what: str) -> dict[str, Header]:
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


def parse_saved(saved: Mapping[str, tuple[bytes, int]]) -> dict[str, Header]:
    """The files of one model again, of `Header.rest` and the size of each, by name in the order of the set.

    Raises:
        ManifestError: It is not what a file's rest can be.
    """
    parsed = {}
    for name, (rest, file_bytes) in saved.items():
        parsed[name] = parse_gguf(rest, file_bytes=file_bytes, what=f"saved header of {name}")
    shards = translated(parsed, "the saved headers")
    return {name: _with_rest(name, header, saved[name][0]) for name, header in shards.items()}


def _with_rest(name: str, header: Header, rest: bytes) -> Header:
    found, position = [], len(header.raw)
    for begin, size in gaps(header):
        found.append(Gap(begin=begin, content=rest[position : position + size]))
        position += size
    if position != len(rest):
        raise ManifestError(f"saved header of {name}: has {len(rest)} bytes, its file has {position} beside tensors")
    return replace(header, gaps=tuple(found))


def gaps(header: Header) -> Iterator[tuple[int, int]]:
    """Begin and size of what is no tensor behind the header."""
    position = 0
    for tensor in header.tensors:
        if tensor.begin > position:
            yield position, tensor.begin - position
        position = tensor.end
    if (end := header.file_bytes - len(header.raw)) > position:
        yield position, end - position


def tokenizer_of(first: Header) -> dict[str, bytes]:
    """The files of a model's tokenizer by name, out of its first file; see `manifests.gguf_tokenizer`."""
    found = parse_gguf(first.raw, file_bytes=first.file_bytes, what="the saved header")
    return tokenizer_documents(found.metadata)
