"""How files on a server are cut into pieces: what is fetched, checked, kept and evicted as one.

A piece is a tensor, or 16 MiB of a large one: what the manifest has a digest of. Original shards have none, and are cut
alike. This is arithmetic on descriptions; nothing is read.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from manifests.digest import CHUNK_BYTES
from manifests.errors import ManifestError
from manifests.names import parse_name
from manifests.schema import FileEntry
from runner.layout import PAGE_BYTES

MAX_FILE_BYTES = 1 << 44
"""What ext4 can hold in one file; a server may say anything."""

REQUEST_BYTES = CHUNK_BYTES
"""Most bytes that are asked for by one request: a large tensor then comes over several connections at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A part of a file.

    Attributes:
        tensor: The tensor that it is of.
        begin, end: Its bytes in the file.
        digest: Their sha256; None where nobody knows it.
        is_dense: Whether every token needs it, as it is not of a routed expert.
    """

    tensor: str
    begin: int
    end: int
    digest: str | None
    is_dense: bool


def cut(file: FileEntry) -> tuple[Piece, ...]:
    """The pieces of a file in the order of their bytes.

    Raises:
        ManifestError: It is said to be larger than file systems have any: its pieces alone would fill the memory.
    """
    if file.size > MAX_FILE_BYTES:
        raise ManifestError(f"{file.path}: has {file.size} bytes, it is said; no file of a checkpoint is that large")
    return tuple(_cut(file))


def _cut(file: FileEntry) -> Iterator[Piece]:
    for tensor in file.tensors:
        digests: Sequence[str | None] = tensor.chunks or (tensor.digest,)
        is_dense = parse_name(tensor.name).expert is None
        for number, begin in enumerate(range(tensor.offset, tensor.offset + tensor.size, CHUNK_BYTES)):
            yield Piece(
                tensor=tensor.name,
                begin=begin,
                end=min(begin + CHUNK_BYTES, tensor.offset + tensor.size),
                digest=digests[number] if len(digests) > number else None,
                is_dense=is_dense,
            )


def touched(pieces: Sequence[Piece], begin: int, end: int) -> range:
    """The numbers of the pieces that have a byte of a range."""
    first = bisect_right(pieces, begin, key=lambda piece: piece.end)
    return range(first, max(first, bisect_left(pieces, end, key=lambda piece: piece.begin)))


def requests(pieces: Sequence[Piece], numbers: Iterable[int]) -> list[range]:
    """Pieces in groups that one request each asks for: neighbours without a gap, few enough bytes.

    Args:
        pieces: Of one file.
        numbers: Of those that are wanted, ascending.
    """
    found: list[range] = []
    for number in numbers:
        last = found[-1] if found else None
        if (
            last is not None
            and last.stop == number
            and pieces[number - 1].end == pieces[number].begin
            and pieces[number].end - pieces[last.start].begin <= REQUEST_BYTES
        ):
            found[-1] = range(last.start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found


def disk_bytes(piece: Piece) -> int:
    """What a piece takes of a disk at most, in whole pages that it may share with its neighbours."""
    return -(-piece.end // PAGE_BYTES) * PAGE_BYTES - piece.begin // PAGE_BYTES * PAGE_BYTES
