"""Run independent jobs on threads, stop all of them at the first failure or Ctrl-C.

Reading, writing and hashing release the interpreter's lock, so threads are enough.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

from manifests.errors import ResourceError

Job = TypeVar("Job")
Result = TypeVar("Result")

DEFAULT_JOBS = min(4, os.cpu_count() or 1)
"""Of work that is one thread a job."""

STREAM_JOBS = max(1, min(4, (os.cpu_count() or 1) // 3))
"""Of streams that are read, hashed and written: each keeps three cores busy, and a disk likes one better than many."""

REMOTE_JOBS = 8
"""Connections to a server: one seldom fills a link."""


SIGNAL_SECONDS = 0.5
"""An interrupt is acted on within this time."""


class StoppedError(Exception):
    """Raised inside a worker when another one failed; never leaves `run_all`."""


class StopFlag:
    """What the workers of one `run_all` ask between blocks."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Ask all workers to stop."""
        self._event.set()

    def check(self) -> None:
        """End this worker if it was asked to stop."""
        if self._event.is_set():
            raise StoppedError


def start(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ResourceError: The system allows no more of them.
    """
    with thread_limit_named():
        thread.start()


@contextmanager
def thread_limit_named() -> Iterator[None]:
    """Where the system may refuse a thread: a `ResourceError` instead of a riddle."""
    try:
        yield
    except RuntimeError as error:
        raise ResourceError(
            "the system allows no more threads; take fewer --jobs, or allow more (ulimit -u)"
        ) from error


def unless_stopped(call: Callable[[], Result], stop: StopFlag) -> Result:
    """What a call gives that may wait for a server; it must change nothing, for a worker that stops leaves it behind.

    Raises:
        StoppedError: All work is to stop.
        ResourceError: The system allows no more threads.
        Whatever the call raises.
    """
    answer: Future[Result] = Future()

    def ask() -> None:
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    # Not one that could be waited for: a server may be silent for a minute when the program is to end.
    start(threading.Thread(target=ask, daemon=True))
    while not wait([answer], SIGNAL_SECONDS).done:
        stop.check()
    return answer.result()


class PoisonLock:
    """A lock that nobody gets any more once its holder failed.

    The kernel tells of a folder that could not be written only once: to the first who asks. The next one must not take
    silence for success.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_poisoned = False

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_poisoned:
            self._lock.release()
            raise StoppedError

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_poisoned = kind is not None
        self._lock.release()


def run_all(work: Callable[[Job, StopFlag], Result], jobs: Iterable[Job], *, workers: int) -> list[Result]:
    """Run ``work(job, stop)`` for every job; return the results in the order of the jobs.

    The first exception, or Ctrl-C, stops the other workers at their next block and is raised when all have ended.
    """
    stop = StopFlag()
    # Counted here as well: the pool does not know of a thread whose start was interrupted, and nothing may still be
    # written when the caller removes what was.
    lock = threading.Condition()
    running = ended = 0
    has_failed = False

    def counted(job: Job) -> Result:
        nonlocal running, ended, has_failed
        with lock:
            stop.check()
            running += 1
        try:
            return work(job, stop)
        except BaseException:
            has_failed = True
            raise
        finally:
            with lock:
                running -= 1
                ended += 1
                lock.notify_all()

    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            with thread_limit_named():
                futures = [pool.submit(counted, job) for job in jobs]
            with lock:
                while ended < len(futures) and not has_failed:
                    # Not for ever: a signal that came to another thread is acted on when this one wakes.
                    lock.wait(SIGNAL_SECONDS)
        finally:
            # Work is left here only after a failure or an interrupt, which may also come while jobs are submitted.
            with lock:
                stop.set()
            pool.shutdown(cancel_futures=True)
            with lock:
                lock.wait_for(lambda: running == 0)
    failures = [error for future in futures if not future.cancelled() and (error := future.exception())]
    for error in failures:
        if not isinstance(error, StoppedError):
            raise error
    return [future.result() for future in futures]
