"""reshard.callqueue: what may be made at once, what must wait, and what a failure stops."""

import threading

import pytest

from reshard.callqueue import CallQueue

SECONDS = 10.0
"""No wait in here lasts longer, unless something is broken."""


def test_as_many_calls_as_threads_are_made_at_once_and_finish_waits_for_all() -> None:
    meeting = threading.Barrier(2)
    calls = CallQueue(2)
    made = []

    def call() -> None:
        meeting.wait(SECONDS)
        made.append(threading.get_ident())

    calls.add(call)
    calls.add(call)
    calls.finish()
    assert len(set(made)) == 2


def test_no_more_calls_than_threads_are_made_at_once() -> None:
    calls = CallQueue(2)
    lock = threading.Lock()
    running, most = 0, 0

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.002)
        with lock:
            running -= 1

    for _ in range(20):
        calls.add(call)
    calls.finish()
    assert most == 2


def test_what_is_behind_waits_for_every_call_before_it_and_for_none_after() -> None:
    calls = CallQueue(2)
    first, third, done = threading.Event(), threading.Event(), threading.Event()
    log: list[str] = []

    def slow(event: threading.Event, name: str) -> None:
        assert event.wait(SECONDS)
        log.append(name)

    calls.add(lambda: slow(first, "first"))
    calls.add(lambda: log.append("second"))
    calls.add_behind(lambda: (log.append("behind"), done.set()))
    calls.add(lambda: slow(third, "third"))
    # The second call is made long before the first; what is behind both still waits.
    assert not done.wait(0.05)
    first.set()
    assert done.wait(SECONDS)
    assert log == ["second", "first", "behind"]
    third.set()
    calls.finish()
    assert log == ["second", "first", "behind", "third"]


def test_what_is_behind_nothing_is_made() -> None:
    calls, made = CallQueue(1), []
    calls.add_behind(lambda: made.append(1))
    calls.finish()
    assert made == [1]


def test_nothing_behind_a_failed_call_is_made_and_nothing_more_is_taken() -> None:
    calls, made = CallQueue(1), []
    gate = threading.Event()

    def fail() -> None:
        gate.wait(SECONDS)
        raise OSError("first")

    calls.add(fail)
    calls.add(lambda: made.append("given before the failure"))
    calls.add_behind(lambda: made.append("behind"))
    gate.set()
    with pytest.raises(OSError, match="first"):
        calls.finish()
    assert made == ["given before the failure"]
    with pytest.raises(OSError, match="first"):
        calls.add(lambda: made.append("added after it"))
    calls.add_behind(lambda: made.append("behind it, after it"))
    calls.close()
    assert made == ["given before the failure"]


def test_the_first_failure_is_the_one_that_is_raised() -> None:
    calls = CallQueue(1)
    gate = threading.Event()

    def fail(name: str) -> None:
        gate.wait(SECONDS)
        raise OSError(name)

    calls.add(lambda: fail("first"))
    calls.add(lambda: fail("second"))
    gate.set()
    with pytest.raises(OSError, match="first"):
        calls.finish()


def test_a_failure_behind_is_a_failure() -> None:
    calls = CallQueue(1)

    def fail() -> None:
        raise OSError("behind")

    calls.add(lambda: None)
    calls.add_behind(fail)
    with pytest.raises(OSError, match="behind"):
        calls.finish()


def test_no_thread_is_left_and_none_is_started_for_nothing() -> None:
    before = threading.active_count()
    calls = CallQueue(2)
    calls.finish()
    assert threading.active_count() == before
    calls.add(lambda: None)
    assert threading.active_count() > before
    calls.finish()
    calls.close()
    assert threading.active_count() == before
