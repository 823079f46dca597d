"""Digests in any cut equal a slow twin that has all bytes at once."""

from __future__ import annotations

import hashlib
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests import digest
from manifests.digest import CHUNK_BYTES, TensorHasher, combine, file_digest, sha256_hex, tensor_digest


def slow_chunks(data: bytes, chunk: int) -> tuple[str, ...]:
    """FORMAT.md's definition, literally."""
    return tuple(hashlib.sha256(data[at : at + chunk]).hexdigest() for at in range(0, max(len(data), 1), chunk))


@given(st.binary(max_size=70), st.lists(st.integers(0, 70), max_size=8))
def test_any_cut_gives_the_same_chunks(data: bytes, cuts: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "CHUNK_BYTES", 16)
        hasher = TensorHasher()
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        for begin, end in pairwise(edges):
            hasher.update(memoryview(data)[begin:end])
        assert hasher.chunks() == slow_chunks(data, 16)


@pytest.mark.parametrize("size", [CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES])
def test_the_real_chunk_size_at_its_edges(size: int) -> None:
    data = bytes(size)
    hasher = TensorHasher()
    hasher.update(memoryview(data))
    assert CHUNK_BYTES == 16_777_216
    assert hasher.chunks() == slow_chunks(data, 16_777_216)
    assert len(hasher.chunks()) == (1 if size <= CHUNK_BYTES else 2)


def test_digests_of_digests() -> None:
    a, b = sha256_hex(b"a"), sha256_hex(b"b")
    both = hashlib.sha256(hashlib.sha256(b"a").digest() + hashlib.sha256(b"b").digest()).hexdigest()
    assert combine([a, b]) == tensor_digest([a, b]) == file_digest(a, [b]) == both
    assert tensor_digest([a]) == a
    assert file_digest(a, []) == hashlib.sha256(hashlib.sha256(b"a").digest()).hexdigest()


def test_an_empty_tensor_has_the_digest_of_nothing() -> None:
    assert TensorHasher().chunks() == (hashlib.sha256().hexdigest(),)
