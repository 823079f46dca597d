"""The digests of the format: sha256 of bytes, and how those of a tensor and of a file are built from them.

A tensor of at most 16 MiB has the sha256 of its bytes. A larger one is cut into chunks of 16 MiB, and its
digest is the sha256 of the concatenated raw chunk digests: damage is named to the range, chunks can be hashed
by several workers, and no byte is hashed twice for it. A file's digest is the sha256 of its header's raw digest
followed by those of its tensors in file order, so it costs no further pass either.
"""

import hashlib
from collections.abc import Iterable, Sequence

CHUNK_BYTES = 16 << 20


def sha256_hex(data: bytes | memoryview) -> str:
    """The sha256 of data in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def combine(digests: Iterable[str]) -> str:
    """The sha256 of the concatenation of raw digests given in hexadecimal."""
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def tensor_digest(chunks: Sequence[str]) -> str:
    """A tensor's digest from the digests of its chunks, of which there is at least one."""
    return chunks[0] if len(chunks) == 1 else combine(chunks)


def file_digest(header_sha256: str, tensor_digests: Iterable[str]) -> str:
    """A file's digest from its header's and its tensors', in file order."""
    return combine([header_sha256, *tensor_digests])


class TensorHasher:
    """Hashes one tensor's bytes as they stream by, in any cut."""

    __slots__ = ("_chunks", "_hash", "_room")

    def __init__(self) -> None:
        self._chunks: list[str] = []
        self._hash = hashlib.sha256()
        self._room = CHUNK_BYTES

    def update(self, data: memoryview) -> None:
        """Take the next bytes."""
        while len(data) >= self._room:
            self._hash.update(data[: self._room])
            data = data[self._room :]
            self._close()
        if len(data):
            self._hash.update(data)
            self._room -= len(data)

    def chunks(self) -> tuple[str, ...]:
        """The digests of all chunks; at least one, also for an empty tensor."""
        if self._room < CHUNK_BYTES or not self._chunks:
            self._close()
        return tuple(self._chunks)

    def _close(self) -> None:
        self._chunks.append(self._hash.hexdigest())
        self._hash = hashlib.sha256()
        self._room = CHUNK_BYTES
