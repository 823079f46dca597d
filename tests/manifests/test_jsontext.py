"""Strict JSON: documents on which readers disagree are refused, with one error class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError, SourceNotFoundError
from manifests.jsontext import parse_json, read_json

REFUSED = {
    "nothing": b"",
    "two documents": b"{}{}",
    "trailing comma": b'{"a":1,}',
    "single quotes": b"{'a':1}",
    "comment": b"{} // really",
    "duplicate keys": b'{"a":1,"a":1}',
    "duplicate keys deep inside": b'{"a":[{"b":{"c":1,"d":2,"c":3}}]}',
    "duplicate keys of which one is escaped": b'{"a":1,"\\u0061":2}',
    "NaN": b'{"a":NaN}',
    "Infinity": b"[Infinity]",
    "minus Infinity": b"[-Infinity]",
    "a number beyond floats, which Python reads as infinity": b"[1e999]",
    "a negative one": b'{"a":[-1e400]}',
    "a number of 5000 digits": b"[" + b"9" * 5000 + b"]",
    "leading zero": b"[01]",
    "plus": b"[+1]",
    "nesting": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "raw control character": b'["\x01"]',
    "raw newline in a string": b'["a\nb"]',
    "NUL behind it": b"{}\x00",
    "byte order mark": b"\xef\xbb\xbf{}",
    "Latin-1": b'["\xe9"]',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "overlong UTF-8": b'["\xc0\xaf"]',
    "surrogate in UTF-8": b'["\xed\xa0\x80"]',
    "half a surrogate pair": b'["\\ud800"]',
    "halves in the wrong order": b'["\\udc00\\ud800"]',
    "half a pair as a key": b'{"x":{"\\ud83d":1}}',
}


@pytest.mark.parametrize("raw", REFUSED.values(), ids=REFUSED.keys())
def test_refused(raw: bytes) -> None:
    with pytest.raises(ManifestError, match=r"^the thing: ") as caught:
        parse_json(raw, what="the thing")
    assert len(str(caught.value)) < 400


def test_what_is_allowed() -> None:
    raw = b' {"a" : [1, -2, 1.5e-6, true, false, null, "\\ud83d\\ude00\\u0000", "\xf0\x9f\x98\x80"]}\n '
    assert parse_json(raw, what="") == {"a": [1, -2, 1.5e-6, True, False, None, "\U0001f600\0", "\U0001f600"]}


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(_JSON, st.booleans())
def test_every_strict_document_is_read_as_it_was(document: object, ascii_only: bool) -> None:
    raw = json.dumps(document, ensure_ascii=ascii_only, allow_nan=False).encode("utf-8")
    assert parse_json(raw, what="") == document


@given(st.binary(max_size=40))
def test_noise_gives_a_document_or_the_one_error(raw: bytes) -> None:
    try:
        parse_json(raw, what="noise")
    except ManifestError:
        return


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'"' + b"x" * 98 + b'"')
    assert read_json(path, max_bytes=100) == "x" * 98
    with pytest.raises(ManifestError, match="larger than 99 bytes"):
        read_json(path, max_bytes=99)
    with path.open("ab") as file:
        file.truncate(1 << 40)  # sparse; a reader that believes the size would end here
    with pytest.raises(ManifestError, match="larger than 100 bytes"):
        read_json(path, max_bytes=100)


def test_what_is_no_file_is_not_found(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "a" / "b"):
        with pytest.raises(SourceNotFoundError):
            read_json(path, max_bytes=100)
