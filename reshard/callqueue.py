"""Calls made in order on a thread of their own, so that who asks for them need not wait."""

import queue
import threading
from collections.abc import Callable


class CallQueue:
    """A thread that makes one call after the other, from the first `add` on. After a failure it makes none."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Have a call made behind those before.

        Raises:
            BaseException: What one of them raised; then this one is not made.
        """
        if self._failure is not None:
            raise self._failure
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        self._calls.put(call)

    def finish(self) -> None:
        """Wait until all calls are made.

        Raises:
            BaseException: What one of them raised.
        """
        self.close()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End the thread behind the calls that it was given. Harmless when it has ended, or never began."""
        if self._thread is not None:
            self._calls.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            if self._failure is None:
                try:
                    call()
                except BaseException as error:
                    self._failure = error
