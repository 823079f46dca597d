"""The window: the right bytes in the right slot, whatever is evicted; errors by name; a file cut while in use."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from manifests.checkpoint import Location
from manifests.errors import IntegrityError, SourceNotFoundError, ToolkitError
from runner import kernels
from runner.background import Background, Load
from runner.layout import Layout, lay_out
from runner.memory import Region
from runner.policy import Key, Policy
from runner.reading import Direct, Files, Mapped
from runner.residency import GROUP_EXPERTS, ExpertWindow

EXPERT_BYTES = 3 * 4096 + 700
LAYERS, EXPERTS = 2, 40
WAYS = [
    pytest.param(Direct, id="direct"),
    pytest.param(
        Mapped,
        id="mmap",
        marks=pytest.mark.skipif(not kernels.supported(), reason="mapped weights need the compiled library"),
    ),
]
pytestmark = pytest.mark.parametrize("way", WAYS)


def content(key: Key) -> bytes:
    return random.Random(repr(key)).randbytes(EXPERT_BYTES)


class Folder:
    """Experts as files, each with a header's worth of bytes before and one byte behind."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sizes: dict[str, int] = {}
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                data = bytes(4096) + content((layer, expert)) + b"x"
                self.path((layer, expert)).write_bytes(data)
                self.sizes[self.path((layer, expert)).name] = len(data)

    def path(self, key: Key) -> Path:
        return self.root / f"{key[0]}-{key[1]}"

    def layout(self, key: Key, alignment: int) -> Layout:
        path = self.path(key)
        at, locations = 4096, []
        for name, size in (("weight", 3 * 4096), ("scale", 700)):
            locations.append(
                Location(
                    name=name, file=path.name, place=str(path), offset=at, size=size, dtype="F8_E4M3", shape=(size,),
                    logical_shape=(size,), codec="none", unpacked_size=0,
                )
            )  # fmt: skip
            at += size
        return lay_out(locations, alignment=alignment)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def open_window(folder: Folder, way: type[Direct] | type[Mapped], slots: int) -> ExpertWindow:
    chosen = way(Files(folder.root, folder.sizes, folder.root.joinpath))
    return ExpertWindow(
        lambda key: folder.layout(key, chosen.alignment),
        slots=slots,
        slot_bytes=5 * 4096,
        way=chosen,
        background=Background(),
        policy=Policy(),
    )


def use(window: ExpertWindow, layer: int, experts: Sequence[int]) -> Iterator[list[int]]:
    """Go through experts and compare every byte; give the experts of each group in their order of arrival."""
    for group in window.groups(layer, experts):
        seen = []
        for some in group:
            for expert in some:
                assert expert.key[0] == layer
                found = b"".join(bytes(one.view(torch.uint8).numpy()) for one in expert.tensors.values())
                assert found == content(expert.key), expert.key
                seen.append(expert.key[1])
        yield seen


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 33, LAYERS * EXPERTS])
def test_every_expert_has_its_own_bytes_whatever_was_there_before(
    folder: Folder, way: type[Direct] | type[Mapped], slots: int
) -> None:
    window = open_window(folder, way, slots)
    chance = random.Random(slots)
    asked = 0
    for _ in range(60):
        window.tick()
        layer, experts = chance.randrange(LAYERS), sorted(chance.sample(range(EXPERTS), chance.randint(1, 36)))
        groups = list(use(window, layer, experts))
        # Groups follow the order; within one, experts come as they arrive.
        assert [expert for group in groups for expert in sorted(group)] == experts
        assert all(len(group) <= max(1, min(slots, GROUP_EXPERTS)) for group in groups)
        assert len(window.held) <= slots
        asked += len(experts)
    assert window.counters.hits + window.counters.misses == asked
    assert window.counters.misses * EXPERT_BYTES == window.counters.read_bytes
    if slots == LAYERS * EXPERTS:
        assert window.counters.misses == len(window.held) <= LAYERS * EXPERTS
    assert window.held_bytes == len(window.held) * EXPERT_BYTES


def test_what_is_there_comes_first(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 10)
    list(use(window, 0, [3, 5]))
    group = next(window.groups(0, [1, 3, 5, 7]))
    first = [expert.key[1] for expert in next(group)]
    assert {3, 5} <= set(first)
    rest = [expert.key[1] for some in group for expert in some]
    assert sorted(first + rest) == [1, 3, 5, 7]
    assert (window.counters.hits, window.counters.misses) == (2, 4)


def test_what_has_its_turn_later_is_not_read_again(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    """A long prompt asks for more than fits; what fits is what was there."""
    window = open_window(folder, way, 24)
    list(use(window, 0, range(16, 40)))
    assert window.counters.misses == 24
    list(use(window, 0, range(40)))
    # Half of the window is for what comes and goes.
    assert window.counters.hits >= 12


def test_an_abandoned_group_can_be_evicted(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 4)
    groups = window.groups(0, range(4))
    next(groups)
    groups.close()  # type: ignore[attr-defined]
    assert not window._policy._locked
    list(use(window, 0, range(4)))
    groups = window.groups(0, [*range(4, 20), *range(4)])
    next(groups)
    groups.close()  # type: ignore[attr-defined]
    assert not window._policy._locked
    for layer in (1, 0):
        assert [sorted(one) for one in use(window, layer, range(4))] == [[0, 1, 2, 3]]


def test_pinned_experts_stay(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 8)
    window.pin([(0, 3), (1, 2)])
    for _ in range(3):
        list(use(window, 0, [expert for expert in range(EXPERTS) if expert != 3]))
    assert {(0, 3), (1, 2)} <= set(window.held)
    hits = window.counters.hits
    list(use(window, 0, [3]))
    list(use(window, 1, [2]))
    assert window.counters.hits == hits + 2


def test_an_expert_that_cannot_be_used_takes_no_place(
    folder: Folder, way: type[Direct] | type[Mapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    window = open_window(folder, way, 2)
    tensors = Region.tensors
    list(use(window, 0, [1, 2]))
    with monkeypatch.context() as patch:
        patch.setattr(Region, "tensors", lambda *_: (_ for _ in ()).throw(ToolkitError("no such dtype")))
        for _ in range(5):
            with pytest.raises(ToolkitError, match="no such dtype"):
                list(use(window, 0, [3]))
    assert Region.tensors is tensors
    assert not window._policy._locked
    for layer in (1, 0):
        assert [sorted(one) for one in use(window, layer, [1, 2])] == [[1, 2]]


def test_a_missing_file_is_named_and_the_window_goes_on(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 4)
    folder.path((0, 2)).rename(folder.root / "away")
    with pytest.raises(SourceNotFoundError, match=r"0-2: no such file"):
        list(use(window, 0, [1, 2, 3]))
    assert (0, 2) not in window.held
    list(use(window, 1, range(EXPERTS)))
    with pytest.raises(SourceNotFoundError):
        list(use(window, 0, [2]))
    (folder.root / "away").rename(folder.path((0, 2)))
    list(use(window, 0, [2]))  # and it is read when it is back


def test_a_file_that_was_cut_before_it_was_read(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 4)
    os.truncate(folder.path((0, 2)), 5000)
    with pytest.raises(IntegrityError, match=r"0-2: has 5000 bytes, expected"):
        list(use(window, 0, [2]))


def test_a_file_that_was_replaced_while_the_model_ran(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 1)
    list(use(window, 0, [2]))
    list(use(window, 0, [1]))
    other = folder.root / "other"
    other.write_bytes(folder.path((0, 2)).read_bytes())
    other.replace(folder.path((0, 2)))
    with pytest.raises(IntegrityError, match=r"0-2: was replaced or written to while in use"):
        list(use(window, 0, [2]))


def test_a_file_that_was_replaced_before_it_was_read(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    """It may be of another checkpoint than what was read already."""
    window = open_window(folder, way, 1)
    list(use(window, 0, [1]))
    kept = folder.root / "kept"
    folder.path((0, 2)).rename(kept)
    folder.path((0, 3)).rename(folder.path((0, 2)))
    kept.rename(folder.path((0, 3)))
    with pytest.raises(IntegrityError, match=r"0-2: was replaced or written to while in use"):
        list(use(window, 0, [2]))


def test_a_file_that_is_cut_while_its_expert_is_used(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    """Not the end of the process: mapped, the expert becomes zeros and is refused; read, it is a copy."""
    window = open_window(folder, way, 4)
    groups = window.groups(0, [2, 3])
    (some,) = ([expert for some in group for expert in some] for group in [next(groups)])
    assert bytes(some[0].tensors["weight"].view(torch.uint8).numpy()) == content((0, 2))[: 3 * 4096]
    os.truncate(folder.path((0, 2)), 0)
    found = bytes(some[0].tensors["weight"].view(torch.uint8).numpy())
    if way is Direct:
        assert found == content((0, 2))[: 3 * 4096]
        assert next(groups, None) is None
        return
    assert found != content((0, 2))[: 3 * 4096]
    with pytest.raises(IntegrityError, match=r"0-2: was cut while in use"):
        next(groups)
    assert (0, 2) not in window.held
    list(use(window, 0, [3]))
    # The place where it lay is as good as any other, for others and for itself.
    for expert in (*range(10, 30), 3):
        list(use(window, 0, [expert]))
    with pytest.raises(IntegrityError, match=r"0-2: has 0 bytes"):
        list(use(window, 0, [2]))


@pytest.mark.parametrize("change", ["cut within a page", "written to"])
def test_a_file_that_changes_without_a_bus_error(folder: Folder, way: type[Direct] | type[Mapped], change: str) -> None:
    """Behind the end of a file that ends within a page a mapping shows zeros; and it shows what others write."""
    window = open_window(folder, way, 4)
    groups = window.groups(0, [2])
    assert [expert.key for some in next(groups) for expert in some] == [(0, 2)]
    path = folder.path((0, 2))
    if change == "written to":
        with path.open("r+b") as file:
            file.seek(5000)
            file.write(b"other")
        os.utime(path, ns=(0, 0))
    else:
        os.truncate(path, path.stat().st_size - 10)
    if way is Direct:
        assert next(groups, None) is None  # what was read is a copy
        return
    with pytest.raises(IntegrityError, match=r"0-2: (was replaced or written to while in use|has \d+ bytes, expected)"):
        next(groups)
    assert (0, 2) not in window.held


@pytest.mark.parametrize("step", ["touch", "lock", "admit", "submit", "tensors", "victim", "forget", "unlock"])
def test_an_interrupt_anywhere_leaves_a_window_that_works(
    folder: Folder, way: type[Direct] | type[Mapped], step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes between any two steps; places, locks and the policy's books are right for the next pass."""
    owner = {"submit": Background, "tensors": Region}.get(step, Policy)
    real = getattr(owner, step)
    for when in (1, 2, 5):
        for before in (True, False):
            window = open_window(folder, way, 6)
            list(use(window, 0, range(8)))
            left = iter(range(when))

            def interrupted(*args: Any, left: Iterator[int] = left, before: bool = before, **kwargs: Any) -> Any:
                is_last = next(left, None) == when - 1  # noqa: B023
                if is_last and before:
                    raise KeyboardInterrupt
                found = real(*args, **kwargs)
                if is_last:
                    raise KeyboardInterrupt
                return found

            with monkeypatch.context() as patch:
                patch.setattr(owner, step, interrupted)
                with contextlib.suppress(KeyboardInterrupt):
                    list(use(window, 1, range(4, 14)))
            gc.collect()
            for layer in (0, 1):
                assert [sorted(one) for one in use(window, layer, range(6))] == [list(range(6))]
            assert len(window._policy) == len(window.held) == 6
            assert sorted(window._unused) == []


@pytest.mark.parametrize("left", [4096, 9000])
def test_a_file_that_is_cut_while_it_is_read(
    folder: Folder, way: type[Direct] | type[Mapped], left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking at its size and reading it."""
    window = open_window(folder, way, 4)
    real = os.fstat

    def cut(descriptor: int) -> os.stat_result:
        found = real(descriptor)
        os.truncate(folder.path((0, 2)), left)
        return found

    monkeypatch.setattr(os, "fstat", cut)
    with pytest.raises(IntegrityError, match=r"0-2: ends (at|before) byte .*; it was cut while in use"):
        list(use(window, 0, [2]))


def test_addresses_are_given_back(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    def mappings() -> int:
        return Path("/proc/self/maps").read_text(encoding="utf-8").count(str(folder.root))

    window = open_window(folder, way, 4)
    list(use(window, 0, range(30)))
    assert mappings() <= 4
    assert len(os.listdir("/proc/self/fd")) < 100
    del window
    gc.collect()
    assert mappings() == 0


def is_cached(path: Path) -> bool:
    """Whether the first page of a file's content is in the page cache; looking does not bring it there."""
    libc, found = ctypes.CDLL(None, use_errno=True), (ctypes.c_ubyte * 2)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8192) as view:
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(8192), found) == 0
    return bool(found[1] & 1)


def test_evicted_experts_leave_the_page_cache(folder: Folder, way: type[Direct] | type[Mapped]) -> None:
    window = open_window(folder, way, 2)
    os.sync()  # what is not written yet cannot leave
    files = Files(folder.root, folder.sizes, folder.root.joinpath)
    for expert in range(10):
        files.forget(folder.layout((0, expert), 4096))
        assert not is_cached(folder.path((0, expert)))
    list(use(window, 0, range(10)))
    held = {key[1] for key in window.held}
    assert len(held) == 2
    assert [is_cached(folder.path((0, expert))) for expert in range(10)] == [
        way is Mapped and expert in held for expert in range(10)
    ]


def test_a_slot_is_not_read_into_while_its_last_reader_is_at_work(
    folder: Folder, way: type[Direct] | type[Mapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An abandoned expert is still on its way when its slot is given to the next."""
    load, go = way.load, threading.Event()

    def late(self: Direct | Mapped, layout: Layout, region: Region, position: int) -> None:
        if layout.runs[0].file == "0-0":
            go.wait(60)
        load(self, layout, region, position)

    monkeypatch.setattr(way, "load", late)
    window = open_window(folder, way, 1)
    groups = window.groups(0, [0])
    assert next(next(groups)) == []
    groups.close()  # type: ignore[attr-defined]
    abandoned = window._held[(0, 0)].load
    threading.Timer(0.3, go.set).start()
    list(use(window, 0, [1]))
    go.wait(60)
    abandoned.wait()
    list(use(window, 0, [1]))
    assert window.counters.hits == 1


def test_a_slot_keeps_its_last_expert_when_an_abandoned_one_is_read_late(
    folder: Folder, way: type[Direct] | type[Mapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads may begin in any order: the one before must not be read over the one that is wanted now."""
    loads: list[Load] = []

    def keep(self: Background, work: Callable[[], None], *, urgency: int = 0) -> Load:
        loads.append(Load(self._queue, work))
        return loads[-1]

    monkeypatch.setattr(Background, "submit", keep)
    window = open_window(folder, way, 1)
    for expert in (0, 1):
        groups = window.groups(0, [expert])
        assert next(next(groups)) == []
        groups.close()  # type: ignore[attr-defined]
    loads[1].run()
    loads[0].run()
    assert list(use(window, 0, [1])) == [[1]]
    assert (window.counters.hits, window.counters.misses) == (1, 2)


def test_a_bus_error_elsewhere_still_ends_the_process(
    folder: Folder, way: type[Direct] | type[Mapped], tmp_path: Path
) -> None:
    """The guard is for our own regions: any other one is as deadly as before."""
    code = f"""
        import mmap, os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_residency as ours
        folder = ours.Folder(Path({str(tmp_path)!r}))
        window = ours.open_window(folder, ours.{way.__name__}, 2)
        list(ours.use(window, 0, [1]))
        path = Path({str(tmp_path)!r}) / "other"
        path.write_bytes(bytes(8192))
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 8192, prot=mmap.PROT_READ)
        os.truncate(path, 0)
        view[5000]
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == -7, done.stderr


def test_a_disk_that_fails_is_named(
    folder: Folder, way: type[Direct] | type[Mapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    window = open_window(folder, way, 4)
    monkeypatch.setattr("os.preadv", fail)
    monkeypatch.setattr("runner.memory.Region.populate", fail)
    with pytest.raises(ToolkitError, match=r"0-2: cannot be read at byte 4096: Input/output error"):
        list(use(window, 0, [2]))


def test_a_system_that_cannot_populate_reads_instead(
    folder: Folder, way: type[Direct] | type[Mapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner.memory.Region.populate", lambda *_: False)
    window = open_window(folder, way, 4)
    list(use(window, 0, range(20)))


def test_a_file_system_without_direct_reading(
    folder: Folder, way: type[Direct] | type[Mapped], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *rest)

    monkeypatch.setattr("os.open", refuse)
    window = open_window(folder, way, 4)
    os.sync()  # what is not written yet cannot leave
    list(use(window, 0, range(20)))
    if way is Direct:  # read through the page cache, and out of it
        assert not any(is_cached(folder.path((0, expert))) for expert in range(20))
