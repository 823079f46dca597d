"""Calls made on a few threads, so that who asks for them need not wait until they are made."""

import queue
import threading
from collections import deque
from collections.abc import Callable

from reshard.workers import start


class CallQueue:
    """Threads that make calls, from the first one on. After a failure no more are taken."""

    def __init__(self, threads: int) -> None:
        """Begin with nothing to do.

        Args:
            threads: Calls that are made at the same time.
        """
        self._wanted = threads
        self._threads: list[threading.Thread] = []
        self._calls: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._added = 0
        self._unmade: set[int] = set()
        # What waits, and for how many of the first calls.
        self._behind: deque[tuple[int, Callable[[], None]]] = deque()
        self._failure: BaseException | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Have a call made as soon as a thread is free. It is made even when another one fails meanwhile.

        Raises:
            BaseException: What a call before raised; then this one is not made.
        """
        if self._failure is not None:
            raise self._failure
        while len(self._threads) < self._wanted:
            thread = threading.Thread(target=self._run, daemon=True)
            start(thread)
            self._threads.append(thread)
        with self._lock:
            number = self._added
            self._added += 1
            self._unmade.add(number)
        self._calls.put((number, call))

    def add_behind(self, call: Callable[[], None]) -> None:
        """Have a call made when all that were added before are made, on some thread; never, if one of them fails."""
        with self._lock:
            self._behind.append((self._added, call))
        self._make_behind()

    def finish(self) -> None:
        """Wait until all calls are made.

        Raises:
            BaseException: What the first one of them to fail raised.
        """
        self.close()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the threads behind the calls that they were given. Harmless when they have ended, or never began."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            number, call = item
            self._guard(call)
            with self._lock:
                self._unmade.remove(number)
            self._make_behind()

    def _make_behind(self) -> None:
        while True:
            with self._lock:
                if not self._behind or self._behind[0][0] > min(self._unmade, default=self._added):
                    return
                _, call = self._behind.popleft()
            if self._failure is None:
                self._guard(call)

    def _guard(self, call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
