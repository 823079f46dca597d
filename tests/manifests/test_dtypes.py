"""dtype tags and sizes, against the safetensors library itself."""

from __future__ import annotations

import json
import struct

import pytest
import safetensors

from manifests.dtypes import BITS, nbytes
from manifests.errors import ManifestError


def stock_accepts(dtype: str, size: int) -> bool:
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, size]}}).encode()
    try:
        safetensors.deserialize(struct.pack("<Q", len(header)) + header + bytes(size))
    except safetensors.SafetensorError:
        return False
    return True


@pytest.mark.parametrize("dtype", BITS)
def test_the_library_knows_each_tag_with_the_same_width(dtype: str) -> None:
    assert nbytes(dtype, [8]) == BITS[dtype]
    assert stock_accepts(dtype, nbytes(dtype, [8]))
    assert not stock_accepts(dtype, nbytes(dtype, [8]) + 8)


@pytest.mark.parametrize("dtype", ["", "f32", "F8", "F128", "FLOAT", "F32 ", "INT4"])
def test_an_unknown_tag_is_refused(dtype: str) -> None:
    assert not stock_accepts(dtype, 32)
    with pytest.raises(ManifestError, match="not one that safetensors defines"):
        nbytes(dtype, [8])


def test_shapes() -> None:
    assert nbytes("BF16", ()) == 2
    assert nbytes("BF16", (3, 0, 5)) == 0
    assert nbytes("F8_E4M3", (7168, 2048)) == 14_680_064
    assert nbytes("F6_E2M3", (4,)) == 3
    assert nbytes("F4", (2, 3)) == 3


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (3,)), ("F4", ()), ("F6_E3M2", (2, 3))])
def test_elements_that_end_inside_a_byte_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ManifestError, match="whole bytes"):
        nbytes(dtype, shape)
