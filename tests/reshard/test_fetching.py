"""Ranges over several connections: in order, within a window, and over at once when they must be."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from manifests import http, patience
from manifests.errors import IntegrityError, RemoteError
from reshard import fetching
from reshard.blocks import new_block
from reshard.fetching import FetchingReader
from reshard.workers import StopFlag, StoppedError
from tests.file_server import Answer, Asked, FileServer, serve

SIZE = 100_000
SEGMENT = 1000


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    (tmp_path / "file").write_bytes(os.urandom(SIZE))
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(fetching, "SEGMENT_BYTES", SEGMENT)
    with serve(tmp_path) as found:
        yield found


def reader_of(
    server: FileServer, ranges: list[tuple[int, int]], connections: int = 3, stop: StopFlag | None = None
) -> FetchingReader:
    file = http.Web().file(f"{server.url}/file")
    return FetchingReader(file, ranges, connections=lambda: connections, stop=stop or StopFlag())


def read(reader: FetchingReader, begin: int, end: int) -> bytes:
    buffer, found = new_block(), b""
    while begin < end:
        data, is_hole = reader.read(buffer, begin, end)
        assert not is_hole
        found += bytes(data)
        begin += len(data)
    return found


@pytest.mark.parametrize("connections", [1, 2, 7])
def test_ranges_come_in_order_whatever_arrives_first(server: FileServer, connections: int) -> None:
    dice = random.Random(connections)
    server.instead = lambda asked, right: time.sleep(dice.random() / 200)
    whole = (server.root / "file").read_bytes()
    ranges = [(0, 1), (10, 5000), (5000, 5001), (7000, 7000 + 3 * SEGMENT), (99_999, SIZE)]
    reader = reader_of(server, ranges, connections)
    try:
        for begin, end in ranges:
            assert read(reader, begin, end) == whole[begin:end]
    finally:
        reader.close()
    assert server.sent() == sum(end - begin for begin, end in ranges)


def test_no_more_than_the_window_is_asked_for(server: FileServer) -> None:
    reader = reader_of(server, [(0, SIZE)], connections=2)
    try:
        read(reader, 0, 1)
        time.sleep(0.2)
        assert 2 * SEGMENT < server.sent() <= 2 * fetching.AHEAD * SEGMENT
    finally:
        reader.close()


def test_several_connections_are_open_at_the_same_time(server: FileServer) -> None:
    together, most = threading.Barrier(4, timeout=10), 4

    def meet(asked: Asked, right: Answer) -> None:
        together.wait()

    server.instead = meet
    reader = reader_of(server, [(0, 4 * SEGMENT)], connections=most)
    try:
        read(reader, 0, 4 * SEGMENT)
    finally:
        reader.close()


def test_a_failure_comes_where_its_bytes_would(server: FileServer) -> None:
    begin = f"bytes={2 * SEGMENT}-"
    server.instead = lambda asked, right: Answer(500) if (asked.range or "").startswith(begin) else None
    reader = reader_of(server, [(0, SIZE)])
    try:
        assert len(read(reader, 0, 2 * SEGMENT)) == 2 * SEGMENT
        with pytest.raises(RemoteError, match="status 500"):
            read(reader, 2 * SEGMENT, 3 * SEGMENT)
    finally:
        reader.close()


def test_a_file_that_ends_early(server: FileServer) -> None:
    reader = reader_of(server, [(SIZE - 10, SIZE + 10)])
    with pytest.raises(IntegrityError, match="ends at byte"):
        read(reader, SIZE - 10, SIZE + 10)
    reader.close()


@pytest.mark.usefixtures("deadline")
def test_a_silent_server_does_not_hold_up_who_must_stop(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, stop = threading.Event(), StopFlag()

    def silent(asked: Asked, right: Answer) -> None:
        go_on.wait(10)

    server.instead = silent
    monkeypatch.setattr(fetching, "SIGNAL_SECONDS", 0.01)
    reader = reader_of(server, [(0, SIZE)], stop=stop)
    threading.Timer(0.1, stop.set).start()
    began = time.monotonic()
    with pytest.raises(StoppedError):
        read(reader, 0, SIZE)
    reader.close()
    assert time.monotonic() - began < 5
    go_on.set()
