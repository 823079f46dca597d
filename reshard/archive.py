"""zstd for what is kept but not mapped: the saved headers and index of the source.

Unpacking is bounded by the size that the manifest promises, so a crafted frame cannot fill memory.
"""

import zstandard

from manifests.errors import IntegrityError

LEVEL = 19
"""Headers are a few megabytes in all and shrink twentyfold; time does not matter here."""


def pack(data: bytes) -> bytes:
    """Compress to one frame with its size and a checksum."""
    return zstandard.ZstdCompressor(level=LEVEL, write_checksum=True).compress(data)


def unpack(data: bytes, *, size: int, what: str) -> bytes:
    """Decompress one frame of a known size.

    Raises:
        IntegrityError: The frame is damaged, or of another size.
    """
    try:
        if zstandard.frame_content_size(data) != size:
            raise IntegrityError(f"{what}: does not unpack to the {size} bytes that the manifest says")
        return zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: damaged zstd frame: {error}") from error
