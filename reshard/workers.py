"""Run independent jobs on threads, stop all of them at the first failure or Ctrl-C.

Reading, writing and hashing release the interpreter's lock, so threads are enough.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

DEFAULT_JOBS = min(4, os.cpu_count() or 1)
"""Of work that is one thread a job."""

STREAM_JOBS = max(1, min(4, (os.cpu_count() or 1) // 3))
"""Of streams that are read, hashed and written: each keeps three cores busy, and a disk likes one better than many."""


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


def run_all(work: Callable[[Job, StopFlag], Result], jobs: Iterable[Job], *, workers: int) -> list[Result]:
    """Run ``work(job, stop)`` for every job; return the results in the order of the jobs.

    The first exception, or Ctrl-C, stops the other workers at their next block and is raised when all have ended.
    """
    stop = StopFlag()
    # Counted here as well: the pool does not know of a thread whose start was interrupted, and nothing may still be
    # written when the caller removes what was.
    lock = threading.Condition()
    running = 0

    def counted(job: Job) -> Result:
        nonlocal running
        with lock:
            stop.check()
            running += 1
        try:
            return work(job, stop)
        finally:
            with lock:
                running -= 1
                lock.notify_all()

    with ThreadPoolExecutor(max_workers=workers) as pool:
        try:
            futures = [pool.submit(counted, job) for job in jobs]
            wait(futures, return_when=FIRST_EXCEPTION)
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
