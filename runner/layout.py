"""Where a group of tensors goes in memory: which parts of which files it takes, and where each tensor then begins.

An expert of a resharded checkpoint is one part of one file; in original shards it may be several parts of two. Both
are the same here. Nothing is read: this is arithmetic on locations.
"""

import mmap
from collections.abc import Iterable
from dataclasses import dataclass, replace

from manifests.checkpoint import Location
from manifests.schema import PLAIN

PAGE_BYTES = max(4096, mmap.PAGESIZE)
"""What direct reading counts in: offsets, lengths and addresses are multiples of it."""


HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contiguous part of a file.

    Attributes:
        file: The file's path in the checkpoint.
        offset: First byte of the file that is laid out, a multiple of the layout's alignment.
        begin: First byte that is needed, from ``offset`` on.
        end: Behind the last byte that is needed.
        position: Where the byte at ``offset`` lies in memory, a multiple of the layout's alignment.
    """

    file: str
    offset: int
    begin: int
    end: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One tensor in memory: its first byte, its dtype (a safetensors tag), its stored shape, what its bytes encode."""

    position: int
    dtype: str
    shape: tuple[int, ...]
    encoding: str = PLAIN


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A group of tensors in memory.

    Attributes:
        size: Bytes of memory, whole pages.
        runs: What is read, in the order of files and offsets.
        places: Each tensor by name.
    """

    size: int
    runs: tuple[Run, ...]
    places: dict[str, Place]

    @property
    def needed_bytes(self) -> int:
        """Bytes that are read."""
        return sum(run.end - run.begin for run in self.runs)


def lay_out(locations: Iterable[Location], *, alignment: int = PAGE_BYTES) -> Layout:
    """Lay out tensors one behind the other; neighbours in a file stay neighbours in memory.

    Args:
        locations: The tensors; those without bytes take no place.
        alignment: A multiple of the page. A byte's place in memory and in its file are equal modulo this, which
            direct reading wants for a page and huge pages of a mapping for their own size.
    """
    runs: list[Run] = []
    places: dict[str, Place] = {}
    end = 0
    for location in sorted(locations, key=lambda location: (location.file, location.offset)):
        if not location.size:
            continue
        stop = location.offset + location.size
        last = runs[-1] if runs else None
        # Neighbours are one run, and so are parts that would share a page, so that no page is there twice.
        if last is not None and last.file == location.file and location.offset <= _up(last.end, alignment):
            run = replace(last, end=max(last.end, stop))
            runs[-1] = run
        else:
            offset = location.offset // alignment * alignment
            position = _up(end, alignment)
            run = Run(
                file=location.file,
                offset=offset,
                begin=location.offset,
                end=stop,
                position=position,
            )
            runs.append(run)
        position = run.position + location.offset - run.offset
        places[location.name] = Place(
            position=position, dtype=location.dtype, shape=location.shape, encoding=location.encoding
        )
        end = run.position + _up(run.end - run.offset, PAGE_BYTES)
    return Layout(size=end, runs=tuple(runs), places=places)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
