"""Threads that bring weights in while the products run: the most urgent first, each piece of work once.

The work is system calls, during which Python's lock is not held. This file must not know files or experts.
"""

import heapq
import itertools
import os
import threading
import weakref
from collections.abc import Callable

from manifests.errors import ResourceError, ToolkitError

THREADS = 2
"""For a disk: one reads at its speed; the second asks for the next part while the first one's is arriving."""


class Load:
    """A piece of work that was handed in.

    Attributes:
        is_done: Whether it has ended, well or not.
    """

    __slots__ = ("_error", "_queue", "_work", "is_done")

    def __init__(self, queue: "_Queue", work: Callable[[], None]) -> None:
        self.is_done = False
        self._queue = queue
        self._work: Callable[[], None] | None = work
        self._error: BaseException | None = None

    def wait(self) -> None:
        """Return when it has ended.

        Raises:
            Whatever the work raised.
        """
        if not self.is_done:
            self._queue.check_process()
            before = self._queue.meter()
            try:
                with self._queue.changed:
                    while not self.is_done:
                        self._queue.changed.wait()
            finally:
                self._queue.metered += self._queue.meter() - before
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        """Do the work; in one of the threads."""
        work, self._work = self._work, None
        try:
            if work is not None:
                work()
        except BaseException as error:
            self._error = error
        with self._queue.changed:
            self.is_done = True
            self._queue.changed.notify_all()


class _Queue:
    def __init__(self, meter: Callable[[], float]) -> None:
        self.meter = meter
        self.metered = 0.0
        self.changed = threading.Condition()
        self.waiting: list[tuple[int, int, Load]] = []
        self.numbers = itertools.count()
        self.is_ending = False
        self.process = os.getpid()

    def check_process(self) -> None:
        """Threads do not live on in a forked child, so nothing would ever come there."""
        if self.process != os.getpid():
            raise ToolkitError("this model was opened in another process; open it again after a fork")


class Background:
    """A few threads that begin with the first piece of work and end with this object.

    Args:
        threads: How many; all but one of them may be refused by the system.
        meter: What is read before and behind each time that somebody waits.
    """

    def __init__(self, threads: int = THREADS, meter: Callable[[], float] = float) -> None:
        self._queue = _Queue(meter)
        self._count = threads
        self._threads: list[threading.Thread] = []
        weakref.finalize(self, _end, self._queue)

    @property
    def metered(self) -> float:
        """By how much the meter went on while somebody waited."""
        return self._queue.metered

    def submit(self, work: Callable[[], None], *, urgency: int = 0) -> Load:
        """Hand in work.

        Args:
            work: Called once, in one of the threads.
            urgency: Higher ones go first; equal ones in the order of their coming.

        Raises:
            ResourceError: The system gives no thread.
            ToolkitError: This is a forked child.
        """
        self._queue.check_process()
        while len(self._threads) < self._count:
            # Daemons: a process that ends does not wait for the disk.
            thread = threading.Thread(target=_serve, args=(self._queue,), name="weights", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                if self._threads:
                    break  # one is enough to go on
                raise ResourceError("the system gives no thread to read weights; allow more (ulimit -u)") from error
            self._threads.append(thread)
        load = Load(self._queue, work)
        with self._queue.changed:
            heapq.heappush(self._queue.waiting, (-urgency, next(self._queue.numbers), load))
            self._queue.changed.notify_all()
        return load


def _serve(queue: _Queue) -> None:
    while True:
        with queue.changed:
            while not queue.waiting:
                if queue.is_ending:
                    return
                queue.changed.wait()
            load = heapq.heappop(queue.waiting)[2]
        load.run()
        del load  # it holds memory that is nobody's once the model is gone


def _end(queue: _Queue) -> None:
    with queue.changed:
        queue.is_ending = True
        queue.waiting.clear()
        queue.changed.notify_all()
