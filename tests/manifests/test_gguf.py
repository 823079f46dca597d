"""GGUF headers: good ones are read as the ggml project's package reads them, bad ones are refused in a sentence."""

from __future__ import annotations

import math
import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import pytest

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.gguf import MAX_ELEMENTS, MAX_TENSORS, GgufHeader, parse_gguf, read_gguf
from manifests.header import MAX_HEADER_BYTES
from tests.fuzz.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    header,
    number,
    pairs_bytes,
    place,
    text,
)
from tests.gguf_files import write_gguf

PAIRS: list[tuple[Any, int, Any]] = [
    ("general.architecture", STRING, "deepseek2"),
    ("u8", U8, 255),
    ("i8", I8, -1),
    ("u16", U16, 65535),
    ("i16", I16, -2),
    ("u32", U32, 2**32 - 1),
    ("i32", I32, -3),
    ("u64", U64, 2**64 - 1),
    ("i64", I64, -(2**63)),
    ("f32", F32, 0.5),
    ("f64", F64, 0.1),
    ("yes", BOOL, True),
    ("no", BOOL, False),
    ("\u6a21\u578b", STRING, "\U0001f600\x00\n"),
    ("empty", STRING, ""),
    ("texts", ARRAY, (STRING, ["a", "", "\u0120b"])),
    ("numbers", ARRAY, (I16, [-1, 2])),
    ("flags", ARRAY, (BOOL, [True, False])),
    ("floats", ARRAY, (F32, [1.5])),
    ("none", ARRAY, (STRING, [])),
    ("nested", ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"]), (ARRAY, [(U8, [])])])),
]
VALUES = {
    "general.architecture": "deepseek2", "u8": 255, "i8": -1, "u16": 65535, "i16": -2, "u32": 2**32 - 1, "i32": -3,
    "u64": 2**64 - 1, "i64": -(2**63), "f32": 0.5, "f64": 0.1, "yes": True, "no": False,
    "\u6a21\u578b": "\U0001f600\x00\n", "empty": "", "texts": ("a", "", "\u0120b"), "numbers": (-1, 2),
    "flags": (True, False), "floats": (1.5,), "none": (), "nested": ((1, 2), ("x",), ((),)),
}  # fmt: skip


def pack(padded: bool = True, **document: Any) -> bytes:
    """A file; its payload is as long as the entries say."""
    raw = header(document)
    alignment = document.get("alignment", 32)
    _, end = place([(name, sizes, kind) for name, sizes, kind, _ in document.get("tensors", [])], alignment)
    return raw + bytes(end + (-end % alignment if padded else 0))


def parse(raw: bytes) -> GgufHeader:
    return parse_gguf(raw, file_bytes=len(raw), what="x")


def entries(*tensors: tuple[str, list[int], int], alignment: int = 32) -> list[Any]:
    return place(list(tensors), alignment)[0]


SMALL = entries(("a", [32, 3, 2], 8), ("b", [5], 0), ("c", [], 30), ("d", [256, 2], 12))


@pytest.mark.parametrize("version", [2, 3])
def test_everything_that_a_header_can_hold(version: int, tmp_path: Path) -> None:
    raw = pack(version=version, pairs=PAIRS, tensors=SMALL)
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    for found in (read_gguf(path), parse(raw)):
        assert (found.version, found.alignment, found.file_bytes) == (version, 32, len(raw))
        assert found.metadata == VALUES
        assert [type(value) for value in found.metadata.values()] == [type(value) for value in VALUES.values()]
        start = len(found.raw)
        assert found.raw == raw[:start]
        assert [(t.name, t.type.name, t.shape, t.begin - start, t.end - start) for t in found.tensors] == [
            ("a", "Q8_0", (2, 3, 32), 0, 204), ("b", "F32", (5,), 224, 244), ("c", "BF16", (), 256, 258),
            ("d", "Q4_K", (2, 256), 288, 576),
        ]  # fmt: skip


@pytest.mark.parametrize("alignment", [1, 8, 64, 4096])
def test_another_alignment(alignment: int) -> None:
    pairs = [("general.alignment", U32, alignment)]
    tensors = entries(("a", [3], 24), ("b", [5], 24), alignment=alignment)
    found = parse(pack(pairs=pairs, tensors=tensors, alignment=alignment))
    assert found.alignment == alignment
    assert len(found.raw) % alignment == 0
    assert found.tensors[1].begin == len(found.raw) + max(3, alignment)


def test_padding_behind_the_last_tensor_is_all_there_or_none() -> None:
    whole = pack(tensors=SMALL[:2])
    bare = pack(padded=False, tensors=SMALL[:2])
    assert len(whole) - len(bare) == 12
    assert parse(bare).tensors[-1].end == parse(whole).tensors[-1].end == len(bare)
    for size in (len(bare) - 1, len(bare) + 1, len(whole) - 1, len(whole) + 1, len(whole) + 32):
        with pytest.raises(ManifestError, match="truncated or has trailing bytes"):
            parse((whole + bytes(32))[:size])


def test_a_file_without_tensors() -> None:
    raw = header({"pairs": PAIRS[:3]})
    bare = header({"pairs": PAIRS[:3], "alignment": 1})
    assert len(raw) > len(bare)
    assert parse(raw).raw == raw
    assert parse(bare).raw == bare
    for wrong in (raw + b"\0", raw[:-1]):
        with pytest.raises(ManifestError, match="truncated"):
            parse(wrong)


def test_entries_may_stand_in_another_order_than_their_bytes() -> None:
    assert [tensor.name for tensor in parse(pack(tensors=SMALL[::-1])).tensors] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("new", [False, True])
def test_a_model_of_the_package_is_read_as_the_package_reads_it(new: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    written = write_gguf(path, new=new)
    found, reader = read_gguf(path), gguf.GGUFReader(path)
    raw = path.read_bytes()
    assert [tensor.name for tensor in found.tensors] == [tensor.name for tensor in reader.tensors] == list(written)
    for ours, theirs in zip(found.tensors, reader.tensors, strict=True):
        shape, kind, data = written[ours.name]
        assert (ours.begin, ours.end - ours.begin) == (theirs.data_offset, theirs.n_bytes)
        assert (ours.shape, ours.type.name) == (shape, kind.name)
        assert ours.shape == tuple(reversed([int(size) for size in theirs.shape]))
        assert raw[ours.begin : ours.end] == theirs.data.tobytes() == data
    assert len(found.raw) == reader.data_offset
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert found.metadata.keys() == fields.keys()
    for key, field in fields.items():
        theirs = field.contents()
        assert found.metadata[key] == (tuple(theirs) if isinstance(theirs, list) else theirs), key


def test_every_prefix_is_refused(tmp_path: Path) -> None:
    raw = pack(pairs=[*PAIRS, ("general.alignment", U32, 32)], tensors=SMALL[:2])
    path = tmp_path / "x.gguf"
    bare = len(raw) - 12
    for size in range(len(raw)):
        if size == bare:
            continue
        with pytest.raises(ManifestError):
            parse(raw[:size])
        if size % 7 == 0:
            path.write_bytes(raw[:size])
            with pytest.raises(ManifestError, match=r"x\.gguf"):
                read_gguf(path)
        # The size is right, but the bytes end: somebody cuts the file while it is read.
        start = len(parse(raw).raw)
        if size < start:
            with pytest.raises(ManifestError, match="became shorter"):
                parse_gguf(raw[:size], file_bytes=len(raw), what="x")


def one(key: Any, kind: int, value: Any) -> bytes:
    return pack(pairs=[(key, kind, value)])


def tensor(name: Any = "a", sizes: Any = (32,), kind: int = 0, offset: int = 0) -> bytes:
    """A file with one entry of anything, and enough bytes behind it."""
    return header({"tensors": [(name, list(sizes), kind, offset)]}) + bytes(4096)


def nested(depth: int) -> bytes:
    """An array in an array in an array."""
    return pairs_bytes([("deep", ARRAY, number("I", ARRAY) + number("Q", 1))]) + (
        (number("I", ARRAY) + number("Q", 1)) * depth + number("I", U8) + number("Q", 0)
    )


BAD = {
    "nothing": (b"", "ends within the magic"),
    "another magic": (pack(magic=b"GGML"), "does not start with 'GGUF'"),
    "the magic of big-endian machines": (pack(magic=b"FUGG"), "does not start with 'GGUF'"),
    "HTML": (b"<!DOCTYPE html><html></html>", "not a GGUF file"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "safetensors": (struct.pack("<Q", 2) + b"{}", "not a GGUF file"),
    "version 0": (pack(version=0), "version 0"),
    "version 1": (pack(version=1), "version 1; this version reads 2 and 3"),
    "version 4": (pack(version=4), "version 4;"),
    "a huge version": (pack(version=2**32 - 1), "version 4294967295"),
    "big-endian": (pack(version=3 << 24), "big-endian"),
    "big-endian version 2": (pack(version=2 << 24), "big-endian"),
    "2^64 - 1 tensors": (pack(tensor_count=2**64 - 1), "too short; it is truncated or damaged"),
    "2^63 tensors": (pack(tensor_count=2**63), "too short; it is truncated or damaged"),
    "2^64 - 1 metadata pairs": (pack(pair_count=2**64 - 1), "too short; it is truncated or damaged"),
    "2^61 pairs": (pack(pair_count=2**61), "too short; it is truncated or damaged"),
    "one tensor more than there is": (pack(tensor_count=1), "too short; it is truncated or damaged"),
    "one pair more than there is": (pack(pairs=PAIRS[:2], pair_count=3), "ends within metadata ''"),
    "more tensors than a model has": (
        pack(tensor_count=MAX_TENSORS + 1) + bytes(2_000_000), "no model has over 65536"),
    "a key of 2^64 - 1 bytes": (pack(pair_count=1)[:24] + b"\xff" * 8 + bytes(99), "at most 65535"),
    "a key of 65536 bytes": (one("k" * 65536, U8, 1), "at most 65535"),
    "a key without end": (pack(pair_count=1)[:24] + number("Q", 65535) + bytes(99), "ends within the key"),
    "a key that is not UTF-8": (one(b"\xff", U8, 1), "the key of metadata pair 0 is not UTF-8"),
    "half a surrogate": (one("\ud800", U8, 1), "not UTF-8"),
    "an overlong NUL": (one(b"\xc0\x80", U8, 1), "not UTF-8"),
    "the same key twice": (pack(pairs=[PAIRS[1], PAIRS[2], PAIRS[1]]), "metadata 'u8' appears twice"),
    "an unknown type": (one("k", 13, 0), "has type 13"),
    "the largest type": (one("k", 2**32 - 1, 0), "has type 4294967295"),
    "a truth value of 2": (one("k", BOOL, 2), "must be 0 or 1"),
    "a truth value of 255 in an array": (one("k", ARRAY, (BOOL, [1, 255])), "must be 0 or 1"),
    "a string of 2^64 - 1 bytes": (one("k", STRING, b"\xff" * 8), "at most 100000000"),
    "a string without end": (one("k", STRING, number("Q", 90_000)), "ends within metadata 'k'"),
    "a string that is not UTF-8": (one("k", STRING, number("Q", 1) + b"\x80"), "metadata 'k' is not UTF-8"),
    "a number without end": (pack(pairs=[("k", U64, b"")])[:-5], "ends within"),
    "an array of 2^64 - 1 bytes": (one("k", ARRAY, (U8, [], 2**64 - 1)), "the header has no room; it is truncated"),
    "an array of 2^61 numbers": (one("k", ARRAY, (U64, [], 2**61)), "for which the header has no room"),
    "an array of 2^61 strings": (one("k", ARRAY, (STRING, [], 2**61)), "for which the header has no room"),
    "an array of one string too many": (one("k", ARRAY, (STRING, ["a"], 9)), "for which the header has no room"),
    "an array of an unknown type": (one("k", ARRAY, (13, [])), "array of type 13"),
    "an array of an unknown type and 2^63": (one("k", ARRAY, (77, [], 2**63)), "no room"),
    "arrays 1000 deep": (pack(pair_count=1)[:24] + nested(1000), "nested more than 4 deep"),
    "arrays 5 deep": (pack(pair_count=1)[:24] + nested(4), "nested more than 4 deep"),
    "alignment 0": (one("general.alignment", U32, 0), "power of two"),
    "alignment 48": (one("general.alignment", U32, 48), "power of two"),
    "alignment 2^31": (one("general.alignment", U32, 2**31), "power of two"),
    "alignment of a string": (one("general.alignment", STRING, "32"), "power of two"),
    "alignment of 64 bits": (one("general.alignment", U64, 32), "power of two"),
    "alignment of a truth value": (one("general.alignment", BOOL, True), "power of two"),
    "an empty name": (tensor(""), "has a name of 0 characters"),
    "a name of 1025 characters": (tensor("n" * 1025), "has a name of 1025 characters"),
    "a name of 2^64 - 1 bytes": (pack(tensor_count=1)[:24] + b"\xff" * 8 + bytes(99), "at most 4096"),
    "a name that is not UTF-8": (tensor(b"\xfe"), "the name of tensor 0 is not UTF-8"),
    "the same name twice": (pack(tensors=entries(("a", [8], 0), ("b", [8], 0), ("a", [8], 0))), "'a' appears twice"),
    "five dimensions": (tensor(sizes=[1] * 5), "has 5 dimensions"),
    "2^32 - 1 dimensions": (pack(tensor_count=1)[:24] + text("a") + b"\xff" * 40, "has 4294967295 dimensions"),
    "no elements": (tensor(sizes=[32, 0]), "no elements"),
    "no elements, and an overflow": (tensor(sizes=[2**63, 2**63, 0]), "no elements"),
    "a product that is 0 in 64 bits": (tensor(sizes=[2**32, 2**32]), "more than any file can hold"),
    "a product that is 32 in 64 bits": (tensor(sizes=[2**62 + 8, 4]), "more than any file can hold"),
    "a product of 2^256": (tensor(sizes=[2**64 - 1] * 4), "more than any file can hold"),
    "more than the file": (tensor(sizes=[2**40]), "truncated or has trailing bytes"),
    "an unknown type of tensor": (tensor(kind=42), "has type 42, which this version does not know"),
    "a type that ggml dropped": (tensor(kind=4), "has type 4,"),
    "the largest type of tensor": (tensor(kind=2**32 - 1), "has type 4294967295"),
    "half a block": (tensor(sizes=[128, 2], kind=12), "not whole Q4_K blocks of 256"),
    "blocks over rows": (tensor(sizes=[1, 32], kind=8), "not whole Q8_0 blocks of 32"),
    "a scalar of blocks": (tensor(sizes=[], kind=8), "not whole Q8_0 blocks"),
    "an offset that is not aligned": (tensor(offset=16), "not at a multiple of the alignment 32"),
    "an offset outside": (tensor(offset=2**20), "leaves a hole"),
    "the largest offset": (tensor(offset=2**64 - 32), "or outside"),
    "a hole at the start": (tensor(offset=32), "leaves a hole"),
    "a hole between": (header({"tensors": [("a", [8], 0, 0), ("b", [8], 0, 64)]}) + bytes(96), "leaves a hole"),
    "an overlap": (header({"tensors": [("a", [16], 0, 0), ("b", [8], 0, 32)]}) + bytes(64), "overlaps"),
    "the same range twice": (header({"tensors": [("a", [8], 0, 0), ("b", [8], 0, 0)]}) + bytes(32), "overlaps"),
    "one in another": (header({"tensors": [("a", [32], 0, 0), ("b", [8], 0, 64)]}) + bytes(128), "overlaps"),
    "a payload without tensors": (pack() + bytes(32), "trailing"),
    "trailing bytes": (tensor(sizes=[8]), "trailing"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "says"), BAD.values(), ids=BAD.keys())
def test_bad_headers(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ManifestError) as caught:
        read_gguf(path)
    seconds, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert says in str(caught.value)
    assert "bad.gguf" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path)) * 2
    # The block that is read, and the bytes of the longest case.
    assert peak < 12_000_000
    assert seconds < 1


def test_what_a_sparse_file_claims_is_not_believed(tmp_path: Path) -> None:
    """Holes are bytes that cost nothing to claim; the bounds hold where a file is long enough for anything."""
    path = tmp_path / "sparse.gguf"
    cases = {
        "arrays of 4000001 elements": (one("k", ARRAY, (U8, [], MAX_ELEMENTS + 1))[:-1], "more than 4000000 elements"),
        "a string of 200 MB": (one("k", STRING, number("Q", 200_000_000)), "at most 100000000"),
        "a string up to the limit": (one("k", STRING, number("Q", MAX_HEADER_BYTES - 60)), "leaves a hole|trailing"),
        "a string behind the limit": (one("k", STRING, number("Q", MAX_HEADER_BYTES)), "behind the limit"),
        "2^40 tensors": (pack(tensor_count=2**32), "too short"),
        "65536 empty keys": (pack(pair_count=65536), "metadata '' appears twice"),
    }
    for what, (raw, says) in cases.items():
        path.write_bytes(raw)
        os.truncate(path, 1 << 40)
        with pytest.raises(ManifestError, match=says):
            read_gguf(path)
        assert what


def test_floats_that_are_no_numbers_are_kept_for_who_asks() -> None:
    found = parse(pack(pairs=[("nan", F32, math.nan), ("inf", F64, -math.inf), ("all", ARRAY, (F32, [math.nan]))]))
    assert math.isnan(found.metadata["nan"])
    assert found.metadata["inf"] == -math.inf
    assert math.isnan(found.metadata["all"][0])


def test_only_the_header_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    raw = header({"tensors": [("a", [1 << 30], 0, 0)]})
    path.write_bytes(raw)
    os.truncate(path, len(raw) + (4 << 30))
    tracemalloc.start()
    assert read_gguf(path).tensors[0].end == path.stat().st_size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_what_is_no_regular_file(tmp_path: Path, deadline: None) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "link.gguf").symlink_to("fifo.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "nowhere.gguf").symlink_to("absent.gguf")
    told = dict.fromkeys(("fifo", "link", "folder"), "not a regular file")
    for name, says in (told | dict.fromkeys(("absent", "nowhere"), "no such file")).items():
        path = tmp_path / f"{name}.gguf"
        with pytest.raises(SourceNotFoundError) as caught:
            read_gguf(path)
        assert str(caught.value) == f"{path}: {says}"
