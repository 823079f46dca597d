"""The output folder: one writer, and all that it left is taken away again, no more than that."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import LockedError, ResourceError, ToolkitError
from reshard.destination import (
    Hold,
    check_apart,
    check_empty,
    copy_file,
    empty_folder,
    hash_file,
    hold_folder,
    used_bytes,
    write_file,
)
from reshard.lock import lock_folder

Tree = Callable[[Path], dict[str, str]]


def fill(folder: Path) -> None:
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "file").write_text("x")
    (folder / "file.partial").write_text("x")
    (folder / "link").symlink_to("/etc")


@contextmanager
def owned(folder: Path) -> Iterator[Hold]:
    """As a command begins in an empty folder."""
    with hold_folder(folder) as hold:
        check_empty(folder)
        hold.own()
        yield hold


def fail_in(folder: Path, error: BaseException, before: Callable[[], Any] = lambda: None) -> None:
    with owned(folder):
        fill(folder)
        before()
        raise error


def test_success_keeps_everything(tmp_path: Path) -> None:
    with owned(tmp_path / "x" / "y"):
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


def test_what_is_not_ours_and_what_is_worth_keeping_stays(tmp_path: Path, tree: Tree) -> None:
    for name, say in (("never ours", lambda hold: None), ("kept", lambda hold: (hold.own(), hold.keep()))):
        with pytest.raises(RuntimeError), hold_folder(tmp_path / name) as hold:  # noqa: PT012
            say(hold)
            fill(tmp_path / name)
            raise RuntimeError
        assert tree(tmp_path / name).keys() == {"a", "a/b", "a/b/file", "file.partial", "link"}


def test_the_journal_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a folder that was emptied in part is still known for what it is."""
    for name in ("a", "reshard-journal.jsonl", "z", "m"):
        (tmp_path / name).touch()
    gone: list[str] = []
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        gone.append(path.name)
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    empty_folder(tmp_path)
    assert (sorted(gone[:-1]), gone[-1]) == (["a", "m", "z"], "reshard-journal.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_journal_stays_with_what_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the folder would be nobody's, and no command would go on from it."""
    (tmp_path / "layers").mkdir()
    (tmp_path / "reshard-journal.jsonl").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
    empty_folder(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"layers", "reshard-journal.jsonl"}


def test_folders_above_that_got_other_content_stay(tmp_path: Path, tree: Tree) -> None:
    with pytest.raises(RuntimeError):
        fail_in(tmp_path / "a" / "b" / "c", RuntimeError(), lambda: (tmp_path / "a" / "mine").write_text("mine"))
    assert tree(tmp_path).keys() == {"a", "a/mine"}


@pytest.mark.parametrize(("code", "cls"), [(errno.ENOSPC, ResourceError), (errno.EIO, ToolkitError)])
def test_what_the_system_says_becomes_a_sentence(tmp_path: Path, code: int, cls: type[ToolkitError]) -> None:
    with pytest.raises(ToolkitError, match=f"^{tmp_path}/out: ") as caught, owned(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is cls
    assert not (tmp_path / "out").exists()


def test_the_failure_is_told_and_not_that_of_the_cleaning_up(tmp_path: Path, fail_call: Callable[..., Any]) -> None:
    with pytest.raises(ToolkitError, match="the cause"):
        fail_in(tmp_path / "out", ToolkitError("the cause"), lambda: [fail_call("unlink", 1), fail_call("rmdir", 1)])


def test_the_second_writer_is_refused_and_takes_nothing(tmp_path: Path, tree: Tree) -> None:
    with owned(tmp_path / "out"):
        (tmp_path / "out" / "file").write_text("x")
        before = tree(tmp_path)
        with pytest.raises(LockedError, match="another process is writing"), owned(tmp_path / "out"):
            pytest.fail("two writers at once")
        assert tree(tmp_path) == before
    with pytest.raises(ToolkitError, match="is not empty"), owned(tmp_path / "out"):
        pytest.fail("wrote into what is full")
    assert tree(tmp_path) == before


def test_a_file_that_appears_before_the_lock_is_not_ours(tmp_path: Path) -> None:
    check_apart(tmp_path / "source", tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ToolkitError, match="is not empty"), owned(tmp_path / "out"):
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
    with owned(folder):
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
    with owned(tmp_path / "out"):
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        stop_twice(tmp_path / "other", [])
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler


def test_a_journal_that_never_got_its_name_is_as_good_as_nothing(tmp_path: Path) -> None:
    (tmp_path / "reshard-journal.jsonl.partial").write_bytes(b"torn")
    check_empty(tmp_path)
    for name in (".hidden", "reshard-journal.jsonl", "other.partial"):
        (tmp_path / name).touch()
        with pytest.raises(ToolkitError, match="neither a resharded checkpoint nor a run to continue"):
            check_empty(tmp_path)
        (tmp_path / name).unlink()


def test_used_bytes(tmp_path: Path) -> None:
    assert used_bytes(tmp_path / "nowhere", ["a"]) == 0
    write_file(tmp_path / "a" / "b", bytes(5000))
    write_file(tmp_path / "a" / "c.partial", bytes(3000))
    write_file(tmp_path / "somebody's", bytes(9000))
    (tmp_path / "holes").touch()
    os.truncate(tmp_path / "holes", 1 << 30)
    assert used_bytes(tmp_path, ["a", "a/b", "a/c", "holes", "no such"]) == 8000


def test_a_small_file_that_is_there_already_is_not_copied_again(tmp_path: Path) -> None:
    write_file(tmp_path / "a", b"content")
    first = copy_file(tmp_path / "a", tmp_path / "b")
    inode = (tmp_path / "b").stat().st_ino
    (tmp_path / "b.partial").write_bytes(b"left by a kill")
    assert copy_file(tmp_path / "a", tmp_path / "b") == first == (7, hash_file(tmp_path / "a"))
    assert (tmp_path / "b").stat().st_ino == inode
    for wrong in (b"contenT", b"conten", b""):
        (tmp_path / "b").write_bytes(wrong)
        assert copy_file(tmp_path / "a", tmp_path / "b") == first
        assert (tmp_path / "b").read_bytes() == b"content"


def test_small_files(tmp_path: Path, fail_call: Callable[..., Any]) -> None:
    write_file(tmp_path / "a" / "b", b"content")
    assert copy_file(tmp_path / "a" / "b", tmp_path / "c" / "d")[0] == 7
    assert (tmp_path / "c" / "d").read_bytes() == b"content"
    fail_call("fsync", 1)
    for write in (lambda: write_file(tmp_path / "e", b"x"), lambda: copy_file(tmp_path / "a" / "b", tmp_path / "f")):
        with pytest.raises(ToolkitError):
            write()
    assert sorted(os.listdir(tmp_path)) == ["a", "c"]
