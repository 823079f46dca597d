"""The byte mover: a run of byte ranges is read once, hashed and written on the way, each on a thread of its own.

    reader -> ring of blocks -> { sha256 of the whole stream, digests of the pieces, writer } -> ring

A block goes back into the ring when all have seen it, so memory is the ring, whatever the size of the stream. Reading,
writing and hashing release the interpreter's lock: two hashes of one byte take two cores, and the disk never waits for
a hash while there is a free block. What is a hole in the source stays one in the output, but is hashed like any zeros.
Knows byte ranges and files to write; it must not know shards, plans or manifests.
"""

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from manifests.digest import TensorHasher
from reshard.blocks import WRITES_AT_ONCE, PageWriter, Writer, new_block
from reshard.callqueue import CallQueue
from reshard.openable import Openable
from reshard.progress import Progress
from reshard.workers import StopFlag, start

if TYPE_CHECKING:
    from hashlib import _Hash

RING_BLOCKS = 16
"""Blocks of all streams together: enough that reader and writer never wait for each other's pauses."""

_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a piece goes: the writer of its file, opened when its first byte comes, and the offset there.

    `written` is called when all of the piece has been handed to the system.
    """

    open: Callable[[], Writer]
    offset: int
    written: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One byte range of a stream.

    Attributes:
        file: The file to read.
        offset, size: The range in it.
        target: Where to write it; None when it is read for its hash alone.
    """

    file: Openable
    offset: int
    size: int
    target: Target | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """Bytes of a stream that are not read from anywhere, but are here already; the target as for a `Piece`."""

    content: bytes
    target: Target | None = None

    @property
    def size(self) -> int:
        """Bytes of it."""
        return len(self.content)


class Ring:
    """The blocks that are under way, shared by all streams of a run. Each is page-aligned memory."""

    def __init__(self, blocks: int = RING_BLOCKS) -> None:
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(blocks):
            self._free.put(new_block())

    def take(self) -> memoryview:
        """A free block; waits for one."""
        return self._free.get()

    def give(self, block: memoryview) -> None:
        """Take a block back."""
        self._free.put(block)


@dataclass(slots=True)
class _Block:
    """What was read at once: the bytes, and which piece each part of them belongs to."""

    buffer: memoryview | None
    data: memoryview
    is_hole: bool
    parts: list[tuple[int, memoryview, int]]  # number of the piece, bytes, offset in the piece
    users: int


@dataclass(slots=True)
class _Line:
    """The threads behind one reader, and the first failure among them."""

    ring: Ring
    progress: Progress
    queues: list["queue.SimpleQueue[_Block | None]"] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: BaseException | None = None

    def add(self, work: Callable[[_Block], None], end: Callable[[], None] | None = None) -> None:
        """Start a thread that sees every block in order, and at the end of the stream calls `end`."""
        line: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()

        def run() -> None:
            while (block := line.get()) is not None:
                # After a failure the blocks only go back, so that the reader is never left waiting for one.
                if self.failure is None:
                    self._guard(partial(work, block))
                self._release(block)
            if end is not None and self.failure is None:
                self._guard(end)

        self.queues.append(line)
        self.threads.append(threading.Thread(target=run, daemon=True))

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            with self.lock:
                self.failure = self.failure or error

    def send(self, block: _Block | None) -> None:
        """Give every thread a block, or the end of the stream."""
        for line in self.queues:
            line.put(block)

    def _release(self, block: _Block) -> None:
        with self.lock:
            block.users -= 1
            if block.users:
                return
        if block.buffer is not None:
            self.ring.give(block.buffer)
        # Guarded like all else: a thread that ended here would leave the reader waiting for its blocks.
        self._guard(partial(self.progress.advance, len(block.data)))


def pump(
    pieces: Sequence[Piece | Given],
    *,
    whole: "_Hash | None",
    digests: bool,
    ring: Ring,
    progress: Progress,
    stop: StopFlag,
) -> list[tuple[str, ...]]:
    """Read the pieces in order, and hash and write them as they pass.

    Args:
        pieces: The stream. Those that follow each other in one file are read in one go.
        whole: Takes all bytes of the stream.
        digests: Whether the pieces' own digests are wanted.
        ring: Blocks to read into.
        progress: Counts bytes that everyone is done with.
        stop: Asked before each block.

    Returns:
        The chunk digests of each piece as in `manifests.digest`; empty tuples when they are not wanted.

    Raises:
        IntegrityError: A file ends before a range does.
        ResourceError: The disk is full.
        ToolkitError: The disk reports another error.
    """
    found: list[tuple[str, ...]] = [()] * len(pieces)
    line = _Line(ring, progress)
    if whole is not None:
        line.add(lambda block: whole.update(block.data))
    if digests:
        line.add(_digester(pieces, found))
    calls = CallQueue(WRITES_AT_ONCE)
    if any(piece.target is not None for piece in pieces):
        writing = _Writing(pieces, calls)
        line.add(writing.take, writing.finish)
    if not line.queues:
        return found
    try:
        for thread in line.threads:
            start(thread)
        with closing(_read(pieces, ring)) as blocks:
            for block in blocks:
                block.users = len(line.queues)
                line.send(block)
                if line.failure is not None:
                    break
                stop.check()
    except BaseException as error:
        with line.lock:
            line.failure = line.failure or error
    finally:
        line.send(None)
        for thread in line.threads:
            if thread.ident is not None:  # it was started
                thread.join()
        calls.close()
    if line.failure is not None:
        raise line.failure
    return found


def _read(pieces: Sequence[Piece | Given], ring: Ring) -> Generator[_Block, None, None]:
    """The stream block by block, cut into the parts of its pieces."""
    file: Openable | None = None
    with ExitStack() as opened:
        first = 0
        while first < len(pieces):
            piece = pieces[first]
            if isinstance(piece, Given):
                content = memoryview(piece.content)
                yield _Block(None, content, False, [(first, content, 0)], 0)
                first += 1
                continue
            if piece.file is not file and piece.file != file:
                opened.close()
                file = piece.file
                reader = opened.enter_context(closing(file.open()))
            # Neighbours are read in one go.
            position = end = piece.offset
            last = first
            for other in islice(pieces, first, None):
                if isinstance(other, Given) or (other.file is not file and other.file != file) or other.offset != end:
                    break
                end += other.size
                last += 1
            while position < end:
                buffer = ring.take()
                try:
                    data, is_hole = reader.read(buffer, position, end)
                except BaseException:
                    ring.give(buffer)
                    raise
                parts, first = _cut(pieces, first, last, position, data)
                yield _Block(buffer, data, is_hole, parts, 0)
                position += len(data)
            if first < last:  # empty tensors alone
                yield _Block(None, _NOTHING, False, [(number, _NOTHING, 0) for number in range(first, last)], 0)
            first = last


def _cut(
    pieces: Sequence[Piece | Given], number: int, last: int, position: int, data: memoryview
) -> tuple[list[tuple[int, memoryview, int]], int]:
    """The parts of the pieces from `number` on that lie in data, and the first piece that goes on behind it."""
    stop = position + len(data)
    parts = []
    while number < last:
        piece = pieces[number]
        assert isinstance(piece, Piece)
        begin, end = max(piece.offset, position), min(piece.offset + piece.size, stop)
        # An empty tensor at the end of the data belongs to it: nothing may come behind.
        if begin >= stop and piece.size:
            break
        parts.append((number, data[begin - position : end - position], begin - piece.offset))
        if end < piece.offset + piece.size:
            break
        number += 1
    return parts, number


def _digester(pieces: Sequence[Piece | Given], found: list[tuple[str, ...]]) -> Callable[[_Block], None]:
    hasher = TensorHasher()

    def take(block: _Block) -> None:
        nonlocal hasher
        for number, data, at in block.parts:
            hasher.update(data)
            if at + len(data) == pieces[number].size:
                found[number] = hasher.chunks()
                hasher = TensorHasher()

    return take


class _Writing:
    """The writing thread's work: pieces to their files, in large runs; says when a piece is written."""

    def __init__(self, pieces: Sequence[Piece | Given], calls: CallQueue) -> None:
        self._pieces = pieces
        self._calls = calls
        self._pages = PageWriter(later=calls.add)
        self._at: tuple[Writer, int] | None = None
        self._held: list[Callable[[], None]] = []

    def take(self, block: _Block) -> None:
        """Write the parts of a block that have a target."""
        for number, data, at in block.parts:
            target = self._pieces[number].target
            if target is None:
                continue
            writer, offset = target.open(), target.offset + at
            if self._at != (writer, offset):
                self.flush()
            # A hole is not written into a new file, which was made with its full size; in one that an interrupted run
            # left, something else may lie there.
            if block.is_hole and writer.keeps_holes:
                self.flush()
            else:
                self._pages.put(writer, data, offset)
            self._at = writer, offset + len(data)
            if at + len(data) == self._pieces[number].size and target.written is not None:
                self._held.append(target.written)

    def flush(self) -> None:
        """Write what is held, and say so for the pieces that it completes."""
        self._pages.flush()
        held, self._held = self._held, []
        for written in held:
            self._calls.add_behind(written)

    def finish(self) -> None:
        """Write what is held, and wait until all is written."""
        self.flush()
        self._calls.finish()
