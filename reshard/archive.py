"""zstd: for what is kept of the source but not mapped, and for experts in cold storage.

Saved headers and index are packed as a whole. Expert files stream through, a block at a time; one that is read in
another order than it was written is unpacked into memory. Unpacking is bounded by the size that the manifest promises,
and that by what such a thing can be, so a crafted frame or manifest cannot fill memory.
"""

import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import zstandard

from manifests.errors import IntegrityError, ResourceError
from manifests.header import LENGTH_BYTES, MAX_HEADER_BYTES
from reshard.blocks import BLOCK_BYTES, PageWriter, Reader, Writer, aligned_buffer

if TYPE_CHECKING:
    from hashlib import _Hash

LEVEL = 9
"""Of saved headers. Level 19 saves 340 kB in all of DeepSeek-V3's, and takes 9 s and 88 MB of memory more."""

MAX_UNPACKED_BYTES = LENGTH_BYTES + MAX_HEADER_BYTES

EXPERT_LEVEL = 1
"""Weights do not repeat themselves, their bytes are only unevenly frequent: level 1 comes within a point of the
entropy, and higher levels give the same size in more time."""

MAX_WINDOW_BYTES = 8 << 20
"""What a frame may make its reader remember: as much as every zstd program is asked to allow; ours need 512 KiB."""

MAX_EXPERT_BYTES = 1 << 30
"""The largest file that is unpacked into memory. Those of DeepSeek-V3 and Kimi-K2 are 44 MB, Mixtral's 8x22B 604 MB."""


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


def write_packed(blocks: Iterable[memoryview], writer: Writer, *, size: int) -> None:
    """Compress a file to one frame with its size and a checksum.

    The same bytes give the same frame, however they are cut into blocks, as long as the zstd library is the same.

    Args:
        blocks: All of it, in order.
        writer: Takes the frame; what is left to do is to finish it.
        size: Bytes of all blocks together.

    Raises:
        ResourceError, ToolkitError: See `Writer.write`.
    """
    frame = zstandard.ZstdCompressor(level=EXPERT_LEVEL, write_checksum=True).compressobj(size=size)
    pages = PageWriter()
    offset = 0
    for block in blocks:
        part = frame.compress(block)
        pages.put(writer, memoryview(part), offset)
        offset += len(part)
    pages.put(writer, memoryview(frame.flush()), offset)
    pages.flush()


def unpack_blocks(path: Path, *, size: int, stored: "_Hash | None" = None) -> Iterator[memoryview]:
    """Yield what a packed file unpacks to, at most a block at a time. A block is valid until the next is asked for.

    Args:
        path: The file.
        size: Bytes that it must unpack to.
        stored: Takes all bytes of the file itself.

    Raises:
        IntegrityError: Its frame is damaged, or unpacks to another size.
        ToolkitError: The disk reports an error.
    """
    with closing(Reader(path)) as reader:
        yield from unpack_stored(reader.blocks(0, path.stat().st_size), size=size, what=str(path), stored=stored)


def unpack_stored(
    blocks: Iterator[memoryview], *, size: int, what: str, stored: "_Hash | None" = None
) -> Iterator[memoryview]:
    """As `unpack_blocks`, with the bytes of a packed file from wherever it is.

    Raises:
        IntegrityError: See `unpack_blocks`.
        Whatever the blocks raise.
    """
    buffer = aligned_buffer(min(size, BLOCK_BYTES) or 1)
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    stream = decompressor.stream_reader(cast(IO[bytes], _Stored(blocks, stored)), read_size=BLOCK_BYTES)
    try:
        while size:
            count = stream.readinto(buffer[:size])
            if not count:
                raise IntegrityError(f"{what}: its zstd frame ends {size} bytes before the size in the manifest")
            yield buffer[:count]
            size -= count
        # The checksum behind the last byte may be looked at only when one more is asked for; and nothing but the
        # frame may be there.
        if stream.readinto(bytearray(1)):
            raise IntegrityError(f"{what}: unpacks to more bytes than the manifest says")
    except zstandard.ZstdError as error:
        raise IntegrityError(f"{what}: damaged zstd frame: {error}") from error


class UnpackingReader:
    """A packed file read as if it were not: the same `read` as that of `reshard.blocks.Reader`.

    A shard wants an expert's tensors in another order than the file has them, so all of it is unpacked at the first
    read and kept until the file is closed.
    """

    def __init__(self, what: object, size: int, unpacked: Callable[[], Iterator[memoryview]]) -> None:
        """Open a file that unpacks to so many bytes.

        Args:
            what: Its name for messages.
            size: The bytes.
            unpacked: Gives them from the start.

        Raises:
            ResourceError: They are more than are ever unpacked into memory.
        """
        if size > MAX_EXPERT_BYTES:
            raise ResourceError(
                f"{what}: unpacks to {size} bytes, and at most {MAX_EXPERT_BYTES} are unpacked into memory; "
                "run `reshard unpack` on its checkpoint first"
            )
        self._size = size
        self._unpacked = unpacked
        self._content: memoryview | None = None

    def close(self) -> None:
        """Give the memory back."""
        self._content = None

    def read(self, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        """Copy the next bytes of a range of the unpacked file into a buffer, as many as it takes.

        Returns:
            The bytes from begin on, at least one, and False: they are never a hole.

        Raises:
            IntegrityError, ToolkitError: See `unpack_blocks`.
        """
        if self._content is None:
            self._content = self._unpack()
        count = min(len(buffer), end - begin)
        buffer[:count] = self._content[begin : begin + count]
        return buffer[:count], False

    def _unpack(self) -> memoryview:
        content = aligned_buffer(self._size)
        position = 0
        for block in self._unpacked():
            content[position : position + len(block)] = block
            position += len(block)
        return content


class _Stored(io.RawIOBase):
    """The blocks of a packed file as the file object that zstandard reads from; whatever it reads is hashed."""

    def __init__(self, blocks: Iterator[memoryview], hasher: "_Hash | None") -> None:
        super().__init__()
        self._blocks = blocks
        self._hasher = hasher

    def read(self, size: int = -1) -> memoryview:
        """The next block, whatever size is asked for; empty at the end."""
        block = next(self._blocks, memoryview(b""))
        if self._hasher is not None:
            self._hasher.update(block)
        return block
