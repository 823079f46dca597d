"""Threads: results in order, the first failure stops the rest, an interrupt stops all of them at once."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from manifests.errors import ResourceError
from reshard.workers import PoisonLock, StopFlag, StoppedError, run_all, start


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    def work(job: int, stop: StopFlag) -> int:
        time.sleep(0.001 * (5 - job % 5))
        return job * job

    assert run_all(work, range(20), workers=workers) == [job * job for job in range(20)]
    assert run_all(work, [], workers=workers) == []


def test_no_more_than_so_many_at_once() -> None:
    lock, now, most = threading.Lock(), 0, 0

    def work(job: int, stop: StopFlag) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)
        with lock:
            now -= 1

    run_all(work, range(12), workers=3)
    assert most == 3


def test_a_failure_stops_the_others_and_is_what_is_raised() -> None:
    started: list[int] = []

    def work(job: int, stop: StopFlag) -> None:
        started.append(job)
        if job == 1:
            raise ValueError("the cause")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            stop.check()
            time.sleep(0.001)
        raise AssertionError("was not stopped")

    with pytest.raises(ValueError, match="the cause"):
        run_all(work, range(100), workers=2)
    assert len(started) <= 4


def test_nothing_runs_any_more_when_the_failure_is_raised() -> None:
    running = threading.Event()

    def work(job: int, stop: StopFlag) -> None:
        if job == 0:
            raise ValueError
        running.set()
        try:
            while True:
                stop.check()
                time.sleep(0.001)
        finally:
            time.sleep(0.05)
            running.clear()

    with pytest.raises(ValueError):  # noqa: PT011 - it has no text
        run_all(work, range(2), workers=2)
    assert not running.is_set()


@pytest.mark.parametrize("delay_s", [0, 0.05])
def test_an_interrupt_stops_all_and_waits_for_them(delay_s: float) -> None:
    """Also one that comes while the first thread is being started, of which the pool then knows nothing."""
    started: list[int] = []
    stopped: list[int] = []

    def work(job: int, stop: StopFlag) -> None:
        started.append(job)
        if job == 0:
            time.sleep(delay_s)
            os.kill(os.getpid(), signal.SIGINT)
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                stop.check()
                time.sleep(0.001)
        except StoppedError:
            time.sleep(0.05)
            stopped.append(job)
            raise

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_all(work, range(50), workers=3)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(stopped) == sorted(started)
    assert 1 <= len(stopped) <= 4


def test_a_signal_that_came_to_another_thread_is_acted_on() -> None:
    """The system may give it to any; Python's handler runs in the main one, which sleeps as long as there is work."""
    ended: list[int] = []

    def work(job: int, stop: StopFlag) -> None:
        time.sleep(0.2)  # until the main one sleeps
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            stop.check()
            time.sleep(0.001)
        ended.append(job)

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(work, [1], workers=1)
    assert (ended, time.monotonic() - begin < 10) == ([], True)


def test_an_interrupt_while_jobs_are_still_handed_out_stops_them() -> None:
    """Else a run of hours would go on to its end before it stops."""
    done: list[int] = []

    def work(job: int, stop: StopFlag) -> None:
        for _ in range(200):
            stop.check()
            time.sleep(0.001)
        done.append(job)

    def jobs() -> object:
        yield 0
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(work, jobs(), workers=2)  # type: ignore[arg-type]
    assert done == []


def test_a_lock_whose_holder_failed_is_given_to_nobody() -> None:
    lock, seen = PoisonLock(), []
    for number in range(3):
        with lock:
            seen.append(number)
    with pytest.raises(ValueError, match="the cause"), lock:
        raise ValueError("the cause")
    for _ in range(2):
        with pytest.raises(StoppedError), lock:
            seen.append(None)
    assert seen == [0, 1, 2]


def test_a_lock_has_one_holder_at_a_time() -> None:
    lock, inside = PoisonLock(), 0

    def work(job: int, stop: StopFlag) -> None:
        nonlocal inside
        with lock:
            inside += 1
            time.sleep(0.002)
            assert inside == 1
            inside -= 1

    run_all(work, range(12), workers=4)


def test_a_system_without_more_threads_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError, match="allows no more threads"):
        start(threading.Thread())
    with pytest.raises(ResourceError, match="allows no more threads"):
        run_all(lambda job, stop: None, [1], workers=1)
