"""Past the page cache and around holes: whole pages only, and the same bytes whatever the file system does not do."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.errors import IntegrityError, ResourceError, ToolkitError
from reshard import blocks
from reshard.blocks import PageWriter, Reader, Writer, data_bytes

PAGE = blocks.ALIGN_BYTES
RAGGED = 9 * PAGE + 123


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three pages, and no file too small for O_DIRECT."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 3 * PAGE)
    monkeypatch.setattr(blocks, "DIRECT_MIN_BYTES", PAGE)


@pytest.fixture
def ragged(tmp_path: Path) -> Path:
    path = tmp_path / "ragged"
    path.write_bytes(random.Random(1).randbytes(RAGGED))
    return path


def refuse(function: Any, when: Callable[..., bool], code: int = errno.EINVAL) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return function(*arguments, **options)

    return call


def read_all(path: Path, begin: int, size: int) -> bytes:
    with closing(Reader(path)) as reader:
        return b"".join(bytes(block) for block in reader.blocks(begin, size))


RANGES = [
    (0, RAGGED), (0, PAGE), (1, PAGE), (PAGE - 1, 2), (PAGE, PAGE), (5, RAGGED - 5), (8 * PAGE + 1, PAGE + 122),
    (RAGGED - 1, 1), (RAGGED, 0), (2 * PAGE + 7, 5 * PAGE), (9 * PAGE, 123),
]  # fmt: skip


def test_past_the_page_cache(ragged: Path, large_blocks: None, direct: Any) -> None:
    raw = ragged.read_bytes()
    for begin, size in RANGES:
        direct.moved.clear()
        assert read_all(ragged, begin, size) == raw[begin : begin + size]
        # Every whole page that was asked for came this way.
        assert bool(direct.moved) is (size >= PAGE)
    assert direct.descriptors == set()


def test_a_small_file_is_read_through_the_cache(tmp_path: Path, large_blocks: None, direct: Any) -> None:
    (tmp_path / "small").write_bytes(bytes(range(256)) * (PAGE // 256 - 1))
    assert len(read_all(tmp_path / "small", 0, PAGE - 256)) == PAGE - 256
    assert direct.opened == []


@pytest.mark.parametrize("most", [1, 7, 512, PAGE, PAGE + 1])
def test_short_direct_reads(
    ragged: Path, large_blocks: None, direct: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    preadv = os.preadv

    def short(descriptor: int, views: list[memoryview], offset: int) -> int:
        count = preadv(descriptor, views, offset)
        return min(count, most) if descriptor in direct.descriptors else count

    monkeypatch.setattr(os, "preadv", short)
    raw = ragged.read_bytes()
    for begin, size in RANGES:
        assert read_all(ragged, begin, size) == raw[begin : begin + size]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_without_o_direct(
    ragged: Path, tmp_path: Path, large_blocks: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "open", refuse(os.open, lambda path, flags, *_: flags & os.O_DIRECT, code))
    raw = ragged.read_bytes()
    for begin, size in RANGES:
        assert read_all(ragged, begin, size) == raw[begin : begin + size]
    assert written_in_pages(tmp_path / "out", raw) == raw


def test_a_file_system_that_says_so_late(
    ragged: Path, tmp_path: Path, large_blocks: None, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It opens the file so, and then neither reads nor writes it so."""
    monkeypatch.setattr(os, "preadv", refuse(os.preadv, lambda descriptor, *_: descriptor in direct.descriptors))
    monkeypatch.setattr(os, "pwrite", refuse(os.pwrite, lambda descriptor, *_: descriptor in direct.descriptors))
    raw = ragged.read_bytes()
    for begin, size in RANGES:
        assert read_all(ragged, begin, size) == raw[begin : begin + size]
    direct.opened.clear()
    assert written_in_pages(tmp_path / "out", raw) == raw
    assert len(direct.opened) == 1
    assert direct.descriptors == set()


def test_other_failures_of_direct_access_are_failures(
    ragged: Path, tmp_path: Path, large_blocks: None, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse(os.open, lambda path, flags, *_: flags & os.O_DIRECT, errno.EMFILE))
        with pytest.raises(ResourceError, match="ragged: too many files are open"):
            Reader(ragged)
        with pytest.raises(ResourceError, match="too many files are open"):
            written_in_pages(tmp_path / "out", bytes(4 * PAGE))
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", refuse(os.preadv, lambda fd, *_: fd in direct.descriptors, errno.EIO))
        with pytest.raises(ToolkitError, match="ragged: cannot be read at byte 0: Input/output error"):
            read_all(ragged, 0, RAGGED)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse(os.pwrite, lambda fd, *_: fd in direct.descriptors, errno.ENOSPC))
        with pytest.raises(ResourceError, match="no space left"):
            written_in_pages(tmp_path / "other", bytes(4 * PAGE))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def written_in_pages(path: Path, data: bytes, offset: int = 0) -> bytes:
    """What a file holds when a page writer has written it in one go."""
    pages, writer = PageWriter(), Writer(path, offset + len(data))
    try:
        pages.put(writer, memoryview(data), offset)
        pages.flush()
        writer.finish()
    except BaseException:
        writer.abandon()
        raise
    return path.read_bytes()[offset:]


@pytest.mark.parametrize("most", [1, 512, 600, PAGE, PAGE + 512])
def test_short_direct_writes(
    ragged: Path, tmp_path: Path, large_blocks: None, direct: Any, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    pwrite = os.pwrite

    def short(descriptor: int, view: memoryview, offset: int) -> int:
        if descriptor not in direct.descriptors:
            return pwrite(descriptor, view, offset)
        assert len(view) % PAGE == 0
        with memoryview(bytes(view[:most])) as part:
            return pwrite(plain, part, offset)

    raw = ragged.read_bytes()
    (tmp_path / "out.partial").touch()
    plain = os.open(tmp_path / "out.partial", os.O_WRONLY)
    monkeypatch.setattr(os, "pwrite", short)
    writer, pages = Writer(tmp_path / "out", adopt=True), PageWriter()
    pages.put(writer, memoryview(raw), 0)
    pages.flush()
    writer.finish()
    os.close(plain)
    assert (tmp_path / "out").read_bytes() == raw


def test_no_page_is_written_in_both_ways(tmp_path: Path, large_blocks: None, direct: Any) -> None:
    """Large runs of two tensors that meet in the middle of a page: the page belongs to both, and to the cache."""
    data = random.Random(2).randbytes(5 * PAGE)
    writer, pages = Writer(tmp_path / "out", 3 * 5 * PAGE), PageWriter()
    for number in (0, 2, 1):
        pages.put(writer, memoryview(data), 100 + number * len(data))
    pages.flush()
    writer.finish()
    written = [
        page
        for what, offset, length in direct.moved
        for page in range(offset // PAGE, (offset + length) // PAGE)
        if what == "write"
    ]
    assert sorted(written) == sorted({*range(15)} - {0, 5, 10})
    assert (tmp_path / "out").read_bytes()[100:] == data * 3


def test_two_threads_open_one_descriptor(
    tmp_path: Path, large_blocks: None, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def slow(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_DIRECT:
            time.sleep(0.05)
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", slow)
    writer = Writer(tmp_path / "out", 4 * PAGE)
    page = blocks.aligned_buffer(PAGE)
    threads = [threading.Thread(target=writer.write_pages, args=(page, number * PAGE)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    writer.finish()
    assert len(direct.opened) == 1
    assert direct.descriptors == set()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the kernel does not list a process's memory here")
def test_blocks_are_private_memory_because_shared_memory_gets_no_huge_pages() -> None:
    block = blocks.new_block()
    block[0] = 1
    address = blocks._address(block)
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= address < end:
            assert line.split()[1] == "rw-p"
            return
    raise AssertionError("the block is in no mapping")


def test_other_threads_go_on_while_a_block_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = memoryview(bytearray(b"x" * 100)), memoryview(bytearray(100))
    moved = []
    real = ctypes.memmove
    monkeypatch.setattr(ctypes, "memmove", lambda *arguments: moved.append(arguments[2]) or real(*arguments))
    blocks.copy_bytes(source[10:60], target[20:70])
    assert bytes(target) == bytes(20) + b"x" * 50 + bytes(30)
    # ctypes gives up the interpreter's lock for the call, an assignment of slices does not.
    assert moved == [50]
    blocks.copy_bytes(memoryview(b"abc"), target[:3])
    blocks.copy_bytes(source[:0], target[:0])
    assert bytes(target[:20]) == b"abc" + bytes(17)


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 1),  # which writer
        st.one_of(st.none(), st.integers(0, 5 * PAGE), st.sampled_from([0, PAGE, PAGE - 1, PAGE + 1])),  # None: follows
        st.one_of(st.integers(0, 7 * PAGE), st.sampled_from([0, 1, PAGE, 2 * PAGE, 3 * PAGE])),
    ),
    max_size=12,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(operations=OPERATIONS, block=st.integers(1, 4 * PAGE), least=st.sampled_from([1, PAGE, 2 * PAGE, 1 << 20]))
def test_a_page_writer_is_as_good_as_memory(
    operations: list[tuple[int, int | None, int]], block: int, least: int, tmp_path: Path, direct: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Any runs, of two files in turns, some of which go on with what was there."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", block)
    monkeypatch.setattr(blocks, "DIRECT_MIN_BYTES", least)
    size = 13 * PAGE
    noise = random.Random(block)
    expected = [bytearray(size), bytearray(noise.randbytes(size))]
    (tmp_path / "1.partial").write_bytes(expected[1])
    writers = [Writer(tmp_path / "0", size), Writer(tmp_path / "1", adopt=True)]
    ends = [0, 0]
    pages = PageWriter()
    for which, offset, length in operations:
        begin = ends[which] if offset is None else offset
        data = noise.randbytes(min(length, size - begin))
        pages.put(writers[which], memoryview(data), begin)
        ends[which] = begin + len(data)
        expected[which][begin : ends[which]] = data
    pages.flush()
    for number, writer in enumerate(writers):
        writer.finish()
        assert (tmp_path / str(number)).read_bytes() == expected[number]
    assert direct.descriptors == set()


def sparse(path: Path, parts: list[int]) -> bytes:
    """A file of holes (positive, in pages) and data (negative); what it holds."""
    raw = b""
    with path.open("wb") as file:
        for part in parts:
            data = random.Random(len(raw)).randbytes(-part * PAGE) if part < 0 else bytes(part * PAGE)
            if part < 0:
                file.seek(len(raw))
                file.write(data)
            raw += data
        file.truncate(len(raw))
    if path.stat().st_blocks * 512 >= len(raw):
        pytest.skip("a file system without holes")
    return raw


HOLES = {
    "start": [4, -3], "middle": [-2, 5, -1], "end": [-3, 4], "all": [6], "many": [1, -1, 2, -2, 1, -1, 3],
    "large": [-1, 700, -1],
}  # fmt: skip


@pytest.mark.parametrize("parts", HOLES.values(), ids=HOLES.keys())
def test_holes_are_told_and_not_read(tmp_path: Path, parts: list[int], large_blocks: None, direct: Any) -> None:
    raw = sparse(tmp_path / "sparse", parts)
    data_pages = {page for page in range(len(raw) // PAGE) if any(raw[page * PAGE : (page + 1) * PAGE])}
    for begin, end in ((0, len(raw)), (PAGE // 2, len(raw) - 1), (len(raw) - 1, len(raw)), (PAGE, PAGE + 1)):
        direct.moved.clear()
        buffer, position, found = blocks.new_block(), begin, b""
        with closing(Reader(tmp_path / "sparse")) as reader:
            while position < end:
                block, is_hole = reader.read(buffer, position, end)
                assert 0 < len(block) <= 3 * PAGE
                assert is_hole is (position // PAGE not in data_pages)
                if is_hole:
                    assert not any(block)
                found += block
                position += len(block)
        assert found == raw[begin:end]
        read = sum(length for _, _, length in direct.moved)
        assert read <= (len(data_pages) + 2) * PAGE
    assert data_bytes(tmp_path / "sparse") == len(data_pages) * PAGE


def test_data_bytes_of_a_file_without_holes(ragged: Path) -> None:
    assert data_bytes(ragged) == RAGGED


@pytest.mark.parametrize("parts", HOLES.values(), ids=HOLES.keys())
def test_a_sparse_file_that_ends_early(tmp_path: Path, parts: list[int], large_blocks: None) -> None:
    """That nothing is there must not be taken for a hole."""
    raw = sparse(tmp_path / "sparse", parts)
    with closing(Reader(tmp_path / "sparse")) as reader:
        with pytest.raises(IntegrityError, match=f"ends at byte {len(raw)}, expected {len(raw) + 1}"):
            list(reader.blocks(0, len(raw) + 1))
        os.truncate(tmp_path / "sparse", PAGE // 2)
        with pytest.raises(IntegrityError, match=f"ends at byte {PAGE // 2}, "):
            list(reader.blocks(0, len(raw)))
        with pytest.raises(IntegrityError, match="it was cut while in use"):
            list(reader.blocks(PAGE, 1))
