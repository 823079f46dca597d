"""Work in threads: the urgent first, errors where they are waited for, threads that end."""

from __future__ import annotations

import gc
import threading
import time

import pytest

from manifests.errors import ResourceError, ToolkitError
from runner.background import THREADS, Background


def block(background: Background) -> threading.Event:
    """Keep every thread busy until the event is set."""
    go = threading.Event()
    begun = threading.Semaphore(0)

    def wait() -> None:
        begun.release()
        go.wait(60)

    for _ in range(THREADS):
        background.submit(wait)
    for _ in range(THREADS):
        assert begun.acquire(timeout=60)
    return go


def test_urgent_work_goes_first_and_equal_work_in_its_order() -> None:
    background, done = Background(), []
    go = block(background)
    order = [("a", 0), ("b", 2), ("c", 0), ("d", 1), ("e", 2)]
    lock = threading.Lock()

    def note(name: str) -> None:
        with lock:
            done.append(name)
        time.sleep(0.05)  # so that what begins later ends later

    loads = [background.submit(lambda name=name: note(name), urgency=urgency) for name, urgency in order]  # type: ignore[misc]
    assert not any(load.is_done for load in loads)
    go.set()
    for load in loads:
        load.wait()
    # Two begin at once, so neighbours may be exchanged, and no others.
    assert [sorted(done[at : at + THREADS]) for at in (0, 2)] == [["b", "e"], ["a", "d"]]
    assert done[4] == "c"


def test_an_error_is_raised_where_it_is_waited_for_each_time() -> None:
    background = Background()

    def fail() -> None:
        raise ValueError("no such thing")

    load = background.submit(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="no such thing"):
            load.wait()
    assert load.is_done
    background.submit(lambda: None).wait()  # the thread lives on


def test_threads_end_with_it_and_take_what_they_held() -> None:
    before = set(threading.enumerate())
    background = Background()
    background.submit(lambda: None).wait()
    ours = set(threading.enumerate()) - before
    assert len(ours) == THREADS
    del background
    gc.collect()
    for thread in ours:
        thread.join(60)
        assert not thread.is_alive()


def test_a_forked_child_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its threads are gone, so it would wait for ever."""
    background = Background()
    background.submit(lambda: None).wait()
    go = block(background)
    waiting = background.submit(lambda: None)
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(ToolkitError, match="open it again after a fork"):
        background.submit(lambda: None)
    with pytest.raises(ToolkitError, match="open it again after a fork"):
        waiting.wait()
    go.set()


def test_a_system_that_gives_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(ResourceError, match="gives no thread to read weights"):
        Background().submit(lambda: None)


def test_work_that_nobody_waits_for_is_dropped_with_it() -> None:
    background = Background()
    go = block(background)
    ran = threading.Event()
    background.submit(ran.set)
    del background
    gc.collect()
    go.set()
    assert not ran.wait(0.2)
