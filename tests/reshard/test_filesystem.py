"""What a folder's file system is said to be and to do, here and on others that are played."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from manifests.errors import ResourceError, ToolkitError
from reshard import filesystem
from reshard.filesystem import (
    existing_folder,
    free_inodes,
    reads_directly,
    trial_folder,
    try_abilities,
    try_renaming,
    type_of,
)

FailCall = Callable[..., list[int]]

MOUNTS = """\
rootfs / rootfs rw 0 0
/dev/sda1 / ext4 rw 0 0
/dev/sdb1 /data xfs rw 0 0
server:/x /data/net nfs4 rw 0 0
/dev/sdc1 /data/a\\040b vfat rw 0 0
tmpfs /data/net tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/", "ext4"), ("/database", "ext4"), ("/data", "xfs"), ("/data/x/y", "xfs"), ("/data/net/z", "tmpfs"),
        ("/data/a b/c", "vfat"),
    ],
)  # fmt: skip
def test_the_type_is_that_of_the_deepest_mount(
    folder: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "mounts")
    assert type_of(Path(folder)) == kind


def test_a_system_that_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filesystem, "MOUNTS", tmp_path / "absent")
    assert type_of(tmp_path) is None


def test_a_path_that_is_not_there_yet(tmp_path: Path) -> None:
    assert existing_folder(tmp_path / "a" / "b") == tmp_path
    (tmp_path / "link").symlink_to(tmp_path / "real" / "deep")
    (tmp_path / "real").mkdir()
    assert existing_folder(tmp_path / "link" / "x") == tmp_path / "real"


def test_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def statvfs(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(f_files=total, f_favail=7)

    monkeypatch.setattr(os, "statvfs", statvfs)
    total = 10
    assert free_inodes(tmp_path / "absent") == 7
    total = 0
    assert free_inodes(tmp_path / "absent") is None  # how btrfs and others say that there is no limit
    assert asked == [tmp_path, tmp_path]


def test_a_trial_leaves_nothing(tmp_path: Path) -> None:
    with trial_folder(tmp_path) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []
    for failure, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "full"), ResourceError)):
        with pytest.raises(seen):
            use_and_fail(tmp_path, failure)
        assert list(tmp_path.iterdir()) == []


def test_no_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(ToolkitError, match="cannot be written: Permission denied"), trial_folder(tmp_path):
        pass


def test_renaming(tmp_path: Path) -> None:
    try_renaming(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("number", [1, 3])
def test_what_makes_files_durable_fails(tmp_path: Path, call: str, number: int, fail_call: FailCall) -> None:
    if (call, number) == ("rename", 3):
        number = 1
    fail_call(call, number)
    with pytest.raises(OSError, match="Input/output error"):
        try_renaming(tmp_path)


def test_a_rename_that_does_nothing_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", lambda *_: None)
    with pytest.raises(OSError, match="not in its new place"):
        try_renaming(tmp_path)


def test_what_this_file_system_can_do_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ability is lost when the system call behind it fails, and no other."""
    everything = try_abilities(make(tmp_path / "all"))
    if not all(getattr(everything, name) for name in everything.__slots__):
        pytest.skip("this file system cannot do everything")
    real_open, real_flock, real_write, real_read = os.open, fcntl.flock, os.pwrite, os.preadv

    def refuse(*_: Any) -> Any:
        raise OSError(errno.EINVAL, "Invalid argument")

    def no_direct(path: Any, flags: int, *more: Any) -> int:
        return refuse() if flags & os.O_DIRECT else real_open(path, flags, *more)

    lost: list[tuple[str, Any, str, Any, set[str]]] = [
        ("open", os, "open", no_direct, {"direct_write", "direct_read"}),
        ("read late", os, "preadv", refuse, {"direct_read"}),
        ("lock", fcntl, "flock", refuse, {"lock"}),
        ("punch", ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=lambda *_: -1), {"punch_hole"}),
        ("no such call", ctypes, "CDLL", lambda *_, **__: SimpleNamespace(), {"punch_hole"}),
        ("full size", os, "fstat", lambda _: SimpleNamespace(st_blocks=filesystem.SPARSE_BYTES // 512), {"sparse"}),
    ]
    for number, (what, place, name, fake, missing) in enumerate(lost):
        folder = make(tmp_path / str(number))
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fake)
            able = try_abilities(folder)
        assert {name for name in able.__slots__ if not getattr(able, name)} == missing, what
    assert (os.open, fcntl.flock, os.pwrite, os.preadv) == (real_open, real_flock, real_write, real_read)


def test_a_late_refusal_of_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def late(*arguments: Any) -> int:
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", late)
    assert not try_abilities(tmp_path).direct_write


def test_a_file_system_that_ignores_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: real(path.with_name(path.name.lower())))
    assert not try_abilities(tmp_path).tells_case


def test_looking_at_a_source_does_not_touch_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "shard"
    path.write_bytes(bytes(10_000))
    before = path.stat()
    reads_directly(path)
    monkeypatch.delattr(os, "O_DIRECT")
    assert not reads_directly(path)
    after = path.stat()
    assert (after.st_mtime_ns, after.st_ctime_ns, after.st_size) == (before.st_mtime_ns, before.st_ctime_ns, 10_000)
    assert not reads_directly(tmp_path / "absent")
    assert [entry.name for entry in tmp_path.iterdir()] == ["shard"]


def use_and_fail(parent: Path, failure: BaseException) -> None:
    with trial_folder(parent) as folder:
        (folder / "file").write_text("x")
        raise failure


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder
