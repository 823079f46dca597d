"""GGUF bytes, spelled out by hand, good and bad: a second reading of the format, which knows no product code.

A document is a mapping of what JSON has: ``magic``, ``version``, ``tensor_count`` and ``pair_count`` (when absent,
those of the lists), ``pairs`` of (key, type number, value), ``tensors`` of (name, sizes, type number, offset) with the
size of the shortest stride first, ``alignment`` of the padding behind the header. The value of an array is (type
number, list), or (type number, list, the count that it claims). Values of the wrong type are written as something of
the right one, so that a document can be changed at will.
"""

from __future__ import annotations

import math
import struct
from typing import Any

Document = dict[str, Any]

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", U64: "Q", I64: "q", F64: "d"}

SIZES = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34), 12: (256, 144), 14: (256, 210), 24: (1, 1), 30: (1, 2)}
"""Elements and bytes of a block for some types: F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, I8, BF16."""


def text(value: Any) -> bytes:
    """A string with its length before it."""
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(kind: Any, value: Any) -> bytes:
    """A value of metadata; raw bytes stand for themselves, and numbers that do not fit are cut."""
    if isinstance(value, bytes):
        return value
    if kind == STRING:
        return text(value)
    if kind == ARRAY and isinstance(value, tuple | list) and len(value) > 1:
        inside, items, *claimed = value
        items = as_list(items)
        count = claimed[0] if claimed else len(items)
        return number("I", inside) + number("Q", count) + b"".join(value_bytes(inside, item) for item in items)
    if kind == BOOL:
        return bytes([whole(value) % 256])
    return number(LETTERS.get(kind, "I") if type(kind) is int else "I", value)


def as_list(value: Any) -> list[Any]:
    """A list as it is, and nothing in place of anything else."""
    return list(value) if isinstance(value, list | tuple) else []


def whole(value: Any) -> int:
    """A whole number of what may be one."""
    return int(value) if isinstance(value, int | float) and abs(value) < math.inf else 0


def number(letter: str, value: Any) -> bytes:
    """A number in little-endian order."""
    if letter in "fd":
        try:
            return struct.pack(f"<{letter}", value if isinstance(value, int | float) else 0)
        except (OverflowError, struct.error):
            return struct.pack(f"<{letter}", math.inf)
    size = struct.calcsize(f"<{letter}")
    return (whole(value) % 2 ** (8 * size)).to_bytes(size, "little")


def pairs_bytes(pairs: Any) -> bytes:
    """Metadata pairs one after the other."""
    raw = b""
    for pair in as_list(pairs):
        key, kind, value = (*as_list(pair), "", 0, 0)[:3]
        raw += text(key) + number("I", kind) + value_bytes(kind, value)
    return raw


def header(document: Document) -> bytes:
    """Everything up to the payload."""
    pairs, tensors = as_list(document.get("pairs")), as_list(document.get("tensors"))
    raw = document.get("magic", b"GGUF") + number("I", document.get("version", 3))
    raw += number("Q", document.get("tensor_count", len(tensors)))
    raw += number("Q", document.get("pair_count", len(pairs)))
    raw += pairs_bytes(pairs)
    for entry in tensors:
        name, sizes, kind, offset = (*as_list(entry), "", [], 0, 0)[:4]
        sizes = as_list(sizes)
        raw += text(name) + number("I", len(sizes)) + b"".join(number("Q", size) for size in sizes)
        raw += number("I", kind) + number("Q", offset)
    return raw + bytes(-len(raw) % max(1, min(whole(document.get("alignment", 32)), 1 << 20)))


def payload_size(sizes: list[int], kind: int) -> int:
    """Bytes of a tensor."""
    elements, size = SIZES[kind]
    total = 1
    for count in sizes:
        total *= count
    return total // elements * size


def place(tensors: list[tuple[str, list[int], int]], alignment: int = 32) -> tuple[list[Any], int]:
    """Entries with their offsets, and the bytes of the payload without padding at its end."""
    entries, end = [], 0
    for name, sizes, kind in tensors:
        begin = end + -end % alignment
        entries.append((name, sizes, kind, begin))
        end = begin + payload_size(sizes, kind)
    return entries, end
