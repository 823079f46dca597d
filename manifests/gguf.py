"""Read and bound-check the header of a GGUF file, without reading its tensors.

A file is, in little-endian numbers: the magic ``GGUF``, a version, the counts of tensors and of metadata pairs, the
pairs (key, type, value), an entry for each tensor (name, dimensions, type, offset), padding up to the alignment, and
the payload. Offsets count from the start of the payload; tensors start at multiples of the alignment, and between
them is padding alone. Versions 2 and 3 are alike but for big-endian files, which are refused.
Source: the GGUF specification of the ggml project (docs/gguf.md).

Nothing in a file is believed: every count is compared with the bytes that are left before anything is made for it.
This file knows one file at a time; it knows nothing of models, layers or splits.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from manifests.errors import ManifestError
from manifests.ggml import BLOCK_TYPES, BlockType
from manifests.header import LFS_POINTER_START, MAX_FILE_BYTES, MAX_HEADER_BYTES, MAX_NAME_CHARS
from manifests.readable import Readable, in_memory, open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_DIMENSIONS = 4
"""What ggml allows."""
MAX_KEY_BYTES = 65_535
"""What the specification allows."""
MAX_NESTING = 4
"""Arrays within arrays; models have none."""
MAX_ELEMENTS = 4_000_000
"""Of all arrays together. A vocabulary of 256,000 with its merges, scores and types has 1.3 million; a tuple of so
many numbers takes ten times the bytes that they take in the file."""

MAX_PAIRS = MAX_TENSORS = 1 << 16
"""DeepSeek-V3 has 50 and 1,086."""

READ_BYTES = 1 << 20
"""The length of a header is known when it ends, so it is read in blocks of this size."""

_LENGTH = struct.Struct("<Q")
_LEAST_PAIR_BYTES = 8 + 4 + 1
_LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""struct's letter for the types of metadata that have a fixed size."""
_CUT = "it is truncated or damaged, download it again"
_ALIGNMENT_KEY = "general.alignment"
_ALIGNMENT_TYPE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """One tensor; begin and end are byte offsets from the start of the file.

    Attributes:
        name: Its name in the file.
        type: How its elements are stored.
        shape: Elements in each dimension, the longest stride first, as numpy and Hugging Face have it.
    """

    name: str
    type: BlockType
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """A parsed header.

    Attributes:
        raw: The bytes up to the payload, padding included, exactly as stored.
        version: 2 or 3.
        alignment: Tensors start at multiples of this.
        metadata: Values by key: int, float, bool, str, and tuples of them for arrays.
        tensors: In the order of their offsets.
        file_bytes: Size of the whole file.
    """

    raw: bytes
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: tuple[GgufTensor, ...]
    file_bytes: int


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of one file.

    Raises:
        SourceNotFoundError, ToolkitError: See `open_regular`.
        ManifestError: The header or the file's size is not what the format allows.
    """
    with open_regular(path) as file:
        return gguf_of(file)


def parse_gguf(raw: bytes, *, file_bytes: int, what: str) -> GgufHeader:
    """The header of a file whose first bytes are known.

    Args:
        raw: The header; longer input is cut.
        file_bytes: Size of the whole file.
        what: Name of the file for messages.

    Raises:
        ManifestError: As for `gguf_of`.
    """
    return gguf_of(in_memory(raw, size=file_bytes, what=what))


class _Cursor:
    """Goes through the header from its start, and keeps what it has seen."""

    def __init__(self, file: Readable) -> None:
        self._file = file
        self._seen = bytearray()
        self._position = 0
        self._elements_left = MAX_ELEMENTS

    @property
    def position(self) -> int:
        """Bytes from the start of the file."""
        return self._position

    @property
    def left(self) -> int:
        """The most bytes that the rest of the header can have."""
        return max(0, min(self._file.size, MAX_HEADER_BYTES) - self._position)

    def fault(self, message: str) -> ManifestError:
        """What to raise: the message with the file's name before it."""
        return ManifestError(f"{self._file.what}: {message}")

    def skip(self, count: int, place: str) -> int:
        """Go on by count bytes, which are then in what was seen; return where they begin."""
        begin = self._position
        end = begin + count
        if end > len(self._seen):
            self._fetch(end, place)
        self._position = end
        return begin

    def _fetch(self, end: int, place: str) -> None:
        if end > MAX_HEADER_BYTES and self._file.size > MAX_HEADER_BYTES:
            raise self.fault(
                f"{place} reaches behind the limit of {MAX_HEADER_BYTES} bytes for a header; it is damaged"
            )
        if end > self._file.size:
            raise self.fault(f"ends within {place}, at {self._file.size} bytes; it is truncated, download it again")
        while len(self._seen) < end:
            # Never more than a block ahead: what follows the header is the payload.
            block = self._file.read(len(self._seen), max(READ_BYTES, end - len(self._seen)))
            if not block:
                raise self.fault(f"became shorter while its header was read, within {place}")
            self._seen += block

    def number(self, letter: str, place: str) -> Any:
        """The next number, by struct's letter for it."""
        form = f"<{letter}"
        begin = self.skip(struct.calcsize(form), place)
        if letter == "?" and self._seen[begin] > 1:
            raise self.fault(f"{place} is a truth value of {self._seen[begin]}; it must be 0 or 1")
        return struct.unpack_from(form, self._seen, begin)[0]

    def text(self, place: str, limit: int = MAX_HEADER_BYTES) -> str:
        """The next string, of at most so many bytes."""
        (text,) = self.texts(1, place, limit)
        return text

    def texts(self, count: int, place: str, limit: int = MAX_HEADER_BYTES) -> tuple[str, ...]:
        """The next strings. Written out, because a vocabulary has hundreds of thousands of them."""
        found = []
        begin = self._position
        for _ in range(count):
            if begin + _LENGTH.size > len(self._seen):
                self._fetch(begin + _LENGTH.size, place)
            (size,) = _LENGTH.unpack_from(self._seen, begin)
            if size > limit:
                raise self.fault(f"{place} has a string of {size} bytes; at most {limit} can be there")
            begin += _LENGTH.size
            end = begin + size
            if end > len(self._seen):
                self._fetch(end, place)
            try:
                found.append(self._seen[begin:end].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise self.fault(f"{place} is not UTF-8; the file is damaged") from error
            begin = end
        self._position = begin
        return tuple(found)

    def value(self, number: int, place: str, depth: int = 0) -> Any:
        """The next value of metadata, of the type with this number."""
        if number == _STRING:
            return self.text(place)
        if number == _ARRAY:
            return self._array(place, depth + 1)
        if number not in _NUMBERS:
            raise self.fault(f"{place} has type {number}, which this version does not know; update it")
        return self.number(_NUMBERS[number], place)

    def _array(self, place: str, depth: int) -> tuple[Any, ...]:
        if depth > MAX_NESTING:
            raise self.fault(f"{place} has arrays nested more than {MAX_NESTING} deep; no model needs that")
        kind = self.number("I", place)
        count = self.number("Q", place)
        # The least that an element takes: a string its length, an array its type and length.
        least = {_STRING: 8, _ARRAY: 12}.get(kind) or struct.calcsize(_NUMBERS.get(kind, "B"))
        if count > self.left // least:
            raise self.fault(f"{place} is an array of {count} elements, for which the header has no room; {_CUT}")
        self._elements_left -= count
        if self._elements_left < 0:
            raise self.fault(f"{place} and the arrays before it have more than {MAX_ELEMENTS} elements; no model has")
        if kind in _NUMBERS and kind != _BOOL:
            form = f"<{count}{_NUMBERS[kind]}"
            return struct.unpack_from(form, self._seen, self.skip(struct.calcsize(form), place))
        if kind == _STRING:
            return self.texts(count, place)
        if kind not in (_BOOL, _ARRAY):
            raise self.fault(f"{place} is an array of type {kind}, which this version does not know; update it")
        return tuple([self.value(kind, place, depth) for _ in range(count)])

    def raw(self) -> bytes:
        """Everything from the start to here."""
        return bytes(memoryview(self._seen)[: self._position])


def gguf_of(file: Readable) -> GgufHeader:
    """Check the bytes up to the payload against the format and the file's size; at most a block behind them is read.

    Raises:
        ManifestError: See the module's description of what a file must be.
    """
    cursor = _Cursor(file)
    version = _read_version(cursor)
    tensor_count = cursor.number("Q", "the count of tensors")
    pair_count = cursor.number("Q", "the count of metadata")
    if tensor_count * _LEAST_TENSOR_BYTES + pair_count * _LEAST_PAIR_BYTES > cursor.left:
        raise cursor.fault(
            f"says {tensor_count} tensors and {pair_count} metadata pairs, for which it is too short; {_CUT}"
        )
    if tensor_count > MAX_TENSORS or pair_count > MAX_PAIRS:
        raise cursor.fault(
            f"says {tensor_count} tensors and {pair_count} metadata pairs; no model has over {MAX_TENSORS}"
        )
    metadata: dict[str, Any] = {}
    alignment = DEFAULT_ALIGNMENT
    for number in range(pair_count):
        key = cursor.text(f"the key of metadata pair {number}", MAX_KEY_BYTES)
        place = f"metadata {key!r:.100}"
        if key in metadata:
            raise cursor.fault(f"{place} appears twice")
        kind = cursor.number("I", place)
        metadata[key] = cursor.value(kind, place)
        if key == _ALIGNMENT_KEY:
            alignment = _check_alignment(cursor, kind, metadata[key])
    entries = [_read_entry(cursor, number, alignment) for number in range(tensor_count)]
    start = -(-cursor.position // alignment) * alignment
    # A file without tensors, such as the first of a split set, may end where its header ends.
    if entries or file.size > cursor.position:
        cursor.skip(start - cursor.position, "the padding before the tensors")
    tensors = _place_tensors(cursor, entries, start, alignment, file.size)
    return GgufHeader(
        raw=cursor.raw(),
        version=version,
        alignment=alignment,
        metadata=metadata,
        tensors=tensors,
        file_bytes=file.size,
    )


def _read_version(cursor: _Cursor) -> int:
    cursor.skip(len(MAGIC), "the magic")
    magic = cursor.raw()
    if magic == LFS_POINTER_START[: len(MAGIC)]:
        raise cursor.fault("is a git-lfs pointer and not the file it stands for; run `git lfs pull`")
    if magic != MAGIC:
        raise cursor.fault(f"does not start with {MAGIC.decode()!r}; not a GGUF file")
    version: int = cursor.number("I", "the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS:
        raise cursor.fault("is big-endian; convert it to little-endian, which is what this version reads")
    raise cursor.fault(f"has GGUF version {version}; this version reads 2 and 3, convert the model again")


def _check_alignment(cursor: _Cursor, kind: int, value: Any) -> int:
    if kind != _ALIGNMENT_TYPE or not 0 < value <= MAX_ALIGNMENT or value & (value - 1):
        raise cursor.fault(f"{_ALIGNMENT_KEY} must be a 32-bit power of two up to {MAX_ALIGNMENT}, not {value!r:.40}")
    return int(value)


def _read_entry(cursor: _Cursor, number: int, alignment: int) -> tuple[int, GgufTensor]:
    """One entry of the table: its place in the payload, and the tensor as if it began at 0."""
    name = cursor.text(f"the name of tensor {number}", MAX_NAME_CHARS * 4)
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise cursor.fault(f"tensor {number} has a name of {len(name)} characters; names have 1 to {MAX_NAME_CHARS}")
    place = f"tensor {name!r:.200}"
    dimensions = cursor.number("I", place)
    if dimensions > MAX_DIMENSIONS:
        raise cursor.fault(f"{place} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are allowed")
    # The file has the dimension of the shortest stride first.
    shape = tuple(reversed([cursor.number("Q", place) for _ in range(dimensions)]))
    kind, offset = cursor.number("I", place), cursor.number("Q", place)
    block_type = BLOCK_TYPES.get(kind)
    if block_type is None:
        raise cursor.fault(f"{place} has type {kind}, which this version does not know; update it")
    elements = 1
    for size in shape:
        elements *= size
        # Checked step by step, so that no number grows beyond what a file can hold.
        if not 0 < elements <= MAX_FILE_BYTES:
            raise cursor.fault(f"{place} has shape {list(shape)}: no elements, or more than any file can hold")
    row = shape[-1] if shape else 1
    if row % block_type.elements:
        raise cursor.fault(
            f"{place} has rows of {row} elements, which are not whole {block_type.name} blocks of {block_type.elements}"
        )
    if offset % alignment or offset > MAX_FILE_BYTES:
        raise cursor.fault(f"{place} at offset {offset} is not at a multiple of the alignment {alignment}, or outside")
    size = elements // block_type.elements * block_type.size
    return offset, GgufTensor(name=name, type=block_type, shape=shape, begin=0, end=size)


def _place_tensors(
    cursor: _Cursor, entries: list[tuple[int, GgufTensor]], start: int, alignment: int, file_bytes: int
) -> tuple[GgufTensor, ...]:
    """The tensors where they lie in the file: one behind the other, with nothing but padding between them."""
    if len({tensor.name for _, tensor in entries}) != len(entries):
        names = sorted(tensor.name for _, tensor in entries)
        twice = next(name for name, after in pairwise(names) if name == after)
        raise cursor.fault(f"tensor {twice!r:.200} appears twice")
    placed = []
    expected = end = start
    for offset, tensor in sorted(entries, key=lambda entry: entry[0]):
        begin = start + offset
        if begin != expected:
            fault = "overlaps its neighbour" if begin < expected else "leaves a hole before it"
            raise cursor.fault(
                f"tensor {tensor.name!r:.200} at {begin} {fault} (expected {expected}); the header is damaged"
            )
        end = begin + tensor.end
        expected = -(-end // alignment) * alignment
        placed.append(GgufTensor(name=tensor.name, type=tensor.type, shape=tensor.shape, begin=begin, end=end))
    if file_bytes not in (end, expected) and (entries or file_bytes != cursor.position):
        raise cursor.fault(
            f"header and tensors need {end} bytes, with padding {expected}, the file has {file_bytes}; "
            "it is truncated or has trailing bytes, download it again"
        )
    return tuple(placed)
