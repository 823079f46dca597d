"""zstd for what is kept but not mapped: the saved headers and index of the source.

Unpacking is bounded by the size that the manifest promises, and that by the largest header there can be, so a crafted
frame or manifest cannot fill memory.
"""

import zstandard

from manifests.errors import IntegrityError
from manifests.header import LENGTH_BYTES, MAX_HEADER_BYTES

LEVEL = 19
"""Headers are a few megabytes in all and shrink twentyfold; time does not matter here."""

MAX_UNPACKED_BYTES = LENGTH_BYTES + MAX_HEADER_BYTES


def pack(data: bytes) -> bytes:
    """Compress to one frame with its size and a checksum."""
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(data)


def unpack(data: bytes, *, size: int, what: str) -> bytes:
    """Decompress one frame of a known size.

    Raises:
        IntegrityError: The frame is damaged, or of another size.
    """
    if size > MAX_UNPACKED_BYTES:
        raise IntegrityError(f"{what}: {size} bytes are more than any saved header or index has; refused")
    try:
        if zstandard.frame_content_size(data) != size:
            raise IntegrityError(f"{what}: does not unpack to the {size} bytes that the manifest says")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: damaged zstd frame: {error}") from error
