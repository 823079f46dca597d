"""Ranges of one remote file over several connections, given out in order.

    ranges -> segments -> connections (each a thread) -> window of buffers -> reader

One connection seldom fills a link: its rate is bounded by the distance and by what the server gives to one. So a range
is cut into segments that are fetched side by side, also those of ranges that come later; what arrives early waits in
the window, so memory is the window, whatever the size of the file.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from manifests.http import RemoteFile
from reshard.blocks import BLOCK_BYTES, copy_bytes, new_block
from reshard.workers import SIGNAL_SECONDS, StopFlag, start

SEGMENT_BYTES = BLOCK_BYTES
"""What one connection is asked for at once. An interruption loses the window, of segments that nobody has seen yet."""

AHEAD = 2
"""Segments in the window for each connection: while one is fetched, another may wait for its turn."""


@dataclass(slots=True, eq=False)
class _Segment:
    """A part of a range, and how far it is."""

    begin: int
    end: int
    buffer: memoryview
    arrived: threading.Event = field(default_factory=threading.Event)
    failure: BaseException | None = None


class FetchingReader:
    """A remote file while the ranges that were announced are read, front to back; see `reshard.openable`.

    Args:
        file: The file.
        ranges: What will be read, in order.
        connections: How many at the same time.
        stop: Asked while nothing arrives.

    Raises:
        ResourceError: The system allows no more threads.
    """

    def __init__(
        self, file: RemoteFile, ranges: Iterable[tuple[int, int]], *, connections: int, stop: StopFlag
    ) -> None:
        self._file = file
        self._coming = _segments(ranges)
        self._stop = stop
        self._connections = connections
        self._room = AHEAD * connections
        self._spare: list[memoryview] = []
        self._window: deque[_Segment] = deque()
        self._wanted: queue.SimpleQueue[_Segment | None] = queue.SimpleQueue()
        self._threads = 0
        self._is_closed = False

    def read(self, buffer: memoryview, begin: int, end: int) -> tuple[memoryview, bool]:
        """Give the next bytes of the range that is due, and False: they are never a hole.

        Raises:
            See `manifests.http.RemoteFile.read`.
            StoppedError: All work is to stop.
        """
        self._ask()
        segment = self._window[0]
        while not segment.arrived.wait(SIGNAL_SECONDS):
            self._stop.check()
        if segment.failure is not None:
            raise segment.failure
        assert segment.begin <= begin < segment.end, "ranges are read as they were announced"
        at = begin - segment.begin
        count = min(len(buffer), end - begin, segment.end - begin)
        copy_bytes(segment.buffer[at : at + count], buffer[:count])
        if begin + count == segment.end:
            self._window.popleft()
            self._spare.append(segment.buffer)
            self._ask()
        return buffer[:count], False

    def close(self) -> None:
        """End the connections; those that wait for a server end by themselves when it says something."""
        self._is_closed = True
        for _ in range(self._threads):
            self._wanted.put(None)

    def _ask(self) -> None:
        """Have segments fetched while there is room for them."""
        while len(self._window) < self._room and (coming := next(self._coming, None)) is not None:
            segment = _Segment(*coming, self._spare.pop() if self._spare else new_block())
            self._window.append(segment)
            self._wanted.put(segment)
            if self._threads < self._connections:
                # Not one that could be waited for: a server may be silent for a minute when the program is to end.
                start(threading.Thread(target=self._fetch, daemon=True))
                self._threads += 1

    def _fetch(self) -> None:
        while (segment := self._wanted.get()) is not None:
            if self._is_closed:
                continue
            try:
                self._fill(segment)
            except BaseException as error:
                segment.failure = error
            segment.arrived.set()

    def _fill(self, segment: _Segment) -> None:
        view = segment.buffer[: segment.end - segment.begin]
        with closing(self._file.stream(segment.begin, segment.end)) as stream:
            while view and not self._is_closed:
                view = view[stream.readinto(view) :]


def _segments(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for begin, end in ranges:
        for at in range(begin, end, SEGMENT_BYTES):
            yield at, min(at + SEGMENT_BYTES, end)
