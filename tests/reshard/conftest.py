"""Faults on order: a disk that fails at the n-th call, and programs that are stopped in mid-run."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import manifests
from manifests.errors import IncompleteError
from manifests.paths import JOURNAL_NAME, MANIFEST_NAME
from manifests.schema import Selection
from reshard.blocks import ALIGN_BYTES
from reshard.destination import Hold
from reshard.journal import Journal
from reshard.packing import pack
from reshard.plan import Plan, make_plan
from reshard.progress import Progress
from reshard.run import reshard_checkpoint
from reshard.source import SourceCheckpoint, read_source


@pytest.fixture
def fail_call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let the n-th call of an os function fail, counted from 1, and all later ones of it too, but not of `open`."""

    def install(name: str, number: int, code: int = errno.EIO) -> list[int]:
        real, calls = getattr(os, name), [0]

        def call(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            # Who cannot open folders cannot clean up either.
            if calls[0] == number or (calls[0] > number and name != "open"):
                raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, call)
        return calls

    return install


@pytest.fixture(scope="session")
def plan_of() -> Callable[..., tuple[SourceCheckpoint, Plan]]:
    """Source and plan of a folder."""

    def plan(folder: Path, selection: Selection | None = None) -> tuple[SourceCheckpoint, Plan]:
        source = read_source(folder)
        return source, make_plan(source, selection or Selection())

    return plan


@pytest.fixture
def run_planned() -> Callable[..., Any]:
    """Run a plan that was made before, so that things can happen in between."""

    def run(source: SourceCheckpoint, plan: Plan, destination: Path, jobs: int = 2) -> Any:
        with Progress(0, label="", quiet=True) as progress:
            return reshard_checkpoint(source, plan, destination, jobs=jobs, progress=progress)

    return run


class Stopped(Exception):
    """Stands for whatever stops a command."""


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Let a command record so many shards and no more: what it holds then is what a kill at that moment leaves."""

    @contextmanager
    def stop(shards: int) -> Iterator[None]:
        append, recorded = Journal.append, [0]

        def counted(self: Journal, record: Mapping[str, Any]) -> None:
            if "shard" in record:
                if recorded[0] == shards:
                    raise Stopped
                recorded[0] += 1
            append(self, record)

        with monkeypatch.context() as patch, pytest.raises(Stopped):  # noqa: PT012
            patch.setattr(Journal, "append", counted)
            # A kill cleans nothing up.
            patch.setattr(Hold, "clear", lambda _: None)
            yield

    return stop


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], AbstractContextManager[None]]:
    """Stop a command as it calls a function; nothing is cleaned up, as after a kill."""

    @contextmanager
    def stop(module: Any, name: str) -> Iterator[None]:
        def stopped(*_: object, **__: object) -> None:
            raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):  # noqa: PT012
            patch.setattr(module, name, stopped)
            patch.setattr(Hold, "clear", lambda _: None)
            yield

    return stop


@pytest.fixture(scope="session")
def v2_resharded(
    v2_folder: Path, tmp_path_factory: pytest.TempPathFactory, reshard_folder: Callable[..., Path], tree: Any
) -> Iterator[Path]:
    """The resharded V2-like checkpoint, for reading."""
    folder = reshard_folder(v2_folder, tmp_path_factory.mktemp("resharded") / "v2")
    before = tree(folder)
    yield folder
    assert tree(folder) == before, "a test changed the shared v2"


@pytest.fixture(scope="session")
def v2_packed(v2_resharded: Path, tmp_path_factory: pytest.TempPathFactory, tree: Any) -> Iterator[Path]:
    """The same with its four experts packed, for reading."""
    folder = shutil.copytree(v2_resharded, tmp_path_factory.mktemp("packed") / "v2")
    with Progress(0, label="", quiet=True) as progress:
        pack(folder, jobs=2, progress=progress)
    before = tree(folder)
    yield folder
    assert tree(folder) == before, "a test changed the shared packed v2"


@pytest.fixture
def v2_copy(tmp_path: Path, v2_folder: Path) -> Path:
    """The V2-like checkpoint, to be damaged or used up."""
    return shutil.copytree(v2_folder, tmp_path / "v2")


@pytest.fixture
def undone_or_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Any) -> Callable[..., bool]:
    """After a failure: as before where no shard was recorded; else the same command ends as one that was left alone."""

    def check(out: Path, before: Mapping[str, str], again: Callable[[], Any], expected: Mapping[str, str]) -> bool:
        monkeypatch.undo()
        journal = out / JOURNAL_NAME
        if not journal.exists():
            assert tree(tmp_path) == before
            return False
        assert any('"shard":' in line for line in journal.read_text().splitlines()[1:])
        assert not (out / MANIFEST_NAME).exists()
        with pytest.raises(IncompleteError):
            manifests.open(out)
        again()
        assert tree(out) == expected
        return True

    return check


class Direct:
    """O_DIRECT on whatever file system the tests run on, with the rules of the strictest: whole pages everywhere."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.descriptors: set[int] = set()
        self.opened: list[int] = []
        self.moved: list[tuple[str, int, int]] = []
        """What was asked for: whether it was read or written, offset and length."""
        real_open, real_close, real_preadv, real_pwrite = os.open, os.close, os.preadv, os.pwrite

        def open_(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            descriptor = real_open(path, flags & ~os.O_DIRECT, *arguments, **options)
            if flags & os.O_DIRECT:
                self.descriptors.add(descriptor)
                self.opened.append(flags)
            return descriptor

        def close(descriptor: int) -> None:
            self.descriptors.discard(descriptor)
            real_close(descriptor)

        def preadv(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            if descriptor in self.descriptors:
                self._note("read", views[0], offset)
            return real_preadv(descriptor, views, offset)

        def pwrite(descriptor: int, view: memoryview, offset: int) -> int:
            if descriptor in self.descriptors:
                self._note("write", view, offset)
            return real_pwrite(descriptor, view, offset)

        for name, function in (("open", open_), ("close", close), ("preadv", preadv), ("pwrite", pwrite)):
            patch.setattr(os, name, function)

    def _note(self, what: str, view: memoryview, offset: int) -> None:
        if not view.nbytes:
            return
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        assert offset % ALIGN_BYTES == len(view) % ALIGN_BYTES == address % ALIGN_BYTES == 0, (what, offset, len(view))
        self.moved.append((what, offset, len(view)))


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Direct:
    return Direct(monkeypatch)


SLOW = r"""
import os, signal, sys, time
from reshard.cli import reshard
from reshard.progress import Progress
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
advance = Progress.advance
def slow(self, count):
    advance(self, count)
    os.write(1, b"moving\n")  # print would mix the lines of two threads
    time.sleep(0.02)
Progress.advance = slow
os.fsync = lambda descriptor: None
reshard.main(sys.argv[1:], prog_name="reshard")
"""


@pytest.fixture
def stop_in_mid_run() -> Callable[..., tuple[int, str]]:
    """Run `reshard` in another process, slowly, and send it signals when it moves bytes."""

    def run(
        arguments: Sequence[object], *signals: signal.Signals, then: Callable[[], None] | None = None
    ) -> tuple[int, str]:
        with subprocess.Popen(
            [sys.executable, "-c", SLOW, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for _ in range(3):
                assert process.stdout.readline() == "moving\n"
            if then is not None:
                then()
            for number in signals:
                process.send_signal(number)
            process.stdout.read()
            err = process.stderr.read()
        return process.returncode, err

    return run
