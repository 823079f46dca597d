"""Read, bound-check and write the header of a safetensors file, without reading its tensors.

A file is: 8 bytes little-endian length n, n bytes of JSON, then the payload. The JSON maps tensor names to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end of the JSON, and may hold
``__metadata__``, a map of strings. Ranges follow each other without hole or overlap and fill the file.
Source: the safetensors format description; the same conditions as the library's ``Metadata::validate``.

This file knows one file at a time; it knows nothing of checkpoints, layers or experts.

A file of another format takes the same form: `manifests.gguf_files` describes GGUF files so.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from manifests.dtypes import BITS
from manifests.errors import ManifestError
from manifests.jsontext import parse_json
from manifests.readable import Readable, in_memory, open_regular
from manifests.schema import PLAIN

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The library's own bound; checked before the length is used to size a read."""

LFS_POINTER_START = b"version "
"""The first bytes of the small text that git keeps in place of a large file."""

MAX_NAME_CHARS = 1024
MAX_FILE_BYTES = 1 << 62
MAX_DIMENSIONS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderTensor:
    """One entry of a header; begin and end are byte offsets from the start of the payload.

    Attributes:
        encoding: ``plain``, or the quantised block type whose bytes the elements are.
        logical_shape: Shape of the matrix that the bytes encode; None when it is the stored one.
        source_name: Name in the file, where that has another grammar; else None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    encoding: str = PLAIN
    logical_shape: tuple[int, ...] | None = None
    source_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """Bytes between tensors, or behind the last: padding. begin counts from the start of the payload."""

    begin: int
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A parsed header.

    Attributes:
        raw: The bytes up to the payload: length, JSON and padding, exactly as stored.
        tensors: Entries in the order of their offsets.
        metadata: The ``__metadata__`` map.
        file_bytes: Size of the whole file.
        gaps: What is no tensor behind `raw`, in order; a safetensors file has none.
    """

    raw: bytes
    tensors: tuple[HeaderTensor, ...]
    metadata: Mapping[str, str]
    file_bytes: int
    gaps: tuple[Gap, ...] = ()

    @property
    def rest(self) -> bytes:
        """Every byte of the file that is no tensor's."""
        return b"".join([self.raw, *(gap.content for gap in self.gaps)])


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises:
        SourceNotFoundError, ToolkitError: See `open_regular`.
        ManifestError: The header or the file's size is not what the format allows.
    """
    with open_regular(path) as file:
        return header_of(file)


def parse_header(raw: bytes, *, file_bytes: int, what: str) -> Header:
    """The header of a file whose first bytes are known.

    Args:
        raw: Length field and JSON; longer input is cut.
        file_bytes: Size of the whole file.
        what: Name of the file for messages.

    Raises:
        ManifestError: As for `header_of`.
    """
    return header_of(in_memory(raw, size=file_bytes, what=what))


def header_of(file: Readable) -> Header:
    """Check the bytes up to the payload against the format and the file's size; no others are read.

    Raises:
        ManifestError: See the module's description of what a file must be.
    """
    what = file.what
    prefix = file.read(0, LENGTH_BYTES)
    json_bytes = _json_length(prefix, file.size, what)
    raw = prefix + file.read(LENGTH_BYTES, json_bytes)
    if len(raw) < LENGTH_BYTES + json_bytes:
        raise ManifestError(
            f"{what}: header of {json_bytes} bytes ends after {len(raw) - LENGTH_BYTES}; it is damaged, or was cut "
            "while it was read"
        )
    # The library demands the brace at once: padding stands behind the JSON, and nothing else may pose as a header.
    if raw[LENGTH_BYTES : LENGTH_BYTES + 1] != b"{":
        raise ManifestError(f"{what}: the header does not start with '{{'; not a safetensors file")
    document = parse_json(raw[LENGTH_BYTES:], what=f"header of {what}")
    metadata = _parse_metadata(document.pop("__metadata__", {}), what)
    tensors = [_parse_entry(name, entry, what) for name, entry in document.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    position = 0
    for tensor in tensors:
        if tensor.begin != position:
            fault = "overlaps its neighbour" if tensor.begin < position else "leaves a hole before it"
            raise ManifestError(
                f"{what}: tensor {tensor.name!r} at {tensor.begin} {fault} (expected {position}); the header is damaged"
            )
        position = tensor.end
    if len(raw) + position != file.size:
        raise ManifestError(
            f"{what}: header and tensors need {len(raw) + position} bytes, the file has {file.size}; "
            "it is truncated or has trailing bytes, download it again"
        )
    return Header(raw=raw, tensors=tuple(tensors), metadata=metadata, file_bytes=file.size)


def encode_header(
    tensors: Sequence[HeaderTensor], *, metadata: Mapping[str, str] | None = None, align: int = 1
) -> bytes:
    """Write the bytes up to the payload.

    Args:
        tensors: Entries in file order; their ranges are taken as given.
        metadata: The ``__metadata__`` map; ``{"format": "pt"}`` when not given.
        align: The payload starts at a multiple of this; the gap is filled with spaces inside the JSON's length.
    """
    document: dict[str, Any] = {"__metadata__": dict(metadata) if metadata is not None else {"format": "pt"}}
    for tensor in tensors:
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.begin, tensor.end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-(LENGTH_BYTES + len(text)) % align)
    return struct.pack("<Q", len(text)) + text


def _json_length(prefix: bytes, file_bytes: int, what: str) -> int:
    if len(prefix) < LENGTH_BYTES:
        raise ManifestError(f"{what}: shorter than {LENGTH_BYTES} bytes; not a safetensors file")
    if prefix == LFS_POINTER_START:
        raise ManifestError(f"{what}: is a git-lfs pointer and not the file it stands for; run `git lfs pull`")
    length: int = struct.unpack("<Q", prefix)[0]
    if length > MAX_HEADER_BYTES:
        raise ManifestError(f"{what}: header of {length} bytes is over the limit of {MAX_HEADER_BYTES}")
    if LENGTH_BYTES + length > file_bytes:
        raise ManifestError(
            f"{what}: header of {length} bytes is longer than the file of {file_bytes}; it is truncated"
        )
    return length


def _parse_metadata(metadata: Any, what: str) -> Mapping[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ManifestError(f"{what}: __metadata__ must map strings to strings")
    return metadata


def _is_count(value: Any) -> bool:
    """True for a number that can be a size or an offset; bool is an int in Python and refused."""
    return type(value) is int and 0 <= value <= MAX_FILE_BYTES


def _parse_entry(name: str, entry: Any, what: str) -> HeaderTensor:
    if not name or len(name) > MAX_NAME_CHARS:
        raise ManifestError(f"{what}: a tensor name of {len(name)} characters; names have 1 to {MAX_NAME_CHARS}")
    where = f"{what}: tensor {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ManifestError(f"{where}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ManifestError(f"{where}: dtype {dtype!r:.80} is not one that safetensors defines")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise ManifestError(f"{where}: shape must be a list of whole numbers from 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise ManifestError(f"{where}: data_offsets must be two whole numbers from 0")
    # A reader with 64-bit numbers overflows on such a shape, even where a zero makes the tensor empty.
    if prod(size for size in shape if size) > MAX_FILE_BYTES:
        raise ManifestError(f"{where}: shape {shape!r:.200} has more elements than any file can hold")
    begin, end = offsets
    if (end - begin) * 8 != bits * prod(shape):
        raise ManifestError(f"{where}: {dtype} {shape} does not fill the {end - begin} bytes of its data_offsets")
    return HeaderTensor(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)
