"""Headers: what we write the library reads, what we accept the library accepts, and noise never gets through."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.dtypes import BITS, nbytes
from manifests.errors import ManifestError, SourceNotFoundError
from manifests.header import MAX_HEADER_BYTES, Header, HeaderTensor, encode_header, parse_header, read_header


def pack(document: Any, payload: int = 0) -> bytes:
    """A file of any header, independent of the code under test."""
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + bytes(payload)


def parse(raw: bytes) -> Header:
    return parse_header(raw, file_bytes=len(raw), what="x")


def stock_accepts(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return False
    return True


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[HeaderTensor]:
    tensors, position = [], 0
    for name in draw(st.lists(NAMES, unique=True, max_size=6)):
        dtype = draw(st.sampled_from([tag for tag, bits in BITS.items() if bits % 8 == 0]))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        end = position + nbytes(dtype, shape)
        tensors.append(HeaderTensor(name=name, dtype=dtype, shape=shape, begin=position, end=end))
        position = end
    return tensors


@given(
    tensor_lists(),
    st.sampled_from([1, 2, 3, 8, 64, 4096]),
    st.none()
    | st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5), st.text('ab\u00e9\n"'), max_size=2
    ),
)
def test_what_is_written_is_read_back_by_us_and_by_the_library(
    tensors: list[HeaderTensor], align: int, metadata: dict[str, str] | None
) -> None:
    raw = encode_header(tensors, metadata=metadata, align=align)
    assert len(raw) % align == 0
    payload = random.Random(len(raw)).randbytes(tensors[-1].end if tensors else 0)
    header = parse_header(raw + payload, file_bytes=len(raw) + len(payload), what="x")
    assert header.raw == raw
    assert header.metadata == ({"format": "pt"} if metadata is None else metadata)
    assert sorted(header.tensors, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    read = {name: (bytes(info["data"]), tuple(info["shape"])) for name, info in safetensors.deserialize(raw + payload)}
    assert read == {tensor.name: (payload[tensor.begin : tensor.end], tensor.shape) for tensor in tensors}


GOOD = pack(
    b'{"__metadata__":{"format":"pt"},"b.weight":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},'
    b'"a.weight":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]},'
    b'"e":{"dtype":"F32","shape":[0,7],"data_offsets":[16,16]},"s":{"dtype":"I64","shape":[],"data_offsets":[16,24]}}',
    24,
)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    raw = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        if not raw:
            break
        at = draw(st.integers(0, len(raw) - 1))
        kind = draw(st.sampled_from(["flip", "set", "delete", "insert", "cut", "repeat", "grow"]))
        if kind == "flip":
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            raw[at] = draw(st.sampled_from(list(b'0123456789-.eE[]{}":, \n\x00\xff')))
        elif kind == "delete":
            del raw[at : at + draw(st.integers(1, 9))]
        elif kind == "insert":
            raw[at:at] = draw(
                st.sampled_from([b"0", b"-", b"1e9", b"9" * 20, b" ", b"true", b'"', b",", b"[", b"}", b"\\u0000"])
            )
        elif kind == "cut":
            del raw[at + 1 :]
        elif kind == "repeat":
            raw[at:at] = raw[at : at + 60]
        else:
            raw += bytes(draw(st.integers(1, 9)))
    if draw(st.booleans()) and len(raw) > 8:
        # With a length field that fits, so that the JSON itself is what is looked at.
        brace = raw.rfind(b"}")
        raw[:8] = struct.pack("<Q", max(0, brace - 7))
    return bytes(raw)


@settings(max_examples=250)
@given(mutations())
def test_a_damaged_file_is_refused_with_the_one_error_or_is_sound_for_the_library_too(raw: bytes) -> None:
    try:
        header = parse(raw)
    except ManifestError:
        return
    position = 0
    for tensor in header.tensors:
        assert (tensor.begin, tensor.end - tensor.begin) == (position, nbytes(tensor.dtype, tensor.shape))
        position = tensor.end
    assert len(header.raw) + position == len(raw)
    if b"-0" not in header.raw:  # JSON's minus zero is our integer zero and the library's float
        assert stock_accepts(raw)


@given(st.binary(max_size=64), st.integers(0, 100))
def test_noise_is_refused(raw: bytes, more: int) -> None:
    try:
        parse_header(raw, file_bytes=len(raw) + more, what="noise")
    except ManifestError:
        return
    pytest.fail("noise was taken for a header")


@given(st.binary(max_size=80))
def test_noise_on_disk_is_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(raw)
    with pytest.raises((ManifestError, SourceNotFoundError)):
        read_header(path)


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4), **extra: Any) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets} | extra}


HUGE = 1 << 63
LARGE = entry(shape=[3], offsets=[0, 12])

BAD = {
    "no brace": (pack(b"[]"), "does not start with"),
    "blank before the brace": (pack(b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4), "does not start"),
    "empty JSON": (pack(b""), "does not start with"),
    "an array": (pack([1]), "does not start with"),
    "not closed": (pack(b'{"a":'), "not valid JSON"),
    "not UTF-8": (pack(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', 4), "not UTF-8"),
    "duplicate name": (pack(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', 2), "appears twice"),
    "duplicate key": (pack(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1), "appears twice"),
    "entry is a number": (pack({"a": 1}), "must have exactly"),
    "entry is null": (pack({"a": None}), "must have exactly"),
    "key missing": (pack({"a": {"dtype": "F32", "shape": [1]}}, 4), "must have exactly"),
    "key too many": (pack(entry(note="hello"), 4), "must have exactly"),
    "unknown dtype": (pack(entry("F33"), 4), "not one that safetensors defines"),
    "dtype in lower case": (pack(entry("f32"), 4), "not one that safetensors defines"),
    "dtype is a list": (pack(entry(["F32"]), 4), "not one that safetensors defines"),
    "dtype is null": (pack(entry(None), 4), "not one that safetensors defines"),
    "shape is a number": (pack(entry(shape=1), 4), "shape must be"),
    "shape is a string": (pack(entry(shape="1"), 4), "shape must be"),
    "negative size": (pack(entry(shape=[-1]), 4), "shape must be"),
    "two negative sizes": (pack(entry(shape=[-1, -1]), 4), "shape must be"),
    "float size": (pack(entry(shape=[1.0]), 4), "shape must be"),
    "bool size": (pack(entry(shape=[True]), 4), "shape must be"),
    "null size": (pack(entry(shape=[None]), 4), "shape must be"),
    "huge size": (pack(entry(shape=[HUGE]), 4), "shape must be"),
    "sizes whose product wraps to 1": (pack(entry("U8", [1 << 32, 1 << 32], [0, 0])), "shape"),
    "a zero hides an overflow": (pack(entry("U8", [1 << 62, 1 << 62, 0], [0, 0])), "shape"),
    "65 dimensions": (pack(entry(shape=[1] * 65), 4), "shape must be"),
    "one offset": (pack(entry(offsets=[0]), 4), "data_offsets must be"),
    "three offsets": (pack(entry(offsets=[0, 4, 4]), 4), "data_offsets must be"),
    "offsets are null": (pack(entry(offsets=None), 4), "data_offsets must be"),
    "negative offset": (pack(entry(offsets=[-4, 0]), 4), "data_offsets must be"),
    "float offset": (pack(entry(offsets=[0, 4.0]), 4), "data_offsets must be"),
    "bool offset": (pack(entry("U8", [1], [False, True]), 1), "data_offsets must be"),
    "huge offset": (pack(entry(offsets=[HUGE, HUGE + 4]), 4), "data_offsets must be"),
    "offset of a thousand digits": (pack(entry(offsets=[0, 10**1000]), 4), "data_offsets must be"),
    "offsets the wrong way round": (pack(entry(offsets=[4, 0]), 4), "does not fill"),
    "shape larger than range": (pack(entry(shape=[2]), 4), "does not fill"),
    "range larger than shape": (pack(entry(offsets=[0, 8]), 8), "does not fill"),
    "half a byte": (pack(entry("F4", [3], [0, 1]), 1), "does not fill"),
    "hole at the start": (pack(entry(offsets=[4, 8]), 8), "hole"),
    "hole between": (pack(entry() | {"b": entry(offsets=[8, 12])["a"]}, 12), "hole"),
    "overlap": (pack(entry() | {"b": entry(offsets=[2, 6])["a"]}, 6), "overlaps"),
    "the same range twice": (pack(entry() | {"b": entry()["a"]}, 4), "overlaps"),
    "one inside the other": (pack(LARGE | {"b": entry(offsets=[4, 8])["a"]}, 12), "overlaps"),
    "empty tensor inside another": (pack(LARGE | {"b": entry(shape=[0], offsets=[4, 4])["a"]}, 12), "overlaps"),
    "empty tensor behind the end": (pack(entry() | {"b": entry(shape=[0], offsets=[9, 9])["a"]}, 4), "hole"),
    "one byte short": (pack(entry(), 3), "truncated"),
    "one byte too many": (pack(entry(), 5), "trailing"),
    "payload without tensors": (pack({}, 1), "trailing"),
    "empty name": (pack({"": entry()["a"]}, 4), "characters"),
    "name of 1025 characters": (pack({"n" * 1025: entry()["a"]}, 4), "characters"),
    "metadata is a list": (pack({"__metadata__": []}), "__metadata__"),
    "metadata is null": (pack({"__metadata__": None}), "__metadata__"),
    "metadata holds a number": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata is nested": (pack({"__metadata__": {"a": {"b": "c"}}}), "__metadata__"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "says"), BAD.values(), ids=BAD.keys())
def test_bad_headers(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ManifestError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert "bad.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path)) * 2


@pytest.mark.parametrize("size", range(9))
def test_files_of_hardly_any_bytes(size: int, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(ManifestError):
        read_header(path)


def test_the_length_field_is_not_believed(tmp_path: Path) -> None:
    """Neither as a size to read nor as a size to allocate, even where a sparse file has so many bytes."""
    path = tmp_path / "long.safetensors"
    for length, size, says in (
        (100, 16, "longer than the file"),
        ((1 << 64) - 1, 16, "over the limit"),
        ((1 << 63) - 8, 16, "over the limit"),
        (MAX_HEADER_BYTES + 1, 1 << 40, "over the limit"),
        (MAX_HEADER_BYTES + 1, 16, "over the limit"),
        (9, 16, "longer than the file"),
    ):
        path.write_bytes(struct.pack("<Q", length))
        os.truncate(path, size)
        with pytest.raises(ManifestError, match=says):
            read_header(path)


def test_the_bound_is_the_librarys() -> None:
    for length, stock_says, says in (
        (MAX_HEADER_BYTES, "invalid header length", "longer than the file"),
        (MAX_HEADER_BYTES + 1, "header too large", "over the limit"),
    ):
        raw = struct.pack("<Q", length) + b"{}"
        with pytest.raises(safetensors.SafetensorError, match=stock_says):
            safetensors.deserialize(raw)
        with pytest.raises(ManifestError, match=says):
            parse(raw)


def test_padding_may_be_any_json_blank() -> None:
    assert parse(pack(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}} \n\t\r ', 1)).tensors[0].name == "a"
    with pytest.raises(ManifestError):
        parse(pack(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0', 1))


def test_an_empty_file_of_tensors_and_extremes_are_read() -> None:
    assert parse(pack({})).tensors == ()
    deep = entry("U8", [1] * 64, [0, 1])
    assert parse(pack(deep, 1)).tensors[0].shape == (1,) * 64
    assert parse(pack({"n" * 1024: entry()["a"]}, 4)).tensors[0].end == 4


def test_zero_sized_tensors_share_an_offset() -> None:
    raw = pack(entry("U8", [0], [0, 0]) | {"b": entry()["a"], "c": entry("U8", [0], [4, 4])["a"]}, 4)
    assert stock_accepts(raw)
    assert [tensor.name for tensor in parse(raw).tensors] == ["a", "b", "c"]


def test_what_is_no_regular_file(tmp_path: Path, deadline: None) -> None:
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "link.safetensors").symlink_to("fifo.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "nowhere.safetensors").symlink_to("absent.safetensors")
    told = dict.fromkeys(("fifo", "link", "folder"), "not a regular file")
    for name, says in (told | dict.fromkeys(("absent", "nowhere"), "no such file")).items():
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(SourceNotFoundError) as caught:
            read_header(path)
        assert str(caught.value) == f"{path}: {says}"
