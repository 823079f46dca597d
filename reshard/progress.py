"""How long work shows itself: a bar on a terminal, events for a program that reads along, silence elsewhere.

`verify` and `restore --check` count bytes read; `run` and `restore` count bytes written. What an earlier run had done
is where the count starts, and is no part of the rate. This file must not know where events go.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from manifests.console import printable

EVENT_SECONDS = 1.0
"""There is at most one `progress` event in this time."""

RATE_EVENTS = 30
"""The rate that events give is that of as many of these times: long enough for the pauses of a disk."""

EventWriter = Callable[[Mapping[str, Any]], None]
"""Takes one event, from any thread. It must not raise: the work goes on when nobody reads along any more."""


class Progress:
    """A byte counter that several threads may advance. Use as a context manager."""

    def __init__(self, total_bytes: int, *, label: str, quiet: bool, events: EventWriter | None = None) -> None:
        """Begin at zero.

        Args:
            total_bytes: What all of the work comes to.
            label: Stands before the bar.
            quiet: Whether there is no bar, even on a terminal.
            events: Takes the events; None when nobody does.
        """
        # disable=None: tqdm draws only where stderr is a terminal.
        self._bar = tqdm(
            total=total_bytes,
            desc=label,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=True if quiet else None,
        )
        self._lock = threading.Lock()
        self._total = total_bytes
        self._skipped = 0
        self._at: str | None = None
        self._named = time.monotonic()
        self._events = events
        self._samples = deque([(time.monotonic(), 0)], maxlen=RATE_EVENTS + 1)
        self.bytes = 0

    @property
    def done_bytes(self) -> int:
        """How much of the total is done; bytes that were read again do not count twice."""
        return min(self._total, self._skipped + self.bytes)

    def advance(self, count: int) -> None:
        """Count bytes that are done."""
        with self._lock:
            self.bytes += count
            self._bar.update(self.done_bytes - self._bar.n)
            if self._events is not None and time.monotonic() - self._samples[-1][0] >= EVENT_SECONDS:
                self._tell(self._events)

    def skip(self, count: int) -> None:
        """Begin at what an earlier run has done, and the clock of the rate with it.

        What was counted until now was reading, to find out what is done.
        """
        with self._lock:
            self._skipped, self.bytes = count, 0
            self._samples.clear()
            self._samples.append((time.monotonic(), 0))
            if not self._bar.disable:
                # `initial` is what tqdm leaves out of its rate; it has no call for this.
                self._bar.initial = self._bar.last_print_n = self._bar.n = self.done_bytes
                self._bar.unpause()

    def at(self, what: str) -> None:
        """Name what is worked on, such as a layer: shown beside the bar and in the events."""
        with self._lock:
            self._at = printable(what)
            # Drawn with the next bytes, for the bar has its own pace; and now and then where none pass.
            now = time.monotonic()
            is_due = now - self._named >= EVENT_SECONDS
            self._named = now if is_due else self._named
            self._bar.set_postfix_str(self._at, refresh=is_due)

    def event(self, kind: str, /, **values: object) -> None:
        """Tell a program that reads along; nothing happens when there is none."""
        with self._lock:
            if self._events is not None:
                self._events({"event": kind, **values})

    def _tell(self, events: EventWriter) -> None:
        """The event of the moment, with the rate of the last ones."""
        now = time.monotonic()
        self._samples.append((now, self.bytes))
        began, before = self._samples[0]
        rate = (self.bytes - before) / (now - began)
        events(
            {
                "event": "progress",
                "bytes": self.done_bytes,
                "total_bytes": self._total,
                "bytes_per_s": rate,
                "seconds_left": (self._total - self.done_bytes) / rate if rate else None,
                "layer": self._at,
            }
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
