"""The output folder: one writer, and all that it left is taken away again, no more than that."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import LockedError, ResourceError, ToolkitError
from reshard.destination import all_or_nothing, check_destination, copy_file, write_file
from reshard.lock import lock_folder

Tree = Callable[[Path], dict[str, str]]


def fill(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    (folder / "file.partial").write_text("x")
    (folder / "link").symlink_to("/etc")


def fail_in(folder: Path, error: BaseException, before: Callable[[], Any] = lambda: None) -> None:
    with all_or_nothing(folder):
        fill(folder)
        before()
        raise error


def test_success_keeps_everything(tmp_path: Path) -> None:
    with all_or_nothing(tmp_path / "x" / "y"):
        fill(tmp_path / "x" / "y")
    assert (tmp_path / "x" / "y" / "a" / "b" / "file").read_text() == "x"


@pytest.mark.parametrize("error", [ToolkitError("x"), RuntimeError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_failure_keeps_nothing(tmp_path: Path, error: BaseException, tree: Tree) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    before = tree(tmp_path)
    for name in ("empty", "link", "new", "new/deep/deeper"):
        with pytest.raises(type(error)):
            fail_in(tmp_path / name, error)
        assert tree(tmp_path) == before
    assert os.listdir("/etc")


def test_folders_above_that_got_other_content_stay(tmp_path: Path, tree: Tree) -> None:
    with pytest.raises(RuntimeError):
        fail_in(tmp_path / "a" / "b" / "c", RuntimeError(), lambda: (tmp_path / "a" / "mine").write_text("mine"))
    assert tree(tmp_path).keys() == {"a", "a/mine"}


@pytest.mark.parametrize(("code", "cls"), [(errno.ENOSPC, ResourceError), (errno.EIO, ToolkitError)])
def test_what_the_system_says_becomes_a_sentence(tmp_path: Path, code: int, cls: type[ToolkitError]) -> None:
    with pytest.raises(ToolkitError, match=f"^{tmp_path}/out: ") as caught, all_or_nothing(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is cls
    assert not (tmp_path / "out").exists()


def test_the_failure_is_told_and_not_that_of_the_cleaning_up(tmp_path: Path, fail_call: Callable[..., Any]) -> None:
    with pytest.raises(ToolkitError, match="the cause"):
        fail_in(tmp_path / "out", ToolkitError("the cause"), lambda: [fail_call("unlink", 1), fail_call("rmdir", 1)])


def test_the_second_writer_is_refused_and_takes_nothing(tmp_path: Path, tree: Tree) -> None:
    with all_or_nothing(tmp_path / "out"):
        (tmp_path / "out" / "file").write_text("x")
        before = tree(tmp_path)
        with pytest.raises(LockedError, match="another process is writing"), all_or_nothing(tmp_path / "out"):
            pytest.fail("two writers at once")
        with pytest.raises(LockedError):
            check_destination(tmp_path / "source", tmp_path / "out")
        assert tree(tmp_path) == before
    with pytest.raises(ToolkitError, match="is not empty"), all_or_nothing(tmp_path / "out"):
        pytest.fail("wrote into what is full")
    assert tree(tmp_path) == before


def test_a_file_that_appears_between_check_and_lock_is_not_ours(tmp_path: Path) -> None:
    check_destination(tmp_path / "source", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ToolkitError, match="is not empty"), all_or_nothing(tmp_path / "out"):
        pytest.fail("took over what someone else made")
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock_folder(tmp_path):
        raise RuntimeError
    with lock_folder(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_file_systems_without_locks_are_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> Callable[..., Any]:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        return flock

    for code in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
        monkeypatch.setattr(fcntl, "flock", refuse(code))
        with lock_folder(tmp_path):
            pass
    monkeypatch.setattr(fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), lock_folder(tmp_path):
        pytest.fail("went on")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stop_twice(folder: Path, waited: list[bool]) -> None:
    with all_or_nothing(folder):
        fill(folder)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            # What waits here for its workers must not be torn out of it, and what cleans up neither.
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            waited.append(True)


def test_one_interrupt_is_heard_and_the_next_ones_wait_for_the_cleaning_up(tmp_path: Path, handlers: None) -> None:
    waited: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        stop_twice(tmp_path / "out", waited)
    assert waited
    assert not (tmp_path / "out").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_a_signal_that_was_ignored_stays_ignored(tmp_path: Path, handlers: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with all_or_nothing(tmp_path / "out"):
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        stop_twice(tmp_path / "other", [])
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_small_files(tmp_path: Path, fail_call: Callable[..., Any]) -> None:
    write_file(tmp_path / "a" / "b", b"content")
    assert copy_file(tmp_path / "a" / "b", tmp_path / "c" / "d")[0] == 7
    assert (tmp_path / "c" / "d").read_bytes() == b"content"
    fail_call("fsync", 1)
    for write in (lambda: write_file(tmp_path / "e", b"x"), lambda: copy_file(tmp_path / "a" / "b", tmp_path / "f")):
        with pytest.raises(ToolkitError):
            write()
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
