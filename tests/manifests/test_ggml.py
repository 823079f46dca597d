"""Block types, against the ggml project's own package."""

from __future__ import annotations

from gguf.constants import GGML_QUANT_SIZES

from manifests.dtypes import BITS
from manifests.ggml import BLOCK_TYPES


def test_every_type_of_the_package_is_known_with_its_number_name_and_sizes() -> None:
    ours = {number: (kind.name, kind.elements, kind.size) for number, kind in BLOCK_TYPES.items()}
    assert ours == {kind.value: (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}


def test_plain_types_are_dtypes_of_the_same_width() -> None:
    plain = {kind.name: kind for kind in BLOCK_TYPES.values() if kind.dtype is not None}
    assert plain.keys() == {"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"}
    for kind in plain.values():
        assert (kind.elements, kind.size * 8) == (1, BITS[kind.dtype or ""])
    assert not any(kind.elements == 1 for kind in BLOCK_TYPES.values() if kind.dtype is None)
