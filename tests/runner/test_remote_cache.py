"""The cache by itself: pieces, mirrors that never claim what is not there, and the bound."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.digest import CHUNK_BYTES, TensorHasher
from manifests.errors import ManifestError, ResourceError, ToolkitError
from manifests.paths import Kind
from manifests.schema import FileEntry, TensorEntry
from runner import cache_folder, filesystem
from runner.cache_folder import TENSORS, CacheFolder, find_root
from runner.mirror import TEMP_SUFFIX, Mirror, kept_bytes, own_bytes
from runner.pieces import REQUEST_BYTES, Piece, cut, disk_bytes, requests, touched


@pytest.fixture
def folder(memory_folder: Path) -> Path:
    return memory_folder


def entry(sizes: list[int], *, gap: int = 0, chunks: bool = True) -> FileEntry:
    """A file of tensors, every second one an expert's."""
    tensors, at = [], 4096
    for number, size in enumerate(sizes):
        count = -(-size // CHUNK_BYTES)
        digests = tuple(hashlib.sha256(f"{number} {chunk}".encode()).hexdigest() for chunk in range(count))
        name = f"model.layers.3.mlp.experts.{number}.up_proj.weight" if number % 2 else f"model.norm{number}.weight"
        tensors.append(
            TensorEntry(
                name=name, dtype="U8", shape=(size,), offset=at, size=size, logical_shape=(size,), source_name=name,
                digest="f" * 64 if chunks else None, chunks=digests if count > 1 and chunks else (),
            )
        )  # fmt: skip
        at += size + gap
    return FileEntry(
        path="a", kind=Kind.SHARD, size=at, unpacked_size=at, header_size=4096, header_sha256=None, digest=None,
        tensors=tuple(tensors),
    )  # fmt: skip


SIZES = st.lists(st.integers(0, 3 * CHUNK_BYTES), min_size=1, max_size=6)


@given(SIZES, st.integers(0, 5), st.booleans(), st.data())
def test_pieces_cover_every_tensor_and_no_request_is_too_large(
    sizes: list[int], gap: int, chunks: bool, data: st.DataObject
) -> None:
    file = entry(sizes, gap=gap, chunks=chunks)
    pieces = cut(file)
    covered = [(piece.begin, piece.end) for piece in pieces]
    assert all(0 < end - begin <= CHUNK_BYTES for begin, end in covered)
    assert sum(end - begin for begin, end in covered) == sum(sizes)
    assert covered == sorted(covered)
    for tensor in file.tensors:
        own = [piece for piece in pieces if piece.tensor == tensor.name]
        expected = tensor.chunks or (tensor.digest,) * (tensor.size > 0)
        assert [piece.digest for piece in own] == list(expected if chunks else (None,) * len(own))
        assert all(piece.is_dense == ("experts" not in tensor.name) for piece in own)
    begin = data.draw(st.integers(0, file.size))
    end = data.draw(st.integers(begin + 1, file.size + 1))
    found = set(touched(pieces, begin, end))
    assert found == {number for number, (a, b) in enumerate(covered) if a < end and b > begin}
    wanted = sorted(data.draw(st.sets(st.sampled_from(range(len(pieces))))) if pieces else [])
    groups = requests(pieces, wanted)
    assert [number for group in groups for number in group] == wanted
    for group in groups:
        some = pieces[group.start : group.stop]
        assert all(one.end == other.begin for one, other in itertools.pairwise(some))
        assert len(some) == 1 or some[-1].end - some[0].begin <= REQUEST_BYTES


def test_a_file_that_no_disk_can_hold_is_refused_before_it_is_cut() -> None:
    with pytest.raises(ManifestError, match="no file of a checkpoint"):
        cut(replace(entry([1]), size=1 << 60))


def test_digests_are_those_of_the_format() -> None:
    """The chunk of a piece is the chunk that the manifest's digest is of."""
    data = random.Random(0).randbytes(CHUNK_BYTES + 1000)
    hasher = TensorHasher()
    hasher.update(memoryview(data))
    file = entry([len(data)])
    whole = FileEntry(
        **{name: getattr(file, name) for name in FileEntry.__slots__ if name != "tensors"},
        tensors=(
            TensorEntry(
                **{name: getattr(file.tensors[0], name) for name in TensorEntry.__slots__ if name != "chunks"},
                chunks=hasher.chunks(),
            ),
        ),
    )
    for piece in cut(whole):
        part = data[piece.begin - 4096 : piece.end - 4096]
        assert piece.digest == hashlib.sha256(part).hexdigest()


# ---- mirrors ----

PIECES = cut(entry([10_000, 5_000, 3, 70_000, 4_096, 1]))
SIZE = 4096 + 10_000 + 5_000 + 3 + 70_000 + 4_096 + 1


def make(path: Path, present: range = range(0), used: int = 7) -> Mirror:
    Mirror.create(path, SIZE, PIECES)
    mirror = Mirror.open(path)
    assert mirror is not None
    for number in present:
        piece = PIECES[number]
        mirror.write(memoryview(bytes([number + 1]) * (piece.end - piece.begin)), piece.begin)
        mirror.sync()
        mirror.mark(range(number, number + 1), used, absent=True)
    return mirror


def content(mirror: Mirror, number: int) -> set[int]:
    with mirror.reader(direct=False) as (descriptor, _):
        return set(os.pread(descriptor, PIECES[number].end - PIECES[number].begin, PIECES[number].begin))


def test_a_mirror_knows_what_is_there(folder: Path) -> None:
    path = folder / "deep" / "file"
    with closing(make(path, range(1, 3))) as mirror:
        assert mirror.fits(PIECES)
        assert not mirror.fits(PIECES[:-1])
        assert [one.used for one in mirror.entries()] == [0, 7, 7, 0, 0, 0]
        mirror.mark(range(6), 9, absent=False)
        assert [one.used for one in mirror.entries()] == [0, 9, 9, 0, 0, 0]
    assert not Mirror.create(path, SIZE, PIECES)
    assert [one.name for one in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize("keep", [0, 1, 24, 4096, -1, -24, -33])
def test_what_is_no_whole_mirror_is_none(folder: Path, keep: int) -> None:
    path = folder / "file"
    make(path).close()
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    assert Mirror.open(path) is None
    with pytest.raises(FileNotFoundError):
        Mirror.open(folder / "absent")


def test_freed_pieces_leave_their_neighbours_alone(folder: Path) -> None:
    for first in range(6):
        for last in range(first, 6):
            path = folder / f"{first}-{last}"
            with closing(make(path, range(6))) as mirror:
                before = kept_bytes(mirror.entries())
                freed = mirror.clear(range(first, last + 1))
                assert before - kept_bytes(mirror.entries()) == freed
                assert mirror.allocated_bytes() <= kept_bytes(mirror.entries()) + own_bytes(6)
                for number in range(6):
                    is_gone = first <= number <= last
                    assert content(mirror, number) == {0 if is_gone else number + 1}
                    assert bool(mirror.entries()[number].used) != is_gone


def test_pieces_freed_one_by_one_leave_nothing(folder: Path) -> None:
    """In any order: the last of those that share a page frees it."""
    for order in itertools.permutations(range(6)):
        path = folder / "file"
        make(path, range(6)).close()
        for number in order:
            with closing(opened(path)) as mirror:
                mirror.lock(range(number, number + 1), filesystem.EXCLUSIVE)
                mirror.clear(range(number, number + 1))
        with closing(opened(path)) as mirror:
            assert mirror.allocated_bytes() == 4096
        path.unlink()


def test_a_page_that_somebody_is_writing_to_stays(folder: Path) -> None:
    """A piece that is not here yet, but comes: who frees its neighbour must not free what was written of it."""
    with closing(make(folder / "file", range(1, 2))) as one, closing(opened(folder / "file")) as other:
        other.lock(range(2, 3), filesystem.EXCLUSIVE)
        other.write(memoryview(b"\3" * 3), PIECES[2].begin)
        one.lock(range(1, 2), filesystem.EXCLUSIVE)
        one.clear(range(1, 2))
        other.mark(range(2, 3), 7, absent=True)
        assert content(other, 2) == {3}


def opened(path: Path) -> Mirror:
    mirror = Mirror.open(path)
    assert mirror is not None
    return mirror


def test_a_clock_that_was_never_set_makes_no_piece_absent(folder: Path) -> None:
    with closing(make(folder / "file")) as mirror:
        for now in (0, -5, 1 << 40):
            mirror.mark(range(6), now, absent=True)
            assert all(one.used for one in mirror.entries())


def test_a_piece_is_not_there_before_its_bytes_are_and_not_while_they_go(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(make(folder / "file", range(6))) as mirror:
        events: list[str] = []
        sync, punch, write = os.fdatasync, filesystem.punch, os.pwrite

        def log(name: str, call: Callable[..., int]) -> Callable[..., int]:
            def logged(*arguments: int) -> int:
                events.append(name)
                return call(*arguments)

            return logged

        monkeypatch.setattr(os, "fdatasync", log("sync", sync))
        monkeypatch.setattr(filesystem, "punch", log("punch", punch))
        monkeypatch.setattr(os, "pwrite", log("write", write))
        mirror.clear(range(2, 4))
        assert events == ["write", "sync", "punch"]


def test_threads_and_processes_lock_pieces(folder: Path) -> None:
    one, other = make(folder / "file"), Mirror.open(folder / "file")
    assert other is not None
    with closing(one), closing(other):
        assert one.lock(range(3), filesystem.EXCLUSIVE, wait=False)
        assert other.lock(range(3, 6), filesystem.EXCLUSIVE, wait=False)
        assert not other.lock(range(2, 3), filesystem.SHARED, wait=False)
        assert one.lock(range(3), filesystem.SHARED, wait=False)
        assert other.lock(range(2, 3), filesystem.SHARED, wait=False)
        assert not other.lock(range(2, 3), filesystem.EXCLUSIVE, wait=False)
        one.close()
        assert other.lock(range(2, 3), filesystem.EXCLUSIVE, wait=False)


# ---- the bound ----


def fill(cache: CacheFolder, name: str, used: int, present: range = range(6), state: str = "s") -> Path:
    """A mirror in a state, with its room written down as it is in use."""
    path = cache.state(state) / TENSORS / name
    cache.reserve(own_bytes(6) + sum(disk_bytes(PIECES[number]) for number in present))
    make(path, present, used).close()
    return path


def used_of(path: Path) -> list[int]:
    if not path.exists():
        return []
    mirror = Mirror.open(path)
    assert mirror is not None
    with closing(mirror):
        return [one.used for one in mirror.entries()]


def allocated(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


WHOLE = own_bytes(6) + sum(map(disk_bytes, PIECES))
EXPERTS = sum(disk_bytes(piece) for piece in PIECES if not piece.is_dense)


def test_what_was_unused_for_longest_goes_first_and_experts_before_dense(folder: Path) -> None:
    cache = CacheFolder(folder, 3 * WHOLE)
    old, new, other = fill(cache, "old", 5), fill(cache, "new", 9), fill(cache, "other", 7)
    victims = [(one.path.name, one.is_dense) for one in reversed(cache._list_victims())]
    assert victims[:9] == [(name, False) for name in ("old", "other", "new") for _ in range(3)]
    assert sorted(victims[9:]) == [(name, True) for name in ("new", "old", "other") for _ in range(3)]
    cache.reserve(1)
    assert (used_of(new), used_of(other)) == ([9] * 6, [7] * 6)
    assert used_of(old)[::2] == [5, 5, 5]
    assert 0 in used_of(old)


def test_dense_weights_do_not_go_while_there_are_experts(folder: Path) -> None:
    """Also when these came since it was last looked what there is."""
    cache = CacheFolder(folder, 3 * WHOLE)
    first = fill(cache, "first", 1)
    for number in range(2, 30):
        fill(cache, f"expert {number}", number, range(1, 6, 2))
        assert used_of(first)[::2] == [1, 1, 1], number
        assert cache_bytes(cache) <= 3 * WHOLE
    assert 0 in used_of(first)


def test_a_dense_part_counts_as_used_with_its_state(folder: Path) -> None:
    cache = CacheFolder(folder, 2 * WHOLE)
    mine = fill(cache, "dense", 3, range(1), "mine")
    fill(cache, "experts", 9, range(1, 2), "mine")
    idle = fill(cache, "dense", 5, range(1), "idle")
    cache.reserve(2 * WHOLE - cache_bytes(cache) + 1)
    assert used_of(idle) == []
    assert used_of(mine)[0] == 3


def cache_bytes(cache: CacheFolder) -> int:
    return cache._ledger.bytes


def test_what_is_in_use_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder, "_LONGEST_S", 0.1)
    cache = CacheFolder(folder, WHOLE)
    path = fill(cache, "used", 5)
    mirror = Mirror.open(path)
    assert mirror is not None
    with closing(mirror):
        mirror.lock(range(6), filesystem.SHARED)
        with pytest.raises(ResourceError, match="in use"):
            cache.reserve(1)
        assert used_of(path) == [5] * 6
    cache.reserve(1)
    assert used_of(path) != [5] * 6


def test_what_somebody_else_freed_is_not_counted_twice(folder: Path) -> None:
    cache, other = CacheFolder(folder, 3 * WHOLE), CacheFolder(folder, 3 * WHOLE)
    for number in range(3):
        fill(cache, f"{number}", number + 1)
    cache._victims = cache._list_victims()
    other.reserve(WHOLE)
    before = cache_bytes(cache)
    freed = cache._evict(WHOLE)
    assert cache_bytes(cache) == before - freed
    other.release(WHOLE)
    assert allocated(folder / "states") <= cache_bytes(cache)


def test_the_number_stays_right_however_much_goes_and_comes(folder: Path) -> None:
    """Neighbours share pages: what is counted when they come is what is given back when they go."""
    cache = CacheFolder(folder, 2 * WHOLE)
    for number in range(50):
        fill(cache, f"{number}", number + 1)
        assert cache_bytes(cache) == cache._count(keep=None)
        assert allocated(folder / "states") <= cache_bytes(cache)


def test_a_refused_write_stays_not_counted(folder: Path) -> None:
    cache = CacheFolder(folder)
    (cache.place("folder") / "in the way").mkdir(parents=True)
    before = cache_bytes(cache)
    with pytest.raises(ToolkitError, match="cannot be written to"):
        cache.put(cache.place("folder"), b"x")
    assert cache_bytes(cache) <= before


def test_nothing_is_freed_for_what_has_no_room_at_all(folder: Path) -> None:
    cache = CacheFolder(folder, 2 * WHOLE)
    path = fill(cache, "file", 1)
    with pytest.raises(ResourceError):
        cache.reserve(2 * WHOLE + 1)
    assert used_of(path) == [1] * 6


def test_where_files_have_no_holes_a_bound_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheFolder(folder, WHOLE)
    fill(cache, "file", 1)

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(filesystem, "punch", refuse)
    with pytest.raises(ToolkitError, match="frees no parts of files"):
        cache.reserve(WHOLE)


def test_a_process_tidies_up_once(folder: Path) -> None:
    """Later it may be fetching itself, into files that nothing speaks of yet."""
    cache = CacheFolder(folder, 10 * WHOLE)
    cache.begin("s")
    path = fill(cache, "file", 5, range(0))
    before = cache_bytes(cache)
    cache.begin("s")
    assert path.exists()
    assert cache_bytes(cache) == before


def test_somebody_waits_until_what_is_in_use_is_free(folder: Path) -> None:
    cache = CacheFolder(folder, WHOLE)
    mirror = Mirror.open(fill(cache, "used", 5))
    assert mirror is not None
    mirror.lock(range(6), filesystem.SHARED)
    timer = threading.Timer(0.2, mirror.close)
    timer.start()
    cache.reserve(100)
    timer.join()


def test_who_waits_for_room_is_patient_while_others_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a slow way what others fetch may take longer than anybody should wait for nothing."""
    monkeypatch.setattr(cache_folder, "_LONGEST_S", 0.4)
    cache, other = CacheFolder(folder, 10 * WHOLE), CacheFolder(folder, 10 * WHOLE)
    other.reserve(10 * WHOLE)

    def go_on() -> None:
        for _ in range(10):
            time.sleep(0.1)
            other.release(WHOLE // 20)
        other.release(WHOLE)

    thread = threading.Thread(target=go_on)
    thread.start()
    cache.reserve(WHOLE)
    thread.join()


def test_names_of_half_written_files_are_nobody_elses() -> None:
    """In containers all processes may have one number."""
    command = "from runner.mirror import temporary_name; import os; os.getpid = lambda: 1; print(temporary_name())"
    names = [subprocess.check_output([sys.executable, "-c", command], text=True) for _ in range(2)]
    assert names[0] != names[1]
    assert all(name.strip().endswith(TEMP_SUFFIX) for name in names)


def test_more_than_the_bound_is_refused_at_once(folder: Path) -> None:
    cache = CacheFolder(folder, WHOLE)
    with pytest.raises(ResourceError, match="--cache-size"):
        cache.reserve(WHOLE + 1)


def test_what_a_killed_process_left_is_found(folder: Path) -> None:
    cache = CacheFolder(folder, 10 * WHOLE)
    path = fill(cache, "file", 5, range(2))
    with closing(make(path)) as mirror:
        mirror.write(memoryview(b"x" * 70_000), PIECES[3].begin)  # and killed before it was marked
    cache.reserve(5 * WHOLE)  # and before this was taken
    (path.parent / "123-0.new").write_bytes(b"half a table")
    cache.put(cache.state("stale") / "manifest.json", b"{}")
    cache.begin("s")
    assert cache_bytes(cache) == own_bytes(6) + sum(disk_bytes(PIECES[number]) for number in range(2))
    assert allocated(path.parent) <= cache_bytes(cache)
    assert used_of(path) == [5, 5, 0, 0, 0, 0]
    assert not cache.state("stale").exists()
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_nothing_of_others_is_tidied_up_while_they_are_there(folder: Path) -> None:
    other = CacheFolder(folder, 10 * WHOLE)
    other.put(other.state("theirs") / "manifest.json", b"{}")
    other.reserve(5 * WHOLE)
    cache = CacheFolder(folder, 10 * WHOLE)
    cache.begin("mine")
    assert other.state("theirs").exists()
    assert cache_bytes(cache) >= 5 * WHOLE


def test_a_smaller_bound_takes_hold_when_it_is_given(folder: Path) -> None:
    cache = CacheFolder(folder)
    for number in range(6):
        fill(cache, f"{number}", number + 1)
    del cache
    cache = CacheFolder(folder, 2 * WHOLE)
    cache.begin("s")
    assert allocated(folder / "states") <= 2 * WHOLE


def test_the_disk_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = CacheFolder(folder)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="No space left"):
        cache.put(cache.state("s") / "file", b"x")
    assert not any((folder / "states" / "s").iterdir())


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERT_RESHARD_CACHE", "/named")
    assert find_root() == Path("/named")
    monkeypatch.delenv("EXPERT_RESHARD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/base")
    assert find_root() == Path("/base/expert-reshard")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/me")
    assert find_root() == Path("/home/me/.cache/expert-reshard")


def test_a_piece_is_at_least_its_pages() -> None:
    assert disk_bytes(Piece(tensor="t", begin=4095, end=4097, digest=None, is_dense=False)) == 8192


def test_no_locks_no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(filesystem.fcntl, "F_OFD_SETLKW")
    with pytest.raises(ToolkitError, match="Linux"):
        CacheFolder(folder)
