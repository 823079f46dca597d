"""The dtype tags of safetensors, their widths, and the bytes of a shape. No tensors, no torch.

Source: the ``Dtype`` enumeration of the safetensors library, version 0.8.
"""

from collections.abc import Sequence
from math import prod

from manifests.errors import ManifestError

BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element by tag."""


def nbytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes that a tensor of this dtype and shape takes on disk.

    Raises:
        ManifestError: The dtype is unknown, or the elements do not fill whole bytes.
    """
    bits = BITS.get(dtype)
    if bits is None:
        raise ManifestError(f"dtype {dtype!r} is not one that safetensors defines")
    total = bits * prod(shape)
    if total % 8:
        raise ManifestError(f"{dtype} elements of shape {list(shape)} do not fill whole bytes")
    return total // 8
