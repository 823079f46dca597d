"""What a person and a program see of work under way. The clock is ours."""

from __future__ import annotations

import io
import json
import sys
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from reshard import progress as module
from reshard.progress import Progress

NO_LABEL: dict[str, Any] = {"label": "", "quiet": True}


class Clock:
    """Stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Put a terminal in the place of stderr; in the test itself, because pytest puts its own there just before."""

    def open_one() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return open_one


def test_a_bar_has_bytes_rate_time_left_and_layer(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    with Progress(4_000_000, label="reshard", quiet=False) as progress:
        progress.at("layer 3")
        progress.advance(1_000_000)
        progress._bar.refresh()
    line = terminal.getvalue().split("\r")[-1]
    assert line.startswith("reshard:  25%")
    assert "1.00M/4.00M" in line
    assert "B/s" in line
    assert "<" in line  # tqdm's elapsed<remaining
    assert line.rstrip().endswith(", layer 3]")


def test_what_is_worked_on_is_drawn_where_no_bytes_pass(open_terminal: Callable[[], Terminal], clock: Clock) -> None:
    terminal = open_terminal()
    with Progress(4, label="x", quiet=False) as progress:
        progress.at("one")
        assert "one" not in terminal.getvalue()
        clock.now += 2 * module.EVENT_SECONDS
        progress.at("two")
        assert "two" in terminal.getvalue()


def test_names_cannot_drive_the_terminal(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    with Progress(4, label="x", quiet=False) as progress:
        progress.at("\x1b[2Jlayer")
        progress.advance(1)
    assert "\x1b[2J" not in terminal.getvalue()
    assert "\\x1b[2Jlayer" in terminal.getvalue()


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    for quiet, stderr in ((True, Terminal()), (False, io.StringIO())):
        monkeypatch.setattr(sys, "stderr", stderr)
        with Progress(4, label="x", quiet=quiet) as progress:
            progress.skip(1)
            progress.at("layer")
            progress.advance(1)
            progress.event("shard", name="a")
        assert (stderr.getvalue(), progress.bytes, progress.done_bytes) == ("", 1, 2)


def test_what_was_done_before_is_no_part_of_the_rate(open_terminal: Callable[[], Terminal]) -> None:
    terminal = open_terminal()
    with Progress(4_000_000, label="x", quiet=False) as progress:
        progress.skip(3_000_000)
        assert progress.bytes == 0
        bar = progress._bar
        assert (bar.n, bar.initial, bar.last_print_n) == (3_000_000, 3_000_000, 3_000_000)
        progress.advance(500_000)
        assert (bar.n, progress.bytes, progress.done_bytes) == (3_500_000, 500_000, 3_500_000)
    assert "88%" in terminal.getvalue().split("\r")[-1]


def test_bytes_that_are_read_again_do_not_count_twice(open_terminal: Callable[[], Terminal], clock: Clock) -> None:
    terminal = open_terminal()
    events: list[Any] = []
    with Progress(100, label="x", quiet=False, events=events.append) as progress:
        progress.skip(60)
        clock.now += 2
        progress.advance(80)
        assert (progress.bytes, progress.done_bytes) == (80, 100)
    assert (events[-1]["bytes"], events[-1]["seconds_left"]) == (100, 0)
    assert "100%" in terminal.getvalue().split("\r")[-1]


def test_events_come_at_most_once_a_second(clock: Clock) -> None:
    events: list[Any] = []
    with Progress(1000, **NO_LABEL, events=events.append) as progress:
        progress.at("layer 1")
        for _ in range(11):
            clock.now += 0.25
            progress.advance(10)
    first = {"event": "progress", "total_bytes": 1000, "bytes_per_s": 40, "layer": "layer 1"}
    assert events == [first | {"bytes": 40, "seconds_left": 24}, first | {"bytes": 80, "seconds_left": 23}]


def test_the_rate_is_that_of_the_last_half_minute(clock: Clock) -> None:
    events: list[Any] = []
    with Progress(10_000, **NO_LABEL, events=events.append) as progress:
        for size in [100] * 40 + [10] * 30:
            clock.now += 1
            progress.advance(size)
    assert [event["bytes_per_s"] for event in events[:40]] == [100.0] * 40
    assert events[54]["bytes_per_s"] == (15 * 100 + 15 * 10) / 30
    assert events[69]["bytes_per_s"] == 10
    assert events[69]["seconds_left"] == (10_000 - 4_300) / 10


def test_a_continued_run_starts_its_clock_when_it_moves(clock: Clock) -> None:
    events: list[Any] = []
    with Progress(1000, **NO_LABEL, events=events.append) as progress:
        for _ in range(2):  # what is there is looked at
            clock.now += 50
            progress.advance(350)
        assert [event["bytes"] for event in events] == [350, 700]
        events.clear()
        progress.skip(500)
        clock.now += 0.5
        progress.advance(10)
        clock.now += 0.5
        progress.advance(90)
    (event,) = events
    assert (event["bytes"], event["bytes_per_s"], event["seconds_left"]) == (600, 100, 4)


def test_nothing_moved_has_no_time_left(clock: Clock) -> None:
    events: list[Any] = []
    with Progress(1000, **NO_LABEL, events=events.append) as progress:
        clock.now += 1
        progress.advance(0)
    assert (events[0]["bytes_per_s"], events[0]["seconds_left"], events[0]["layer"]) == (0, None, None)
    json.dumps(events, allow_nan=False)


def test_events_have_their_own_values() -> None:
    events: list[Any] = []
    with Progress(10, **NO_LABEL, events=events.append) as progress:
        progress.event("shard", name="a", kind="b", sha256=None)
    assert events == [{"event": "shard", "name": "a", "kind": "b", "sha256": None}]


def test_threads_lose_no_bytes_and_events_never_overlap(clock: Clock) -> None:
    inside, overlaps, events = threading.Lock(), [], []

    def write(event: Any) -> None:
        if not inside.acquire(blocking=False):
            overlaps.append(event)
            return
        events.append(event)
        inside.release()

    with Progress(8 * 500, **NO_LABEL, events=write) as progress:

        def work() -> None:
            for number in range(500):
                clock.now += 0.5
                progress.advance(1)
                progress.at(str(number))
                progress.event("shard", name=str(number))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert progress.bytes == 8 * 500
    assert overlaps == []
    assert sum(event["event"] == "shard" for event in events) == 8 * 500
