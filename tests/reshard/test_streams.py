"""The pipeline: any pieces arrive anywhere, hashed on the way; whatever fails, nothing is left hanging."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests import digest
from manifests.errors import IntegrityError, ResourceError, ToolkitError
from reshard import blocks, streams
from reshard.blocks import ALIGN_BYTES, Writer
from reshard.openable import LocalFile
from reshard.progress import Progress
from reshard.streams import Piece, Ring, Target, pump
from reshard.workers import StopFlag, StoppedError

PAGE = ALIGN_BYTES
RING = 3


@pytest.fixture(autouse=True)
def _all_comes_back(monkeypatch: pytest.MonkeyPatch, deadline: None) -> Iterator[None]:
    """Small blocks of which there are few; in the end all threads have ended and every file is closed."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 2 * PAGE)
    monkeypatch.setattr(blocks, "DIRECT_MIN_BYTES", PAGE)
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.endswith("(run)")]
    assert len(os.listdir("/proc/self/fd")) == files


@pytest.fixture
def ring() -> Iterator[Ring]:
    made = Ring(RING)
    yield made
    assert made._free.qsize() == RING
    blocks_back = [made.take() for _ in range(RING)]
    assert len({id(block) for block in blocks_back}) == RING


@dataclass
class Pumped:
    whole: str
    digests: list[tuple[str, ...]]
    bytes: int


def flow(pieces: Sequence[Piece], ring: Ring, *, digests: bool = True, stop: StopFlag | None = None) -> Pumped:
    hasher = hashlib.sha256()
    with Progress(0, label="", quiet=True) as progress:
        found = pump(pieces, whole=hasher, digests=digests, ring=ring, progress=progress, stop=stop or StopFlag())
    return Pumped(whole=hasher.hexdigest(), digests=found, bytes=progress.bytes)


class Output:
    """An output file, what must be in it, and that it is there when it is said to be written."""

    def __init__(self, path: Path, size: int) -> None:
        self.expected = bytearray(size)
        self.written: list[int] = []
        self._path = path
        self._writer: Writer | None = None

    def target(self, offset: int, data: bytes) -> Target:
        begin, end = offset, offset + len(data)
        self.expected[begin:end] = data

        def written() -> None:
            with self._path.with_name(self._path.name + ".partial").open("rb") as file:
                file.seek(begin)
                assert file.read(end - begin) == data
            self.written.append(begin)

        return Target(open=self.open, offset=offset, written=written)

    def open(self) -> Writer:
        if self._writer is None:
            self._writer = Writer(self._path, len(self.expected))
        return self._writer

    def finish(self) -> bytes:
        if self._writer is None:
            return b""
        self._writer.finish()
        return self._path.read_bytes()


SIZES = st.one_of(st.integers(0, 5 * PAGE), st.sampled_from([0, 0, 1, PAGE, 2 * PAGE, PAGE - 1, 4 * PAGE]))
PIECES = st.lists(
    st.tuples(
        st.integers(0, 1),  # which source
        st.one_of(st.none(), st.integers(0, 9 * PAGE)),  # where in it; None: behind the piece before
        SIZES,
        st.one_of(st.none(), st.integers(0, 2)),  # which output
        st.one_of(st.just(0), st.integers(1, 2 * PAGE)),  # left free in the output before it
    ),
    max_size=14,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(
    shapes=PIECES, block=st.integers(500, 4 * PAGE), least=st.sampled_from([1, PAGE, 1 << 20]),
    chunk=st.sampled_from([1000, PAGE, 1 << 24]), backwards=st.booleans(),
)  # fmt: skip
def test_any_pieces_arrive(
    shapes: list[tuple[int, int | None, int, int | None, int]], block: int, least: int, chunk: int, backwards: bool,
    tmp_path_factory: pytest.TempPathFactory, direct: Any, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for module, name, value in (
        (blocks, "BLOCK_BYTES", block), (blocks, "DIRECT_MIN_BYTES", least), (digest, "CHUNK_BYTES", chunk),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, value)
    folder = tmp_path_factory.mktemp("pieces")
    sources = [random.Random(number).randbytes(12 * PAGE + 77 * number) for number in range(2)]
    for number, raw in enumerate(sources):
        (folder / f"source{number}").write_bytes(raw)
    outputs = [Output(folder / f"out{number}", 16 * 7 * PAGE) for number in range(3)]
    behind, ends = [0, 0], [0, 0, 0]
    pieces, parts = [], []
    for source, where, size, output, gap in shapes:
        offset = behind[source] if where is None else where
        data = sources[source][offset : offset + size]
        behind[source] = offset + len(data)
        target = None
        if output is not None:
            begin = ends[output] + gap
            ends[output] = begin + len(data)
            # Runs that follow each other in the output, or lie there in the other order.
            target = outputs[output].target(len(outputs[output].expected) - ends[output] if backwards else begin, data)
        pieces.append(Piece(file=LocalFile(folder / f"source{source}"), offset=offset, size=len(data), target=target))
        parts.append(data)
    ring = Ring(RING)
    pumped = flow(pieces, ring)
    assert ring._free.qsize() == RING
    assert pumped.whole == hashlib.sha256(b"".join(parts)).hexdigest()
    assert pumped.digests == [digests_of(data, chunk) for data in parts]
    assert pumped.bytes == sum(map(len, parts))
    for output in outputs:
        wanted = [piece for piece in pieces if piece.target and piece.target.open == output.open]
        assert sorted(output.written) == sorted(piece.target.offset for piece in wanted if piece.target)
        assert output.finish() == (output.expected if wanted else b"")
    assert direct.descriptors == set()


def digests_of(data: bytes, chunk: int = digest.CHUNK_BYTES) -> tuple[str, ...]:
    """As FORMAT.md says it."""
    parts = [data[begin : begin + chunk] for begin in range(0, len(data), chunk)] or [b""]
    return tuple(hashlib.sha256(part).hexdigest() for part in parts)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(random.Random(0).randbytes(10 * PAGE))
    return tmp_path / "source"


@pytest.mark.parametrize(
    "sizes",
    [
        [0], [0, 0, 0], [0, 5 * PAGE], [5 * PAGE, 0], [2 * PAGE, 0, 0, 2 * PAGE], [1, 0, 2 * PAGE - 1, 0, 1, 0],
        [2 * PAGE, 2 * PAGE, 2 * PAGE], [],
    ],
    ids=str,
)  # fmt: skip
def test_empty_tensors_and_the_borders_of_blocks(source: Path, tmp_path: Path, sizes: list[int], ring: Ring) -> None:
    raw = source.read_bytes()
    outputs, pieces, offset = [], [], 0
    for number, size in enumerate(sizes):
        outputs.append(Output(tmp_path / f"out{number}", size))
        target = outputs[-1].target(0, raw[offset : offset + size])
        pieces.append(Piece(file=LocalFile(source), offset=offset, size=size, target=target))
        offset += size
    pumped = flow(pieces, ring)
    assert pumped.digests == [digests_of(bytes(output.expected)) for output in outputs]
    for output in outputs:
        assert output.finish() == output.expected
        assert output.written == [0]


def test_an_empty_tensor_that_stands_behind_its_neighbour(source: Path, tmp_path: Path, ring: Ring) -> None:
    """Sorted by where they begin, either of two may come first."""
    raw = source.read_bytes()
    ranges = [(0, PAGE), (PAGE, 3 * PAGE), (PAGE, 0), (4 * PAGE, 10), (10 * PAGE, 0)]
    pumped = flow([Piece(file=LocalFile(source), offset=offset, size=size) for offset, size in ranges], ring)
    assert pumped.digests == [digests_of(raw[offset : offset + size]) for offset, size in ranges]


def test_neighbours_are_read_in_one_go(source: Path, direct: Any, ring: Ring) -> None:
    pieces = [Piece(file=LocalFile(source), offset=number * 100, size=100) for number in range(10 * PAGE // 100)]
    flow(pieces, ring)
    assert [length for what, _, length in direct.moved if what == "read"] == [2 * PAGE] * 5


def test_what_is_not_asked_for_is_not_done(source: Path, ring: Ring) -> None:
    pieces = [Piece(file=LocalFile(source), offset=0, size=PAGE), Piece(file=LocalFile(source), offset=PAGE, size=1)]
    assert flow(pieces, ring, digests=False).digests == [(), ()]
    with Progress(0, label="", quiet=True) as progress:
        gone = [Piece(file=LocalFile(source.with_name("gone")), offset=0, size=PAGE)]
        assert pump(gone, whole=None, digests=False, ring=ring, progress=progress, stop=StopFlag()) == [()]


MB = 1 << 20


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    """Two megabytes of hole, a page of data, a megabyte of hole, a page of data, and a hole at the end."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for offset in (2 * MB, 3 * MB + PAGE):
            file.seek(offset)
            file.write(random.Random(offset).randbytes(PAGE))
        file.truncate(4 * MB)
    if path.stat().st_blocks * 512 >= 4 * MB:
        pytest.skip("a file system without holes")
    return path


CUTS = [0, 100, MB, 2 * MB + 50, 2 * MB + 60, 3 * MB, 3 * MB, 4 * MB]


def test_holes_stay_holes_and_are_hashed(sparse: Path, tmp_path: Path, ring: Ring) -> None:
    raw = sparse.read_bytes()
    output = Output(tmp_path / "out", 4 * MB + 4096)
    pieces = [
        Piece(
            file=LocalFile(sparse), offset=begin, size=end - begin, target=output.target(4096 + begin, raw[begin:end])
        )
        for begin, end in pairwise(CUTS)
    ]
    pumped = flow(pieces, ring)
    assert pumped.whole == hashlib.sha256(raw).hexdigest()
    assert pumped.digests == [digests_of(bytes(raw[piece.offset : piece.offset + piece.size])) for piece in pieces]
    assert output.finish() == output.expected
    assert (tmp_path / "out").stat().st_blocks * 512 <= 8 * PAGE
    assert sorted(output.written) == sorted(4096 + begin for begin in CUTS[:-1])


def test_a_hole_is_written_where_something_else_may_lie(sparse: Path, tmp_path: Path, ring: Ring) -> None:
    """In the file of an interrupted run: what was found to be wrong there must not shine through."""
    (tmp_path / "out.partial").write_bytes(b"\xff" * 4 * MB)
    writer = Writer(tmp_path / "out", 4 * MB, adopt=True)
    flow([Piece(file=LocalFile(sparse), offset=0, size=4 * MB, target=Target(open=lambda: writer, offset=0))], ring)
    writer.finish()
    assert (tmp_path / "out").read_bytes() == sparse.read_bytes()


class Trouble(Exception):
    pass


def fail(*_: object) -> Any:
    raise Trouble


def failing(monkeypatch: pytest.MonkeyPatch, name: str, at: int, only: Callable[..., bool] = lambda *_: True) -> None:
    real, calls = getattr(os, name), [0]

    def call(*arguments: Any) -> Any:
        if only(*arguments):
            calls[0] += 1
            if calls[0] == at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    monkeypatch.setattr(os, name, call)


class BadHash:
    def __init__(self, at: int) -> None:
        self._left = at

    def update(self, _: object) -> None:
        self._left -= 1
        if not self._left:
            raise Trouble

    def chunks(self) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize("at", [1, 2, 9])
@pytest.mark.parametrize(
    "stage", ["reader", "whole", "digest", "writer", "open", "written", "progress", "stop", "cut", "gone"]
)
def test_a_failure_anywhere_ends_everything(
    stage: str, at: int, source: Path, tmp_path: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty pieces, each twice as long as a block; the stage fails at its first, second and ninth call."""
    (tmp_path / "source").write_bytes(random.Random(0).randbytes(80 * PAGE))
    writer = Writer(tmp_path / "out", 80 * PAGE)
    calls, stop = [0], StopFlag()

    def count(what: str) -> None:
        if what == stage:
            calls[0] += 1
            if calls[0] >= at:
                fail()

    def opened() -> Writer:
        count("open")
        return writer

    pieces = [
        Piece(
            file=LocalFile(source if number < 10 else tmp_path / "source"),
            offset=number * 4 * PAGE,
            size=4 * PAGE,
            # Apart from each other, so that each is written for itself.
            target=Target(open=opened, offset=(19 - number) * 4 * PAGE, written=lambda: count("written")),
        )
        for number in range(20)
    ]
    whole: Any = hashlib.sha256()
    error: type[BaseException] = Trouble
    if stage == "reader":
        failing(monkeypatch, "preadv", at)
        error = ToolkitError
    elif stage == "whole":
        whole = BadHash(at)
    elif stage == "digest":
        bad = BadHash(at)
        monkeypatch.setattr(streams, "TensorHasher", lambda: bad)
    elif stage == "writer":
        failing(monkeypatch, "pwrite", at)
        error = ToolkitError
    elif stage == "progress":
        monkeypatch.setattr(Progress, "advance", lambda *_: count("progress"))
    elif stage == "stop":
        stop.set()
        error = StoppedError
    elif stage == "cut":
        os.truncate(source, 80 * PAGE - at * 4 * PAGE)
        error = IntegrityError
    elif stage == "gone":
        pieces[at] = Piece(file=LocalFile(tmp_path / "gone"), offset=0, size=1)
        error = ToolkitError
    with pytest.raises(error), Progress(0, label="", quiet=True) as progress:
        pump(pieces, whole=whole, digests=True, ring=ring, progress=progress, stop=stop)
    writer.abandon()


def test_a_failure_is_soon_the_end(source: Path, tmp_path: Path, direct: Any, ring: Ring) -> None:
    """The rest of a shard of gigabytes is not read for nothing."""
    source.write_bytes(bytes(200 * PAGE))
    with pytest.raises(Trouble):
        flow([Piece(file=LocalFile(source), offset=0, size=200 * PAGE, target=Target(open=fail, offset=0))], ring)
    assert len(direct.moved) <= 2 * RING  # of 100 blocks


def test_a_piece_is_said_to_be_written_soon(source: Path, tmp_path: Path, ring: Ring) -> None:
    """So that its file can be finished while the stream goes on."""
    raw = random.Random(0).randbytes(60 * PAGE)
    source.write_bytes(raw)
    outputs = [Output(tmp_path / f"out{number}", 3 * PAGE) for number in range(20)]

    def opened(number: int) -> Writer:
        # The one before is still collected; all others are under way, and nothing else is needed to complete them.
        deadline = time.monotonic() + 10
        while not all(output.written for output in outputs[: max(0, number - 1)]):
            assert time.monotonic() < deadline
            time.sleep(0.0005)
        return outputs[number].open()

    pieces = []
    for number, output in enumerate(outputs):
        made = output.target(0, raw[number * 3 * PAGE : (number + 1) * 3 * PAGE])
        target = Target(open=partial(opened, number), offset=0, written=made.written)
        pieces.append(Piece(file=LocalFile(source), offset=number * 3 * PAGE, size=3 * PAGE, target=target))
    flow(pieces, ring)
    assert [output.finish() for output in outputs] == [bytes(output.expected) for output in outputs]


def test_the_first_failure_is_told(source: Path, ring: Ring) -> None:
    """The others are its consequences."""
    seen: list[int] = []

    def opened() -> Writer:
        seen.append(1)
        raise Trouble

    target = Target(open=opened, offset=0)
    pieces = [Piece(file=LocalFile(source), offset=number * PAGE, size=PAGE, target=target) for number in range(10)]
    with pytest.raises(Trouble):
        flow(pieces, ring)
    assert seen == [1]  # and nothing more is tried


@pytest.mark.parametrize("allowed", [0, 1, 2, 3, 4])
def test_a_system_without_more_threads(
    allowed: int, source: Path, tmp_path: Path, ring: Ring, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, real, started = Output(tmp_path / "out", PAGE), threading.Thread.start, []

    def start(self: threading.Thread) -> None:
        if len(started) == allowed:
            raise RuntimeError("can't start new thread")
        started.append(self)
        real(self)

    piece = Piece(file=LocalFile(source), offset=0, size=PAGE, target=output.target(0, source.read_bytes()[:PAGE]))
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(ResourceError, match="allows no more threads"):
            flow([piece], ring)
    assert not any(thread.is_alive() for thread in started)
    assert flow([piece], ring).bytes == PAGE  # every block is back
    assert output.finish() == source.read_bytes()[:PAGE]


def test_streams_share_a_ring_of_one_block(source: Path, tmp_path: Path) -> None:
    """Slow, but nobody waits for ever."""
    ring = Ring(1)
    raw = source.read_bytes()
    outputs = [Output(tmp_path / f"out{number}", 10 * PAGE) for number in range(4)]
    found: list[Pumped] = []

    def run(output: Output) -> None:
        target = output.target(0, raw)
        found.append(flow([Piece(file=LocalFile(source), offset=0, size=10 * PAGE, target=target)], ring))

    threads = [threading.Thread(target=run, args=(output,)) for output in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [pumped.whole for pumped in found] == [hashlib.sha256(raw).hexdigest()] * 4
    assert [output.finish() for output in outputs] == [raw] * 4


def test_memory_is_the_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ring: Ring) -> None:
    """However slow the writer is, no more than the ring's blocks are read ahead of it."""
    (tmp_path / "source").write_bytes(bytes(range(256)) * (40 * PAGE // 256))
    most, under_way, lock = [0], [0], threading.Lock()
    read, advance = os.preadv, Progress.advance

    def reading(*arguments: Any) -> int:
        with lock:
            under_way[0] += 1
            most[0] = max(most[0], under_way[0])
        return read(*arguments)

    def done(self: Progress, count: int) -> None:
        with lock:
            under_way[0] -= 1
        advance(self, count)

    monkeypatch.setattr(os, "preadv", reading)
    monkeypatch.setattr(Progress, "advance", done)
    writer = Writer(tmp_path / "out", 40 * PAGE)
    slow = threading.Event()
    target = Target(open=lambda: (slow.wait(0.005), writer)[1], offset=0)
    flow([Piece(file=LocalFile(tmp_path / "source"), offset=0, size=40 * PAGE, target=target)], ring)
    writer.finish()
    assert 1 <= most[0] <= RING + 3  # each thread counts down a moment after the block is free again
    assert (tmp_path / "out").read_bytes() == (tmp_path / "source").read_bytes()
