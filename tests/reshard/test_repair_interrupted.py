"""A repair that is stopped leaves each file as it was or whole, and another one ends what it began."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manifests.errors import ResourceError
from reshard import rebuild
from reshard.progress import Progress
from reshard.rebuild import Repaired
from reshard.repair import UnrepairedError, repair

EXPERT = "layers/2/experts/03.safetensors"
DENSE = "layers/1/dense.safetensors"
Tree = Callable[[Path], dict[str, str]]


def quiet(total_bytes: int, *, label: str) -> Progress:
    return Progress(total_bytes, label=label, quiet=True)


def mend(folder: Path, source: Path, jobs: int = 2) -> list[Repaired]:
    return repair(folder, source, jobs=jobs, progress=quiet)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.fixture(params=["shards", "copy"])
def source(request: pytest.FixtureRequest, v3_folder: Path, v3_resharded: Path) -> Path:
    return {"shards": v3_folder, "copy": v3_resharded}[request.param]


def test_what_an_interrupted_repair_left_is_replaced(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree
) -> None:
    for path in (EXPERT, "config.json", "source/headers/03.zst", "model.safetensors.index.json"):
        flip(resharded_copy / path, 5)
        (resharded_copy / f"{path}.partial").write_bytes(b"half" * 5000)
    mend(resharded_copy, source)
    assert tree(resharded_copy) == tree(v3_resharded)


@pytest.mark.parametrize("name", ["fsync", "rename", "pwrite"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failing_disk_leaves_what_was_there(
    resharded_copy: Path,
    v3_resharded: Path,
    source: Path,
    tree: Tree,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    number: int,
) -> None:
    """Each file is damaged as it was or repaired, and another repair ends what this one began."""
    for path in (EXPERT, DENSE, "config.json"):
        flip(resharded_copy / path, 5)
    damaged, good = tree(resharded_copy), tree(v3_resharded)
    real, calls = getattr(os, name), [0]
    if name == "fsync":
        # Every folder is made durable once before anything is looked at.
        calls[0] = -sum(1 for _ in os.walk(resharded_copy))

    def fail(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] >= number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(UnrepairedError, match="Input/output error"):
            mend(resharded_copy, source, jobs=1)
    after = tree(resharded_copy)
    assert after.keys() == damaged.keys()
    assert all(what in (damaged[path], good[path]) for path, what in after.items())
    mend(resharded_copy, source)
    assert tree(resharded_copy) == good


def repair_and_die(folder: Path, source: Path, point: int) -> bool:
    """Repair in another process, which ends without a word before the n-th call that changes something."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = [point]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            return real(*arguments, **options)

        return call

    for name in ("pwrite", "fsync", "rename", "unlink", "mkdir", "ftruncate"):
        setattr(os, name, counted(getattr(os, name)))
    with contextlib.suppress(BaseException):
        mend(folder, source, jobs=1)
        os._exit(0)
    os._exit(1)


def test_killed_anywhere(v2_folder: Path, tmp_path: Path, reshard_folder: Callable[..., Path], tree: Tree) -> None:
    """Each file is damaged as it was or whole, and another repair ends what this one began."""
    out = reshard_folder(v2_folder, tmp_path / "out")
    paths = ["layers/1/experts/2.safetensors", "config.json", "model.safetensors.index.json", "source/headers/3.zst"]
    good = tree(out)
    for path in paths:
        flip(out / path, 5)
    damaged = tree(out)
    states = set()
    point = 1
    while not repair_and_die(out, v2_folder, point):
        after = {path: what for path, what in tree(out).items() if not path.endswith(".partial")}
        assert all(what in (damaged[path], good[path]) for path, what in after.items())
        assert after.keys() == damaged.keys()
        whole = [path for path in paths if after[path] == good[path]]
        states.add(tuple(whole))
        for path in whole:
            flip(out / path, 5)
        point += 1
    assert point > 20
    assert states == {tuple(paths[:count]) for count in range(len(paths) + 1)}
    assert tree(out) == good


def test_nothing_is_begun_where_nothing_can_be_made_durable(
    resharded_copy: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier repair's last renames may be in memory only: what they show must not be taken for what is there."""
    flip(resharded_copy / EXPERT, 5)
    damaged = tree(resharded_copy)

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        mend(resharded_copy, source)
    assert tree(resharded_copy) == damaged


def test_a_full_disk_ends_it(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(resharded_copy / EXPERT, 5)
    damaged = tree(resharded_copy)

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(ResourceError, match="no space left"):
            mend(resharded_copy, source)
    assert tree(resharded_copy) == damaged


def test_too_little_room_is_found_before_anything_is_written(
    resharded_copy: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file takes its size; one that is replaced takes it only while both are there."""
    sizes = {path: (resharded_copy / path).stat().st_size for path in (EXPERT, DENSE, "model/embed.safetensors")}
    (resharded_copy / EXPERT).unlink()
    flip(resharded_copy / DENSE, 5)
    flip(resharded_copy / "model/embed.safetensors", 5)
    needed = sizes[EXPERT] + max(sizes[DENSE], sizes["model/embed.safetensors"])
    free = [needed - 1]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    damaged = tree(resharded_copy)
    with pytest.raises(ResourceError, match=f"needs {needed:,} bytes"):
        mend(resharded_copy, source, jobs=1)
    assert tree(resharded_copy) == damaged
    free[0] = needed
    assert len(mend(resharded_copy, source, jobs=1)) == 3


def test_ctrl_c_leaves_what_was_there(
    resharded_copy: Path, v3_resharded: Path, source: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(resharded_copy / EXPERT, 5)
    damaged = tree(resharded_copy)

    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "pump", interrupt)
        with pytest.raises(KeyboardInterrupt):
            mend(resharded_copy, source)
    assert tree(resharded_copy) == damaged
    mend(resharded_copy, source)
    assert tree(resharded_copy) == tree(v3_resharded)


def test_a_new_file_is_durable_before_it_takes_its_place(
    resharded_copy: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a crash could leave the name without the bytes, where both were before."""
    calls: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(("fsync", os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd))[1]
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", str(b))), rename(a, b))[1])
    shutil.rmtree(resharded_copy / "layers/2")
    mend(resharded_copy, source, jobs=1)
    path = resharded_copy / EXPERT
    at = calls.index(("rename", str(path)))
    assert calls[at - 1] == ("fsync", f"{path}.partial")
    folders = [path.parent, resharded_copy / "layers/2", resharded_copy / "layers", resharded_copy]
    assert calls[at + 1 : at + 5] == [("fsync", str(folder)) for folder in folders]
